"""J, F and decay against plain numpy, all pairwise distances, and numbers worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.spatial.distance import cdist

from dino_kd.metrics.masks import (
    boundary,
    boundary_similarity,
    over_time,
    region_similarity,
    tolerance,
)


def blob(shape, seed):
    """A random smooth region, sometimes touching the edge."""
    rng = np.random.default_rng(seed)
    y, x = np.indices(shape)
    cy, cx = rng.uniform(0, shape[0]), rng.uniform(0, shape[1])
    wave = 1 + 0.3 * np.sin(3 * np.arctan2(y - cy, x - cx) + rng.uniform(0, 6))
    return np.hypot(y - cy, x - cx) < wave * min(shape) / 3


def boundary_by_looping(mask):
    """A pixel at a time: does it differ from its right, lower or diagonal neighbour?"""
    height, width = mask.shape
    found = np.zeros(mask.shape, dtype=bool)
    for r in range(height):
        for c in range(width):
            for dr, dc in ((0, 1), (1, 0), (1, 1)):
                if r + dr < height and c + dc < width:
                    found[r, c] |= mask[r, c] != mask[r + dr, c + dc]
    return found


def f_by_distances(predicted, truth, radius):
    """Precision and recall from the distances of all pairs of boundary pixels."""
    mine, its = (np.argwhere(boundary_by_looping(m)) for m in (predicted, truth))
    if not len(mine) or not len(its):
        return float(len(mine) == len(its))
    near = cdist(mine, its) <= radius
    precision, recall = near.any(1).mean(), near.any(0).mean()
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


@pytest.mark.parametrize("seed", range(12))
def test_measures_are_those_of_brute_force(seed):
    shape = (37, 53)
    predicted, truth = blob(shape, seed), blob(shape, seed + 100 * (seed % 3))
    assert np.array_equal(boundary(predicted), boundary_by_looping(predicted))
    union = (predicted | truth).sum()
    assert region_similarity(predicted, truth) == pytest.approx((predicted & truth).sum() / union)
    for bound in (0.008, 0.03, 0.1):
        radius = int(np.ceil(bound * np.sqrt(37**2 + 53**2)))
        assert tolerance(shape, bound) == radius
        found = boundary_similarity(predicted, truth, bound=bound)
        assert found == pytest.approx(f_by_distances(predicted, truth, radius))


def test_a_shift_within_the_tolerance_costs_nothing_and_beyond_it_everything():
    truth = np.zeros((100, 100), dtype=bool)
    truth[40:60, 40:60] = True
    assert tolerance((100, 100)) == 2  # ceil(0.008 * 141.4)
    assert boundary_similarity(np.roll(truth, 2, axis=1), truth) == 1.0
    assert 0 < boundary_similarity(np.roll(truth, 3, axis=1), truth) < 1
    far = np.roll(truth, 35, axis=(0, 1))
    assert boundary_similarity(far, truth) == 0.0
    assert tolerance((480, 854)) == 8


def test_empty_masks():
    empty, full = np.zeros((9, 9), dtype=bool), np.ones((9, 9), dtype=bool)
    some = full.copy()
    some[:3] = False
    assert region_similarity(empty, empty) == 1.0
    assert region_similarity(empty, some) == 0.0
    assert boundary_similarity(empty, empty) == 1.0
    assert boundary_similarity(empty, some) == 0.0
    assert boundary_similarity(some, empty) == 0.0
    # a mask that fills the frame has no boundary at its edge
    assert boundary_similarity(full, empty) == 1.0


def test_void_pixels_count_for_neither():
    truth = np.zeros((20, 20), dtype=bool)
    truth[5:15, 5:15] = True
    predicted = truth.copy()
    predicted[5:15, 15:20] = True  # wrong, but void
    void = np.zeros_like(truth)
    void[:, 15:] = True
    assert region_similarity(predicted, truth) == pytest.approx(100 / 150)
    assert region_similarity(predicted, truth, void) == 1.0
    assert boundary_similarity(predicted, truth, void, bound=0.001) == 1.0
    assert boundary_similarity(predicted, truth, bound=0.001) < 1.0


def test_statistics_over_time_by_hand():
    values = np.array([1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2])  # edges 0, 2, 4, 6, 8
    found = over_time(values)
    assert found.mean == pytest.approx(0.6)
    assert found.recall == pytest.approx(5 / 9)  # 0.5 itself is not above
    assert found.decay == pytest.approx(0.9 - 0.3)


def test_quarters_round_half_up_and_short_videos_have_a_decay():
    # 3 frames: 1, 1.5, 2, 2.5, 3 round to 1, 2, 2, 3, 3
    assert over_time(np.array([1.0, 0.5, 0.0])).decay == pytest.approx(0.75 - 0.0)
    assert over_time(np.array([0.7])).decay == 0.0


def test_a_long_video_has_its_last_quarter_at_its_end():
    """Indices kept in 8 bits would wrap after 256 frames."""
    values = np.concatenate([np.ones(300), np.zeros(100)])
    assert over_time(values).decay == pytest.approx(1.0 - 1 / 101, abs=0.02)
