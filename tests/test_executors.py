"""Sweeps on a Dask cluster of processes on this machine: the same records, lost workers, refusals, interrupts."""

from __future__ import annotations

import importlib
import inspect
import json
import os
import pkgutil
import re
import runpy
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from book_project import make_project
from distributed import Client, fire_and_forget
from hypothesis import given, settings
from hypothesis import strategies as st
from test_records import make_cell, write_package
from test_tasks import Letters, data  # noqa: F401  (a fixture)
from tiny import measure_tiny

from kvrepro import executors, fingerprint, provenance, records, texts
from kvrepro import experiments as package
from kvrepro.book import workers
from kvrepro.book.build import run as run_notebook
from kvrepro.book.project import RequestError
from kvrepro.evaluate import perplexity
from kvrepro.executors import ExecutorError
from kvrepro.experiments import tasks, weightedkv
from kvrepro.experiments.common import Bench, Variant
from kvrepro.records import Skip, Store, StoreError, Value
from kvrepro.tasks import batch

pytestmark = pytest.mark.timeout(120)
ROOT = Path(__file__).resolve().parents[1]
Start = Callable[..., subprocess.Popen[bytes]]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    """Start a scheduler or a worker with this package on its path; all are ended with the module."""
    folder = tmp_path_factory.mktemp("dask")
    started: list[subprocess.Popen[bytes]] = []
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}

    def run(program: str, *words: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", f"distributed.cli.dask_{program}", *words, "--no-dashboard"]
        with (folder / f"{program}-{len(started)}.log").open("wb") as log:
            started.append(subprocess.Popen(command, env=environment, cwd=folder, stdout=log, stderr=log))
        return started[-1]

    yield run
    for process in started:
        process.kill()  # a worker ends with the process that watches over it
        process.wait()


def start_scheduler(start: Start, folder: Path) -> tuple[subprocess.Popen[bytes], str]:
    """A scheduler on the loopback address, and its address."""
    file = folder / "scheduler.json"
    process = start("scheduler", "--host", "127.0.0.1", "--port", "0", "--scheduler-file", str(file))
    while not file.is_file():
        assert process.poll() is None, "the scheduler ended"
        time.sleep(0.05)
    return process, json.loads(file.read_text())["address"]


@pytest.fixture(scope="module", autouse=True)
def cluster(start: Start, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A scheduler and two workers, each with a label where others have a GPU; the executor's name."""
    _, address = start_scheduler(start, tmp_path_factory.mktemp("scheduler"))
    for _ in range(2):
        start("worker", address, "--nthreads", "1", "--resources", "GPU=1", "--memory-limit", "0")
    with Client(address, set_as_default=False) as client:
        client.wait_for_workers(2)
        for worker in client.nthreads():  # slow: while the first tests run
            fire_and_forget(client.submit(importlib.import_module, "kvrepro.executors", workers=[worker], key=worker))
    return address.replace("tcp://", "dask://")


@pytest.fixture
def on_workers(cluster: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(executors.VARIABLE, cluster)


# --- what is measured: functions that travel with their code


def number(value: float) -> Value:
    return Value(value, 0.5, n=3, extra={"pid": os.getpid()})


def failing(error: Exception) -> Value:
    raise error


def huge() -> Value:
    return Value(torch.empty(1 << 60).sum().item())


def once(folder: Path, name: str) -> Value:
    """Leave a mark at every try."""
    with (folder / name).open("a") as file:
        file.write(f"{os.getpid()}\n")
    return Value(1.0)


def deadly(folder: Path, name: str, times: int) -> Value:
    """Take the worker down, so many times."""
    once(folder, name)
    if len((folder / name).read_text().split()) <= times:
        os.kill(os.getpid(), signal.SIGKILL)
    return Value(2.0)


def together(folder: Path, me: str, other: str) -> Value:
    """End when another cell runs at the same time."""
    (folder / me).touch()
    while not (folder / other).exists():
        time.sleep(0.01)
    return Value(1.0, extra={"pid": os.getpid()})


def large(folder: Path, name: str, room: int) -> Value:
    """Take a share of a memory that has room for so many: none where others hold all."""
    once(folder, name)
    mine = folder / f"{name}.held"
    mine.touch()
    try:
        time.sleep(0.2)  # whoever began at the same time is seen
        if (held := len(list(folder.glob("*.held")))) > room:
            raise MemoryError(f"{held} cells hold memory for {room}")
        time.sleep(0.4)
    finally:
        mine.unlink()
    return Value(1.0)


def until(path: Path) -> Value:
    """Wait for a file."""
    while not path.exists():
        time.sleep(0.01)
    return Value(1.0)


def whereabouts() -> Value:
    from distributed import get_worker

    host = get_worker().address.rpartition(":")[0].removeprefix("tcp://")
    about = {"pid": os.getpid(), "folder": os.getcwd(), "threads": os.environ["OMP_NUM_THREADS"], "host": host}
    return Value(1.0, extra=about)


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and that nobody asked about does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False


def tries(folder: Path) -> dict[str, int]:
    return {path.name: len(path.read_text().split()) for path in folder.iterdir()}


def cells(
    *runs: Callable[[], Value], experiment: str = "sizes", **params: Any
) -> list[tuple[records.Cell, Callable[[], Value]]]:
    return [(make_cell(seed=seed, experiment=experiment, params=params), run) for seed, run in enumerate(runs)]


def pid(record: records.Record) -> int:
    return record.value.extra["pid"]


# --- refusals


def order(run: Callable[[], Value], cell: records.Cell | None = None) -> executors._Order:
    cell = cell or make_cell()
    code = fingerprint.fingerprint(run, cell.method)
    return executors._Order.of(executors.Job(cell, run, cell.key(code), code))


def test_what_a_worker_may_not_measure(monkeypatch: pytest.MonkeyPatch) -> None:
    text = texts.load("code")
    run = partial(perplexity, None, None, "h2o")
    good = order(run, make_cell(data="code", data_sha256=text.sha256))
    assert (good.named, good.modules, good.own) == (["data"], ["kvrepro.evaluate"], "")
    assert good.problem(1) is None
    assert "--nthreads 1" in str(good.problem(2))
    assert "same commit" in str(replace(good, code="0" * 64).problem(1))
    assert "same commit" in str(replace(good, modules=["kvrepro.experiments.needle"]).problem(1))
    assert "on cpu and the client on cuda" in str(replace(good, device="cuda").problem(1))
    monkeypatch.setattr(texts, "load", lambda name: replace(text, sha256="other"))
    assert "data 'code' is not the client's" in str(good.problem(1))
    assert order(run, make_cell(data="code", data_sha256="made up")).named == []


def test_a_worker_knows_the_code_it_began_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_package(tmp_path) / "methods" / "h2o.py"
    index = partial(fingerprint.CodeIndex, path.parents[1], "demo", core=("slots",), harness=frozenset({"records"}))
    monkeypatch.setattr(fingerprint, "CodeIndex", index)
    fingerprint.code_at_start.cache_clear()
    began = fingerprint.code_at_start()
    path.write_text(path.read_text() + "changed = 1\n")
    for method in ("h2o", "tova"):
        same = began.fingerprint(["demo.late"], method) == index().fingerprint(["demo.late"], method)
        assert same == (method == "tova")
    assert fingerprint.code_at_start() is began
    fingerprint.code_at_start.cache_clear()


def test_what_cannot_be_sent_is_named() -> None:
    with pytest.raises(ExecutorError, match=r"h2o budget=64 .*cannot be sent.*local"):
        order(partial(number, threading.Lock()))


@pytest.mark.parametrize("name", ["dask", "dask://", "dask://host", "tcp://host:1", "dask://a b:1", "ray://host:1"])
def test_unknown_executors_are_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(executors.VARIABLE, name)
    with pytest.raises(ValueError, match="local, stored, or dask://HOST:PORT"):
        Store(tmp_path).sweep(cells(partial(number, 1.0)), "title")


def test_names_of_executors() -> None:
    assert executors.scheduler("") is executors.scheduler("local") is executors.scheduler("stored") is None
    assert executors.scheduler("dask://node-3.cluster:8786") == "tcp://node-3.cluster:8786"
    assert executors.scheduler("dask://[::1]:8786") == "tcp://[::1]:8786"


def test_stored_measures_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = cells(partial(number, 1.0))
    monkeypatch.setenv(executors.VARIABLE, executors.STORED)
    with pytest.raises(StoreError, match=f"{len(wanted)} values are not stored, and KVREPRO_EXECUTOR=stored forbids"):
        Store(tmp_path).sweep(wanted, "title")
    monkeypatch.delenv(executors.VARIABLE)
    there = Store(tmp_path).sweep(wanted, "title")
    monkeypatch.setenv(executors.VARIABLE, executors.STORED)
    assert Store(tmp_path).sweep(wanted, "title") == there


def test_local_needs_no_dask_and_the_cluster_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("dask", "distributed", "cloudpickle"):
        monkeypatch.setitem(sys.modules, module, None)  # to import it is an error
    runpy.run_path(str(executors.__file__))
    assert Store(tmp_path).sweep(cells(partial(number, 1.0)), "title")[0].status == "ok"
    monkeypatch.setenv(executors.VARIABLE, "dask://127.0.0.1:1")
    with pytest.raises(ExecutorError, match=r"not installed here.*kvrepro\[dask\]"):
        Store(tmp_path / "other").sweep(cells(partial(number, 1.0)), "title")


def test_a_scheduler_that_is_not_there_or_goes(start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executors, "_CONNECT_S", 1)
    monkeypatch.setenv(executors.VARIABLE, "dask://127.0.0.1:1")
    with pytest.raises(ExecutorError, match="no Dask scheduler answers at tcp://127.0.0.1:1"):
        executors.check()
    process, address = start_scheduler(start, tmp_path)
    monkeypatch.setenv(executors.VARIABLE, address.replace("tcp://", "dask://"))
    executors.check()
    start("worker", address, "--nthreads", "1")
    shown: list[str] = []

    def show(text: str) -> None:
        shown.append(text)
        if not text.startswith("waiting"):
            process.kill()

    job = executors.Job(make_cell(), partial(number, 1.0), "key", "code")
    with pytest.raises(ExecutorError, match="scheduler is gone"):
        list(executors.measure(address, [job], show))
    assert shown == ["waiting for a worker", "h2o budget=64 window=128"]


# --- who measures what


@dataclass(frozen=True)
class Numbered:
    """Stands for a job."""

    number: int
    shared: int


def numbered(jobs: int, together: int = 1) -> list[Numbered]:
    """Jobs, so many neighbours of which have something in common."""
    return [Numbered(i, i // together) for i in range(jobs)]


def in_turns(waiting: executors._Waiting) -> dict[str, list[int]]:
    """What three workers take, one after another."""
    taken: dict[str, list[int]] = {"a": [], "b": [], "c": []}
    while waiting:
        for worker, numbers in taken.items():
            if (job := waiting.take(worker)) is not None:
                numbers.append(job.number)  # type: ignore[attr-defined]
    return taken


@settings(max_examples=30)
@given(
    jobs=st.integers(1, 40),
    together=st.integers(1, 9),
    turns=st.lists(st.integers(0, 5), max_size=80),
    gone=st.sets(st.integers(0, 4)),
)
def test_every_job_is_handed_out_once_and_lost_ones_again(
    jobs: int, together: int, turns: list[int], gone: set[int]
) -> None:
    waiting, taken = executors._Waiting(numbered(jobs, together)), []  # type: ignore[arg-type]
    for turn, worker in enumerate(turns):
        if not waiting:
            break
        job = waiting.take(str(worker))
        if turn in gone:
            waiting.leave(str(worker), job)
        elif job is not None:
            taken.append(job.number)
    for worker in waiting.owners:  # all are gone
        waiting.leave(worker)
    while (job := waiting.take("last")) is not None:
        taken.append(job.number)
    assert not waiting and sorted(taken) == list(range(jobs))


def test_a_worker_measures_neighbours() -> None:
    taken = in_turns(executors._Waiting(numbered(12)))  # type: ignore[arg-type]
    assert sorted(sum(taken.values(), [])) == list(range(12))
    jumps = sum(b - a != 1 for each in taken.values() for a, b in zip(each, each[1:], strict=False))
    assert jumps <= 2  # in the order of the sweep, turn by turn, there would be nine


def test_what_jobs_have_in_common_is_worked_out_once() -> None:
    """Six readings of four cells: no worker takes a cell of a reading that another one has begun."""
    taken = in_turns(executors._Waiting(numbered(24, together=4)))  # type: ignore[arg-type]
    assert sorted(sum(taken.values(), [])) == list(range(24))
    readings = [{number // 4 for number in numbers} for numbers in taken.values()]
    assert sum(map(len, readings)) == 6 and all(readings)


def test_what_a_sweep_has_apart_is_brought_together() -> None:
    """Table I's sweep goes text by text, and the readings, one a method and budget, take turns in it."""
    jobs = [Numbered(i, i % 6) for i in range(24)]
    taken = in_turns(executors._Waiting(jobs))  # type: ignore[arg-type]
    assert sorted(sum(taken.values(), [])) == list(range(24))
    assert sum(len({number % 6 for number in numbers}) for numbers in taken.values()) == 6


def test_who_worked_something_out_measures_what_needs_it_later() -> None:
    waiting = executors._Waiting(numbered(12, together=4), {1: "b", 2: "gone"})  # type: ignore[arg-type]
    assert waiting.owners == {"b", "gone"} and len(waiting) == 12
    waiting.leave("gone")
    taken = in_turns(waiting)
    assert taken["b"][:4] == [4, 5, 6, 7]
    assert sorted(sum(taken.values(), [])) == list(range(12))
    assert sum(len({number // 4 for number in numbers}) for numbers in taken.values()) == 3


def test_what_is_measured_again_stays_with_what_it_has_in_common() -> None:
    waiting = executors._Waiting(numbered(8, together=4), {1: "b"})  # type: ignore[arg-type]
    ours, theirs = waiting.take("a"), waiting.take("b")
    assert (ours.number, theirs.number) == (0, 4)  # type: ignore[union-attr]
    waiting.put_back(ours)  # type: ignore[arg-type]
    assert [waiting.take("a").number for _ in range(4)] == [1, 2, 3, 0]  # type: ignore[union-attr]
    waiting.leave("b", theirs)
    assert [waiting.take("c").number for _ in range(4)] == [4, 5, 6, 7]  # type: ignore[union-attr]
    waiting.put_back(theirs)  # type: ignore[arg-type]
    assert len(waiting) == 1 and waiting.take("a") is theirs and not waiting


def test_cells_of_one_reading_are_served_together() -> None:
    """Of Table I: the windows and texts of a method and budget, in pieces too; the full cache's lengths apart."""
    bench = Bench("weightedkv", "perplexity", "smollm2-135m")
    plan = weightedkv.Reading(replace(bench, experiment="reading"), ("code",), 1, 64, None, 64)

    def job(method: str, budget: int | None, **size: int) -> executors.Job:
        """One cell's."""
        about = {"starts_of": 64, "chunk": 1, **size}
        cell = bench.cell("perplexity", "", method=Variant.parse(method), data="code", budget=budget, **about)
        return executors.Job(cell, partial(weightedkv._perplexity, plan, cell), repr(about), "")

    first = job("h2o", 16, window=32)
    assert first.shared == job("h2o", 16, window=64).shared == job("h2o", 16, piece=64).shared
    others = [job("h2o", 24, window=32), job("tova", 16, window=32), job("full", None, window=32)]
    assert len({first.shared, *(each.shared for each in others), job("full", None, window=64).shared}) == 5


# --- the experiments' own cells

TEXT: dict[str, Any] = {"text": "code"}
SMALL: dict[str, Any] = {**TEXT, "length": 64, "samples": 1}
TASKS: dict[str, Any] = {"methods": ["full", "h2o"], "budget": 0.5, "samples": 1}
READ: dict[str, Any] = {"context": 40, "continuation": 8}
#: How each experiment is asked for little.
ASKED: dict[str, dict[str, Any]] = {
    "across.same_bytes": {**TEXT, **READ, "method": "h2o", "share": 0.5, "n": 1},
    "across.reading_times": {**TEXT, "slots": {"h2o": 16}, "context": 40, "n": 1, "repeats": 1},
    "curvature.alignment": {**SMALL, "layers": 1, "pairs": 4},
    "curvature.closed_form": {**SMALL, "draws": 2, "layers": 1},
    "kvmerger.similarity": {**SMALL, "layers": 1, "map_tokens": 16, "tokens": 32, "reach": 8},
    "kvmerger.merging_sets": {**SMALL, "method": "kvmerger(budget_mode='threshold')", "budget": 0.5},
    "kvmerger.ablations": {**TEXT, **READ, "methods": "kvmerger", "budget": 0.5, "samples": 1},
    "kvslimmer.similarity": SMALL,
    "kvslimmer.spectra": SMALL,
    "kvslimmer.efficiency": {**TEXT, "methods": "h2o", "lengths": 40, "budget": 16, "chunk": 8, "repeats": 1},
    "needle.needle": {
        **{**TEXT, "methods": "h2o", "lengths": 64, "depths": 0.5, "budget": 0.5, "samples": 1, "question": "seen"}
    },
    "quantised_slots.same_bytes": {**TEXT, **READ, "method": "h2o", "bits": 4, "share": 0.5, "n": 1},
    "tasks.longbench": {**TASKS, "tasks": ["qasper", "zeroscrolls/qmsum"]},
    "tasks.retrieval": {**TASKS, "tasks": ["niah_single", "madlibs1"], "length": 900},
    "weightedkv.toy": {},
    "weightedkv.spectra": {**TEXT, "n": 1, "length": 32},
    "weightedkv.perplexity": {**TEXT, "method": "h2o", "budget": 16, "window": 32, "n_windows": 1},
    "weightedkv.perplexity_in_pieces": {**TEXT, "method": "h2o", "budget": 16, "piece": 32, "n_pieces": 1},
    "weightedkv.merge_or_evict": {**TEXT, "budget": 16, "length": 32, "n": 1},
    "weightedkv.one_merge": {**TEXT, "n": 1, "step": 16, "following": 8},
    "yardstick.errors": {**TEXT, **READ, "method": "h2o", "share": 0.5, "fit": 24, "n": 1},
}


def experiments() -> dict[str, Callable[..., list[records.Record]]]:
    """Every function that sweeps, by module and name; what times a machine stays there, ``targets`` reads."""
    found = {}
    for info in pkgutil.iter_modules(package.__path__):
        module = importlib.import_module(f"{package.__name__}.{info.name}")
        for name, function in inspect.getmembers(module, inspect.isfunction):
            own = function.__module__ == module.__name__ and not name.startswith("_")
            if (
                own
                and info.name not in ("speed", "task_runtimes", "targets")
                and function.__annotations__.get("return") == "list[Record]"
            ):
                found[f"{info.name}.{name}"] = function
    return found


def test_every_experiment_is_asked() -> None:
    assert set(ASKED) == set(experiments())


@pytest.mark.parametrize("name", sorted(ASKED))
@pytest.mark.usefixtures("data")
def test_cells_of_experiments_can_be_sent(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measure_tiny(monkeypatch)
    monkeypatch.setattr(tasks, "_tokenizer", lambda _: Letters())
    sent: list[tuple[records.Cell, partial[Value]]] = []
    monkeypatch.setattr(Store, "sweep", lambda self, cells, title: sent.extend(cells) or [])
    model = {} if name == "weightedkv.toy" else {"model": "smollm2-135m"}
    experiments()[name](**ASKED[name], **model)
    assert sent
    for cell, run in sent:
        packed = order(run, cell)
        assert packed.problem(1) is None
        there = packed.unpack()
        assert (there.func, repr(there.args), repr(there.keywords)) == (run.func, repr(run.args), repr(run.keywords))
        if "hardware" in cell.params:
            assert executors.names_this_machine(cell)
        elif name in ("weightedkv.toy", "weightedkv.perplexity", "yardstick.errors", "across.same_bytes"):
            values = [records.measured(cell, each, "key", "code")[0].value for each in (run, there)]
            assert values[0] == values[1] and values[0].n


# --- on the cluster


def test_records_are_those_of_this_process(tmp_path: Path, cluster: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = 3.0
    runs = [
        partial(number, 1.5),
        lambda: number(ours),  # a closure
        partial(failing, Skip("needs a GPU")),
        partial(failing, ValueError("wrong")),
        partial(failing, MemoryError("no room")),
        partial(number, float("nan")),
        huge,
    ]
    here = Store(tmp_path / "here").sweep(cells(*runs), "here")
    monkeypatch.setenv(executors.VARIABLE, cluster)
    store = Store(tmp_path / "there")
    there = store.sweep(cells(*runs), "there")
    assert [record.status for record in there] == ["ok", "ok", "skipped", "error", "oom", "error", "oom"]
    for a, b in zip(here, there, strict=True):
        assert (a.key, a.cell, a.status) == (b.key, b.cell, b.status)
        assert a.reason.rsplit(" (", 1)[0] == b.reason.rsplit(" (", 1)[0]  # code that travels has no file
        assert (a.value.value, a.value.spread, a.value.n) == (b.value.value, b.value.spread, b.value.n)
        assert set(a.provenance) == set(b.provenance)
        assert all(a.provenance[name] == b.provenance[name] for name in ("code", "module", "commit", "device"))
    assert pid(here[0]) == os.getpid() != pid(there[0])
    assert store.touched == there
    assert sorted(r.key for r in Store(tmp_path / "there").records()) == sorted(r.key for r in there)
    monkeypatch.setenv(executors.VARIABLE, "dask://127.0.0.1:1")  # nobody there, and nobody needed
    assert store.sweep(cells(*runs[:3]), "again") == there[:3]


@pytest.mark.usefixtures("on_workers")
def test_workers_measure_at_the_same_time_and_progress_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    progress = tmp_path / "progress"
    monkeypatch.setenv("KVREPRO_PROGRESS", str(progress))
    runs = [partial(together, tmp_path, "a", "b"), partial(together, tmp_path, "b", "a")]
    found = Store(tmp_path / "records").sweep(cells(*runs), "title")
    assert len({pid(record) for record in found}) == 2
    steps = [json.loads(line) for line in progress.read_text().splitlines()]
    assert [step["done"] for step in steps] == sorted(step["done"] for step in steps)
    assert (steps[-1]["done"], steps[-1]["total"], steps[-1]["running"]) == (2, 2, "")
    assert any(step["running"].endswith(", and 1 more") for step in steps)


class Shared:
    """What several cells are measured on, as prompts are: two of them are never equal."""

    def __init__(self) -> None:
        self.uses = 0

    def use(self) -> Value:
        self.uses += 1
        return Value(float(self.uses), extra={"pid": os.getpid()})


def use(shared: Shared, _: int) -> Value:
    return shared.use()


@pytest.mark.usefixtures("on_workers")
def test_what_cells_share_is_one_object_a_worker(tmp_path: Path) -> None:
    shared = Shared()
    found = Store(tmp_path).sweep(cells(*(partial(use, shared, i) for i in range(8))), "title")
    seen = Counter(pid(record) for record in found)
    for worker, n in seen.items():
        assert sorted(r.value.value for r in found if pid(r) == worker) == list(range(1, n + 1))
    assert sum(seen.values()) == 8 and len(seen) <= 2


class Halved(Shared):
    """Of which cells of even and of odd seeds need different halves."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Halved)

    def __hash__(self) -> int:
        return 0

    def shared(self, cell: records.Cell) -> int:
        return (cell.seed or 0) % 2


@pytest.mark.usefixtures("on_workers")
def test_the_next_sweep_goes_where_the_last_one_worked_it_out(tmp_path: Path) -> None:
    half: list[set[int]] = [set(), set()]
    for sweep in range(3):
        every = cells(*(partial(use, Halved(), i) for i in range(6)), sweep=sweep)
        found = Store(tmp_path).sweep(every[::-1] if sweep else every, "title")
        for record in found:
            half[record.cell.seed % 2].add(pid(record))  # type: ignore[operator]
    assert [len(pids) for pids in half] == [1, 1]


@pytest.mark.usefixtures("on_workers")
def test_memory_that_others_hold_is_no_result(tmp_path: Path) -> None:
    """Two workers share a memory for one cell: what does not fit beside another is measured alone."""
    runs = [partial(large, tmp_path, f"cell {i}", 1) for i in range(4)]
    found = Store(tmp_path.with_name(f"{tmp_path.name}-records")).sweep(cells(*runs), "title")
    assert [record.status for record in found] == ["ok"] * 4
    assert max(tries(tmp_path).values()) <= 2


@pytest.mark.usefixtures("on_workers")
def test_what_does_not_fit_alone_is_out_of_memory(tmp_path: Path) -> None:
    runs = [partial(large, tmp_path, "too large", 0), *(partial(large, tmp_path, f"cell {i}", 2) for i in range(3))]
    found = Store(tmp_path.with_name(f"{tmp_path.name}-records")).sweep(cells(*runs), "title")
    assert [record.status for record in found] == ["oom", "ok", "ok", "ok"]
    assert "1 cells hold memory for 0" in found[0].reason  # the last try was alone
    assert tries(tmp_path)["too large"] == 2


@pytest.mark.usefixtures("on_workers")
def test_running_out_of_memory_beside_others_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another client never leaves the cell alone: after so many tries it is recorded."""
    monkeypatch.setattr(executors, "MOST_CROWDED", 0)
    gate, mine = tmp_path / "gate", tmp_path / "mine"
    mine.mkdir()
    theirs: list[records.Record] = []
    beside = threading.Thread(target=sweep_beside, args=(tmp_path / "theirs", theirs, partial(until, gate)))
    beside.start()
    time.sleep(3)  # one worker measures for it
    found = Store(tmp_path / "ours").sweep(cells(partial(large, mine, "too large", 0)), "title")
    gate.touch()
    beside.join(30)
    assert [record.status for record in found + theirs] == ["oom", "ok"]
    assert tries(mine) == {"too large": 1}


class NoPrompts:
    """A task's prompts, of which there are none."""

    rows, max_length, samples = 1, None, ()

    @property
    def task(self) -> NoPrompts:
        return self

    @property
    def bench(self) -> NoPrompts:
        return self

    def load(self) -> tuple[None, None]:
        return None, None


def kept_before(then: Callable[[], Any] = int) -> Value:
    """How many readings this process kept; now it keeps one."""
    found = batch._groups.cache_info().currsize
    batch._groups(NoPrompts())  # type: ignore[arg-type]
    then()
    return Value(float(found), extra={"pid": os.getpid()})


def memory_is_full(tried: Path, later: float) -> Value:
    """Run out of memory, once, after a while."""
    if tried.exists():
        return Value(1.0)
    tried.touch()
    time.sleep(later)
    raise MemoryError


def one_a_worker(folder: Path, *names: str) -> list[Callable[[], Value]]:
    """Two cells that look at what is kept, each on a worker of its own."""
    return [partial(kept_before, partial(together, folder, *pair)) for pair in (names, names[::-1])]


@pytest.mark.usefixtures("on_workers")
def test_a_worker_keeps_nothing_of_another_experiment(tmp_path: Path) -> None:
    for turn, experiment in enumerate(["one", "two", "one"]):
        for kept in (0, 1):
            runs = one_a_worker(tmp_path, f"{turn} {kept} a", f"{turn} {kept} b")
            sweep = cells(*runs, experiment=experiment, turn=turn, kept=kept)
            found = Store(tmp_path / "records").sweep(sweep, "title")
            assert [record.value.value for record in found] == [kept, kept]


@pytest.mark.usefixtures("on_workers")
def test_an_idle_worker_lets_go_of_what_it_keeps_where_memory_runs_out(tmp_path: Path) -> None:
    runs = [kept_before, partial(memory_is_full, tmp_path / "tried", 1.0)]
    keeper, full = Store(tmp_path / "records").sweep(cells(*runs), "title")
    assert (full.status, full.value.value) == ("ok", 1.0)
    then = Store(tmp_path / "then").sweep(cells(*one_a_worker(tmp_path, "a", "b"), then=1), "title")
    assert {pid(record): record.value.value for record in then}[pid(keeper)] == 0


@pytest.mark.usefixtures("on_workers")
def test_cells_that_name_this_machine_are_measured_here(tmp_path: Path) -> None:
    store = Store(tmp_path)
    named = store.sweep(cells(partial(number, 1.0), hardware=provenance.device_name("cpu")), "timing")
    other = store.sweep(cells(partial(number, 1.0), hardware="NVIDIA H100"), "elsewhere")
    assert pid(named[0]) == os.getpid() != pid(other[0])


@pytest.mark.usefixtures("on_workers")
def test_a_strict_store_raises_after_recording(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="ValueError: wrong"):
        Store(tmp_path, strict=True).sweep(cells(partial(failing, ValueError("wrong"))), "title")
    assert [record.status for record in Store(tmp_path).records()] == ["error"]


@pytest.mark.usefixtures("on_workers", "heeds_interrupts")
def test_an_interrupt_keeps_what_came_back_and_begins_nothing_more(tmp_path: Path) -> None:
    marks, gate, path = tmp_path / "marks", tmp_path / "gate", tmp_path / "records" / "demo.jsonl"
    marks.mkdir()

    def interrupt() -> None:
        while not (path.is_file() and path.stat().st_size):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    first = [partial(once, marks, "first"), partial(until, gate), partial(until, gate)]
    rest = [partial(once, marks, f"rest {i}") for i in range(6)]
    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        Store(path.parent).sweep(cells(first[0], first[1], *rest[:3], first[2], *rest[3:]), "title")
    gate.touch()  # the workers end what they had begun
    again = Store(path.parent)
    kept = {record.cell.seed for record in again.records()}
    began = len(tries(marks))
    assert {record.status for record in again.records()} == {"ok"} and 0 in kept and len(kept) < 9
    found = again.sweep(cells(first[0], first[1], *rest[:3], first[2], *rest[3:]), "again")
    assert len(found) == 9 and {record.status for record in found} == {"ok"}
    assert tries(marks)["first"] == 1 and began < 7


@pytest.mark.usefixtures("on_workers")
def test_a_worker_with_other_code_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "fingerprint", lambda run, method: "0" * 64)  # as if this process had other code
    with pytest.raises(ExecutorError, match="worker tcp://.* its code is not the client's .* same commit"):
        Store(tmp_path).sweep(cells(partial(number, 1.0)), "title")
    assert Store(tmp_path).records() == []


@pytest.mark.usefixtures("on_workers")
def test_a_notebook_s_kernel_uses_the_workers(tmp_path: Path) -> None:
    project = make_project(tmp_path / "project")
    run_notebook(project, "demo/sizes", {"size": 7})
    page = next(project.runs.glob("*.ipynb"))
    (record,) = records.read_records(page.with_suffix(".records.jsonl"))
    assert record.value.value == 7.0 and record.provenance["module"] == "__main__"
    stamp = json.loads(page.with_suffix(".stamp.json").read_text())
    assert stamp["environment"]["device"].endswith("and a Dask cluster")


def sweep_beside(folder: Path, found: list[records.Record], *runs: Callable[[], Value], **params: Any) -> None:
    found += Store(folder).sweep(cells(*runs, **params), "title")


@pytest.mark.usefixtures("on_workers")
def test_sweeps_share_the_workers_and_nothing_else(tmp_path: Path) -> None:
    """Two clients: the second gets the workers that the first leaves idle, and the same cells are two tasks."""
    gates = [tmp_path / name for name in ("first", "last")]
    ours: list[records.Record] = []
    theirs: list[records.Record] = []
    runs = [partial(until, gate) for gate in gates]
    one = threading.Thread(target=sweep_beside, args=(tmp_path / "ours", ours, *runs), daemon=True)
    one.start()
    time.sleep(3)  # both workers measure for it
    two = threading.Thread(target=sweep_beside, args=(tmp_path / "theirs", theirs, *runs[:1]), daemon=True)
    two.start()
    time.sleep(1)
    assert ours == theirs == []
    gates[0].touch()
    two.join(30)
    assert [record.status for record in theirs] == ["ok"] and one.is_alive()
    gates[1].touch()
    one.join(30)
    assert [record.status for record in ours] == ["ok", "ok"]
    assert theirs[0].key == ours[0].key


# --- workers that a build starts for itself


def test_workers_of_a_build_s_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, log = tmp_path / "folder", tmp_path / "workers.log"
    folder.mkdir()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 6)
    before = dict(os.environ)
    with workers.working(1, folder, log) as name:
        assert dict(os.environ) == before  # or kernels would run on one thread
        monkeypatch.setenv(executors.VARIABLE, name)
        found = Store(tmp_path / "records").sweep(cells(whereabouts, whereabouts, whereabouts), "title")
        assert re.fullmatch(r"dask://127\.0\.0\.1:\d+", name)
    assert {(r.value.extra["folder"], r.value.extra["threads"]) for r in found} == {(str(folder), "6")}
    assert {r.value.extra["host"] for r in found} == {"127.0.0.1"}
    assert not any(alive(pid(record)) for record in found)
    assert "Start worker at" in log.read_text()
    with pytest.raises(ExecutorError, match="no Dask scheduler answers"):
        monkeypatch.setattr(executors, "_CONNECT_S", 1)
        executors.check()


def test_workers_are_killed_at_what_they_do_after_an_interrupt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before they are asked to end, since they would first be waited for."""
    started: list[int] = []
    codes: list[int] = []
    end = workers._end

    def noted(running: list[subprocess.Popen[bytes]]) -> None:
        """Ask them to end, once they have; who is not killed goes on."""
        codes.extend(process.wait(60) for process in running)
        end(running)

    monkeypatch.setattr(workers, "_end", noted)
    with (
        pytest.raises(KeyboardInterrupt),
        workers.working(2, tmp_path) as name,
        Client(name.replace("dask://", "tcp://"), set_as_default=False) as client,
    ):
        started += client.run(os.getpid).values()
        begun = tmp_path / "begun"
        # Not a function of this module, which these workers cannot import.
        fire_and_forget(client.submit(exec, f"import time; open({str(begun)!r}, 'w').close(); time.sleep(600)"))
        until(begun)
        raise KeyboardInterrupt
    assert codes == 2 * [-signal.SIGKILL]
    until_s = time.monotonic() + 30  # a process that was killed ends a moment later
    while any(map(alive, started)) and time.monotonic() < until_s:
        time.sleep(0.05)
    assert len(started) == 2 and not any(map(alive, started))


def test_a_worker_that_does_not_start_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "_command", lambda *_: [sys.executable, "-c", "raise SystemExit('no')"])
    log = tmp_path / "workers.log"
    with (
        pytest.raises(ExecutorError, match=f"0 of 1 workers started; {log} says more"),
        workers.working(1, tmp_path, log),
    ):
        pass
    assert log.read_text() == "no\n"


def test_a_worker_that_does_not_start_ends_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which may be killed before they have said anything."""
    started: list[subprocess.Popen[bytes]] = []
    start, seconds = workers._started, iter(["600", "0"])

    def noted(*given: Any) -> subprocess.Popen[bytes]:
        started.append(start(*given))
        return started[-1]

    monkeypatch.setattr(workers, "_started", noted)
    code = "import sys, time; time.sleep(int(sys.argv[1]))"
    monkeypatch.setattr(workers, "_command", lambda *_: [sys.executable, "-c", code, next(seconds)])
    with pytest.raises(ExecutorError, match="0 of 2 workers started$"), workers.working(2, tmp_path):
        pass
    assert [process.poll() for process in started] == [-signal.SIGKILL, 0]


@pytest.mark.parametrize(
    ("visible", "found", "seen"),
    [(None, 0, []), (None, 1, []), (None, 2, ["0", "1", "0"]), ("5,7", 2, ["5", "7", "5"])],
)
def test_workers_take_turns_with_the_gpus(
    visible: str | None, found: int, seen: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: found)
    environments = list(workers._environments(3))
    assert [each["CUDA_VISIBLE_DEVICES"] for each in environments if "CUDA_VISIBLE_DEVICES" in each] == seen


def test_fewer_than_one_worker_is_refused() -> None:
    with pytest.raises(RequestError, match="0 workers measure nothing"):
        workers.check(0)
    workers.check(1)


# --- the last test: it takes the workers down


@pytest.mark.usefixtures("on_workers")
def test_a_killed_worker_costs_its_own_cell_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executors, "MOST_LOST", 2)
    plain = [partial(once, tmp_path, f"plain {i}") for i in range(4)]
    killed, poison = partial(deadly, tmp_path, "killed once", 1), partial(deadly, tmp_path, "poison", 99)
    folder = tmp_path.with_name(f"{tmp_path.name}-records")
    found = Store(folder).sweep(cells(killed, plain[0], poison, *plain[1:]), "title")
    assert [record.status for record in found] == ["ok", "ok", "error", "ok", "ok", "ok"]
    assert found[0].value.value == 2.0
    assert "2 workers were lost" in found[2].reason and found[2].provenance["device"] == ""
    assert tries(tmp_path) == {**{f"plain {i}": 1 for i in range(4)}, "killed once": 2, "poison": 2}
