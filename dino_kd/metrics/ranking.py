"""How well a ranking finds what it should: average precision and precision at k.

The conventions are those of the Oxford, Holidays and revisited Oxford/Paris evaluations: precision
is averaged by trapezoids, ignored images count as if they were not there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class QueryScore:
    """One query's average precision, and its precision at each k that was asked for (0..1)."""

    average_precision: float
    precision_at: tuple[float, ...]


def average_precision(ranks: np.ndarray | Sequence[int], num_positives: int) -> float:
    """Area under the precision-recall curve, by the trapezoidal rule, in 0..1.

    With the positives found at ranks r_0 < r_1 < ...::

        AP = 1 / num_positives * sum over j of (p_before + p_after) / 2
        p_before = j / r_j (1 when r_j = 0),  p_after = (j + 1) / (r_j + 1)

    Args:
        ranks: ascending ranks of the positives that were found, int ``[R]``, 0 is the best.
        num_positives: how many there are to find, at least 1; those not found contribute 0.
    """
    if num_positives < 1:
        raise ValueError(f"average precision needs a positive, got num_positives={num_positives}")
    r = np.asarray(ranks, dtype=np.float64)  # [R]
    j = np.arange(len(r))  # [R]
    before = np.where(r == 0, 1.0, j / np.maximum(r, 1.0))
    after = (j + 1) / (r + 1)
    return float(np.sum(before + after) / (2 * num_positives))


def precision_at(ranks: np.ndarray | Sequence[int], k: int) -> float:
    """Share of positives among the first k, in 0..1; fewer than k when all are found earlier.

    A query with three positives at ranks 0, 1, 2 has precision 1 at 10, not 0.3 (the revisited
    benchmark's definition).

    Args:
        ranks: ascending ranks of all positives, int ``[R]``, R >= 1, 0 is the best.
        k: at least 1.
    """
    r = np.asarray(ranks)
    counted = min(int(r[-1]) + 1, k)
    return float(np.count_nonzero(r < counted) / counted)


def score_query(
    order: np.ndarray,
    positives: np.ndarray | Sequence[int],
    ignored: np.ndarray | Sequence[int] = (),
    ks: Sequence[int] = (),
) -> QueryScore | None:
    """Score one query's ranking; None when the query has no positive.

    Args:
        order: database indices int ``[N]``, the most similar first, each once.
        positives: indices that should come first. One that `order` lacks was not found.
        ignored: indices that are taken out of the ranking first, the positives excepted.
        ks: where to measure precision.
    """
    good = np.unique(np.asarray(positives, dtype=np.int64))
    if not len(good):
        return None
    hidden = np.setdiff1d(np.asarray(ignored, dtype=np.int64), good)
    seen = order[~np.isin(order, hidden)]
    ranks = np.flatnonzero(np.isin(seen, good))
    if not len(ranks):
        return QueryScore(0.0, (0.0,) * len(ks))
    return QueryScore(
        average_precision(ranks, len(good)), tuple(precision_at(ranks, k) for k in ks)
    )


def rank_by_similarity(similarity: np.ndarray) -> np.ndarray:
    """Database indices int64 ``[Q, N]``, best first, of similarities ``[Q, N]``.

    Equal similarities keep the order of the database.
    """
    return np.argsort(-similarity, axis=1, kind="stable")


def mean_scores(scores: Sequence[QueryScore | None]) -> tuple[float, tuple[float, ...], int]:
    """(mean average precision, mean precision at each k, queries counted).

    Queries without a positive (None) are left out; without any query the means are NaN.
    """
    counted = [score for score in scores if score is not None]
    if not counted:
        return float("nan"), (), 0
    precisions = np.array([score.precision_at for score in counted], dtype=np.float64)  # [Q, k]
    mean = float(np.mean([score.average_precision for score in counted]))
    return mean, tuple(float(p) for p in precisions.mean(0)), len(counted)
