"""ZeroSCROLLS (Shaham et al., 2023): QMSum, the one of its tasks whose source has public answers here.

ZeroSCROLLS keeps its own answers private, so its numbers cannot be remade. These are the 281 queries of QMSum's own
test set, from which its task is made. Second-hand, from copies of the prompt and of the paper's figure: the
instruction, the headings, the note that a cut leaves, and the metric. From tau-nlp/zero_scrolls: the cut, at the end of
the transcript, and 1,024 tokens to write. Ours: a turn is a line "speaker: words", nothing is cleaned, and queries come
from all meetings in turn.
"""

from __future__ import annotations

from typing import Any

from kvrepro.tasks.base import Sample, Task, check_count, damaged, pick, read_jsonl

SUITE = "zeroscrolls"
NAMES = ("qmsum",)
FILE = "zeroscrolls_src/qmsum_test.jsonl"
_COLUMNS = {"general_query_list": list, "specific_query_list": list, "meeting_transcripts": list}
_INSTRUCTION = (
    "You are given a meeting transcript and a query containing a question or instruction. Answer the query in one or "
    "more sentences.\n\nTranscript:\n"
)
_QUERY = "Query:\n{query}\n\nAnswer:\n"
_SEPARATOR = "... [The rest of the transcript is omitted]\n\n"
_MAX_NEW_TOKENS = 1024


def load(name: str = "qmsum", samples: int | None = None) -> Task:
    """A task from the data folder.

    Args:
        name: one of `NAMES`.
        samples: the first samples only; None takes all.

    Raises:
        ValueError: an unknown task, or a missing or damaged file; names the file and what it should be.
    """
    pick(NAMES, name, SUITE)
    check_count(samples)
    rows, sha256 = read_jsonl(FILE, _COLUMNS)
    try:
        meetings = [_meeting(i, row) for i, row in enumerate(rows)]
    except (KeyError, TypeError) as error:
        raise damaged(
            FILE, f"lacks {error}", "QMSum's: queries with query and answer, turns with speaker and content"
        ) from error
    longest = max((len(each) for each in meetings), default=0)
    chosen = [each[i] for i in range(longest) for each in meetings if i < len(each)][:samples]
    return Task(SUITE, name, "rouge_geometric", FILE.removesuffix(".jsonl"), {FILE: sha256}, tuple(chosen))


def _meeting(index: int, row: dict[str, Any]) -> list[Sample]:
    """One sample a query, the general ones first."""
    turns = "\n".join(f"{turn['speaker']}: {turn['content']}" for turn in row["meeting_transcripts"])
    context = f"{_INSTRUCTION}{turns}\n\n"
    return [
        Sample(
            id=f"{index}-{place}",
            prompt=context + _QUERY.format(query=query["query"]),
            answers=(query["answer"],),
            max_new_tokens=_MAX_NEW_TOKENS,
            document=str(index),
            query_at=len(context),
            separator=_SEPARATOR,
        )
        for place, query in enumerate([*row["general_query_list"], *row["specific_query_list"]])
    ]
