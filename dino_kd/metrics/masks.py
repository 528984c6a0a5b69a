"""Region and boundary agreement of two masks, and how they develop over a video.

The measures of the DAVIS benchmark: Perazzi et al. 2016 (J, F, recall, decay), Pont-Tuset et al.
2017 (several objects). Written from the definitions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

BOUND = 0.008  # tolerance of the boundary, as a share of the image's diagonal
_RECALL_OVER = 0.5
_QUARTERS = 4


@dataclass(frozen=True)
class OverTime:
    """One object's measure over the scored frames of a video.

    Attributes:
        mean: 0..1.
        recall: share of frames above 0.5.
        decay: mean of the first quarter minus mean of the last; small or negative is good.
    """

    mean: float
    recall: float
    decay: float


def region_similarity(
    predicted: np.ndarray, truth: np.ndarray, void: np.ndarray | None = None
) -> float:
    """J: intersection over union of two bool masks ``[H, W]``, in 0..1; 1 when both are empty.

    Pixels of `void` (bool ``[H, W]``) count for neither.
    """
    if void is not None:
        predicted, truth = predicted & ~void, truth & ~void
    union = np.count_nonzero(predicted | truth)
    return np.count_nonzero(predicted & truth) / union if union else 1.0


def boundary(mask: np.ndarray) -> np.ndarray:
    """Boundary pixels of a bool mask, bool ``[H, W]``, one pixel wide.

    A pixel is one when it differs from its right, lower, or lower right neighbour. In the last
    row only the right neighbour counts, in the last column only the lower one: a mask that touches
    the frame's edge has no boundary there (as in DAVIS).
    """
    found = np.zeros(mask.shape, dtype=bool)
    right = mask[:, :-1] != mask[:, 1:]
    down = mask[:-1, :] != mask[1:, :]
    found[:, :-1] |= right
    found[:-1, :] |= down
    found[:-1, :-1] |= mask[:-1, :-1] != mask[1:, 1:]
    return found


def tolerance(shape: tuple[int, ...], bound: float = BOUND) -> int:
    """Pixels by which two boundaries may differ in an image of `shape` (height, width)."""
    return math.ceil(bound * math.hypot(shape[0], shape[1]))


def boundary_similarity(
    predicted: np.ndarray,
    truth: np.ndarray,
    void: np.ndarray | None = None,
    *,
    bound: float = BOUND,
) -> float:
    """F: harmonic mean of the precision and recall of the boundary of bool masks ``[H, W]``.

    A boundary pixel of one mask is met when the other has one within `tolerance` pixels
    (Euclidean). Without a boundary on both sides F is 1, on one side 0.

    Args:
        predicted: the mask to judge.
        truth: the mask it should be.
        void: pixels that both masks lack.
        bound: tolerance as a share of the diagonal.
    """
    if void is not None:
        predicted, truth = predicted & ~void, truth & ~void
    mine, its = boundary(predicted), boundary(truth)
    if not mine.any() or not its.any():
        return float(mine.any() == its.any())
    # only the part of the image that holds a boundary matters, and mostly it is small
    rows, columns = (np.flatnonzero((mine | its).any(axis)) for axis in (1, 0))
    window = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    mine, its = mine[window], its[window]
    radius = tolerance(predicted.shape, bound)
    precision = _share_near(mine, its, radius)
    recall = _share_near(its, mine, radius)
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def over_time(values: np.ndarray) -> OverTime:
    """Mean, recall and decay of one value per scored frame, float ``[T]``, T >= 1.

    Quarter q of 4 runs from frame e_q to e_(q+1), both included, e = round(1..T in 5 even steps):
    neighbouring quarters share a frame, as in DAVIS.
    """
    edges = np.floor(np.linspace(1, len(values), _QUARTERS + 1) + 0.5).astype(int) - 1  # [5]
    first, last = values[edges[0] : edges[1] + 1], values[edges[-2] : edges[-1] + 1]
    return OverTime(
        float(np.mean(values)),
        float(np.mean(values > _RECALL_OVER)),
        float(np.mean(first) - np.mean(last)),
    )


def _share_near(points: np.ndarray, others: np.ndarray, radius: int) -> float:
    """Share of the pixels of `points` with a pixel of `others` within `radius`."""
    from scipy.ndimage import distance_transform_edt

    # the distance of every pixel to the nearest pixel of `others`
    return float(np.mean(distance_transform_edt(~others)[points] <= radius))
