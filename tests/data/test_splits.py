"""Held-out and few-label draws: counts by hand, seeds, nesting, odd sets."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from dino_kd.data.splits import class_orders, draw_fraction, draw_shots, fraction_of, holdout


def counts(labels, indices):
    return [int((labels[indices] == y).sum()) for y in np.unique(labels)]


def test_parts_are_disjoint_and_complete():
    labels = np.random.default_rng(0).integers(0, 7, 500)
    fit, held_out = holdout(labels, 0.1, seed=3)
    assert sorted([*fit, *held_out]) == list(range(500))
    assert (np.diff(fit) > 0).all()
    assert (np.diff(held_out) > 0).all()
    assert fit.dtype == held_out.dtype == np.int64


def test_every_class_gives_its_share():
    """Against counts by hand: shares of 100, 30 and 10 images."""
    labels = np.repeat([4, 2, 9], [100, 30, 10])
    _, held_out = holdout(labels, 0.1, seed=0)
    assert counts(labels, held_out) == [3, 10, 1]  # classes 2, 4, 9


def test_rounding_losses_are_made_up():
    """Three images a class: a tenth of each is none, a tenth of all is 30."""
    labels = np.repeat(np.arange(100), 3)
    fit, held_out = holdout(labels, 0.1, seed=0)
    assert len(held_out) == 30
    assert max(counts(labels, held_out)) == 1
    assert min(counts(labels, fit)) == 2


@pytest.mark.parametrize("share", [0.29, 0.57, 0.58])
def test_shares_that_floats_miss_are_exact(share):
    labels = np.repeat([0, 1], 100)
    _, held_out = holdout(labels, share, seed=0)
    assert counts(labels, held_out) == [round(100 * share)] * 2


def test_every_class_keeps_an_image_for_fitting():
    labels = np.repeat([0, 1, 2], [1, 2, 50])
    for share in (0.01, 0.5, 0.99):
        fit, held_out = holdout(labels, share, seed=0)
        assert min(counts(labels, fit)) >= 1
        assert len(held_out) >= 1
    assert len(holdout(np.arange(5), 0.5, seed=0)[1]) == 0  # nobody can spare one
    assert len(holdout(labels, 0, seed=0)[1]) == 0
    assert len(holdout(labels[:0], 0.5, seed=0)[0]) == 0


def test_the_seed_alone_decides():
    labels = np.random.default_rng(1).integers(0, 5, 200)
    first, again, other = (holdout(labels, 0.2, seed=s)[1] for s in (0, 0, 1))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_share_outside_its_range_is_refused():
    for share in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match="share must be"):
            holdout(np.array([0, 1]), share, seed=0)


def test_orders_hold_each_class_once_and_ignore_the_others():
    labels = np.random.default_rng(2).integers(0, 4, 100)
    orders = class_orders(labels, seed=5)
    for y, order in enumerate(orders):
        assert sorted(order) == list(np.flatnonzero(labels == y))
    without_three = np.where(labels == 3, 7, labels)
    for order, same in zip(orders[:3], class_orders(without_three, seed=5), strict=False):
        assert np.array_equal(order, same)


def test_every_image_is_as_likely_as_the_others():
    """Against the binomial: 400 seeds, one of ten images of a class each."""
    labels = np.repeat([0, 1], 10)
    drawn = np.bincount([class_orders(labels, seed)[0][0] for seed in range(400)], minlength=10)
    assert abs(drawn - 40).max() < 4.5 * np.sqrt(400 * 0.1 * 0.9)


def test_larger_draws_contain_smaller_ones():
    labels = np.random.default_rng(4).integers(0, 5, 300)
    draws = [draw_shots(labels, n, seed=2) for n in (1, 2, 5, 10)]
    draws += [draw_fraction(labels, share, seed=2) for share in (0.5, 0.9, 1.0)]
    for small, large in itertools.pairwise(draws):
        assert set(small) < set(large)
    for n, draw in zip((1, 2, 5, 10), draws, strict=False):
        assert counts(labels, draw) == [n] * 5
    assert np.array_equal(draws[-1], np.arange(300))
    assert not np.array_equal(draws[2], draw_shots(labels, 5, seed=3))


def test_fractions_are_rounded_and_leave_no_class_empty():
    """Against hand counts: 10 % of 4, 14, 15, 100 images."""
    labels = np.repeat([0, 1, 2, 3], [4, 14, 15, 100])
    assert counts(labels, draw_fraction(labels, 0.1, seed=0)) == [1, 1, 2, 10]
    assert [fraction_of(n, 0.1) for n in (4, 5, 14, 15, 100)] == [0, 1, 1, 2, 10]
    assert fraction_of(50, 0.29) == 15  # 14.499999999999998 as floats, a half as numbers


def test_more_shots_than_images_are_refused():
    with pytest.raises(ValueError, match="6 images of each class asked for, the smallest has 5"):
        draw_shots(np.repeat([0, 1], [5, 9]), 6, seed=0)
