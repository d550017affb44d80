"""Bootstrap intervals over documents: alone, paired, and of the mean over several tasks."""

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
    mean = float(np.mean(np.asarray(values, dtype=np.float64)))
    if len(set(documents)) == 1:
        return Interval(mean, None, None)
    means = drawn(values, documents, seed=seed, draws=draws)
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(mean, float(low), float(high))


def paired(
    first: Sequence[float], second: Sequence[float], documents: Sequence[str], *, seed: int = 0, draws: int = DRAWS
) -> Interval:
    """Mean of second − first over the same samples, with its interval over documents; arguments as `bootstrap`'s."""
    return bootstrap([b - a for a, b in zip(first, second, strict=True)], documents, seed=seed, draws=draws)


def macro(parts: Sequence[tuple[Sequence[float], Sequence[str]]], *, seed: int = 0, draws: int = DRAWS) -> Interval:
    """The mean over tasks of each task's mean, every task counting alike, with its bootstrap interval.

    Documents are drawn with replacement within each task. A task of one document cannot vary: its mean is taken as it
    is, and where every task has one only, there is no interval.

    Args:
        parts: a task's values `[n]` and the documents of its samples `[n]`.
        seed: of the draws.
        draws: number of draws.

    Raises:
        ValueError: no tasks, or as `bootstrap` says.
    """
    if not parts:
        raise ValueError("a mean over tasks needs at least one task")
    whole = [bootstrap(values, documents, seed=seed, draws=1) for values, documents in parts]
    mean = float(np.mean([each.mean for each in whole]))
    if all(each.low is None for each in whole):
        return Interval(mean, None, None)
    means = np.mean(
        [drawn(values, documents, seed=seed + place, draws=draws) for place, (values, documents) in enumerate(parts)],
        axis=0,
    )  # [draws]
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(mean, float(low), float(high))


def drawn(values: Sequence[float], documents: Sequence[str], *, seed: int, draws: int) -> np.ndarray:
    """Means `[draws]` over the samples of documents drawn with replacement; arguments as `bootstrap`'s."""
    _, place = np.unique(np.asarray(documents), return_inverse=True)  # [n], document of each sample
    sums = np.bincount(place, weights=np.asarray(values, dtype=np.float64))  # [documents]
    counts = np.bincount(place)  # [documents]
    chosen = np.random.default_rng(seed).integers(len(sums), size=(draws, len(sums)))
    return sums[chosen].sum(axis=1) / counts[chosen].sum(axis=1)
