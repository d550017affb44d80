"""SynthWiki (Peysakhovich and Lerer, 2023): a question about one invented biography among many others.

From adamlerer/synthwiki: the files, the wording of the prompt, other biographies in random order up to a number of
tokens, one of them replaced by the right one at a random place, 36 tokens to write, and the metric. Ours: seeds (the
official draws have none), and the chat template of the tokenizer where the official prompts write a model's own.
"""

from __future__ import annotations

import csv
import functools
import io
import random
from collections.abc import Callable, Sequence

from transformers import PreTrainedTokenizerBase

from kvrepro.tasks.base import Sample, Task, check_count, damaged, pick, read_file, token_ids

SUITE = "synthwiki"
NAMES = ("madlibs1", "madlibs2")
_COLUMNS = ("context", "question", "answer")
_WHAT = "a CSV file with the columns context, question and answer"
_PROMPT = (
    "Here is some information you will use to answer a question. Some of the information may be irrelevant.\n\n"
    "### Information\n{documents}\n\n### Question\n{question}\n\n"
    "Please return only the answer to the question. Answer concisely.\n"
)
_MAX_NEW_TOKENS = 36


def load(name: str, tokenizer: PreTrainedTokenizerBase, length: int, samples: int | None = None, seed: int = 0) -> Task:
    """A task from the data folder.

    Args:
        name: one of `NAMES`.
        tokenizer: the model's, which counts the tokens.
        length: tokens of all biographies together, at most; the paper's are 1,000, 16,000 and 30,000.
        samples: questions, drawn at random; None takes all.
        seed: of the draws.

    Raises:
        ValueError: an unknown task, a missing or damaged file (names it and what it should be), or too small a length.
    """
    pick(NAMES, name, SUITE)
    check_count(samples)
    relative = f"synthwiki/{name}.csv"
    rows, sha256 = _rows(relative)
    order = random.Random(seed).sample(range(len(rows)), len(rows))[:samples]
    contexts = sorted({context for context, _, _ in rows})
    size = functools.cache(lambda text: len(token_ids(tokenizer, text, special=False)))
    chosen = []
    for index in order:
        context, question, answer = rows[index]
        draw = random.Random(f"{seed}-{index}")
        others = draw.sample([each for each in contexts if each != context], len(contexts) - 1)
        documents = _filled(others, length, size)
        place = draw.randrange(len(documents))
        documents[place] = context
        text = "".join(f"DOCUMENT: {document}\n\n" for document in documents)
        prompt = _PROMPT.format(documents=text, question=question)
        chosen.append(
            Sample(
                str(index), prompt, tuple(answer.split(" | ")), _MAX_NEW_TOKENS, document=str(contexts.index(context))
            )
        )
    return Task(SUITE, name, "contains", f"synthwiki/{name}", {relative: sha256}, tuple(chosen))


def _rows(relative: str) -> tuple[list[tuple[str, str, str]], str]:
    """Context, question and answer of each row, and the file's sha256."""
    text, sha256 = read_file(relative, _WHAT)
    reader = csv.DictReader(io.StringIO(text, newline=""))
    if not set(_COLUMNS) <= set(reader.fieldnames or ()):
        raise damaged(relative, f"its columns are {reader.fieldnames}", _WHAT)
    rows = []
    for row in reader:
        cells = tuple(row[column] or "" for column in _COLUMNS)
        if not all(cells):
            raise damaged(relative, f"line {reader.line_num} lacks a column", _WHAT)
        rows.append(cells)
    return rows, sha256


def _filled(others: Sequence[str], length: int, size: Callable[[str], int]) -> list[str]:
    """The first of the documents that together have no more than `length` tokens."""
    chosen: list[str] = []
    left = length
    for document in others:
        left -= size(document)
        if left < 0:
            break
        chosen.append(document)
    if not chosen:
        raise ValueError(f"length={length} has no room for one biography of about {size(others[0])} tokens")
    return chosen
