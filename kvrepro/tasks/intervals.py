"""Bootstrap intervals over documents, alone and paired."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

#: Draws of the bootstrap.
DRAWS = 10_000
LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean and its bootstrap percentile interval; the ends are None where there is one document only."""

    mean: float
    low: float | None
    high: float | None


def bootstrap(values: Sequence[float], documents: Sequence[str], *, seed: int = 0, draws: int = DRAWS) -> Interval:
    """The mean over samples, with the 95 % percentile interval of drawing whole documents with replacement.

    Args:
        values: one a sample, `[n]`.
        documents: the document of each sample, `[n]`.
        seed: of the draws; the same seed and documents give the same draws.
        draws: number of draws.

    Raises:
        ValueError: no values, or not as many documents as values.
    """
    if not len(values) or len(values) != len(documents):
        raise ValueError(f"{len(values)} values of {len(documents)} samples: give one value a sample, and at least one")
    _, place = np.unique(np.asarray(documents), return_inverse=True)  # [n], document of each sample
    sums = np.bincount(place, weights=np.asarray(values, dtype=np.float64))  # [documents]
    counts = np.bincount(place)  # [documents]
    mean = float(sums.sum() / counts.sum())
    if len(sums) == 1:
        return Interval(mean, None, None)
    drawn = np.random.default_rng(seed).integers(len(sums), size=(draws, len(sums)))
    means = sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)  # [draws]
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(mean, float(low), float(high))


def paired(
    first: Sequence[float], second: Sequence[float], documents: Sequence[str], *, seed: int = 0, draws: int = DRAWS
) -> Interval:
    """Mean of second − first over the same samples, with its interval over documents; arguments as `bootstrap`'s."""
    return bootstrap([b - a for a, b in zip(first, second, strict=True)], documents, seed=seed, draws=draws)
