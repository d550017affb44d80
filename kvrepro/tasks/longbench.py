"""LongBench (Bai et al., 2024): its 16 English tasks with the official prompts, lengths, cuts, stops and metrics.

From THUDM/LongBench: prompts and output lengths are read from its two configuration files; metrics, first lines,
newline stop and the tasks without a chat template are as in its ``pred.py`` and ``eval.py``. Ours: the chat template
is the tokenizer's own, where the official code writes one for each model it knows.
"""

from __future__ import annotations

from typing import Any

from kvrepro.tasks.base import Sample, Task, check_count, damaged, folder, pick, read_entry, read_jsonl

SUITE = "longbench"
#: Metric of each task.
METRIC = {
    "narrativeqa": "qa_f1",
    "qasper": "qa_f1",
    "multifieldqa_en": "qa_f1",
    "hotpotqa": "qa_f1",
    "2wikimqa": "qa_f1",
    "musique": "qa_f1",
    "gov_report": "rouge_l",
    "qmsum": "rouge_l",
    "multi_news": "rouge_l",
    "trec": "classification",
    "triviaqa": "qa_f1",
    "samsum": "rouge_l",
    "passage_count": "count",
    "passage_retrieval_en": "retrieval",
    "lcc": "code_similarity",
    "repobench-p": "code_similarity",
}
NAMES = tuple(METRIC)
#: Few-shot and code tasks, whose prompts are no request: no chat template.
PLAIN = frozenset({"trec", "triviaqa", "samsum", "lcc", "repobench-p"})
FIRST_LINE = frozenset({"trec", "triviaqa", "samsum"})
#: Folders that are looked for, the whole benchmark before the small one.
FOLDERS = ("longbench", "longbench_mini")
_COLUMNS = {"input": str, "context": str, "answers": list}


def load(name: str, samples: int | None = None) -> Task:
    """A task from the data folder.

    Args:
        name: one of `NAMES`.
        samples: the first samples only; None takes all.

    Raises:
        ValueError: an unknown task, or a missing or damaged file; names the file and what it should be.
    """
    pick(NAMES, name, SUITE)
    check_count(samples)
    place = next((each for each in FOLDERS if (folder(f"{SUITE} {name}") / each).is_dir()), FOLDERS[-1])
    files = [f"{place}/config/dataset2prompt.json", f"{place}/config/dataset2maxlen.json", f"{place}/{name}.jsonl"]
    prompt, prompt_sum = read_entry(files[0], name, str)
    length, length_sum = read_entry(files[1], name, int)
    try:
        prompt.format(context="", input="")
    except (LookupError, ValueError) as error:
        raise damaged(
            files[0], f"the prompt of {name} asks for {error}", "prompts with {context} and {input}"
        ) from error
    rows, rows_sum = read_jsonl(files[2], {**_COLUMNS, **({"all_classes": list} if name == "trec" else {})})
    return Task(
        suite=SUITE,
        name=name,
        metric=METRIC[name],
        data=f"{place}/{name}",
        files=dict(zip(files, [prompt_sum, length_sum, rows_sum], strict=True)),
        samples=tuple(_sample(files[2], i, row, prompt, length) for i, row in enumerate(rows[:samples])),
        chat=name not in PLAIN,
        first_line=name in FIRST_LINE,
        stop_at_newline=name == "samsum",
    )


def _sample(relative: str, index: int, row: dict[str, Any], prompt: str, length: int) -> Sample:
    answers = tuple(str(answer) for answer in row["answers"] if answer)
    if not answers:
        raise damaged(relative, f"sample {index + 1} has no answer", "one JSON object a line, each with an answer")
    return Sample(
        id=str(row.get("_id", index)),
        prompt=prompt.format(context=row["context"], input=row["input"]),
        answers=answers,
        max_new_tokens=length,
        all_classes=tuple(row.get("all_classes") or ()),
        document=str(row.get("_id", index)),
    )
