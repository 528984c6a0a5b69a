"""Two ways of training compared image by image: is the difference more than luck?

`hits` are bool or 0/1 arrays ``[S, N]``: S seeds, N test images, whether the image is right.
Accuracies and differences are in points (percent of images).
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import numpy as np

RESAMPLES = 2000
_SMALLEST_GAP = 1.0  # points between teacher and baseline below which a share of it means nothing


class Estimate(NamedTuple):
    """A value and its 95 % confidence interval."""

    value: float
    low: float
    high: float


def bootstrap(values: np.ndarray, *, resamples: int = RESAMPLES, seed: int = 0) -> Estimate:
    """100 times the mean of ``[S, N]``, with the interval of resampled images and seeds.

    Each resample draws N images and S seeds with replacement (percentile bootstrap). For a paired
    difference give ``hits_a - hits_b``: whatever both share cancels. With one seed the interval
    speaks of images alone.

    Raises:
        ValueError: `values` is not ``[S, N]`` with at least one of each.
    """
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 2 or 0 in values.shape:
        raise ValueError(f"expected values of shape [seeds, images], got {values.shape}")
    seeds, images = values.shape
    rng = np.random.default_rng(seed)
    means = np.empty(resamples)
    for number in range(resamples):
        drawn = values[rng.integers(seeds, size=seeds)].mean(0) if seeds > 1 else values[0]
        means[number] = drawn[rng.integers(images, size=images)].mean()
    low, high = np.percentile(100 * means, [2.5, 97.5])
    return Estimate(100 * float(values.mean()), float(low), float(high))


def paired_difference(
    hits_a: np.ndarray, hits_b: np.ndarray, *, resamples: int = RESAMPLES, seed: int = 0
) -> Estimate:
    """Accuracy of a less accuracy of b in points, paired by image and seed.

    Raises:
        ValueError: the arrays differ in shape.
    """
    if np.shape(hits_a) != np.shape(hits_b):
        raise ValueError(f"cannot pair {np.shape(hits_a)} with {np.shape(hits_b)}")
    difference = np.asarray(hits_a, dtype=np.float64) - np.asarray(hits_b, dtype=np.float64)
    return bootstrap(difference, resamples=resamples, seed=seed)


def mcnemar(hits_a: np.ndarray, hits_b: np.ndarray) -> float:
    """Exact two-sided p of McNemar's test on the images ``[N]`` that one alone gets right.

    1.0 when there is no such image.
    """
    from scipy.stats import binomtest

    a, b = np.asarray(hits_a, dtype=bool), np.asarray(hits_b, dtype=bool)
    if a.shape != b.shape:
        raise ValueError(f"cannot pair {a.shape} with {b.shape}")
    only_a, only_b = int((a & ~b).sum()), int((~a & b).sum())
    return float(binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0


def gap_recovered(student: float, baseline: float, teacher: float) -> float | None:
    """Share of the way from the baseline's accuracy to the teacher's that the student has gone.

    None when the teacher is less than 1 point better than the baseline.
    """
    gap = teacher - baseline
    return (student - baseline) / gap if gap >= _SMALLEST_GAP else None


def seed_noise(hits: np.ndarray) -> dict[str, float] | None:
    """What another seed alone changes: means over all pairs of the S seeds; None for one seed.

    ``difference``: of the accuracies, in points, without sign. ``churn``: images that one of the
    two gets right and the other wrong, in percent.
    """
    hits = np.asarray(hits, dtype=bool)
    pairs = list(itertools.combinations(range(len(hits)), 2))
    if not pairs:
        return None
    means = 100 * hits.mean(1)
    return {
        "difference": float(np.mean([abs(means[a] - means[b]) for a, b in pairs])),
        "churn": float(np.mean([100 * (hits[a] != hits[b]).mean() for a, b in pairs])),
    }
