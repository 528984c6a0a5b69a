"""Is one network better than another on the same images? Intervals and tests on paired answers."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Interval(NamedTuple):
    """An estimate and the ends of its 95 % interval."""

    value: float
    low: float
    high: float


def bootstrap_difference(
    ours: np.ndarray, theirs: np.ndarray, *, resamples: int = 2000, seed: int = 0
) -> Interval:
    """Difference of two accuracies in points, over images and seeds at once.

    Every resample draws images with replacement, the same for both sides, and seeds with
    replacement on each side (training runs of one seed are not paired: their noise is their own).
    With one seed the interval is that of the images alone.

    Args:
        ours: bool ``[seeds, N]``, whether each image is right.
        theirs: likewise, for the same images.
        resamples: how many.
        seed: of the draws.

    Raises:
        ValueError: another number of images.
    """
    if ours.ndim != 2 or theirs.ndim != 2 or ours.shape[1] != theirs.shape[1]:
        raise ValueError(f"expected [seeds, N] twice, got {ours.shape} and {theirs.shape}")
    rng = np.random.default_rng(seed)
    count = ours.shape[1]
    drawn = np.empty(resamples)
    for number in range(resamples):
        often = np.bincount(rng.integers(count, size=count), minlength=count)  # [N]
        sides = [
            (side[rng.integers(len(side), size=len(side))] @ often).mean()
            for side in (ours, theirs)
        ]
        drawn[number] = 100 * (sides[0] - sides[1]) / count
    low, high = np.percentile(drawn, [2.5, 97.5])
    return Interval(100 * float(ours.mean() - theirs.mean()), float(low), float(high))


def mcnemar(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Exact two-sided p-value of McNemar's test on bool ``[N]``: are both right equally often?

    Only images that exactly one side has right count; 1.0 when there is none.
    """
    from scipy.stats import binomtest

    only_ours = int((ours & ~theirs).sum())
    only_theirs = int((theirs & ~ours).sum())
    if only_ours + only_theirs == 0:
        return 1.0
    return float(binomtest(only_ours, only_ours + only_theirs).pvalue)


def gap_recovered(student: float, scratch: float, teacher: float) -> float | None:
    """Share of the distance from scratch to teacher that the student has closed; all in percent.

    None when the teacher is less than a point ahead: the share is then noise.
    """
    return None if teacher - scratch < 1 else (student - scratch) / (teacher - scratch)


def mean_interval(values: np.ndarray) -> Interval:
    """Mean of a few runs ``[R]`` with its 95 % interval by Student's t; one run has no interval."""
    from scipy.stats import t

    mean = float(np.mean(values))
    if len(values) < 2:
        return Interval(mean, float("nan"), float("nan"))
    half = float(t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5)
    return Interval(mean, mean - half, mean + half)
