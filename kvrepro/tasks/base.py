"""What a task is, how its prompt reaches the model, and how its files are read and checked."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from kvrepro.texts import DATA_VARIABLE

#: Lists the sha256 of the folder's files, where there is one: ``| file | bytes | sha256 |``.
MANIFEST = "MANIFEST.md"
_MANIFEST_ROW = re.compile(r"^\|\s*(\S+)\s*\|\s*(\d+)\s*\|\s*([0-9a-f]{64})\s*\|\s*$", re.MULTILINE)


class MissingData(ValueError):
    """The data folder or a file in it is not there; the message says what should be. Damage is another error."""


@dataclass(frozen=True)
class Sample:
    """One prompt with its reference answers.

    Attributes:
        id: unique within the task.
        prompt: what the model is asked, before any chat template.
        answers: reference answers.
        max_new_tokens: tokens to write at most.
        all_classes: names of all classes; classification only.
        document: what the prompt is about: intervals are over documents, whose samples are not independent.
        lead: beginning of the answer, given to the model.
        target: text whose log-likelihood is measured; the first answer where it is empty.
        query_at: index in `prompt` of what a cut must keep, and before which it cuts; None cuts in the middle.
        separator: what a cut before `query_at` leaves behind.
    """

    id: str
    prompt: str
    answers: tuple[str, ...]
    max_new_tokens: int
    all_classes: tuple[str, ...] = ()
    document: str = ""
    lead: str = ""
    target: str = ""
    query_at: int | None = None
    separator: str = ""

    @property
    def reference(self) -> str:
        """The text whose log-likelihood is measured."""
        return self.target or self.answers[0]


@dataclass(frozen=True)
class Task:
    """A task with its samples.

    Attributes:
        suite: what it belongs to, such as ``"longbench"``.
        name: its name there.
        metric: a name in ``kvrepro.tasks.metrics.METRICS``.
        data: where the samples come from, for records.
        files: sha256 of each file behind them, by its path in the data folder; empty where they are generated.
        samples: the samples; empty where the file has none.
        chat: whether the prompt goes into the chat template of a model that has one.
        first_line: whether only the first line of what was written is scored.
        stop_at_newline: whether a newline ends the answer; then it never begins with an end.
    """

    suite: str
    name: str
    metric: str
    data: str
    files: Mapping[str, str]
    samples: tuple[Sample, ...]
    chat: bool = True
    first_line: bool = False
    stop_at_newline: bool = False

    @functools.cached_property
    def sha256(self) -> str:
        """The sha256 of all that a result depends on: files, samples, and how they are asked and scored."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()


def pick(names: Sequence[str], name: str, suite: str) -> str:
    """The name, if the suite has it.

    Raises:
        ValueError: it has not; lists the names.
    """
    if name not in names:
        raise ValueError(f"{suite} has no task {name!r}; tasks are {', '.join(names)}")
    return name


# --- prompts


def render(tokenizer: PreTrainedTokenizerBase, task: Task, sample: Sample, max_length: int | None = None) -> str:
    """The text that the model reads: the prompt, cut to length, in the chat template, and the answer's beginning.

    Args:
        tokenizer: the model's.
        task: says whether the chat template is used; a tokenizer without one leaves the prompt as it is.
        sample: the sample.
        max_length: tokens of the prompt at most, before the template; None cuts nothing.
    """
    prompt = sample.prompt if max_length is None else cut(tokenizer, sample, max_length)
    if uses_chat(tokenizer, task):
        message = [{"role": "user", "content": prompt}]
        prompt = str(tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True))
    return prompt + sample.lead


def uses_chat(tokenizer: PreTrainedTokenizerBase, task: Task) -> bool:
    """Whether the task's prompts go into the tokenizer's chat template."""
    return task.chat and getattr(tokenizer, "chat_template", None) is not None


def cut(tokenizer: PreTrainedTokenizerBase, sample: Sample, max_length: int) -> str:
    """The prompt cut to about `max_length` tokens.

    In the middle, as LongBench does: the first and the last half of the tokens are kept, each decoded by itself. Or,
    as ZeroSCROLLS does, at the end of the document: what comes from `query_at` on is kept, after the separator.

    Raises:
        ValueError: what must be kept leaves no room for the document.
    """
    ids = token_ids(tokenizer, sample.prompt)
    if len(ids) <= max_length:
        return sample.prompt
    if sample.query_at is None:
        half = max(1, max_length // 2)
        return _decode(tokenizer, ids[:half]) + _decode(tokenizer, ids[-half:])
    kept = sample.separator + sample.prompt[sample.query_at :]
    room = max_length - len(token_ids(tokenizer, kept, special=False))
    if room < 1:
        raise ValueError(f"max_length={max_length} leaves no room: the query alone has {max_length - room} tokens")
    return _decode(tokenizer, token_ids(tokenizer, sample.prompt[: sample.query_at])[:room]) + kept


def token_ids(tokenizer: PreTrainedTokenizerBase, text: str, *, special: bool = True) -> list[int]:
    """Token ids of a text of any length, with or without the special tokens that a tokenizer adds."""
    return list(tokenizer(text, add_special_tokens=special, verbose=False).input_ids)


def _decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True))


def encode(tokenizer: PreTrainedTokenizerBase, task: Task, text: str) -> Tensor:
    """Token ids `[1, n]` of a rendered prompt; a chat template writes its own special tokens."""
    ids = token_ids(tokenizer, text, special=not uses_chat(tokenizer, task))
    return torch.tensor([ids], dtype=torch.long)


def encode_reference(tokenizer: PreTrainedTokenizerBase, text: str, sample: Sample) -> Tensor:
    """Token ids `[1, a]` of the reference answer, after a space unless the prompt `text` ends in white space.

    Raises:
        ValueError: the reference answer has no tokens.
    """
    space = "" if not text or text[-1].isspace() or sample.reference[:1].isspace() else " "
    ids = token_ids(tokenizer, space + sample.reference, special=False)
    if not ids:
        raise ValueError(f"sample {sample.id}: the reference answer is empty")
    return torch.tensor([ids], dtype=torch.long)


# --- files


def folder(what: str) -> Path:
    """The data folder.

    Args:
        what: what is read from it, for the message.

    Raises:
        MissingData: the variable is not set.
    """
    named = os.environ.get(DATA_VARIABLE)
    if not named:
        raise MissingData(f"{what} is read from the folder that the variable {DATA_VARIABLE} names, which is not set")
    return Path(named).expanduser()


def read_file(relative: str, what: str) -> tuple[str, str]:
    """Text and sha256 of a file of the data folder.

    Args:
        relative: its path in the folder.
        what: what the file should be, for messages: "one JSON object a line with …".

    Raises:
        MissingData: the file is missing.
        ValueError: it is not the one that the folder's MANIFEST.md lists, or is no UTF-8 text.
    """
    root = folder(relative)
    path = root / relative
    if not path.is_file():
        raise MissingData(f"{path} is missing; it should be {what}")
    data = path.read_bytes()
    sha256 = hashlib.sha256(data).hexdigest()
    listed = _listed(root).get(relative)
    if listed is not None and listed != (len(data), sha256):
        found = f"{len(data)} bytes with sha256 {sha256}"
        raise damaged(relative, f"{found}, but {MANIFEST} says {listed[0]} bytes with sha256 {listed[1]}", what)
    try:
        return data.decode(), sha256
    except UnicodeDecodeError as error:
        raise damaged(relative, f"byte {error.start} is not UTF-8", what) from error


def damaged(relative: str, why: str, what: str) -> ValueError:
    """The error for a file of the data folder that is there but not `what` it should be."""
    return ValueError(f"{folder(relative) / relative} is damaged: {why}; it should be {what}")


def _listed(root: Path) -> dict[str, tuple[int, str]]:
    """Bytes and sha256 of each file in the folder's manifest; empty where there is none."""
    path = root / MANIFEST
    rows = _MANIFEST_ROW.findall(path.read_text(encoding="utf-8")) if path.is_file() else []
    return {name: (int(size), sha256) for name, size, sha256 in rows}


def read_jsonl(relative: str, columns: Mapping[str, type]) -> tuple[list[dict[str, Any]], str]:
    """Rows and sha256 of a file with one JSON object a line.

    Args:
        relative: the file's path in the data folder.
        columns: what each row must have, and of which type.

    Raises:
        ValueError: the file is missing or damaged; names the file, the line, and what it should be.
    """
    what = f"one JSON object a line with {_described(columns)}"
    text, sha256 = read_file(relative, what)
    lines = text.split("\n")  # splitlines would also cut at separators inside a string
    return [_row(relative, i, line, columns, what) for i, line in enumerate(lines, 1) if line.strip()], sha256


def _row(relative: str, number: int, line: str, columns: Mapping[str, type], what: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise damaged(relative, f"line {number} is no JSON ({error.msg} at character {error.pos})", what) from error
    bad = [name for name, kind in columns.items() if not isinstance(row, dict) or not isinstance(row.get(name), kind)]
    if bad:
        raise damaged(relative, f"line {number} lacks {_described({name: columns[name] for name in bad})}", what)
    return row


def _described(columns: Mapping[str, type]) -> str:
    kinds = {str: "a string", list: "a list"}
    return ", ".join(f"{name} ({kinds[kind]})" for name, kind in columns.items())


def read_entry(relative: str, name: str, kind: type) -> tuple[Any, str]:
    """A task's entry in a file with one JSON object, and the file's sha256.

    Args:
        relative: the file's path in the data folder.
        name: of the task.
        kind: type of the entry.

    Raises:
        ValueError: the file is missing or damaged; names it and what it should be.
    """
    what = f"one JSON object from a task's name to {'its prompt' if kind is str else 'a whole number of tokens'}"
    text, sha256 = read_file(relative, what)
    try:
        table = json.loads(text)
    except json.JSONDecodeError as error:
        raise damaged(relative, f"no JSON ({error.msg} at character {error.pos})", what) from error
    if not isinstance(table, dict) or not isinstance(table.get(name), kind):
        raise damaged(relative, f"no such entry for {name}", what)
    return table[name], sha256


def check_count(samples: int | None) -> None:
    """Refuse a number of samples below 1.

    Raises:
        ValueError: it is.
    """
    if samples is not None and samples < 1:
        raise ValueError(f"samples={samples} must be 1 or more")
