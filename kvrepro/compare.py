"""Two record stores side by side: does another machine, or another version, measure the same?"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from kvrepro.records import Record, read_records

#: Differences below this share of the values are rounding, whatever the spread.
RTOL = 1e-6


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
