"""Task experiments: side by side as one by one, replayed as read, records that resume, data that are not there."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from test_tasks import Letters, data, sample, task, tiny  # noqa: F401  (fixtures)
from transformers import PreTrainedModel

import kvrepro
from kvrepro.experiments import tasks as harness
from kvrepro.experiments.common import Bench
from kvrepro.ledger import read_claims
from kvrepro.tasks import batch, intervals, longbench, summary
from kvrepro.tasks.base import Task
from kvrepro.tasks.batch import Prompts, score_references, write_answers
from kvrepro.tasks.run import log_likelihood, write

TEXT = "The city of {} lies at the sea, and {} people live there. How many? "
BENCH = Bench("across", "toy")


@pytest.fixture
def toy() -> Task:
    """Samples of three lengths, two of each, with answers of different lengths."""
    names = ("Oslo", "Rome", "Lisbon", "Dublin", "Paris", "Tokyo")
    samples = [
        sample(TEXT.format(name, 11 * place), id=name, answers=("7" * (1 + place),), max_new_tokens=5)
        for place, name in enumerate(names, 1)
    ]
    return task(*samples)


@pytest.mark.filterwarnings(
    "ignore:asymkv. no loss gradient"
)  # while writing: there is no chunk whose loss it could be
@pytest.mark.parametrize("chunk", [None, 16])
@pytest.mark.parametrize("method", ["full", "h2o", "cam", "weightedkv", "kvmerger", "kvslimmer", "asymkv"])
def test_side_by_side_is_as_one_by_one(tiny: PreTrainedModel, toy: Task, method: str, chunk: int | None) -> None:  # noqa: F811
    new_cache = partial(kvrepro.make_cache, tiny, method, **({} if method == "full" else {"budget": 0.5}))
    found = score_references(Prompts(BENCH, toy), new_cache, chunk)
    written = write_answers(Prompts(BENCH, toy), new_cache, chunk)
    letters = Letters()
    for each, scored, (text, _) in zip(toy.samples, found, written, strict=True):
        prompt = torch.tensor([letters(each.prompt).input_ids])
        answer = torch.tensor([letters(each.reference).input_ids[: each.max_new_tokens]])
        with torch.no_grad():
            alone = log_likelihood(tiny, prompt, answer, new_cache(), chunk)
        assert scored.loglik == pytest.approx(alone, abs=1e-4)
        assert scored.tokens == prompt.shape[1]
        assert text == letters.decode(write(tiny, prompt, new_cache(), 5, [], chunk))
        if method in ("h2o", "weightedkv", "kvslimmer"):
            assert scored.slots == -(-prompt.shape[1] // 2)


def test_heads_that_fell_back_are_counted_a_sample(tiny: PreTrainedModel, toy: Task) -> None:  # noqa: F811
    """Side by side as one by one; only for methods that count them."""
    for method, counted in (("attention_matching", True), ("h2o", False)):
        new_cache = partial(kvrepro.make_cache, tiny, method, budget=0.5)
        value = harness._loglik(Prompts(BENCH, toy), new_cache, None)
        alone = harness._loglik(Prompts(BENCH, toy, rows=1), new_cache, None)
        assert ("fallbacks" in value.extra) == counted
        assert value.extra.get("fallbacks") == alone.extra.get("fallbacks")
        assert not counted or len(value.extra["fallbacks"]) == len(toy.samples)


def test_what_is_read_again_for_lack_of_memory_gives_the_same(
    tiny: PreTrainedModel,  # noqa: F811
    toy: Task,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    new_cache = partial(kvrepro.make_cache, tiny, "kvmerger", budget=0.5)
    kept = score_references(Prompts(BENCH, toy), new_cache)
    assert all(group.passes for group in batch._readings(Prompts(BENCH, toy)))
    monkeypatch.setattr(batch, "free_bytes", lambda device: 0)
    prompts = Prompts(BENCH, toy, rows=1)
    assert not any(group.passes for group in batch._readings(prompts))
    again = score_references(prompts, new_cache)
    assert [each.loglik for each in again] == pytest.approx([each.loglik for each in kept], abs=1e-4)


def test_exact_is_what_greedy_decoding_writes(tiny: PreTrainedModel, toy: Task) -> None:  # noqa: F811
    full = partial(kvrepro.make_cache, tiny, "full")
    asked = replace(toy, samples=tuple(replace(each, prompt=f"{each.prompt} ") for each in toy.samples))
    texts = [text for text, _ in write_answers(Prompts(BENCH, asked), full)]
    right = [replace(each, answers=(text[:3],)) for each, text in zip(asked.samples, texts, strict=True)]
    found = score_references(Prompts(BENCH, replace(asked, samples=tuple(right))), full)
    assert [each.exact for each in found] == [True] * 6
    assert not any(each.exact for each in score_references(Prompts(BENCH, asked), full))


def test_longbench_records(data: Path, tiny: PreTrainedModel) -> None:  # noqa: F811
    ask = partial(harness.longbench, ["qasper", "zeroscrolls/qmsum"], ["full", "h2o"], [0.5, 0.25], max_length=200)
    records = ask(samples=2)
    assert [record.status for record in records] == ["ok"] * 6
    first = records[1]
    assert (first.cell.paper, first.cell.experiment, first.cell.metric) == ("across", "longbench", "log-likelihood")
    assert first.cell.data_sha256 == longbench.load("qasper", 2).sha256 and first.cell.params["measure"] == "loglik"
    assert {"ids", "documents", "files", "loglik", "exact", "tokens", "slots"} == set(first.value.extra)
    assert records[0].cell.budget is None and {records[1].cell.budget, records[2].cell.budget} == {0.5, 0.25}
    assert [record.key for record in ask(samples=2)] == [record.key for record in records]
    scores = harness.longbench("qasper", "h2o", 0.5, measure="score", samples=2, max_length=200)
    assert scores[0].value.extra["scores"] and scores[0].cell.metric == "qa_f1"
    chunked = harness.longbench("qasper", "kvslimmer", 40, samples=1, max_length=60, chunk=16)
    assert chunked[0].status == "ok" and chunked[0].cell.params["chunk"] == 16


def test_data_that_are_not_there_are_skipped_and_damaged_ones_are_an_error(
    data: Path,  # noqa: F811
    tiny: PreTrainedModel,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (data / "longbench_mini/qasper.jsonl").write_text("{")
    (data / "longbench_mini/lcc.jsonl").unlink()
    (data / "longbench_mini/musique.jsonl").write_text("")
    damaged, gone, empty, fine = harness.longbench(["qasper", "lcc", "musique", "trec"], "full", 0.5, max_length=60)
    assert damaged.status == "error" and "qasper.jsonl is damaged: line 1 is no JSON" in damaged.reason
    assert gone.status == "skipped" and gone.reason.startswith("KVREPRO_DATA_DIR/longbench_mini/lcc.jsonl is missing")
    assert (empty.status, empty.reason) == ("skipped", "longbench_mini/musique has no samples")
    assert fine.status == "ok" and str(data) not in damaged.reason + gone.reason
    monkeypatch.delenv("KVREPRO_DATA_DIR")
    monkeypatch.setattr(Bench, "load", lambda self: pytest.fail("the model was loaded"))
    (none,) = harness.longbench("qasper", "full", 0.5)
    assert none.status == "skipped" and "KVREPRO_DATA_DIR names, which is not set" in none.reason


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"tasks": "quasper"}, "longbench has no task 'quasper'"),
        ({"methods": "h3o"}, "unknown method 'h3o'"),
        ({"measure": "f1"}, "measure='f1' is not valid; choose among loglik, score"),
        ({"max_length": 1}, "max_length=1 2 or more"),
        ({"methods": "weightedkv", "budget": 3}, "sinks"),
        ({"tasks": "zeroscrolls/qasper"}, "zeroscrolls has no task 'qasper'"),
    ],
)
def test_bad_requests(given: dict[str, Any], message: str) -> None:
    asked = {"tasks": "qasper", "methods": "h2o", "budget": 0.5, **given}
    with pytest.raises(ValueError, match=message):
        harness.longbench(**asked)


def test_retrieval_needs_no_data(tiny: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setattr(harness, "_tokenizer", lambda name: Letters())
    tasks = ["niah_single", "variable_tracking", "madlibs1"]
    records = harness.retrieval(tasks, ["full", "tova"], 0.5, length=900, samples=2)
    assert [record.status for record in records] == ["ok", "ok", "ok", "ok", "skipped", "skipped"]
    assert all(
        found < whole
        for whole, found in [(r.value.extra["tokens"][0], r.value.extra["slots"][0]) for r in records[1:2]]
    )
    with pytest.raises(ValueError, match="no room"):
        harness.retrieval("niah_single", "full", 0.5, length=20)


def test_averages_and_differences(data: Path, tiny: PreTrainedModel) -> None:  # noqa: F811
    records = harness.longbench(["qasper", "trec"], ["full", "h2o", "cam"], 0.5, max_length=60)
    means, cost = summary.averages(records), summary.differences(records)
    assert list(means.label) == ["full", "h2o", "cam"] and set(cost.label) == {"h2o", "cam"}
    whole = means.set_index("label")["mean"]
    assert cost.set_index("label")["mean"]["h2o"] == pytest.approx(whole["h2o"] - whole["full"])
    assert list(cost.tasks) == [2, 2] and list(cost.n) == [6, 6]
    single = summary.by_task(records, "h2o")
    assert len(single) == 2 and set(single.label) == {"cam"}  # the full cache has no budget to be compared at
    assert set(summary.apart(single)) <= {-1, 0, 1}
    assert summary.in_words(cost.iloc[0], 3).count("[") == 1
    assert len(summary.differences(records, "asymkv")) == 0


def test_mean_over_tasks() -> None:
    one, two = ([1.0, 1.0], ["a", "b"]), ([3.0, 3.0, 3.0], ["a", "b", "c"])
    assert intervals.macro([one, two]) == intervals.Interval(2.0, 2.0, 2.0)  # tasks, not samples, count alike
    spread = intervals.macro([([0.0, 2.0] * 8, list("abcdefghijklmnop")), one])
    assert spread.low is not None and spread.high is not None and 0.5 < spread.low < 1.0 < spread.high < 1.5
    assert intervals.macro([([1.0], ["a"]), ([2.0], ["b"])]) == intervals.Interval(1.5, None, None)
    with pytest.raises(ValueError, match="at least one task"):
        intervals.macro([])


def test_claims_ask_for_what_the_gpu_profile_measures() -> None:
    """Labels and tasks of the ledger's rules are those of the notebook: a misspelling would pass as not run."""
    from book_project import ROOT

    from kvrepro.book import Project

    notebook = next(each for each in Project(ROOT).notebooks() if each.name == "across/longbench")
    given = notebook.parameters("gpu")
    for claim in read_claims():
        if claim.rule.get("name") != "tasks":
            continue
        where = claim.rule["where"]
        names = given["chunked"] if where["chunk"] else given["methods"] if where["budget"] == 0.5 else given["tight"]
        assert {claim.rule["of"], *claim.rule["against"]} <= {*names, "full"}, claim.id
        assert where["chunk"] in (None, given["chunk"])
        asked = {
            f"zeroscrolls/{name}" if where["experiment"] == "zeroscrolls" else name for name in claim.rule["tasks"]
        }
        assert asked <= set(given["tasks"]), claim.id


def test_measuring_needs_no_notebook_packages(tmp_path: Path) -> None:
    script = (
        "import sys, json; from kvrepro.experiments import tasks\n"
        "print(json.dumps([n for n in ('pandas', 'IPython', 'papermill', 'datasets', 'seaborn') if n in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert json.loads(done.stdout) == []
