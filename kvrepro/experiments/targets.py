"""What the timings should reach, and whether they do: by rule, from records."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from kvrepro.experiments.speed import PAPER, PLAIN_LOOP, TRANSFORMERS
from kvrepro.records import Record, Store, read_records

MET, MISSED, UNKNOWN = "met", "not met", "not measured"
#: What a parameter must agree in for a measurement and its peer to be of the same thing.
SAME = ("hardware", "dtype", "length", "slots", "batch")
GIB = 2**30
#: Columns of a board that are the same in most rows or said otherwise.
REPEATED = ["hardware", "dtype", "model", "label", "chunk"]


def published() -> list[Record]:
    """The timings that are published with the project; none where there are none."""
    folder = Store.default().published_folder
    return [] if folder is None else read_records(folder / f"{PAPER}.jsonl")


class Board:
    """The newest record of each cell, to be asked by what was measured."""

    def __init__(self, records: Iterable[Record]) -> None:
        """Keep the timings; a later record of a cell replaces an earlier one."""
        newest: dict[str, Record] = {}
        for record in sorted(records, key=lambda record: record.provenance["date"]):
            if record.cell.paper == PAPER:
                newest[record.cell.identity] = record
        self.records = list(newest.values())

    def all(self, experiment: str | None = None, peer: str | None = "", **asked: object) -> list[Record]:
        """Records by experiment, peer and parameters.

        Args:
            experiment: piece, or None for any.
            peer: the beginning of the peer's name, ``""`` for the package's own, None for either.
            **asked: parameters or fields of the cell with their values.
        """
        found = []
        for record in self.records:
            name = str(record.cell.params.get("peer", ""))
            fits = peer is None or (name.startswith(peer) if peer else not name)
            if experiment in (None, record.cell.experiment) and fits and _agrees(record, asked):
                found.append(record)
        return found

    def best(self, experiment: str, peer: str | None = "", **asked: object) -> Record | None:
        """The fastest of the measured records, such as of compiled and not; None without any."""
        found = [record for record in self.all(experiment, peer, **asked) if record.value.value is not None]
        sign = -1 if any(record.cell.unit == "tokens/s" for record in found) else 1
        return min(found, key=lambda record: sign * float(record.value.value or 0), default=None)

    def peer_of(self, record: Record, peer: str = TRANSFORMERS) -> Record | None:
        """The peer's measurement of the same thing on the same hardware, or None."""
        same = {name: record.cell.params[name] for name in SAME if name in record.cell.params}
        if peer == PLAIN_LOOP:
            same.pop("batch", None)
            same["label"] = record.cell.params["label"]
        return self.best(record.cell.experiment, peer, model=record.cell.model, metric=record.cell.metric, **same)


def _agrees(record: Record, asked: dict[str, object]) -> bool:
    """Whether a record's cell has the parameters or fields asked for."""
    cell = record.cell
    return all(cell.params.get(name, getattr(cell, name, None)) == value for name, value in asked.items())


def share(record: Record) -> float | None:
    """The floor's time over the time taken, at most 1 where the floor is right; None without a floor."""
    floor, value = record.value.extra.get("floor"), record.value.value
    if not floor or not value:
        return None
    if record.cell.unit in ("s", "ms"):
        return float(floor) / value
    times = sorted(record.value.extra["times"])
    return float(floor) / times[len(times) // 2]


def board(records: Iterable[Record]) -> pd.DataFrame:
    """One row a cell: what, the value with its unit, the peer's, their ratio, the floor and the share of it."""
    table = Board(records)
    rows = [_row(table, record) for record in table.records]
    return pd.DataFrame(rows, columns=list(_COLUMNS))


_COLUMNS = (
    *(
        "hardware",
        "dtype",
        "model",
        "label",
        "chunk",
        "piece",
        "method",
        "peer",
        "task",
        "length",
        "slots",
        "batch",
        "value",
        "unit",
    ),
    *("transformers", "ratio", "floor", "share of floor", "peak GiB", "cache GiB", "status"),
)


def _row(table: Board, record: Record) -> dict[str, Any]:
    """One row of :func:`board`."""
    cell, value, extra = record.cell, record.value.value, record.value.extra
    compiled = ", compiled" if cell.params.get("compile") else ""
    row: dict[str, Any] = {
        name: cell.params.get(name)
        for name in ("hardware", "dtype", "label", "chunk", "peer", "task", "length", "slots", "batch")
    }
    row["model"] = cell.model
    row |= {"piece": cell.experiment, "method": cell.params["label"] + compiled, "value": value, "unit": cell.unit}
    row |= {"floor": extra.get("floor"), "share of floor": share(record), "status": record.status}
    row |= {f"{name} GiB": extra[name] / GIB for name in ("peak", "cache") if extra.get(name)}
    row["batch"] = extra.get("batch", row["batch"])
    other = table.peer_of(record, PLAIN_LOOP if cell.experiment == "perplexity" else TRANSFORMERS)
    if other is not None and other is not record and value:
        row |= {"transformers": other.value.value, "ratio": value / float(other.value.value or 1)}
    return row


def plain(frame: pd.DataFrame) -> pd.DataFrame:
    """A table to read: counts as whole numbers, without the columns that :data:`REPEATED` names."""
    frame = frame.drop(columns=REPEATED, errors="ignore")
    counts = {name: frame[name].map(_count) for name in ("length", "slots", "batch") if name in frame}
    return frame.assign(**counts)


def _count(value: float | None) -> str:
    """A whole number for people, or nothing."""
    return "" if value is None or pd.isna(value) else f"{int(value):,}"


def text(frame: pd.DataFrame) -> str:
    """A table for a terminal: four significant digits, blanks where there is nothing."""
    frame = plain(frame)
    return frame.to_string(index=False, na_rep="", float_format=lambda x: f"{x:.4g}") if len(frame) else "(no records)"


# --- targets --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Found:
    """What was found for a target.

    Attributes:
        measured: the measured value.
        peer: the peer's value, or None.
        judged: the number that the limit is for.
        record: the record behind it.
    """

    measured: float
    peer: float | None
    judged: float
    record: Record


@dataclass(frozen=True)
class Target:
    """A limit on something measured.

    Attributes:
        name: what is measured, in words, with the method.
        limit: the limit on the number judged.
        at_most: whether the number must not be above the limit, or else not below it.
        unit: unit of the limit; with ``x`` for a ratio.
        find: looks the number up.
        shown: unit of the measured value.
        on: what the hardware's name must contain; None for anything but a GPU.
    """

    name: str
    limit: float
    at_most: bool
    unit: str
    find: Callable[[Board], Found | None]
    shown: str
    on: str | None = "H100"

    def holds_for(self, record: Record) -> bool:
        """Whether the record was measured on the hardware that the target is for."""
        hardware = str(record.cell.params.get("hardware", ""))
        return "NVIDIA" not in hardware if self.on is None else self.on in hardware

    @property
    def rule(self) -> str:
        """The limit in words."""
        return f"{'≤' if self.at_most else '≥'} {self.limit:g} {self.unit}".replace(" x", " ×")

    def verdict(self, found: Found | None) -> str:
        """Met, not met, or not measured."""
        if found is None:
            return UNKNOWN
        good = found.judged <= self.limit if self.at_most else found.judged >= self.limit
        return MET if good else MISSED


def _ratio(record: Record | None, other: Record | None, name: str | None = None) -> Found | None:
    """The ratio of two records' values, or of one of their extras."""
    if record is None or other is None:
        return None
    a, b = ((r.value.value if name is None else r.value.extra[name]) for r in (record, other))
    return Found(float(a), float(b), float(a) / float(b), record)


def _alone(record: Record | None, other: Record | None = None) -> Found | None:
    """A record's value itself; the other's stands beside it."""
    if record is None or record.value.value is None:
        return None
    return Found(record.value.value, None if other is None else other.value.value, record.value.value, record)


def _reading(label: str, where: dict[str, object], name: str | None = None) -> Callable[[Board], Found | None]:
    def find(board: Board) -> Found | None:
        found = board.best("prefill", label=label, length=32768, **where)
        return None if found is None else _ratio(found, board.peer_of(found), name)

    return find


def _long(label: str, where: dict[str, object]) -> Callable[[Board], Found | None]:
    def find(board: Board) -> Found | None:
        found = board.all("prefill", label=label, length=131072, **where)
        if not found:
            return None
        record = next((r for r in found if r.status == "ok"), found[0])
        done = float(record.status == "ok")
        other = board.peer_of(record)
        return Found(record.value.value or float("nan"), other and other.value.value, done, record)

    return find


def _step(label: str, slots: int, where: dict[str, object], other: str | None = None) -> Callable[..., Found | None]:
    def find(board: Board) -> Found | None:
        found = board.best("decode", label=label, slots=slots, batch=1, **where)
        if found is None or other is None:
            return _alone(found, found and board.peer_of(found))
        same = {"compile": found.cell.params["compile"], **where}
        return _ratio(found, board.best("decode", label=other, slots=slots, batch=1, **same))

    return find


def _merge(label: str, where: dict[str, object]) -> Callable[[Board], Found | None]:
    def find(board: Board) -> Found | None:
        found = board.best("merging", label=label, length=32768, **where)
        return found and Found(float(found.value.value or 0), None, 100 * float(found.value.extra["share"]), found)

    return find


def _pair(length: int, where: dict[str, object], name: str | None = None) -> Callable[[Board], Found | None]:
    def find(board: Board) -> Found | None:
        ours, theirs = (board.best("pairs", label=x, length=length, **where) for x in ("kvslimmer", "asymkv"))
        return _ratio(ours, theirs, name)

    return find


def _rows(label: str, where: dict[str, object]) -> Callable[[Board], Found | None]:
    def find(board: Board) -> Found | None:
        found = board.best("throughput", label=label, length=32768, **where)
        return None if found is None else _ratio(found, board.peer_of(found))

    return find


def _streaming(where: dict[str, object], loop: bool) -> Callable[[Board], Found | None]:
    def find(board: Board) -> Found | None:
        found = board.best("perplexity", label="weightedkv", **where)
        other = found and board.peer_of(found, PLAIN_LOOP)
        return _ratio(found, other) if loop else _alone(found, other)

    return find


def targets(model: str = "llama-3.1-8b", embedded: str = "smollm2-135m") -> list[Target]:
    """The targets.

    Args:
        model: shape that they are for.
        embedded: shape that the perplexity's are for.
    """
    where: dict[str, object] = {"model": model}
    found = [*_prompt_targets(where), *_decode_targets(where), *_merge_targets(where)]
    for label in ("streaming_llm", "weightedkv"):
        name = f"largest batch at 32k, {label}"
        found.append(Target(name, 1.0, False, "x full cache", _rows(label, where), "tokens/s"))
    small: dict[str, object] = {"model": embedded}
    found.append(Target("perplexity, weightedkv", 20000, False, "tokens/s", _streaming(small, False), "tokens/s"))
    loop = _streaming(small, True)
    found.append(Target("perplexity on a CPU, weightedkv", 5, False, "x plain loop", loop, "tokens/s", on=None))
    return found


def _prompt_targets(where: dict[str, object]) -> list[Target]:
    """Reading long prompts with exact attention statistics."""
    found = []
    for label in ("h2o", "weightedkv", "kvmerger", "kvslimmer"):
        found.append(Target(f"32k prompt, {label}", 1.25, True, "x SDPA", _reading(label, where), "s"))
        find = _reading(label, where, "peak")
        found.append(Target(f"32k prompt, peak memory, {label}", 1.0, True, "x SDPA", find, "bytes"))
        found.append(Target(f"128k prompt in chunks, {label}", 1, False, "run", _long(label, where), "s"))
    return found


def _decode_targets(where: dict[str, object]) -> list[Target]:
    """Decoding, and what letting go or merging at every step adds."""
    found = []
    for slots, limit in ((1024, 7.0), (8192, 7.5)):
        for label in ("full", "streaming_llm", "h2o", "weightedkv"):
            name = f"decoding at {slots:,} slots, {label}"
            found.append(Target(name, limit, True, "ms a token", _step(label, slots, where), "ms"))
        for label in ("weightedkv", "kvmerger", "kvslimmer"):
            find = _step(label, slots, where, "streaming_llm")
            name = f"merging while decoding at {slots:,} slots, {label}"
            found.append(Target(name, 1.10, True, "x StreamingLLM", find, "ms"))
    return found


def _merge_targets(where: dict[str, object]) -> list[Target]:
    """Merging a prompt once, and pair by pair."""
    found = []
    for label in ("kvmerger", "kvslimmer", "d2o", "keepkv"):
        name = f"one-shot merging at 32k, {label}"
        found.append(Target(name, 3.0, True, "% of the prefill", _merge(label, where), "s"))
    for length in (8192, 32768):
        name = f"{length // 1024}k prompt, KVSlimmer against AsymKV"
        found.append(Target(f"{name}, time", 0.72, True, "x AsymKV", _pair(length, where), "s"))
        found.append(Target(f"{name}, memory", 0.71, True, "x AsymKV", _pair(length, where, "peak"), "bytes"))
    return found


def readable(table: pd.DataFrame) -> pd.DataFrame:
    """The columns of :func:`verdicts` that fit a page: values with their units, the floor as a share in per cent."""

    def value(row: pd.Series, name: str) -> str:
        """A value with its unit, or a dash."""
        x = row[name]
        return "–" if pd.isna(x) else f"{x:,.0f} {row.unit}" if x >= 1000 else f"{x:.4g} {row.unit}"

    return pd.DataFrame(
        {
            "target": table.target,
            "limit": table.limit,
            "measured": [value(row, "measured") for _, row in table.iterrows()],
            "peer": [value(row, "peer") for _, row in table.iterrows()],
            "judged": table.judged,
            "verdict": table.verdict,
            "% of floor's speed": 100 * table["share of floor"].astype(float),
        }
    )


def verdicts(records: Iterable[Record], chosen: Sequence[Target] | None = None) -> pd.DataFrame:
    """One row a target: measured, peer, the number judged, floor, share of the floor, limit, verdict."""
    records, rows = list(records), []
    for target in targets() if chosen is None else chosen:
        found = target.find(Board(record for record in records if target.holds_for(record)))
        row: dict[str, Any] = {"target": target.name, "limit": target.rule, "verdict": target.verdict(found)}
        row["unit"], scale = ("GiB", GIB) if target.shown == "bytes" else (target.shown, 1)
        if found is not None:
            peer = None if found.peer is None else found.peer / scale
            row |= {"measured": found.measured / scale, "peer": peer, "judged": found.judged}
            if target.shown != "bytes":
                row |= {"floor": found.record.value.extra.get("floor"), "share of floor": share(found.record)}
        rows.append(row)
    columns = ["target", "measured", "unit", "peer", "judged", "limit", "verdict", "floor", "share of floor"]
    return pd.DataFrame(rows, columns=columns)
