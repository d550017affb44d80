"""The timings at toy size: every piece gives records with floors, failures stay where they are, targets go by rule."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from benchmarks import __main__ as benchmarks
from kvrepro import models
from kvrepro.experiments import speed, targets, task_runtimes
from kvrepro.experiments.common import Variant
from kvrepro.experiments.memory import peak_bytes
from kvrepro.records import Cell, Record, Store, Value
from kvrepro.tasks import longbench

TOY = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": True,
}
PLAN: benchmarks.Plan = {
    "kvpress": [{"lengths": 32, "presses": "snapkv", "repeats": 1, "steps": 2}],
    "prefill": [{"lengths": 32, "methods": ["full", "h2o", "kvmerger"], "repeats": 2}],
    "long": [{"lengths": 48, "methods": "weightedkv", "chunk": 16, "repeats": 1}],
    "pairs": [{"lengths": 48, "methods": ["kvslimmer", "asymkv"], "budget": 32, "chunk": 8, "repeats": 1}],
    "merging": [{"length": 32, "methods": ["kvmerger", "keepkv"], "repeats": 2}],
    "decode": [{"slots": 24, "methods": ["full", "weightedkv"], "steps": 2, "blocks": 2, "generate": "weightedkv"}],
    "batch": [{"slots": 24, "methods": "kvmerger", "batch": [2], "steps": 2, "blocks": 2}],
    "throughput": [{"length": 32, "methods": "weightedkv", "limit": 3, "steps": 2}],
    "perplexity": [
        {"methods": "weightedkv", "budget": 16, "window": 32, "rows": 2, "plain_steps": 2, "repeats": 2},
    ],
    "perplexity_cpu": [
        {"methods": "weightedkv", "budget": 16, "window": 40, "rows": 2, "plain_steps": 2, "repeats": 1},
    ],
}
NO_KVPRESS = speed.Kvpress("kvpress_peer.py")
#: How little is asked of LongBench's prompts.
LITTLE = {"budget": 40, "chunk": 10, "max_length": 60}


@pytest.fixture
def setup(monkeypatch: pytest.MonkeyPatch) -> speed.Setup:
    """A model of a few thousand weights, and a small copy for the bandwidth."""
    monkeypatch.setitem(models.SHAPES, "toy", TOY)
    monkeypatch.setitem(speed.COPIED, "cpu", 1 << 20)
    monkeypatch.setitem(speed.MULTIPLIED, "cpu", 64)
    models.identity.cache_clear()
    speed.release()
    return speed.Setup("toy", "cpu")


def test_every_piece_gives_records_with_floor_and_peak(setup: speed.Setup) -> None:
    records = benchmarks.run(list(PLAN), PLAN, setup, NO_KVPRESS, "toy")
    statuses = {(record.cell.experiment, record.status) for record in records if "kvpress" not in str(record.cell)}
    assert {status for _, status in statuses} == {"ok"}, [r.reason for r in records if r.status == "error"]
    measured = {"prefill", "pairs", "merging", "decode", "throughput", "perplexity"}
    assert {name for name, _ in statuses} == {"ceilings", *measured}
    for record in records:
        cell, extra = record.cell, record.value.extra
        assert cell.params["hardware"] and cell.params["dtype"] == "float32" and cell.data == "random tokens"
        if cell.experiment in measured and record.status == "ok":
            assert record.value.value > 0 and extra["floor"] > 0 and extra["bytes"] > 0 and len(extra["times"]) > 0
            assert extra.get("peak", 1) > 0 and targets.share(record) > 0
    again = benchmarks.run(list(PLAN), PLAN, setup, NO_KVPRESS, "toy")
    assert [record.key for record in again] == [record.key for record in records]  # nothing is measured twice
    table = targets.board(records)
    assert len(table) == len({record.cell.identity for record in records})
    peers = table[(table.piece == "prefill") & table.peer.isna()]
    assert peers.ratio.notna().all()


def test_the_floor_counts_what_cannot_be_left_out() -> None:
    shape = speed.Shape(weights=1000, read=900, matrices=100, layers=2, width=8, slot=10)
    at_once = shape.reading(6, None, 6)
    assert at_once.flops == 2 * 100 * 6 + 4 * (6 * 7 / 2) * 8 * 2
    assert at_once.bytes == 900 + 10 * 6
    in_chunks = shape.reading(6, 4, 3)  # the second chunk has 2 tokens and sees 3 slots
    assert in_chunks.flops == 2 * 100 * 6 + 4 * (4 * 5 / 2 + 2 * 3 + 2 * 3 / 2) * 8 * 2
    assert in_chunks.bytes == 2 * 900 + 10 * (3 + 6)
    assert shape.step(3, 500) == speed.Work(2.0 * 100 * 3, 1400.0)


def test_sizes_are_the_models_own(setup: speed.Setup) -> None:
    model = setup.load()
    shape = speed.Shape.of(model)
    assert shape.weights == shape.read == 4 * sum(p.numel() for p in model.parameters())  # tied: the table is read
    per_layer = 32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 48
    assert (shape.matrices, shape.width, shape.slot) == (2 * per_layer, 32, 2 * 2 * 2 * 8 * 4)


def test_on_a_cpu_memory_is_watched_over_one_cycle_and_finds_what_all_steps_hold(
    setup: speed.Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched: list[int] = []

    def peak_of(run: Any, device: torch.device) -> Any:
        (clock, *rest), peak = peak_bytes(run, device)
        watched.append(len(clock))
        return (clock, *rest), peak

    monkeypatch.setattr(speed, "peak_bytes", peak_of)
    found = speed._decode(setup, "kvslimmer", None, 48, 1, False, 4, 3).extra
    assert found["cycle"] == 3 and len(found["times"]) == 3
    assert watched == [speed.SKIPPED["cpu"] + 3]
    model = setup.load()
    cache = speed.read_prompt(model, setup.tokens(48 + speed.OVER), Variant.parse("kvslimmer"), 48, None)
    before = cache.nbytes
    _, peak = peak_bytes(lambda: speed._decoded(model, cache, 1, 26, False, 8), model.device)
    assert found["peak"] == before + peak


def test_on_a_gpu_what_is_decoded_first_does_not_count(setup: speed.Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a process times first is preceded by something that is decoded once and not recorded."""
    ran: list[tuple[Any, ...]] = []
    monkeypatch.setattr(speed, "_decode_now", lambda *given: ran.append(given))
    monkeypatch.setattr(speed.Setup, "place", property(lambda its: torch.device("cuda")))
    speed._decode_before.cache_clear()
    wanted = (setup, "kvslimmer", None, 48, 1, False, 4, 3)
    for _ in range(2):
        speed._decode(*wanted)
    assert ran[1:] == [wanted, wanted] and ran[0][:2] == (setup, "streaming_llm")
    speed._decode_before.cache_clear()


def test_running_out_of_memory_costs_one_record(setup: speed.Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    read = speed.read_prompt

    def fail(model: Any, ids: torch.Tensor, variant: Any, *rest: Any) -> Any:
        if variant.method == "h2o":
            raise torch.OutOfMemoryError("tried to allocate 20 GiB")
        return read(model, ids, variant, *rest)

    monkeypatch.setattr(speed, "read_prompt", fail)
    records = speed.prefill(setup, [32], ["h2o", "streaming_llm"], repeats=1)
    assert [record.status for record in records] == ["ok", "oom", "ok"]
    assert "20 GiB" in records[1].reason and records[1].cell.params["length"] == 32
    assert (targets.board(records).status == "oom").sum() == 1


@pytest.mark.parametrize(("fits", "guess"), [(1, 40), (7, 1), (37, 50), (37, 30), (64, 64), (64, 10)])
def test_the_largest_batch_is_found_to_a_sixteenth(fits: int, guess: int) -> None:
    found, tried, value = speed.largest_batch(lambda rows: rows if rows <= fits else None, guess, 64)
    assert found == value and fits - max(1, fits // 16) <= found <= fits
    assert len(tried) < 12


def test_no_batch_fits() -> None:
    with pytest.raises(torch.OutOfMemoryError, match="not even one row"):
        speed.largest_batch(lambda rows: None, 8, 64)


def test_kvpress_absent_is_skipped_with_the_reason(setup: speed.Setup) -> None:
    records = speed.kvpress(setup, 32, ["snapkv", "observed_attention"], NO_KVPRESS)
    assert {record.status for record in records} == {"skipped"}
    assert "--kvpress-python" in records[0].reason
    assert [record.cell.method for record in records] == ["snapkv", "snapkv", "h2o", "h2o"]


def test_kvpress_answers_become_records(setup: speed.Setup, tmp_path: Path) -> None:
    versions = {"kvpress": "9.9", "transformers": "5.2.0"}
    good = {"press": "snapkv", "length": 32, "versions": versions, "times": [0.2, 0.1, 0.3]}
    good |= {"steps": [0.01, 0.02], "peak": 5, "cache": 7}
    full = {"press": "observed_attention", "length": 32, "versions": versions, "oom": "CUDA out of memory"}
    script = tmp_path / "peer.py"
    lines = f"for row in {json.dumps([good, full])}: print(json.dumps(row))"
    version = f"print(json.dumps({versions}))"
    script.write_text(f"import json, sys\nif '--version' in sys.argv: {version}\nelse:\n    {lines}\n")
    peer = speed.Kvpress(str(script), sys.executable)
    prompt, step, *failed = speed.kvpress(setup, 32, ["snapkv", "observed_attention"], peer)
    assert (prompt.value.value, step.value.value) == (0.2, 10.0)
    assert prompt.cell.params["peer"] == "kvpress 9.9 snapkv" and prompt.value.extra["versions"] == versions
    assert prompt.cell.options == {"compression_ratio": 0.75}
    assert [record.status for record in failed] == ["oom", "oom"]


# --- LongBench's prompts --------------------------------------------------------------------------------------------


class Letters:
    """A tokenizer of one token a character, all of which the toy model knows."""

    chat_template = None

    def __call__(self, text: str, **_: object) -> SimpleNamespace:
        return SimpleNamespace(input_ids=[ord(letter) % 64 for letter in text])

    def decode(self, ids: Sequence[int], **_: object) -> str:
        return "".join(chr(64 + i) for i in ids)


@pytest.fixture
def prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two tasks in LongBench's files: prompts of 25, 45 and, cut, 60 letters. Returns their folder."""
    folder = tmp_path / "data/longbench_mini"
    (folder / "config").mkdir(parents=True)
    for name, entry in (("dataset2prompt", "{context} {input}?"), ("dataset2maxlen", 4)):
        (folder / f"config/{name}.json").write_text(json.dumps(dict.fromkeys(("trec", "lcc"), entry)))
    rows = [
        {"_id": f"q{i}", "context": "long" * i, "input": "Who", "answers": ["me"], "all_classes": []}
        for i in (5, 10, 20)
    ]
    for name in ("trec", "lcc"):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setenv("KVREPRO_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setattr(task_runtimes, "_tokenizer", lambda name: Letters())
    return folder


def test_a_task_is_read_by_both_methods_in_turn(
    setup: speed.Setup, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, done = speed.read_prompt, []

    def note(model: Any, ids: torch.Tensor, variant: Variant, budget: int, chunk: int) -> Any:
        cache = read(model, ids, variant, budget, chunk)
        done.append((variant.label, ids.shape[1], cache.layers[0].keys.shape[2]))
        return cache

    monkeypatch.setattr(speed, "read_prompt", note)
    (record,) = task_runtimes.task_runtimes(setup, "trec", samples=3, **LITTLE)
    assert record.status == "ok", record.reason
    timed = [(label, length) for label, length, _ in done[2:]]  # what is before warms up
    assert timed == [(name, n) for n in (25, 45, 60) for name in ("kvslimmer", "asymkv")]
    assert [length for _, length, _ in done[:2]] == [20, 20]
    assert all(slots <= 40 for _, _, slots in done)
    extra, cell = record.value.extra, record.cell
    assert extra["tokens"] == [25, 45, 60] and extra["ids"] == ["q5", "q10", "q20"] and record.value.n == 3
    ours, theirs = (sum(extra["seconds"][label]) for label in ("kvslimmer", "asymkv"))
    assert record.value.value == pytest.approx(100 * ours / theirs, rel=1e-4) and record.value.spread is not None
    assert (cell.method, cell.data, cell.budget) == ("kvslimmer+asymkv", "longbench_mini/trec", 40)
    assert cell.data_sha256 == longbench.load("trec", 3).sha256 and cell.unit == "%"
    assert cell.params["task"] == "trec" and cell.params["hardware"] and cell.params["label"] == "kvslimmer / asymkv"
    assert cell.options["asymkv"]["fisher"] == "loss" and "variant" in cell.options["kvslimmer"]
    done.clear()
    both = task_runtimes.task_runtimes(setup, ["trec", "lcc"], samples=3, **LITTLE)
    assert both[0].key == record.key and len(done) == 2 + 2 * 3  # a task that was measured is not read again
    table = targets.board(both)
    assert list(table.task) == ["trec", "lcc"] and not targets.plain(table).empty


def test_tasks_without_data_are_skipped_and_damaged_ones_are_an_error(
    setup: speed.Setup, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speed.Setup, "load", lambda self: pytest.fail("the model was loaded"))
    (prompts / "trec.jsonl").write_text("{")
    (prompts / "lcc.jsonl").write_text("")
    damaged, empty, gone = task_runtimes.task_runtimes(setup, ["trec", "lcc", "qasper"], **LITTLE)
    assert damaged.status == "error" and "trec.jsonl is damaged: line 1 is no JSON" in damaged.reason
    assert (empty.status, empty.reason) == ("skipped", "longbench_mini/lcc has no samples")
    assert gone.status == "error" and "no such entry for qasper" in gone.reason
    (prompts / "lcc.jsonl").unlink()
    (gone,) = task_runtimes.task_runtimes(setup, "lcc", **LITTLE)
    assert gone.status == "skipped" and gone.reason.startswith("KVREPRO_DATA_DIR/longbench_mini/lcc.jsonl is missing")
    assert str(prompts.parent) not in damaged.reason + gone.reason
    monkeypatch.delenv("KVREPRO_DATA_DIR")
    (none,) = task_runtimes.task_runtimes(setup, "musique", **LITTLE)
    assert none.status == "skipped" and "KVREPRO_DATA_DIR names, which is not set" in none.reason
    assert none.cell.data == "longbench/musique" and none.cell.data_sha256 == "not there"


def test_a_tokenizer_that_the_shape_does_not_know_is_an_error(
    setup: speed.Setup, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(models.SHAPES, "toy", {**TOY, "vocab_size": 60})
    models.identity.cache_clear()
    (record,) = task_runtimes.task_runtimes(setup, "trec", samples=1, **LITTLE)
    assert record.status == "error" and "toy knows 60 tokens: choose a shape with a larger" in record.reason


def test_a_task_without_memory_names_the_method(
    setup: speed.Setup, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = speed.read_prompt

    def fail(model: Any, ids: torch.Tensor, variant: Variant, *rest: Any) -> Any:
        if variant.method == "asymkv" and ids.shape[1] == 60:
            raise torch.OutOfMemoryError("tried to allocate 20 GiB")
        return read(model, ids, variant, *rest)

    monkeypatch.setattr(speed, "read_prompt", fail)
    (full,) = task_runtimes.task_runtimes(setup, "trec", samples=3, **LITTLE)
    assert full.status == "oom" and "asymkv: tried to allocate 20 GiB" in full.reason
    (short,) = task_runtimes.task_runtimes(setup, "trec", samples=2, **LITTLE)
    assert short.status == "ok" and short.value.n == 2


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"tasks": "quasper"}, "longbench has no task 'quasper'"),
        ({"pair": ["kvslimmer"]}, "must be two methods"),
        ({"pair": ["kvslimmer", "h3o"]}, "unknown method 'h3o'"),
        ({"chunk": 0}, "chunk=0 must be 1 or more"),
        ({"max_length": 1}, "max_length=1 2 or more"),
        ({"samples": 0}, "samples=0 must be 1 or more"),
    ],
)
def test_bad_requests_for_tasks(setup: speed.Setup, given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        task_runtimes.task_runtimes(setup, **{"tasks": "trec", **given})


def test_the_error_of_a_ratio_is_of_what_it_leaves() -> None:
    over, under = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0, 4.0, 6.0])
    assert task_runtimes.ratio_of_sums(over, under) == (0.5, 0.0)  # prompts differ in length, not in ratio
    # sums 6 and 6, ratio 1; left over: 1, -2, 1, of variance 3; mean of the second 2
    ratio, error = task_runtimes.ratio_of_sums(torch.tensor([2.0, 1.0, 3.0]), torch.tensor([1.0, 3.0, 2.0]))
    assert ratio == 1.0 and error == pytest.approx((3 / 3) ** 0.5 / 2)
    assert task_runtimes.ratio_of_sums(over[:1], under[:1]) == (0.5, None)


# --- targets --------------------------------------------------------------------------------------------------------


def record(experiment: str, value: float | None, label: str = "full", **params: Any) -> Record:
    """A record as the H100 could have given it."""
    extra: Mapping[str, Any] = params.pop("extra", {})
    model = params.pop("model", "llama-3.1-8b")
    unit = {"decode": "ms", "throughput": "tokens/s", "perplexity": "tokens/s"}.get(experiment, "s")
    cell = Cell(
        paper="speed",
        experiment=experiment,
        metric="m",
        unit=unit,
        method=label,
        model=model,
        model_sha256="0",
        data="random tokens",
        data_sha256="0",
        params={"label": label, "hardware": "NVIDIA H100 80GB HBM3", "dtype": "bfloat16", **params},
    )
    status = "ok" if value is not None else "oom"
    return Record(cell.identity, cell, Value(value, None, 1, extra), status, "", {"date": "2026-01-01"})


def verdict(records: list[Record], name: str) -> str:
    """The verdict of one target."""
    table = targets.verdicts(records).set_index("target")
    return str(table.verdict[name])


def test_nothing_measured_nothing_claimed() -> None:
    assert set(targets.verdicts([]).verdict) == {targets.UNKNOWN}


@pytest.mark.parametrize(("seconds", "expected"), [(1.25, "met"), (1.26, "not met")])
def test_a_prompts_time_is_judged_against_sdpa(seconds: float, expected: str) -> None:
    peer = record("prefill", 1.0, length=32768, peer=speed.TRANSFORMERS, extra={"peak": 100, "times": [1.0]})
    ours = record("prefill", seconds, "h2o", length=32768, extra={"peak": 101, "floor": 0.5, "times": [seconds]})
    assert verdict([peer, ours], "32k prompt, h2o") == expected
    assert verdict([peer, ours], "32k prompt, peak memory, h2o") == "not met"
    assert verdict([ours], "32k prompt, h2o") == "not measured"  # no peer beside it
    row = targets.verdicts([peer, ours]).set_index("target").loc["32k prompt, h2o"]
    assert row["share of floor"] == 0.5 / seconds


def test_a_long_prompt_must_run() -> None:
    name = "128k prompt in chunks, weightedkv"
    assert verdict([record("prefill", 20.0, "weightedkv", length=131072, extra={"floor": 9.0})], name) == "met"
    assert verdict([record("prefill", None, "weightedkv", length=131072)], name) == "not met"


def test_the_faster_way_to_decode_counts_and_is_compared_with_the_same_way() -> None:
    def step(label: str, ms: float, compiled: bool) -> Record:
        return record("decode", ms, label, slots=1024, batch=1, compile=compiled)

    found = [step("weightedkv", 7.5, False), step("weightedkv", 6.9, True)]
    found += [step("streaming_llm", 5.0, False), step("streaming_llm", 6.5, True)]
    assert verdict(found, "decoding at 1,024 slots, weightedkv") == "met"
    assert verdict(found, "merging while decoding at 1,024 slots, weightedkv") == "met"
    assert verdict(found, "decoding at 8,192 slots, weightedkv") == "not measured"


def test_other_targets() -> None:
    merge = record("merging", 0.05, "d2o", length=32768, extra={"share": 0.031, "times": [0.05]})
    assert verdict([merge], "one-shot merging at 32k, d2o") == "not met"
    ours = record("pairs", 0.7, "kvslimmer", length=8192, extra={"peak": 70})
    theirs = record("pairs", 1.0, "asymkv", length=8192, extra={"peak": 100})
    assert verdict([ours, theirs], "8k prompt, KVSlimmer against AsymKV, time") == "met"
    assert verdict([ours, theirs], "8k prompt, KVSlimmer against AsymKV, memory") == "met"
    full = record("throughput", 400.0, length=32768, peer=speed.TRANSFORMERS, extra={"batch": 14})
    many = record("throughput", 900.0, "weightedkv", length=32768, extra={"batch": 50})
    assert verdict([full, many], "largest batch at 32k, weightedkv") == "met"


def test_perplexity_has_one_target_a_device() -> None:
    same = {"label": "weightedkv", "model": "smollm2-135m", "extra": {"times": [1.0]}}
    fast = record("perplexity", 30000.0, batch=128, **same)
    loop = record("perplexity", 40.0, batch=1, peer=speed.PLAIN_LOOP, **same)
    assert verdict([fast, loop], "perplexity, weightedkv") == "met"
    assert verdict([fast, loop], "perplexity on a CPU, weightedkv") == "not measured"
    here = [
        dataclasses.replace(r, cell=dataclasses.replace(r.cell, params={**r.cell.params, "hardware": "AMD EPYC"}))
        for r in (record("perplexity", 190.0, batch=16, **same), loop)
    ]
    assert verdict(here, "perplexity on a CPU, weightedkv") == "not met"
    assert verdict(here, "perplexity, weightedkv") == "not measured"


def test_the_command_prints_tables_of_what_is_there(setup: speed.Setup, tmp_path: Path) -> None:
    speed.ceilings(setup)
    folder = str(Store.default().folder)
    shown = CliRunner().invoke(benchmarks.main, ["--piece", "none", "--out", folder])
    assert shown.exit_code == 0 and "ceilings" in shown.output and "not measured" in shown.output
    wrong = CliRunner().invoke(benchmarks.main, ["--piece", "prefil"])
    assert wrong.exit_code == 2 and "no piece prefil" in wrong.output
