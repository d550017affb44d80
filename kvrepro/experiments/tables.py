"""From records to what a page shows: data frames, standard errors, the papers' own numbers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.resources import files

import numpy as np
import pandas as pd

from kvrepro.records import Record


@dataclass(frozen=True)
class Estimate:
    """A mean with its standard error.

    Attributes:
        mean: The mean.
        error: Standard error of the mean; NaN for fewer than two samples.
        n: Number of samples.
    """

    mean: float
    error: float
    n: int

    @property
    def sign(self) -> int:
        """1 or -1 when the mean is more than two standard errors from zero, else 0."""
        return int(np.sign(self.mean)) if abs(self.mean) > 2 * self.error else 0

    def __str__(self) -> str:
        """As ``0.012 ± 0.003``."""
        return f"{self.mean:.3g} ± {self.error:.1g}" if np.isfinite(self.error) else f"{self.mean:.3g}"


def estimate(samples: Sequence[float] | np.ndarray) -> Estimate:
    """Mean and standard error (sample standard deviation over √n) of independent samples ``[n]``."""
    x = np.asarray(samples, dtype=float)
    error = float(x.std(ddof=1) / np.sqrt(len(x))) if len(x) > 1 else float("nan")
    return Estimate(float(x.mean()), error, len(x))


def paired(samples: Sequence[float] | np.ndarray, reference: Sequence[float] | np.ndarray) -> Estimate:
    """Mean difference ``samples - reference`` of measurements of the same things ``[n]``, and its standard error.

    Texts differ far more from each other than methods do on one text: pairing takes that part out.

    Raises:
        ValueError: The lengths differ.
    """
    x, y = np.asarray(samples, dtype=float), np.asarray(reference, dtype=float)
    if x.shape != y.shape:
        raise ValueError(f"paired samples must be of the same things: {x.shape} against {y.shape}")
    return estimate(x - y)


def frame(records: Iterable[Record]) -> pd.DataFrame:
    """One row a measured record: the cell's fields, its ``params`` and the value's ``extra`` as columns of their own.

    Records that are not ``ok`` are left out: :func:`problems` lists them.
    """
    rows = []
    for record in records:
        if record.status != "ok":
            continue
        cell, value = record.cell, record.value
        row = {
            "label": cell.method,
            "method": cell.method,
            "metric": cell.metric,
            "unit": cell.unit,
            "model": cell.model,
        }
        row |= {"data": cell.data, "budget": cell.budget, "seed": cell.seed, "options": dict(cell.options)}
        row |= dict(cell.params)
        row |= {"value": value.value, "spread": value.spread, "n": value.n, **dict(value.extra), "key": record.key}
        rows.append(row)
    return pd.DataFrame(rows)


def over_seeds(found: pd.DataFrame, by: Sequence[str]) -> pd.DataFrame:
    """How much a number depends on the seed: its mean over seeds and the standard deviation between them.

    Args:
        found: As from :func:`frame`, one row a setting and seed.
        by: Columns that tell settings apart.

    Returns:
        One row a setting, in their order: the columns of ``by``; ``seeds``, their number; ``value``, the mean; ``sd``,
        NaN for one seed; ``most``, the largest difference between two seeds; ``spread``, the mean of the standard
        errors that single seeds have.
    """
    groups = found.astype({"spread": float}).groupby(list(by), sort=False, as_index=False)
    return groups.agg(
        seeds=("value", "size"),
        sd=("value", "std"),
        most=("value", np.ptp),
        spread=("spread", "mean"),
        value=("value", "mean"),
    )


def problems(records: Iterable[Record]) -> pd.DataFrame:
    """One row a cell that could not be measured, with the reason; empty when all went well."""
    rows = [
        {"method": r.cell.method, "budget": r.cell.budget, "data": r.cell.data, "status": r.status, "reason": r.reason}
        for r in records
        if r.status != "ok"
    ]
    return pd.DataFrame(rows, columns=["method", "budget", "data", "status", "reason"])


def published(paper: str, experiment: str | None = None) -> pd.DataFrame:
    """Numbers a paper reports, with the column ``source`` that says whether they were read in the paper or second-hand.

    Args:
        paper: The paper's name as printed: WeightedKV, TOVA, KVMerger, AsymKV, KVSlimmer.
        experiment: One table or experiment of it, or None for all.

    Raises:
        ValueError: Nothing is recorded under these names.
    """
    with files("kvrepro").joinpath("data/published_numbers.csv").open(encoding="utf-8") as handle:
        table = pd.read_csv(handle)
    known = table[["paper", "experiment"]].drop_duplicates()
    chosen = table[(table.paper == paper) & (experiment is None or table.experiment == experiment)]
    if chosen.empty:
        valid = "; ".join(f"{p}: {e}" for p, e in known.itertuples(index=False))
        raise ValueError(f"no published numbers for {paper!r}, {experiment!r}; there are {valid}")
    return chosen.reset_index(drop=True)


def kvpress_reference() -> pd.DataFrame:
    """What the kvpress library reaches on the embedded model: ``press, removed, delta_nll, kl, source``.

    ``removed`` is the share of slots removed, ``delta_nll`` and ``kl`` are nats per token, for 1,024 tokens of context
    and the 256 that follow. Figures copied from a run outside this package: no record stands behind them.
    """
    with files("kvrepro").joinpath("data/kvpress_reference.csv").open(encoding="utf-8") as handle:
        return pd.read_csv(handle)


def compare(frame: pd.DataFrame, column: str, reference: str, on: Sequence[str]) -> pd.DataFrame:
    """Add the paired difference of every row to the reference method's row.

    Args:
        frame: One row a cell, with the samples ``[n]`` of a cell in ``column``.
        column: Column of the samples.
        reference: Label of the reference method.
        on: Columns in which a row and its reference agree; leave out ``budget`` where the reference has none.

    Returns:
        A copy with the columns ``difference`` and ``error`` (mean paired difference and its standard error) and
        ``sign`` (-1 or 1 when the difference is beyond two standard errors, else 0); NaN where there is no reference.
    """
    base = {tuple(row[list(on)]): row[column] for _, row in frame[frame.label == reference].iterrows()}
    found = [
        paired(row[column], base[key]) if (key := tuple(row[list(on)])) in base else Estimate(np.nan, np.nan, 0)
        for _, row in frame.iterrows()
    ]
    return frame.assign(
        difference=[e.mean for e in found], error=[e.error for e in found], sign=[e.sign for e in found]
    )


def verdict(sign: int, expected: int) -> str:
    """A claim's fate in words: the sign found (0 for within errors) against the one claimed."""
    if sign == 0:
        return "Not decided here"
    return "Reproduced here" if sign == expected else "Not reproduced here"
