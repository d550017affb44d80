"""The record store: every measured cell is one JSON line, written atomically and never edited.

A record's key is the sha256 of its cell and of the code that measured it, so a value whose method, core modules or
experiment changed is measured again instead of being shown. Records live in ``results/local`` (``KVREPRO_RESULTS``
moves it); the committed ones in ``results/published`` are read for comparison and never count as measured here.
"""

from __future__ import annotations

import fcntl
import functools
import gc
import hashlib
import json
import logging
import math
import os
import re
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from tqdm import tqdm

from kvrepro import provenance
from kvrepro.fingerprint import fingerprint, is_current, measuring_module, with_bases

if TYPE_CHECKING:
    import pandas as pd

Status = Literal["ok", "oom", "error", "skipped"]
#: Statuses that are not measured again while cell and code stay the same.
DONE: frozenset[str] = frozenset({"ok", "skipped"})
SCHEMA = 1
#: A line longer than this is a mistake: an array that should have been subsampled.
MAX_LINE_BYTES = 1 << 20
_FREE_BYTES_NEEDED = 4 * MAX_LINE_BYTES
_OUT_OF_MEMORY = re.compile(r"out of memory|can't allocate memory|not enough memory|_ALLOC_FAILED", re.IGNORECASE)
_log = logging.getLogger(__name__)


class StoreError(OSError):
    """Records cannot be written or read where they should be; the message says what to do."""


class Skip(Exception):
    """Raised by a measuring function to record that, and why, a cell cannot be measured here."""


class TimesLater(RuntimeError):
    """A time is to be measured, and ``KVREPRO_TIMES=later`` says that what runs beside this would be part of it."""


def plain(value: Any, digits: int | None = None) -> Any:
    """A JSON-able copy of a value: tuples and arrays become lists, numbers Python's own.

    Args:
        value: None, bool, int, float, str, or mappings, sequences, numpy arrays and tensors of them.
        digits: significant digits that floats are rounded to; None keeps them and refuses NaN and infinity, while
            with rounding NaN and infinity become None.

    Raises:
        ValueError: something else, a key that is no string, or a number that is not finite.
    """
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, float | np.floating):
        return _plain_float(float(value), digits)
    if isinstance(value, int | np.integer):
        return int(value)
    if isinstance(value, torch.Tensor):
        return plain(value.detach().cpu().tolist(), digits)
    if isinstance(value, np.ndarray | np.bool_):
        return plain(value.tolist(), digits)
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            raise ValueError(f"records take mappings with string keys, not {list(value)}")
        return {key: plain(item, digits) for key, item in value.items()}
    if isinstance(value, Sequence):
        return [plain(item, digits) for item in value]
    raise ValueError(f"a record cannot hold a {type(value).__name__} ({value!r}): give a number, string or list")


def _plain_float(value: float, digits: int | None) -> float | None:
    if digits is None:
        if not math.isfinite(value):
            raise ValueError(f"{value} cannot be part of a record's key or value: JSON has no such number")
        return value
    return float(f"{value:.{digits}g}") if math.isfinite(value) else None


def canonical(value: Any) -> str:
    """The one JSON text of a value: sorted keys, no spaces, ``1`` and ``1.0`` kept apart, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=True)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class Cell:
    """What a value is a measurement of; two equal cells ask for the same number.

    Attributes:
        paper: paper or chapter the experiment belongs to, as in ``notebooks/<paper>``.
        experiment: name of the experiment.
        metric: what the value is, such as ``"perplexity"``.
        unit: its unit, empty for a pure number.
        method: method of compression, or several joined by ``+`` where one value compares them.
        options: every option of the method (``method.resolved()``).
        model: model's name.
        model_sha256: its identity (``kvrepro.models.model_identity``).
        data: name of the text.
        data_sha256: its sha256 (``kvrepro.texts.Text.sha256``).
        budget: slots (int), share (float), or None for all.
        seed: seed of every random draw.
        params: everything else the value depends on: window, stride, chunk, number of samples, dtype; for timings also
            ``kvrepro.provenance.device_name()``.
    """

    paper: str
    experiment: str
    metric: str
    unit: str = ""
    method: str = "full"
    options: Mapping[str, Any] = field(default_factory=dict)
    model: str
    model_sha256: str
    data: str
    data_sha256: str
    budget: int | float | None = None
    seed: int = 0
    params: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Bring every field to plain JSON, so that a cell read back equals the one written.

        Raises:
            ValueError: a value that JSON cannot hold, or a parameter named like a column of ``Store.frame``.
        """
        for item in fields(self):
            try:
                object.__setattr__(self, item.name, plain(getattr(self, item.name)))
            except ValueError as error:
                raise ValueError(f"cell field {item.name}: {error}") from error
        clash = sorted(set(self.params) & set(COLUMNS))
        if clash:
            raise ValueError(f"parameters must not be named like a record's columns: {', '.join(clash)}")

    @property
    def is_time(self) -> bool:
        """Whether the value is a time or speed of one machine: such cells name their hardware."""
        return "hardware" in self.params

    @functools.cached_property
    def identity(self) -> str:
        """The sha256 of the cell alone, whatever code measured it."""
        return _sha256(canonical(asdict(self)))

    @functools.cached_property
    def methods(self) -> str:
        """The methods whose code the value depends on, joined by ``+``: ``method``, and what its options build on."""
        return with_bases(self.method, self.options)

    def key(self, code: str) -> str:
        """Key of the record of this cell measured by a given code.

        Args:
            code: fingerprint of the measuring code.
        """
        return _sha256(canonical({"cell": asdict(self), "code": code}))

    def label(self) -> str:
        """Short text for progress bars: method, budget, parameters."""
        budget = [] if self.budget is None else [f"budget={self.budget}"]
        short = [f"{k}={v}" for k, v in self.params.items() if isinstance(v, int | float | str) and len(str(v)) <= 12]
        return " ".join([self.method, *budget, *short])


@dataclass(frozen=True)
class Value:
    """A measured value.

    Attributes:
        value: the number, or None where the result is an array in ``extra``. NaN and infinity are recorded as status
            ``error``, since the number cannot be shown.
        spread: its standard error over ``n`` samples; NaN (one sample) is stored as None.
        n: number of samples behind it.
        extra: further results, JSON-able; arrays and tensors become lists, floats keep 6 significant digits, and what
            is not finite becomes None.
    """

    value: float | None
    spread: float | None = None
    n: int = 1
    extra: Mapping[str, Any] = field(default_factory=dict)

    def plain(self) -> Value:
        """The value as it is stored.

        Raises:
            ValueError: a value that is not finite, or extras that JSON cannot hold.
        """
        if self.value is not None and not math.isfinite(self.value):
            raise ValueError(f"the result is not finite: {float(self.value)}")
        spread = None if self.spread is None or not math.isfinite(self.spread) else float(self.spread)
        value = None if self.value is None else float(self.value)
        return Value(value, spread, int(self.n), plain(self.extra, digits=6))


@dataclass(frozen=True)
class Record:
    """One measured cell.

    Attributes:
        key: sha256 of cell and code.
        cell: what was measured.
        value: the result; ``Value(None, n=0)`` unless the status is ``ok``.
        status: ``ok``; ``skipped`` (cannot be measured here); ``oom`` and ``error`` (tried again next time).
        reason: why the status is not ``ok``.
        provenance: commit, dirty, date, device, threads, versions, wall_s, peak_bytes, code, module.
    """

    key: str
    cell: Cell
    value: Value
    status: Status
    reason: str
    provenance: Mapping[str, Any]

    def line(self) -> str:
        """The record as one line of strict JSON, without the newline."""
        return canonical({"schema": SCHEMA, **asdict(self)})

    @staticmethod
    def parse(line: str | bytes) -> Record:
        """The record of one line.

        Raises:
            ValueError: the line is no record of this schema.
        """
        try:
            data = json.loads(line)
            if data.pop("schema") != SCHEMA:
                raise ValueError("a record of another schema")
            return Record(**{**data, "cell": Cell(**data["cell"]), "value": Value(**data["value"])})
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"not a record: {error}") from error

    @property
    def is_current(self) -> bool:
        """Whether the code that measured it is, fingerprint for fingerprint, the code that is here now."""
        return is_current(self.provenance["module"], self.cell.methods, self.provenance["code"])

    def row(self) -> dict[str, Any]:
        """The record as one flat row of ``Store.frame``: options as ``option.<name>``, parameters by their names."""
        cell = {item.name: getattr(self.cell, item.name) for item in fields(Cell) if item.name in COLUMNS}
        value = {"value": self.value.value, "spread": self.value.spread, "n": self.value.n, "extra": self.value.extra}
        run = {name: self.provenance.get(name) for name in _PROVENANCE_COLUMNS}
        options = {f"option.{name}": item for name, item in self.cell.options.items()}
        row = {**cell, **value, "status": self.status, "reason": self.reason, **run, "key": self.key}
        return {**row, **options, **self.cell.params}


_CELL_COLUMNS = tuple(item.name for item in fields(Cell) if item.name not in ("options", "params"))
_PROVENANCE_COLUMNS = ("commit", "dirty", "date", "device", "wall_s", "peak_bytes")
#: Columns of ``Store.frame`` that every record has, in order.
COLUMNS = (*_CELL_COLUMNS, "value", "spread", "n", "extra", "status", "reason", *_PROVENANCE_COLUMNS, "key")


class RecordFile:
    """One JSON-lines file that several processes may append to at once."""

    def __init__(self, path: Path) -> None:
        """Nothing is opened yet."""
        self.path = path
        self._offset = 0

    def read_new(self) -> list[Record]:
        """Records appended since the last call, this process's own included.

        A line that was cut off by a crash is skipped with a warning; an unfinished last line is left for later.

        Raises:
            StoreError: the file is there but cannot be read.
        """
        try:
            with self.path.open("rb") as file:
                file.seek(self._offset)
                data = file.read()
        except FileNotFoundError:
            return []
        except OSError as error:
            raise StoreError(f"cannot read the records in {self.path}: {error.strerror or error}") from error
        whole = data[: data.rfind(b"\n") + 1]
        self._offset += len(whole)
        return list(self._parse(whole))

    def _parse(self, data: bytes) -> Iterator[Record]:
        for line in data.splitlines():
            try:
                if line.strip():
                    yield Record.parse(line)
            except ValueError as error:
                _log.warning("%s: a line that is no whole record is ignored (%s)", self.path, error)

    def check_writable(self) -> None:
        """Make sure, before anything is computed, that a record can be written.

        Raises:
            StoreError: no permission, or no space.
        """
        with self._explained():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            os.close(self._open())
            free = shutil.disk_usage(self.path.parent).free
        if free < _FREE_BYTES_NEEDED:
            raise StoreError(
                f"only {free / 1e6:.1f} MB are free in {self.path.parent}, records need "
                f"{_FREE_BYTES_NEEDED / 1e6:.1f} MB: free some, or set KVREPRO_RESULTS to a folder on another disk"
            )

    def append(self, records: Iterable[Record]) -> None:
        """Append records, each on a line of its own, all of them or none.

        Raises:
            StoreError: they could not be written; what the file held before is untouched.
        """
        data = b"".join(record.line().encode() + b"\n" for record in records)
        with self._explained():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            handle = self._open()
            try:
                fcntl.flock(handle, fcntl.LOCK_EX)
                _append_whole(handle, data)
            finally:
                os.close(handle)  # releases the lock

    def _open(self) -> int:
        return os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StoreError(
                f"cannot write records to {self.path}: {error.strerror or error}. Earlier records are untouched. "
                "Free some space or set KVREPRO_RESULTS to a folder that can be written"
            ) from error


def _append_whole(handle: int, data: bytes) -> None:
    """Append all bytes under a lock already held, or leave the file as it was."""
    size = os.fstat(handle).st_size
    if size and os.pread(handle, 1, size - 1) != b"\n":
        data = b"\n" + data  # a crash cut the last line off: start on a fresh one
    written = 0
    try:
        while written < len(data):
            written += os.write(handle, data[written:])
        os.fsync(handle)
    except OSError:
        os.ftruncate(handle, size)
        raise


class Store:
    """Records of this machine, and the published ones beside them.

    Attributes:
        folder: where records are written, one file a paper.
        published_folder: committed records, only read; None for none.
        strict: raise what a measuring function raised, after it was recorded (``KVREPRO_STRICT=1``).
        touched: records measured or asked for through this store, in order, each once.
    """

    def __init__(self, folder: Path | str, published: Path | str | None = None, *, strict: bool | None = None) -> None:
        """A store over a folder, which is made when the first record is written."""
        self.folder = Path(folder)
        self.published_folder = None if published is None else Path(published)
        self.strict = os.environ.get("KVREPRO_STRICT", "") == "1" if strict is None else strict
        self._files: dict[Path, RecordFile] = {}
        self._records: dict[str, Record] = {}
        self._published: dict[str, list[Record]] | None = None
        self._touched: dict[str, Record] = {}

    @staticmethod
    def default() -> Store:
        """The store of this checkout: ``results/local`` and ``results/published``.

        ``KVREPRO_RESULTS`` replaces the first. Without a checkout, records go to ``kvrepro-results`` in the working
        folder. Within a process it is one store, so that ``touched`` and ``frame`` know all that was measured.
        """
        checkout = (provenance.ROOT / "pyproject.toml").is_file()
        base = provenance.ROOT / "results" if checkout else Path.cwd() / "kvrepro-results"
        folder = os.environ.get("KVREPRO_RESULTS") or base / "local"
        return _shared_store(Path(folder), base / "published")

    @property
    def touched(self) -> list[Record]:
        """Records measured or asked for through this store, each once, in order of first use."""
        return list(self._touched.values())

    def get(self, cell: Cell, run: Callable[..., Any]) -> Record | None:
        """The stored record of a cell measured by the present code, or None.

        Args:
            cell: what is asked for.
            run: the measuring function, which is not called.
        """
        return self._stored(cell.key(fingerprint(run, cell.methods)))

    def measure(self, cell: Cell, run: Callable[[], Value]) -> Record:
        """The record of a cell: the stored one, or a new one from running the measurement.

        Args:
            cell: what is measured.
            run: measures it. It may raise ``Skip``; any other exception becomes a record of status ``oom`` or
                ``error``, which is tried again next time.

        Raises:
            StoreError: records cannot be written (checked before running).
            TimesLater: the cell is a time, is not stored yet, and ``KVREPRO_TIMES=later`` is set.
            ValueError: an unknown method in the cell.
            KeyboardInterrupt: passed on; nothing is recorded.
        """
        code = fingerprint(run, cell.methods)
        key = cell.key(code)
        record = self._stored(key)
        if record is None or not _is_done(record):
            if cell.is_time and os.environ.get("KVREPRO_TIMES") == "later":
                raise TimesLater(f"{cell.label()}: other work runs beside this")
            file = self._file(cell)
            file.check_writable()
            record, error = measured(cell, run, key, code)
            file.append([record])
            self._records[key] = record
            if error is not None and self.strict:
                raise error
        self._touched[key] = record
        return record

    def sweep(self, cells: Sequence[tuple[Cell, Callable[[], Value]]], title: str) -> list[Record]:
        """Measure many cells, with a progress bar that names what runs and the time left.

        Only cells that are not stored yet count as steps. With ``KVREPRO_PROGRESS`` set to a file, one JSON line a step
        (``title, done, total, running, elapsed_s, left_s``) is appended there instead of drawing a bar.

        With ``KVREPRO_EXECUTOR`` set to ``dask://HOST:PORT``, the workers of that Dask scheduler measure, and their
        records are stored here as they come; but for cells that name this machine's hardware, see
        :mod:`kvrepro.executors`.

        Args:
            cells: cells and the functions that measure them.
            title: what the bar is called.

        Returns:
            The records, in the order of the cells.

        Raises:
            kvrepro.executors.ExecutorError: the workers cannot measure; what came back before is stored.
        """
        keyed = [(cell.key(fingerprint(run, cell.methods)), cell, run) for cell, run in cells]
        pending = {key: (cell, run) for key, cell, run in keyed if not _is_done(self._stored(key))}
        records = []
        with _Progress(title, len(pending)) as progress:
            found = self._measure_elsewhere(pending, progress)
            for key, cell, run in keyed:
                if pending.pop(key, None) and key not in found:
                    progress.start(cell.label())
                record = self._touched[key] = found.get(key) or self.measure(cell, run)
                records.append(record)
        return records

    def _measure_elsewhere(
        self, pending: Mapping[str, tuple[Cell, Callable[[], Value]]], progress: _Progress
    ) -> dict[str, Record]:
        """Have a cluster's workers measure what they may, storing each record as it comes; nothing without a cluster.

        Raises:
            RuntimeError: a cell failed, and the store is strict.
            StoreError: nothing may be measured.
        """
        from kvrepro import executors  # imports this module

        if pending and os.environ.get(executors.VARIABLE) == executors.STORED:
            first = next(iter(pending.values()))[0]
            raise StoreError(
                f"{len(pending)} values are not stored, and {executors.VARIABLE}={executors.STORED} forbids measuring: "
                f"{first.paper}/{first.experiment} {first.label()}"
            )
        address = executors.scheduler()
        if address is None:
            return {}
        jobs = [
            executors.Job(cell, run, key, fingerprint(run, cell.methods))
            for key, (cell, run) in pending.items()
            if not executors.names_this_machine(cell)
        ]
        for job in jobs:
            self._file(job.cell).check_writable()
        found: dict[str, Record] = {}
        with closing(executors.measure(address, jobs, progress.show)) as records:
            for _ in jobs:
                progress.start(progress.running)
                record = next(records)
                self._file(record.cell).append([record])
                found[record.key] = self._records[record.key] = record
                if self.strict and record.status in ("oom", "error"):
                    raise RuntimeError(f"{record.cell.label()}: {record.reason}")
        return found

    def published(self, cell: Cell) -> Record | None:
        """The newest published record of a cell, whatever code measured it (see ``Record.is_current``).

        Args:
            cell: what is asked for.

        Returns:
            The record, which then counts as touched; None where nothing was published.
        """
        if self._published is None:
            self._published = {}
            for record in self._read_published():
                self._published.setdefault(record.cell.identity, []).append(record)
        found = self._published.get(cell.identity)
        if not found:
            return None
        newest = max(found, key=lambda record: record.provenance["date"])
        self._touched[newest.key] = newest
        return newest

    def publish(self, records: Iterable[Record]) -> list[Record]:
        """Append records to the published ones, one file a paper; those already there are left out.

        Args:
            records: finished records.

        Returns:
            The records added.

        Raises:
            ValueError: the store has no published folder, or a record is not finished.
        """
        if self.published_folder is None:
            raise ValueError("this store has no folder of published records")
        known = {record.key for record in self._read_published()}
        added = {record.key: record for record in records if record.key not in known}
        unfinished = [record.cell.label() for record in added.values() if record.status not in DONE]
        if unfinished:
            raise ValueError(f"only finished records are published, not {'; '.join(unfinished)}")
        for record in added.values():
            RecordFile(self.published_folder / _file_name(record.cell)).append([record])
        self._published = None
        return list(added.values())

    def records(self) -> list[Record]:
        """Every local record, the latest of each key, oldest first."""
        for path in sorted(self.folder.glob("*.jsonl")):
            self._load(path)
        return sorted(self._records.values(), key=lambda record: record.provenance["date"])

    def frame(self, paper: str | None = None, experiment: str | None = None, *, touched: bool = True) -> pd.DataFrame:
        """Records as a table, one row each: ``COLUMNS``, then ``option.<name>``, then parameters by their names.

        Args:
            paper: only this paper's.
            experiment: only this experiment's.
            touched: only records used through this store (so of the present code); False for all stored locally.
        """
        import pandas as pd  # slow to import, and only tables need it

        chosen = [
            record
            for record in (self.touched if touched else self.records())
            if paper in (None, record.cell.paper) and experiment in (None, record.cell.experiment)
        ]
        rows = [record.row() for record in chosen]
        return pd.DataFrame(rows) if rows else pd.DataFrame(columns=list(COLUMNS))

    def _stored(self, key: str) -> Record | None:
        if not _is_done(self._records.get(key)):
            for path in self.folder.glob("*.jsonl"):
                self._load(path)
        return self._records.get(key)

    def _load(self, path: Path) -> None:
        for record in self._files.setdefault(path, RecordFile(path)).read_new():
            self._records[record.key] = record

    def _file(self, cell: Cell) -> RecordFile:
        path = self.folder / _file_name(cell)
        return self._files.setdefault(path, RecordFile(path))

    def _read_published(self) -> list[Record]:
        if self.published_folder is None:
            return []
        return [record for path in sorted(self.published_folder.glob("*.jsonl")) for record in read_records(path)]


@functools.cache
def _shared_store(folder: Path, published: Path) -> Store:
    return Store(folder, published)


def _file_name(cell: Cell) -> str:
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", cell.paper) + ".jsonl"


def _is_done(record: Record | None) -> bool:
    return record is not None and record.status in DONE


def measured(cell: Cell, run: Callable[[], Value], key: str, code: str) -> tuple[Record, Exception | None]:
    """Run a measurement and describe what came of it, without storing it.

    Args:
        cell: what is measured.
        run: measures it.
        key: of the record.
        code: fingerprint of the code that measures.

    Returns:
        The record, and the error where its status is ``oom`` or ``error``.
    """
    status: Status = "ok"
    reason, value, error = "", Value(None, n=0), None
    meter = provenance.Meter()
    try:
        with meter:
            measured = run()
        value = measured.plain()
        if (size := len(canonical(asdict(value)))) > MAX_LINE_BYTES:
            raise ValueError(f"{size / 1e6:.1f} MB of extra results; a record holds 1 MB: subsample the arrays")
    except Skip as skip:
        status, reason = "skipped", str(skip)
    except Exception as caught:
        value, error = Value(None, n=0), caught
        status = "oom" if _is_out_of_memory(caught) else "error"
        reason = _reason(caught)
        _log.warning("%s: %s", cell.label(), reason)
        _let_go(caught)
    if status == "oom":
        free_memory()
    about = provenance.describe(meter, code, measuring_module(run))
    return Record.parse(Record(key, cell, value, status, reason, about).line()), error


def _is_out_of_memory(error: Exception) -> bool:
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and _OUT_OF_MEMORY.search(str(error)) is not None


def _reason(error: Exception) -> str:
    """Kind, message and place of an error, without the machine's folders."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({'/'.join(Path(frames[-1].filename).parts[-2:])}:{frames[-1].lineno})" if frames else ""
    message = " ".join(str(error).split())
    return f"{type(error).__name__}: {message[:500]}{place}"


def _let_go(error: BaseException | None) -> None:
    """Free what the frames of an error, and of those that it came from, hold: on a GPU that is what ran out."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def free_memory() -> None:
    """Give back what nothing holds any more, on a GPU what PyTorch keeps for later, too."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


class _Progress:
    """A tqdm bar on stderr, or JSON lines in the file that ``KVREPRO_PROGRESS`` names. Silent without steps."""

    def __init__(self, title: str, total: int) -> None:
        self.title, self.total, self.done, self.running = title, total, -1, ""
        self._path = os.environ.get("KVREPRO_PROGRESS")
        self._start = time.monotonic()
        self._bar: tqdm[Any] | None = None

    def __enter__(self) -> _Progress:
        if self.total and not self._path:
            self._bar = tqdm(total=self.total, desc=self.title, file=sys.stderr, dynamic_ncols=True)
        return self

    def start(self, running: str) -> None:
        """Say that the next step runs, which ends the one before."""
        self.done += 1
        if self._bar is not None:
            self._bar.update(min(self.done, 1))
        self.show(running)

    def show(self, running: str) -> None:
        """Say what runs now."""
        self.running = running
        if self._bar is not None:
            self._bar.set_postfix_str(running)
        elif self._path and self.total:
            self._write(running)

    def _write(self, running: str) -> None:
        elapsed = time.monotonic() - self._start
        left = round(elapsed / self.done * (self.total - self.done), 1) if self.done else None
        step = {"title": self.title, "done": self.done, "total": self.total, "running": running}
        line = canonical({**step, "elapsed_s": round(elapsed, 1), "left_s": left})
        with Path(str(self._path)).open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def __exit__(self, *exception: object) -> None:
        if exception[0] is None and self.total:
            self.start("")
        if self._bar is not None:
            self._bar.close()


def read_records(path: Path | str) -> list[Record]:
    """Records of one JSON-lines file, such as the one a page offers for download.

    Raises:
        StoreError: the file cannot be read.
    """
    return RecordFile(Path(path)).read_new()


def write_records(path: Path | str, records: Iterable[Record]) -> None:
    """Write records to a file of their own in one step: readers see the old file or the new one.

    Raises:
        StoreError: the file cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text("".join(record.line() + "\n" for record in records), encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise StoreError(f"cannot write {path}: {error.strerror or error}") from error
