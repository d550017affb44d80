"""Records: keys, statuses, atomic appends, and fingerprints that see just the code a value depends on."""

from __future__ import annotations

import dataclasses
import errno
import functools
import importlib.util
import json
import logging
import math
import multiprocessing
import os
import shutil
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvrepro import fingerprint as code
from kvrepro import provenance, records
from kvrepro.records import COLUMNS, Cell, Record, Skip, Store, StoreError, TimesLater, Value


def make_cell(**changes: Any) -> Cell:
    fields = {
        "paper": "demo",
        "experiment": "sizes",
        "metric": "perplexity",
        "method": "h2o",
        "options": {"sinks": 4},
        "model": "m",
        "model_sha256": "1",
        "data": "d",
        "data_sha256": "2",
        "budget": 64,
        "params": {"window": 128},
    }
    return Cell(**{**fields, **changes})


def one() -> Value:
    return Value(1.0)


class Counted:
    """A measurement that counts how often it runs."""

    def __init__(self, value: Value | Exception) -> None:
        self.value, self.runs = value, 0

    def __call__(self) -> Value:
        self.runs += 1
        if isinstance(self.value, Exception):
            raise self.value
        return self.value


# --- cells and values


def test_equal_cells_have_one_identity_however_they_are_written() -> None:
    a = make_cell(options={"a": 1, "b": (1, 2)}, params={"x": np.float64(0.5), "y": np.int64(3)})
    b = make_cell(options={"b": [1, 2], "a": 1}, params={"y": 3, "x": 0.5})
    assert a.identity == b.identity
    assert a == b


@pytest.mark.parametrize(
    "change",
    [
        {"budget": 1},
        {"budget": 1.0},
        {"budget": None},
        {"seed": 1},
        {"options": {}},
        {"model_sha256": "9"},
        {"unit": "s"},
    ],
)
def test_every_field_is_part_of_the_key(change: dict[str, Any]) -> None:
    assert make_cell(**change).key("code") != make_cell().key("code")
    assert make_cell(**change).identity != make_cell().identity
    assert make_cell().key("code") != make_cell().key("other code")


def test_one_slot_is_not_the_whole_prompt() -> None:
    assert make_cell(budget=1).identity != make_cell(budget=1.0).identity


@pytest.mark.parametrize("value", [math.nan, math.inf, object(), {1: 2}, {"a": {1}}])
def test_cells_refuse_what_json_cannot_hold(value: Any) -> None:
    with pytest.raises(ValueError, match="cell field params"):
        make_cell(params={"x": value})


def test_parameters_must_not_hide_columns() -> None:
    with pytest.raises(ValueError, match="model, value"):
        make_cell(params={"value": 1, "model": 2, "window": 3})


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(params=st.dictionaries(st.text().filter(lambda name: name not in COLUMNS), json_values, max_size=4))
def test_cells_survive_a_round_trip(params: dict[str, Any]) -> None:
    cell = make_cell(params=params)
    again = Cell(**json.loads(json.dumps(dataclasses.asdict(cell))))
    assert again.identity == cell.identity


@given(
    value=st.floats(allow_nan=False, allow_infinity=False),
    spread=st.none() | st.floats(),
    numbers=st.lists(st.floats()),
)
def test_records_are_strict_json_and_survive_a_round_trip(
    value: float, spread: float | None, numbers: list[float]
) -> None:
    stored = Value(value, spread, n=3, extra={"numbers": numbers}).plain()
    record = Record("k", make_cell(), stored, "ok", "", {"module": "m", "code": "c", "date": "d"})
    line = record.line()
    assert "\n" not in line
    json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert Record.parse(line) == record
    assert record.value.value == value


def test_extras_become_short_lists() -> None:
    extra = {"t": torch.tensor([1 / 3, math.nan]), "a": np.array([[1, 2]]), "s": (1e-9 / 3,), "flag": np.bool_(True)}
    plain = Value(1.0, extra=extra).plain().extra
    assert plain == {"t": [0.333333, None], "a": [[1, 2]], "s": [3.33333e-10], "flag": True}


# --- measuring


def test_a_cell_is_measured_once(tmp_path: Path) -> None:
    run = Counted(Value(2.5, 0.1, 4, {"nll": [1, 2]}))
    first = Store(tmp_path).measure(make_cell(), run)
    second = Store(tmp_path).measure(make_cell(), run)
    assert run.runs == 1
    assert first == second
    assert (first.status, first.value) == ("ok", Value(2.5, 0.1, 4, {"nll": [1, 2]}))
    assert len((tmp_path / "demo.jsonl").read_text().splitlines()) == 1


def test_provenance_says_where_and_how(tmp_path: Path) -> None:
    about = Store(tmp_path).measure(make_cell(), one).provenance
    assert set(about) == {
        *("commit", "dirty", "date", "device", "threads", "versions", "wall_s", "peak_bytes", "code", "module")
    }
    assert (
        about["versions"]["torch"] == torch.__version__.split("+")[0] or about["versions"]["torch"] == torch.__version__
    )
    assert about["device"] == provenance.device_name("cpu")
    assert about["module"] == __name__
    assert about["date"].endswith("+00:00")
    assert os.uname().nodename not in json.dumps({**about, "device": ""}) or len(os.uname().nodename) < 4


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "oom"),
        (MemoryError(), "oom"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 9 TB"), "oom"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), "oom"),
        (RuntimeError("shapes differ"), "error"),
        (ValueError("wrong"), "error"),
    ],
)
def test_failures_are_recorded_and_tried_again(tmp_path: Path, error: Exception, status: str) -> None:
    failing = Counted(error)
    store = Store(tmp_path)
    record = store.measure(make_cell(), failing)
    assert (record.status, record.value) == (status, Value(None, n=0))
    assert type(error).__name__ in record.reason
    assert store.measure(make_cell(), failing).status == status
    assert failing.runs == 2
    failing.value = Value(1.0)
    assert Store(tmp_path).measure(make_cell(), failing).status == "ok"
    assert Store(tmp_path).measure(make_cell(), failing).status == "ok"
    assert failing.runs == 3


def test_an_error_holds_nothing_of_what_its_frames_did() -> None:
    """Nor does the one that it came from; or what ran out would still be taken when the next cell is measured."""
    held: list[weakref.ref[torch.Tensor]] = []

    def fill() -> None:
        taken = torch.zeros(8)
        held.append(weakref.ref(taken))
        raise torch.OutOfMemoryError("CUDA out of memory")

    def explained() -> Value:
        try:
            fill()
        except torch.OutOfMemoryError as error:
            raise torch.OutOfMemoryError("what would fit") from error
        raise AssertionError

    record, error = records.measured(make_cell(), explained, "key", "code")
    assert record.status == "oom" and error is not None and error.__cause__ is not None
    assert [each() for each in held] == [None]


def test_real_memory_exhaustion_counts_as_oom(tmp_path: Path) -> None:
    record = Store(tmp_path).measure(make_cell(), lambda: Value(torch.empty(1 << 60).sum().item()))
    assert record.status == "oom"


def test_a_skipped_cell_stays_skipped(tmp_path: Path) -> None:
    run = Counted(Skip("needs a GPU"))
    for _ in range(2):
        record = Store(tmp_path).measure(make_cell(), run)
    assert (record.status, record.reason, run.runs) == ("skipped", "needs a GPU", 1)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_is_an_error(tmp_path: Path, value: float) -> None:
    record = Store(tmp_path).measure(make_cell(), lambda: Value(value))
    assert (record.status, record.value.value) == ("error", None)
    assert "not finite" in record.reason


def test_too_large_extras_are_an_error(tmp_path: Path) -> None:
    record = Store(tmp_path).measure(make_cell(), lambda: Value(1.0, extra={"map": torch.rand(512, 512)}))
    assert record.status == "error"
    assert "subsample" in record.reason


def test_an_interrupt_passes_through_and_leaves_no_record(tmp_path: Path) -> None:
    def interrupted() -> Value:
        raise KeyboardInterrupt

    store = Store(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        store.measure(make_cell(), interrupted)
    assert store.records() == []


def test_strict_raises_after_recording(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        Store(tmp_path, strict=True).measure(make_cell(), lambda: Value(1 / 0))
    assert [record.status for record in Store(tmp_path).records()] == ["error"]


def test_an_unknown_method_is_refused_before_running(tmp_path: Path) -> None:
    run = Counted(Value(1.0))
    with pytest.raises(ValueError, match="weightedkv"):
        Store(tmp_path).measure(make_cell(method="weihgtedkv"), run)
    assert run.runs == 0


def test_times_can_be_put_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, value, seconds = Store(tmp_path), Counted(Value(1.0)), Counted(Value(2.0))
    time = make_cell(params={"hardware": "a machine"})
    monkeypatch.setenv("KVREPRO_TIMES", "later")
    with pytest.raises(TimesLater, match="h2o budget=64"):
        store.sweep([(make_cell(), value), (time, seconds)], "sizes")
    assert (value.runs, seconds.runs) == (1, 0)
    monkeypatch.delenv("KVREPRO_TIMES")
    found = store.sweep([(make_cell(), value), (time, seconds)], "sizes")
    assert [record.value.value for record in found] == [1.0, 2.0]
    monkeypatch.setenv("KVREPRO_TIMES", "later")
    store.measure(time, seconds)  # it is stored
    assert (value.runs, seconds.runs) == (1, 1)


# --- sweeps and tables


def test_a_sweep_goes_on_where_it_stopped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [Counted(Value(float(i))) for i in range(3)]
    cells = [(make_cell(seed=i), run) for i, run in enumerate(runs)]
    Store(tmp_path).sweep(cells[:2], "part")
    assert "part" in capsys.readouterr().err
    found = Store(tmp_path).sweep(cells, "whole")
    assert [record.value.value for record in found] == [0.0, 1.0, 2.0]
    assert [run.runs for run in runs] == [1, 1, 1]
    assert "1/1" in capsys.readouterr().err
    Store(tmp_path).sweep(cells, "again")
    assert capsys.readouterr().err == ""


def test_progress_can_go_to_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    progress = tmp_path / "progress"
    monkeypatch.setenv("KVREPRO_PROGRESS", str(progress))
    Store(tmp_path).sweep([(make_cell(seed=i), one) for i in range(2)], "title")
    steps = [json.loads(line) for line in progress.read_text().splitlines()]
    assert [step["done"] for step in steps] == [0, 1, 2]
    assert [bool(step["running"]) for step in steps] == [True, True, False]
    assert {step["total"] for step in steps} == {2}
    assert steps[0]["left_s"] is None
    assert steps[1]["left_s"] >= 0
    assert capsys.readouterr().err == ""


def test_frame_has_one_row_a_record(tmp_path: Path) -> None:
    store = Store(tmp_path)
    assert list(store.frame().columns) == list(COLUMNS)
    store.measure(make_cell(), one)
    store.measure(make_cell(experiment="other", params={"stride": 2}), one)
    frame = store.frame()
    assert list(frame.columns[: len(COLUMNS)]) == list(COLUMNS)
    assert frame["option.sinks"].tolist() == [4, 4]
    assert frame["window"].tolist()[0] == 128
    assert len(store.frame(experiment="other")) == 1
    assert len(store.frame(paper="nobody")) == 0
    later = Store(tmp_path)
    assert len(later.frame()) == 0
    assert len(later.frame(touched=False)) == 2


def test_the_default_store_is_the_variable_s_and_one_a_process(tmp_path: Path) -> None:
    store = Store.default()
    assert store.folder == tmp_path / "results"  # set by conftest
    assert store is Store.default()
    assert store.published_folder == provenance.ROOT / "results" / "published"


# --- published records


def test_published_records_are_read_and_never_count_as_measured(tmp_path: Path) -> None:
    here = Store(tmp_path / "local", tmp_path / "published")
    assert here.published(make_cell()) is None
    record = here.measure(make_cell(), one)
    assert here.publish([record]) == [record]
    assert here.publish([record]) == []  # published once
    elsewhere = Store(tmp_path / "elsewhere", tmp_path / "published")
    assert elsewhere.published(make_cell()) == record
    assert elsewhere.touched == [record]
    assert elsewhere.published(make_cell(seed=5)) is None
    run = Counted(Value(3.0))
    elsewhere.measure(make_cell(), run)
    assert run.runs == 1


def test_the_newest_published_record_wins_whatever_its_code(tmp_path: Path) -> None:
    cell, lines = make_cell(), []
    for date, value in (("2025-02-01", 2.0), ("2025-01-01", 1.0)):
        about = {"module": "kvrepro.evaluate", "code": value, "date": date}
        lines.append(Record(cell.key(date), cell, Value(value), "ok", "", about).line())
    (tmp_path / "a.jsonl").write_text("\n".join(lines) + "\n")
    found = Store(tmp_path / "local", tmp_path).published(cell)
    assert found is not None
    assert found.value.value == 2.0
    assert not found.is_current


def test_unfinished_records_are_not_published(tmp_path: Path) -> None:
    store = Store(tmp_path / "local", tmp_path / "published")
    record = store.measure(make_cell(), lambda: Value(math.nan))
    with pytest.raises(ValueError, match="h2o budget=64"):
        store.publish([record])
    assert not (tmp_path / "published").exists()
    with pytest.raises(ValueError, match="no folder of published"):
        Store(tmp_path / "local").publish([])


def test_records_of_a_page_go_to_a_file_of_their_own(tmp_path: Path) -> None:
    store = Store(tmp_path)
    made = [store.measure(make_cell(seed=i), one) for i in range(3)]
    path = tmp_path / "pages" / "sizes.records.jsonl"
    records.write_records(path, made[:2])
    records.write_records(path, made)
    assert records.read_records(path) == made
    assert [file.name for file in path.parent.iterdir()] == [path.name]


# --- crashes, crowds and full disks


def test_a_line_cut_off_by_a_crash_is_skipped_and_repaired(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = Store(tmp_path)
    for seed in range(2):
        store.measure(make_cell(seed=seed), one)
    path = tmp_path / "demo.jsonl"
    whole = path.read_bytes()
    for cut in (1, 10, len(whole) // 2 - 1):
        path.write_bytes(whole[:-cut])
        run = Counted(Value(1.0))
        fresh = Store(tmp_path)
        fresh.measure(make_cell(seed=0), run)
        fresh.measure(make_cell(seed=1), run)
        assert run.runs == 1  # the first record is whole
        assert path.read_bytes().startswith(whole[:-cut] + b"\n")
        with caplog.at_level(logging.WARNING):
            assert len(Store(tmp_path).records()) == 2
    assert "no whole record is ignored" in caplog.text


@pytest.mark.parametrize("line", ["[]", "1", "{}", '{"schema": 99}', '{"schema": 1, "key": "k"}', "\x00", "not json"])
def test_foreign_lines_are_no_records(line: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError):
        Record.parse(line)
    (tmp_path / "demo.jsonl").write_text(line + "\n")
    assert Store(tmp_path).records() == []


def _write_many(folder: str, worker: int, n: int) -> None:
    store = Store(folder)
    for i in range(n):
        store.measure(make_cell(seed=1000 * worker + i), functools.partial(Value, float(i), extra={"pad": "x" * 3000}))


def test_two_processes_append_at_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_write_many, args=(str(tmp_path), w, 40)) for w in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    lines = (tmp_path / "demo.jsonl").read_text().splitlines()
    assert len(lines) == 120
    assert len({Record.parse(line).key for line in lines}) == 120


def test_a_store_sees_what_another_process_wrote(tmp_path: Path) -> None:
    store = Store(tmp_path)
    run = Counted(Value(1.0))
    store.measure(make_cell(seed=1), run)
    Store(tmp_path).measure(make_cell(seed=2), run)
    store.measure(make_cell(seed=2), run)
    assert run.runs == 2


def test_a_full_disk_is_noticed_before_running(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, run = Store(tmp_path), Counted(Value(1.0))
    store.measure(make_cell(), run)
    before = (tmp_path / "demo.jsonl").read_bytes()
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(StoreError, match="KVREPRO_RESULTS"):
        store.measure(make_cell(seed=1), run)
    assert run.runs == 1
    assert (tmp_path / "demo.jsonl").read_bytes() == before


def test_a_write_that_fails_half_way_leaves_earlier_records_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path)
    store.measure(make_cell(), one)
    before = (tmp_path / "demo.jsonl").read_bytes()
    write = os.write
    calls = []

    def failing(handle: int, data: bytes) -> int:
        calls.append(len(data))
        if len(calls) > 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(handle, data[:20])

    monkeypatch.setattr(os, "write", failing)
    with pytest.raises(StoreError, match="No space left.*Earlier records are untouched"):
        store.measure(make_cell(seed=1), one)
    monkeypatch.undo()
    assert (tmp_path / "demo.jsonl").read_bytes() == before


def test_a_folder_that_cannot_be_written_is_noticed_before_running(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    run = Counted(Value(1.0))
    with pytest.raises(StoreError, match="KVREPRO_RESULTS"):
        Store(blocked / "results").measure(make_cell(), run)
    assert run.runs == 0


def test_records_that_cannot_be_read_are_an_error(tmp_path: Path) -> None:
    (tmp_path / "demo.jsonl").mkdir()
    with pytest.raises(StoreError, match="cannot read"):
        Store(tmp_path).records()


# --- fingerprints

PACKAGE = {
    "__init__.py": "from demo.cache import Cache\nfrom demo import methods\n__version__ = '1'\n",
    "cache.py": "from demo.slots import Slots\nfrom demo import methods\nfrom demo.methods.base import Method\n",
    "slots.py": "Slots = 1\n",
    "records.py": "x = 1\n",
    "book/__init__.py": "",
    "book/build.py": "x = 1\n",
    "unrelated.py": "x = 1\n",
    "methods/__init__.py": "from demo.methods.h2o import H2O\nfrom demo.methods.cam import CaM\n",
    "methods/base.py": "class Method: pass\n",
    "methods/h2o.py": "from demo.methods.base import Method\nfrom demo.methods.common import top\nH2O = Method\n",
    "methods/cam.py": "from .base import Method\nfrom .h2o import H2O\nclass CaM(H2O): pass\n",
    "methods/tova.py": "from demo.methods.base import Method\n",
    "methods/common.py": "def top(): pass\n",
    "experiments/__init__.py": "from demo.experiments import one, two\n",
    "experiments/one.py": (
        "import demo\nfrom demo.experiments.common import bench\n"
        "from demo import records\nfrom demo.book import build\n"
        "def run():\n    from demo.late import late\n    return late\n"
    ),
    "experiments/two.py": "from . import common\n",
    "experiments/common.py": "def bench(): pass\n",
    "late.py": "late = 1\n",
}
DEPENDS = {  # what the fingerprint of experiments.one with h2o must see
    *("slots.py", "cache.py", "methods/base.py", "methods/h2o.py", "methods/common.py"),
    *("experiments/one.py", "experiments/common.py", "late.py"),
}


def write_package(folder: Path) -> Path:
    for name, source in PACKAGE.items():
        path = folder / "demo" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    return folder / "demo"


def demo_fingerprint(folder: Path, method: str = "h2o", module: str = "demo.experiments.one") -> str:
    index = code.CodeIndex(folder, "demo", core=("slots", "methods.base"), harness=frozenset({"records", "book"}))
    return index.fingerprint([module], method)


@pytest.mark.parametrize("changed", sorted(PACKAGE))
def test_a_fingerprint_sees_what_a_value_depends_on_and_nothing_else(tmp_path: Path, changed: str) -> None:
    folder = write_package(tmp_path)
    before = demo_fingerprint(folder)
    (folder / changed).write_text(PACKAGE[changed] + "changed = 1\n")
    assert (demo_fingerprint(folder) != before) == (changed in DEPENDS)


@pytest.mark.parametrize(
    ("uses", "seen"),
    [
        ("import demo\ndemo.Cache", {"cache"}),
        ("import demo as d\nd.Cache, d.late", {"cache", "late"}),
        ("from demo import Cache", {"cache"}),
        ("import demo\nprint(demo)\ndemo.Cache", {"cache", "unrelated", "late"}),
        ("import demo\ndemo.__version__", {"cache", "unrelated", "late"}),
    ],
)
def test_of_the_public_names_those_count_that_are_used(tmp_path: Path, uses: str, seen: set[str]) -> None:
    folder = write_package(tmp_path)
    (folder / "__init__.py").write_text(
        PACKAGE["__init__.py"] + "from demo.unrelated import x\nfrom .late import late\n"
    )
    (folder / "experiments/two.py").write_text(uses + "\n")
    closure = code.CodeIndex(folder, "demo", core=(), harness=frozenset()).closure(["demo.experiments.two"])
    assert {name.removeprefix("demo.") for name in closure} & {"cache", "unrelated", "late"} == seen


@pytest.mark.parametrize("changed", ["methods/cam.py", "methods/h2o.py", "methods/common.py"])
def test_a_method_depends_on_the_methods_it_builds_on(tmp_path: Path, changed: str) -> None:
    folder = write_package(tmp_path)
    cam, tova = demo_fingerprint(folder, "cam"), demo_fingerprint(folder, "tova")
    both = demo_fingerprint(folder, "tova+cam")
    (folder / changed).write_text(PACKAGE[changed] + "changed = 1\n")
    assert demo_fingerprint(folder, "cam") != cam
    assert demo_fingerprint(folder, "tova") == tova
    assert demo_fingerprint(folder, "tova+cam") != both


def test_an_option_can_name_a_method_that_another_builds_on() -> None:
    assert code.with_bases("attention_matching", {"keys": "h2o", "rounds": 3}) == "attention_matching+h2o"
    assert code.with_bases("attention_matching", {"keys": "rms"}) == "attention_matching"
    assert code.with_bases("kvmerger", {"pivot": "random"}) == "kvmerger"  # a word, not the method
    both = {"tova": {}, "attention_matching(keys='h2o')": {"keys": "h2o"}}
    assert code.with_bases("tova+attention_matching", both) == "tova+attention_matching+h2o"
    assert code.with_bases("h2o+attention_matching", both) == "h2o+attention_matching"
    assert code.with_bases("gone", {"keys": "h2o"}) == "gone"


def test_a_hybrid_depends_on_the_code_of_the_method_it_builds_on(tmp_path: Path) -> None:
    folder = tmp_path / "kvrepro"
    shutil.copytree(code.PACKAGE_DIR, folder, ignore=shutil.ignore_patterns("data", "__pycache__"))

    def fingerprints() -> dict[str, str]:
        index = code.CodeIndex(folder, core=())
        cells = {
            keys: make_cell(method="attention_matching", options={"keys": keys}) for keys in ("rms", "h2o", "tova")
        }
        return {keys: index.fingerprint([], cell.methods) for keys, cell in cells.items()}

    before = fingerprints()
    with (folder / "methods/h2o.py").open("a") as file:
        file.write("changed = 1\n")
    after = fingerprints()
    assert {keys for keys in before if before[keys] != after[keys]} == {"h2o"}


def test_a_record_of_a_hybrid_has_its_fingerprint(tmp_path: Path) -> None:
    from kvrepro.evaluate import perplexity

    cell, run = make_cell(method="attention_matching", options={"keys": "h2o"}), functools.partial(perplexity, None)
    record = Store(tmp_path).measure(cell, run)
    assert record.provenance["code"] == code.fingerprint(run, "attention_matching+h2o")
    assert record.is_current
    assert not dataclasses.replace(record, cell=make_cell(method="attention_matching")).is_current


SOURCE = '''"""Module."""

import os  # needed


class A:
    """Docstring
    of two lines."""

    def f(self) -> str:
        """One."""
        # a comment
        return "# not a comment"


def g():
    "only a docstring"; return """
text
"""
'''


def test_comments_docstrings_and_blank_lines_do_not_count() -> None:
    other = SOURCE.replace("needed", "used").replace("Docstring", "Words").replace("# a comment", "# b\n\n")
    assert code.normalise(other) == code.normalise(SOURCE)
    assert "# not a comment" in code.normalise(SOURCE)
    assert "only a docstring" in code.normalise(SOURCE)  # shares its line with code
    for old, new in (("not a comment", "changed"), ("text", "words"), ("import os", "import sys")):
        assert code.normalise(SOURCE.replace(old, new)) != code.normalise(SOURCE)


def test_wrapped_functions_count_as_the_module_that_defines_them() -> None:
    def closure() -> Value:
        return one()

    @functools.wraps(records.read_records)
    def wrapper() -> None:
        """Stands for any decorator."""

    assert code.measuring_module(functools.partial(functools.partial(records.read_records), "x")) == "kvrepro.records"
    assert code.measuring_module(wrapper) == "kvrepro.records"
    assert code.measuring_module(Store.measure) == "kvrepro.records"
    assert code.measuring_module(Store("x").measure) == "kvrepro.records"
    assert code.measuring_module(closure) == __name__
    assert code.measuring_module(Counted(Value(1.0))) == __name__
    assert code.measuring_module(lambda: one()) == __name__


def test_every_core_and_harness_name_is_a_module_of_the_package() -> None:
    index = code.CodeIndex()
    for name in (*code.CORE, *code.HARNESS):
        assert index.path(f"kvrepro.{name}") is not None, name


def test_a_record_of_an_experiment_is_current_until_its_code_changes(tmp_path: Path) -> None:
    from kvrepro.evaluate import perplexity

    cell = make_cell()
    record = Store(tmp_path).measure(cell, functools.partial(perplexity, None, None, "h2o"))
    assert record.status == "error"  # there is no model
    assert record.provenance["module"] == "kvrepro.evaluate"
    assert record.is_current
    assert not dataclasses.replace(record, provenance={**record.provenance, "code": "0" * 64}).is_current
    assert not dataclasses.replace(record, provenance={**record.provenance, "module": "gone"}).is_current
    assert not dataclasses.replace(record, cell=make_cell(method="gone")).is_current


def test_a_script_s_own_code_is_part_of_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def script_fingerprint(name: str, value: str) -> str:
        path = tmp_path / f"{name}.py"
        path.write_text(f"from kvrepro.records import Value\n\n\ndef run():\n    return Value({value}\n    )\n")
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        return code.fingerprint(module.run, "h2o")

    first = script_fingerprint("script_a", "1.0")
    assert script_fingerprint("script_b", "1.0  # the same") == first
    assert script_fingerprint("script_c", "2.0") != first


def test_code_without_a_source_is_refused() -> None:
    scope: dict[str, Any] = {"__name__": "__main__"}
    exec("def run(): return 1", scope)
    with pytest.raises(ValueError, match="define it in a file"):
        code.fingerprint(scope["run"], "h2o")


# --- provenance


def test_a_copy_without_history_is_told_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVREPRO_COMMIT", "abc123+")
    provenance.commit.cache_clear()
    assert provenance.commit(tmp_path) == ("abc123", True)
    provenance.commit.cache_clear()


def test_the_commit_is_that_of_the_package_s_own_checkout(tmp_path: Path) -> None:
    def git(*arguments: str) -> None:
        identity = ["-c", "user.name=t", "-c", "user.email=t@t", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", "-C", str(tmp_path), *identity, *arguments], check=True, capture_output=True)

    (tmp_path / "venv").mkdir()
    assert provenance.commit(tmp_path / "venv") == (None, None)
    provenance.commit.cache_clear()
    git("init", "-q")
    (tmp_path / "file").write_text("1")
    assert provenance.commit(tmp_path) == (None, True)
    assert provenance.commit(tmp_path / "venv") == (None, None)  # some other project's repository
    git("add", "-A")
    git("commit", "-q", "-m", "one")
    provenance.commit.cache_clear()
    head, dirty = provenance.commit(tmp_path)
    assert head is not None
    assert (len(head), dirty) == (40, False)
    (tmp_path / "file").write_text("2")
    provenance.commit.cache_clear()
    assert provenance.commit(tmp_path) == (head, True)
    provenance.commit.cache_clear()


def test_the_meter_sees_time_and_memory() -> None:
    meter = provenance.Meter()
    with meter:
        held = torch.ones(64, 1024, 1024, dtype=torch.uint8)
        del held
    assert meter.wall_s > 0
    assert meter.device == provenance.device_name("cpu")
    if sys.platform == "linux":
        assert 48 << 20 < meter.peak_bytes < 256 << 20
