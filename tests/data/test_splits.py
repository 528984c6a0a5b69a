"""Held-out and few-label draws: counts by hand, seeds, nesting, odd sets."""

from __future__ import annotations

import numpy as np
import pytest

from dino_kd.data.splits import class_orders, holdout


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
