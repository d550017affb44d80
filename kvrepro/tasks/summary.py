"""From records of tasks to what a page shows: averages over tasks, paired differences, and tables of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd

from kvrepro.records import Record
from kvrepro.tasks.intervals import Interval, macro

_COLUMNS = ("label", "budget", "tasks", "n", "mean", "low", "high")


def measured(records: Iterable[Record], samples: str = "loglik") -> list[Record]:
    """Records that hold the samples asked for, ``loglik``, ``exact`` or ``scores``."""
    return [record for record in records if record.status == "ok" and samples in record.value.extra]


def averages(records: Iterable[Record], samples: str = "loglik") -> pd.DataFrame:
    """The mean over tasks of each method, one row a method and budget.

    Args:
        records: of one way of reading the prompts.
        samples: ``loglik``, ``exact`` or ``scores``.

    Returns:
        Columns ``label, budget, tasks, n, mean, low, high``; the interval is the 95 % bootstrap over documents.
    """
    rows = []
    for (label, budget), group in _methods(measured(records, samples)).items():
        parts = [(each.value.extra[samples], each.value.extra["documents"]) for each in group.values()]
        rows.append(_row(label, budget, parts))
    return pd.DataFrame(rows, columns=list(_COLUMNS))


def differences(records: Iterable[Record], against: str = "full", samples: str = "loglik") -> pd.DataFrame:
    """Each method's paired difference to another at the same budget (the full cache has none), averaged over tasks.

    Args:
        records: of one way of reading the prompts.
        against: label of the other.
        samples: as in `averages`.

    Returns:
        As `averages`, without rows of the other itself; only tasks that both have count.
    """
    found = _methods(measured(records, samples))
    rows = []
    for (label, budget), group in found.items():
        other = found.get((against, budget), found.get((against, None), {}))
        shared = [name for name in group if name in other]
        if label != against and shared:
            rows.append(_row(label, budget, [_pair(group[name], other[name], samples) for name in shared]))
    return pd.DataFrame(rows, columns=list(_COLUMNS))


def by_task(records: Iterable[Record], against: str = "full", samples: str = "loglik") -> pd.DataFrame:
    """As `differences`, each task by itself: with the column ``task``."""
    found = _methods(measured(records, samples))
    rows = []
    for (label, budget), group in found.items():
        other = found.get((against, budget), found.get((against, None), {}))
        for name in group:
            if label != against and name in other:
                rows.append({"task": name, **_row(label, budget, [_pair(group[name], other[name], samples)])})
    return pd.DataFrame(rows, columns=["task", *_COLUMNS])


def apart(frame: pd.DataFrame) -> pd.Series:
    """1 or -1 where a row's interval lies above or below zero, else 0."""
    low, high = (frame[name].astype(float) for name in ("low", "high"))
    return (low > 0).astype(int) - (high < 0).astype(int)


def in_words(row: pd.Series, digits: int = 2) -> str:
    """A mean with its interval: ``-0.12 [-0.20, -0.05]``."""
    ends = "" if pd.isna(row.low) else f" [{row.low:+.{digits}f}, {row.high:+.{digits}f}]"
    return f"{row['mean']:+.{digits}f}{ends}".replace("-", "\N{MINUS SIGN}")


def _methods(records: Sequence[Record]) -> dict[tuple[str, int | float | None], dict[str, Record]]:
    """Records by method and budget, and there by task; the last one of a task counts."""
    found: dict[tuple[str, int | float | None], dict[str, Record]] = {}
    for record in records:
        key = str(record.cell.params["label"]), record.cell.budget
        found.setdefault(key, {})[f"{record.cell.experiment}/{record.cell.params['task']}"] = record
    return found


def _pair(record: Record, other: Record, samples: str) -> tuple[list[float], Sequence[str]]:
    """Differences a sample `[n]`, and documents.

    Raises:
        ValueError: they are not of the same samples.
    """
    a, b = record.value.extra, other.value.extra
    if a["ids"] != b["ids"] or record.cell.data_sha256 != other.cell.data_sha256:
        raise ValueError(f"{record.cell.label()} and {other.cell.label()} are not of the same samples")
    return np.subtract(a[samples], b[samples]).tolist(), a["documents"]


def _row(
    label: str, budget: int | float | None, parts: Sequence[tuple[Sequence[float], Sequence[str]]]
) -> dict[str, object]:
    """One row of a table."""
    mean: Interval = macro(parts)
    ends = [np.nan if end is None else end for end in (mean.low, mean.high)]
    n = sum(len(values) for values, _ in parts)
    return dict(zip(_COLUMNS, (label, budget, len(parts), n, mean.mean, *ends), strict=True))
