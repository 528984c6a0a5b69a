"""Two ways of training compared image by image: is the difference more than luck?

`hits` are bool ``[S, N]``: S seeds, N test images, whether the image is right. Accuracies and
differences are in points (percent of images); intervals are percentile bootstraps over images and
seeds at once. With one seed they speak of the images alone.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import numpy as np

RESAMPLES = 2000
_SMALLEST_GAP = 1.0  # points between teacher and baseline below which a share of it means nothing


class Interval(NamedTuple):
    """An estimate and the ends of its 95 % interval."""

    value: float
    low: float
    high: float


def accuracy_interval(hits: np.ndarray, *, resamples: int = RESAMPLES, seed: int = 0) -> Interval:
    """Accuracy over all seeds. Raises ValueError unless `hits` is ``[S, N]``, neither being 0."""
    return _bootstrap([_checked(hits)], resamples, seed)


def bootstrap_difference(
    ours: np.ndarray, theirs: np.ndarray, *, resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """Accuracy of `ours` less that of `theirs`.

    Every resample draws images with replacement, the same for both sides, and seeds with
    replacement on each side: two trainings of one seed differ in more than what is compared.

    Args:
        ours: bool ``[S, N]``.
        theirs: bool ``[R, N]``, of the same images.
        resamples: how many.
        seed: of the draws.

    Raises:
        ValueError: another number of images, or none.
    """
    sides = [_checked(ours), _checked(theirs)]
    if sides[0].shape[1] != sides[1].shape[1]:
        raise ValueError(f"cannot pair {sides[0].shape[1]} images with {sides[1].shape[1]}")
    return _bootstrap(sides, resamples, seed)


def mcnemar(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Exact two-sided p-value of McNemar's test on bool ``[N]``: are both right equally often?

    Only images that exactly one side has right count; 1.0 when there is none.
    """
    from scipy.stats import binomtest

    if ours.shape != theirs.shape:
        raise ValueError(f"cannot pair {ours.shape} with {theirs.shape}")
    only_ours = int((ours & ~theirs).sum())
    only_theirs = int((theirs & ~ours).sum())
    if only_ours + only_theirs == 0:
        return 1.0
    return float(binomtest(only_ours, only_ours + only_theirs).pvalue)


def gap_recovered(student: float, scratch: float, teacher: float) -> float | None:
    """Share of the distance from scratch to teacher that the student has closed; all in percent.

    None when the teacher is less than a point ahead: the share is then noise.
    """
    gap = teacher - scratch
    return (student - scratch) / gap if gap >= _SMALLEST_GAP else None


def seed_noise(hits: np.ndarray) -> dict[str, float] | None:
    """What another seed alone changes: means over all pairs of the S seeds; None for one seed.

    ``difference``: of the accuracies, in points, without sign. ``churn``: images that one of the
    two gets right and the other wrong, in percent.
    """
    pairs = list(itertools.combinations(range(len(hits)), 2))
    if not pairs:
        return None
    means = 100 * hits.mean(1)
    return {
        "difference": float(np.mean([abs(means[a] - means[b]) for a, b in pairs])),
        "churn": float(np.mean([100 * (hits[a] != hits[b]).mean() for a, b in pairs])),
    }


def _checked(hits: np.ndarray) -> np.ndarray:
    if hits.ndim != 2 or 0 in hits.shape:
        raise ValueError(f"expected hits of shape [seeds, images], got {hits.shape}")
    return hits.astype(np.float64)


def _bootstrap(sides: list[np.ndarray], resamples: int, seed: int) -> Interval:
    """The first side's mean less the second's, if there is one, in percent."""
    signs = (1, -1)
    rng = np.random.default_rng(seed)
    count = sides[0].shape[1]
    drawn = np.empty(resamples)
    for number in range(resamples):
        often = np.bincount(rng.integers(count, size=count), minlength=count) / count  # [N]
        means = (side[rng.integers(len(side), size=len(side))].mean(0) @ often for side in sides)
        drawn[number] = 100 * sum(s * mean for s, mean in zip(signs, means, strict=False))
    value = 100 * sum(s * float(side.mean()) for s, side in zip(signs, sides, strict=False))
    low, high = np.percentile(drawn, [2.5, 97.5])
    return Interval(value, float(low), float(high))
