"""Average precision and precision at k against loops over the definition and hand-made numbers."""

from __future__ import annotations

import numpy as np
import pytest

from dino_kd.metrics.ranking import (
    QueryScore,
    average_precision,
    mean_scores,
    precision_at,
    rank_by_similarity,
    score_query,
)


def area_by_counting(order, positives, ignored):
    """The precision-recall curve point by point, and its trapezoids, over a plain Python list."""
    seen = [i for i in order if i not in ignored or i in positives]
    area, found, precision = 0.0, 0, 1.0
    for position, index in enumerate(seen):
        before = precision
        found += index in positives
        precision = found / (position + 1)
        if index in positives:
            area += (before + precision) / 2 / len(positives)
    return area


def test_average_precision_of_known_rankings():
    assert average_precision([0, 1, 2], 3) == 1.0
    assert average_precision([], 4) == 0.0
    # one positive at rank 1: precision goes 0 -> 1/2
    assert average_precision([1], 1) == pytest.approx(0.25)
    # positives at ranks 0 and 3: (1 + 1) / 2 and (1/3 + 2/4) / 2, two to find
    assert average_precision([0, 3], 2) == pytest.approx((1 + (1 / 3 + 1 / 2) / 2) / 2)
    # a positive that was never found halves it
    assert average_precision([0], 2) == pytest.approx(0.5)


def test_average_precision_without_positives_is_refused():
    with pytest.raises(ValueError, match="num_positives=0"):
        average_precision([], 0)


@pytest.mark.parametrize("seed", range(20))
def test_scores_are_those_of_counting(seed):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(5, 60))
    order = rng.permutation(n)
    kinds = rng.integers(0, 4, n)  # 0, 1: negative
    positives, ignored = np.flatnonzero(kinds == 2), np.flatnonzero(kinds == 3)
    found = score_query(order, positives, ignored, ks=(1, 5, 10))
    if not len(positives):
        assert found is None
        return
    assert found.average_precision == pytest.approx(
        area_by_counting(order.tolist(), set(positives.tolist()), set(ignored.tolist()))
    )
    seen = [i for i in order.tolist() if i not in set(ignored.tolist())]
    last = max(seen.index(p) for p in positives.tolist()) + 1
    for k, value in zip((1, 5, 10), found.precision_at, strict=True):
        top = seen[: min(k, last)]
        assert value == pytest.approx(len(set(top) & set(positives.tolist())) / len(top))


def test_precision_stops_at_the_last_positive():
    assert precision_at([0, 1, 2], 10) == 1.0
    assert precision_at([0, 4], 10) == pytest.approx(2 / 5)
    assert precision_at([3], 1) == 0.0


def test_an_image_both_positive_and_ignored_counts_as_positive():
    found = score_query(np.array([1, 0, 2]), [0], [0, 1])
    assert found.average_precision == 1.0


def test_positives_that_were_not_ranked_were_not_found():
    assert score_query(np.array([0, 1]), [7], ks=(1,)) == QueryScore(0.0, (0.0,))


def test_means_leave_out_queries_without_positives():
    scores = [QueryScore(1.0, (1.0, 0.5)), None, QueryScore(0.5, (0.0, 0.5))]
    assert mean_scores(scores) == (0.75, (0.5, 0.5), 2)
    mean, precisions, count = mean_scores([None])
    assert np.isnan(mean)
    assert (precisions, count) == ((), 0)


def test_ties_keep_the_order_of_the_database():
    found = rank_by_similarity(np.array([[0.5, 0.9, 0.5, 0.9]], dtype=np.float32))
    assert found.tolist() == [[1, 3, 0, 2]]
