"""Two record stores side by side: does another machine, or another version, measure the same?"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kvrepro.records import Record, read_records

#: Differences below this share of the values are rounding, whatever the spread.
RTOL = 1e-6
#: The same cell measured again, on another machine: the same samples, so that only rounding differs, which now and then
#: turns a choice of the method. Share of the value, by number format (wider in formats of fewer bits).
REBUILT_RTOL = {"float32": 1e-3, "float64": 1e-3}
COARSE_RTOL = 1e-2
#: Share of the published standard error: what is less changes no statement. At most :data:`COARSE_RTOL` of the value.
REBUILT_ERROR = 0.1
#: Less than this is nothing but rounding, as where the value is a numerical error itself.
REBUILT_ATOL = 1e-6


@dataclass(frozen=True)
class Pair:
    """One cell that was measured in both stores.

    Attributes:
        a, b: the records.
        difference: value of ``b`` minus value of ``a``.
        tolerance: the difference that counts as agreement.
    """

    a: Record
    b: Record
    difference: float
    tolerance: float

    @property
    def agrees(self) -> bool:
        """Whether the two values are as close as they should be."""
        return abs(self.difference) <= self.tolerance


@dataclass(frozen=True)
class Comparison:
    """What two stores have in common and where they differ.

    Attributes:
        pairs: cells with a value in both.
        only_a, only_b: cells with a value in one of them.
        without_value: cells in both whose result is no single number.
    """

    pairs: list[Pair]
    only_a: list[Record]
    only_b: list[Record]
    without_value: list[Record]

    @property
    def disagreements(self) -> list[Pair]:
        """Pairs whose values differ by more than the tolerance."""
        return [pair for pair in self.pairs if not pair.agrees]


def load(path: Path) -> dict[str, Record]:
    """The newest finished record of each cell in a store, whatever code measured it.

    Args:
        path: a folder of ``.jsonl`` files, or one such file.

    Raises:
        ValueError: no such folder or file, or no record in it.
    """
    if not path.exists():
        raise ValueError(f"{path} does not exist; give a folder of records, such as results/local, or one .jsonl file")
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    records = [record for file in files for record in read_records(file) if record.status == "ok"]
    if not records:
        raise ValueError(f"no finished record in {path}")
    records.sort(key=lambda record: record.provenance["date"])
    return {record.cell.identity: record for record in records}


def compare(a: Path, b: Path, rtol: float = RTOL) -> Comparison:
    """Compare two stores cell by cell.

    Two values agree when they differ by at most two combined standard errors, ``2 sqrt(s_a^2 + s_b^2)``, or by at most
    ``rtol`` of the larger one, whichever is more.

    Args:
        a: a folder of records, or one file.
        b: another.
        rtol: share of the larger value.

    Raises:
        ValueError: a store without records.
    """
    left, right = load(a), load(b)
    both = [(record, right[identity]) for identity, record in left.items() if identity in right]
    numbers = [(x, y) for x, y in both if x.value.value is not None and y.value.value is not None]
    return Comparison(
        pairs=[_pair(x, y, rtol) for x, y in numbers],
        only_a=_missing(left, right),
        only_b=_missing(right, left),
        without_value=[x for x, y in both if x.value.value is None or y.value.value is None],
    )


def _missing(of: dict[str, Record], others: Iterable[str]) -> list[Record]:
    known = set(others)
    return [record for identity, record in of.items() if identity not in known]


def _pair(a: Record, b: Record, rtol: float) -> Pair:
    x, y = float(a.value.value or 0.0), float(b.value.value or 0.0)
    error = math.hypot(a.value.spread or 0.0, b.value.spread or 0.0)
    return Pair(a, b, y - x, max(2 * error, rtol * max(abs(x), abs(y))))


@dataclass(frozen=True)
class Apart:
    """A cell measured here that no published value can be put beside.

    Attributes:
        record: what was measured here.
        kind: why, in a word or two, the same for all cells of a kind.
        reason: why, in full.
    """

    record: Record
    kind: str
    reason: str


@dataclass(frozen=True)
class Rebuilt:
    """Values measured here beside the published ones.

    Attributes:
        pairs: published (``a``) and measured here (``b``), with the tolerance of :func:`rebuilt_tolerance`.
        apart: cells that could not be compared.
    """

    pairs: list[Pair]
    apart: list[Apart]

    @property
    def disagreements(self) -> list[Pair]:
        """Pairs whose values differ by more than the tolerance."""
        return [pair for pair in self.pairs if not pair.agrees]


def rebuilt(published: Iterable[Record], here: Iterable[Record]) -> Rebuilt:
    """Put what was measured here beside what was published, cell by cell; times are never compared.

    Args:
        published: published records; the newest of a cell counts.
        here: records of this machine.
    """
    finished = sorted((r for r in published if r.status == "ok"), key=lambda record: record.provenance["date"])
    known = {record.cell.identity: record for record in finished}
    alike = defaultdict(list)
    for record in known.values():
        alike[_kin(record)].append(record)
    pairs, apart = [], []
    for record in here:
        kind, reason = _incomparable(record)
        twin = known.get(record.cell.identity)
        if not kind and twin is None:
            kind, reason = _without_twin(record, alike[_kin(record)])
        elif not kind and twin == record:
            kind, reason = "the published record itself", "it was measured by this copy, so there is nothing to compare"
        if kind or twin is None:
            apart.append(Apart(record, kind, reason))
            continue
        difference = float(record.value.value or 0.0) - float(twin.value.value or 0.0)
        pairs.append(Pair(twin, record, difference, rebuilt_tolerance(twin)))
    return Rebuilt(pairs, apart)


def rebuilt_tolerance(published: Record) -> float:
    """How far the same cell, measured on another machine, may be from the published value.

    Model, text, samples, seeds and number format are the same, so the statistical error says nothing: what is left is
    rounding, and the choices that rounding turns. The tolerance is the largest of a share of the value
    (:data:`REBUILT_RTOL` in float32, :data:`COARSE_RTOL` in coarser formats), a share of the published standard error
    (:data:`REBUILT_ERROR`, but never more than :data:`COARSE_RTOL` of the value), and :data:`REBUILT_ATOL`.
    """
    share = REBUILT_RTOL.get(published.cell.params.get("dtype", "float32"), COARSE_RTOL)
    value, error = float(published.value.value or 0.0), published.value.spread or 0.0
    return max(share * abs(value), min(REBUILT_ERROR * error, COARSE_RTOL * abs(value)), REBUILT_ATOL)


def _incomparable(record: Record) -> tuple[str, str]:
    """Kind and reason for a record that is never compared, or empty texts."""
    if record.status != "ok":
        return "not measured", f"{record.status}: {record.reason}"
    if record.cell.is_time:
        return "a time", "times and speeds depend on the machine"
    if record.value.value is None:
        return "no single number", "the result is an array"
    return "", ""


def _kin(record: Record) -> tuple[str, ...]:
    """What a cell must share with another one to be called the same measurement with other parameters."""
    cell = record.cell
    return cell.paper, cell.experiment, cell.metric, cell.method


def _without_twin(record: Record, kin: Iterable[Record]) -> tuple[str, str]:
    """Why no published record has this cell: in what the nearest one differs."""
    mine = _flat(record)
    found = [_differences(mine, _flat(other)) for other in kin]
    if not found:
        return "not published", "nothing of this experiment, measure and method is published"
    nearest = min(found, key=len)
    names = {name for name, _, _ in nearest}
    told = ", ".join(f"{name} {ours} for {theirs}" for name, ours, theirs in nearest)
    if names <= {"text's sha256", "model's sha256"}:
        what = " and ".join(sorted(name.removesuffix("'s sha256") for name in names))
        return f"other {what}", f"the same name, another version of the {what}"
    return "other parameters", f"here {told} in the nearest published cell"


def _flat(record: Record) -> dict[str, Any]:
    """A cell's fields, options and parameters by name."""
    cell = asdict(record.cell)
    options, params = cell.pop("options"), cell.pop("params")
    cell["text's sha256"], cell["model's sha256"] = cell.pop("data_sha256"), cell.pop("model_sha256")
    if not params.get("label"):
        params.pop("label", None)
    return {**cell, **{f"option {name}": value for name, value in options.items()}, **params}


def _differences(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Names of what differs, with both values; sums are shortened."""
    absent = "(none)"
    found = []
    for name in dict.fromkeys([*mine, *theirs]):
        ours, other = mine.get(name, absent), theirs.get(name, absent)
        if ours != other and not (name.endswith("sha256") and _named_apart(name, mine, theirs)):
            found.append((name, str(ours)[:40], str(other)[:40]))
    return found


def _named_apart(name: str, mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> bool:
    """Whether a sum differs only because the name of the text or model does."""
    field = "data" if name.startswith("text") else "model"
    return bool(mine.get(field) != theirs.get(field))
