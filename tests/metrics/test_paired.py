"""Paired statistics against closed forms and brute force."""

from __future__ import annotations

import math

import numpy as np
import pytest

from dino_kd.metrics.paired import (
    accuracy_interval,
    bootstrap_difference,
    gap_recovered,
    mcnemar,
    seed_noise,
)


def coins(share: float, shape: tuple[int, int], seed: int) -> np.ndarray:
    return np.random.default_rng(seed).random(shape) < share


def test_the_interval_of_one_seed_is_the_binomial_one() -> None:
    hits = coins(0.7, (1, 4000), 0)
    value, low, high = accuracy_interval(hits)
    share = hits.mean()
    half = 100 * 1.96 * math.sqrt(share * (1 - share) / 4000)
    assert value == pytest.approx(100 * share)
    assert low == pytest.approx(value - half, abs=0.15 * half)
    assert high == pytest.approx(value + half, abs=0.15 * half)


def test_the_interval_of_a_difference_is_that_of_the_paired_differences() -> None:
    ours, theirs = coins(0.7, (1, 3000), 1), coins(0.6, (1, 3000), 2)
    found = bootstrap_difference(ours, theirs)
    paired = ours[0].astype(float) - theirs[0]
    half = 100 * 1.96 * paired.std(ddof=1) / math.sqrt(3000)
    assert found.value == pytest.approx(100 * paired.mean())
    assert found.high - found.low == pytest.approx(2 * half, rel=0.1)


def test_what_both_get_right_cancels() -> None:
    shared = coins(0.5, (1, 500), 3)
    assert bootstrap_difference(shared, shared) == (0.0, 0.0, 0.0)
    better = shared.copy()
    better[0, np.flatnonzero(~shared[0])[:50]] = True
    found = bootstrap_difference(better, shared)
    alone = accuracy_interval(better)
    assert found.value == pytest.approx(10.0)
    assert found.high - found.low < 0.7 * (alone.high - alone.low)


def test_seeds_that_differ_widen_the_interval() -> None:
    base = coins(0.5, (1, 2000), 4)
    same = np.repeat(base, 3, axis=0)
    spread = np.concatenate([coins(share, (1, 2000), 5) for share in (0.4, 0.5, 0.6)])
    narrow, wide = accuracy_interval(same), accuracy_interval(spread)
    assert wide.high - wide.low > 3 * (narrow.high - narrow.low)


def test_the_same_seed_draws_the_same_interval() -> None:
    hits = coins(0.5, (2, 100), 6)
    assert accuracy_interval(hits) == accuracy_interval(hits)
    assert accuracy_interval(hits) != accuracy_interval(hits, seed=1)


@pytest.mark.parametrize(("only_ours", "only_theirs"), [(0, 0), (3, 9), (10, 2), (5, 5), (0, 8)])
def test_mcnemar_sums_the_binomial_tail(only_ours: int, only_theirs: int) -> None:
    ours = np.array([True] * only_ours + [False] * only_theirs + [True] * 7 + [False] * 4)
    theirs = np.array([False] * only_ours + [True] * only_theirs + [True] * 7 + [False] * 4)
    count = only_ours + only_theirs
    tail = sum(math.comb(count, k) for k in range(min(only_ours, only_theirs) + 1)) / 2**count
    assert mcnemar(ours, theirs) == pytest.approx(min(1.0, 2 * tail))


def test_the_gap_is_undefined_below_a_point() -> None:
    assert gap_recovered(75.0, 70.0, 80.0) == pytest.approx(0.5)
    assert gap_recovered(69.0, 70.0, 80.0) == pytest.approx(-0.1)
    assert gap_recovered(70.5, 70.0, 71.0) == pytest.approx(0.5)
    assert gap_recovered(70.5, 70.0, 70.9) is None
    assert gap_recovered(70.5, 70.0, 60.0) is None


def test_seed_noise_is_the_mean_over_pairs() -> None:
    hits = np.array([[1, 1, 0, 0], [1, 0, 1, 0], [1, 1, 1, 1]], dtype=bool)
    # accuracies 50, 50, 100: differences 0, 50, 50; flips 2, 2, 2 of 4
    assert seed_noise(hits) == pytest.approx({"difference": 100 / 3, "churn": 50.0})
    assert seed_noise(hits[:1]) is None


def test_what_cannot_be_paired_is_refused() -> None:
    with pytest.raises(ValueError, match="pair 4 images with 5"):
        bootstrap_difference(np.ones((1, 4), bool), np.ones((1, 5), bool))
    with pytest.raises(ValueError, match=r"\[seeds, images\]"):
        accuracy_interval(np.ones(4, bool))
    with pytest.raises(ValueError, match=r"\[seeds, images\]"):
        accuracy_interval(np.ones((0, 4), bool))
    with pytest.raises(ValueError, match="cannot pair"):
        mcnemar(np.ones(4, bool), np.ones(5, bool))
