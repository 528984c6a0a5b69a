"""Label propagation against a loop over patches, and on videos worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import one_hot

from dino_kd import propagation
from dino_kd.propagation import follow, labels_to_mask, propagate


def by_looping(target, sources, labels, grid, topk, temperature, radius):
    """Every patch, every source, every neighbour."""
    rows, columns = grid
    out = torch.zeros_like(labels[0])
    for p in range(rows * columns):
        found = []
        for source, label in zip(sources, labels, strict=True):
            for q in range(rows * columns):
                away = max(abs(p // columns - q // columns), abs(p % columns - q % columns))
                if radius is None or away <= radius:
                    cosine = torch.dot(target[p], source[q]) / (target[p].norm() * source[q].norm())
                    found.append((float(cosine), label[:, q]))
        found.sort(key=lambda pair: -pair[0])
        weights = [math.exp(cosine / temperature) for cosine, _ in found[:topk]]
        for weight, (_, label) in zip(weights, found, strict=False):
            out[:, p] += weight / sum(weights) * label
    return out


def video(frames, grid, classes=3, width=8, seed=0):
    g = torch.Generator().manual_seed(seed)
    patches = grid[0] * grid[1]
    features = [torch.randn(patches, width, generator=g) for _ in range(frames)]
    labels = [torch.rand(classes, patches, generator=g) for _ in range(frames)]
    return features, labels


@pytest.mark.parametrize("grid", [(5, 7), (6, 4), (1, 9)])
@pytest.mark.parametrize(("topk", "radius"), [(5, 2), (1, 1), (3, None), (5, 0), (1000, 12)])
def test_propagation_is_that_of_the_loop(grid, topk, radius):
    features, labels = video(4, grid)
    target, *sources = features
    found = propagate(target, sources, labels[1:], grid=grid, topk=topk, radius=radius)
    expected = by_looping(target, sources, labels[1:], grid, topk, 0.1, radius)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_blocks_of_rows_change_nothing(monkeypatch):
    features, labels = video(3, (9, 5))
    whole = propagate(features[0], features[1:], labels[1:], grid=(9, 5), radius=3)
    for at_once in (1, 2 * 45 * 5 * 2, 2 * 45 * 5 * 4):  # blocks of 1, 2 and 4 rows
        monkeypatch.setattr(propagation, "_SIMILARITIES_AT_ONCE", at_once)
        torch.testing.assert_close(
            propagate(features[0], features[1:], labels[1:], grid=(9, 5), radius=3), whole
        )


def test_context_is_the_first_frame_and_the_last_of_the_queue():
    """Follows the frames by hand, with the loop."""
    grid, queue = (3, 4), 2
    features, labels = video(6, grid)
    found = list(follow(iter(features), labels[0], grid=grid, queue=queue, topk=3, radius=1))
    assert len(found) == 5
    known = [labels[0]]
    for t in range(1, 6):
        context = [0, *range(max(1, t - queue), t)]
        expected = by_looping(
            features[t],
            [features[i] for i in context],
            [known[i] for i in context],
            grid,
            3,
            0.1,
            1,
        )
        torch.testing.assert_close(found[t - 1], expected, atol=1e-5, rtol=1e-4)
        known.append(expected)


def test_without_a_queue_only_the_first_frame_counts():
    features, labels = video(4, (3, 3))
    found = list(follow(features, labels[0], grid=(3, 3), queue=0))
    for t in (1, 2, 3):
        alone = propagate(features[t], features[:1], labels[:1], grid=(3, 3))
        torch.testing.assert_close(found[t - 1], alone)


def test_a_patch_that_moves_takes_its_label_along():
    """Distinct features shifted by one column a frame; neighbours of one decide alone."""
    grid = (4, 6)
    places = torch.arange(24).reshape(grid)
    features = [one_hot(places.roll(t, 1).flatten(), 24).float() for t in range(5)]
    numbers = [(places.roll(t, 1) % 6 == 1).long().flatten() for t in range(5)]
    first = one_hot(numbers[0], 2).T.float()
    for t, found in enumerate(follow(features, first, grid=grid, topk=1, radius=1), start=1):
        # what comes back in at the left edge was out of reach
        inner = (torch.arange(24) % 6) >= t
        assert torch.equal(found.argmax(0)[inner], numbers[t][inner])


def test_radius_keeps_far_twins_out():
    grid = (1, 9)
    target = torch.zeros(9, 2)
    target[:, 0] = 1
    source = torch.zeros(9, 2)
    source[:, 1] = 1
    source[8] = target[0]  # a perfect match, 8 columns from the left end
    label = torch.zeros(1, 9)
    label[0, 8] = 1
    near = propagate(target, [source], [label], grid=grid, topk=1, radius=3)
    assert near[0].tolist() == [0, 0, 0, 0, 0, 1, 1, 1, 1]
    assert propagate(target, [source], [label], grid=grid, topk=1, radius=None).eq(1).all()


def test_masks_are_upsampled_then_stretched_then_compared():
    """Against Pillow's bilinear filter on floats, class by class."""
    g = torch.Generator().manual_seed(1)
    labels = torch.rand(3, 20, generator=g)
    labels[2] *= 0.2  # a faint class still wins where it is strongest
    found = labels_to_mask(labels, (4, 5), (32, 40))
    assert found.dtype == torch.uint8
    maps = []
    for row in labels:
        picture = Image.fromarray(row.reshape(4, 5).numpy())
        up = torch.from_numpy(np.array(picture.resize((40, 32), Image.Resampling.BILINEAR)))
        maps.append((up - up.min()) / (up.max() - up.min()))
    stacked = torch.stack(maps)
    best = stacked.topk(2, dim=0).values
    clear = best[0] - best[1] > 1e-4
    assert torch.equal(found[clear].long(), stacked.argmax(0)[clear])
    assert clear.float().mean() > 0.99
    assert (found == 2).any()


def test_a_class_that_is_nowhere_never_wins():
    labels = torch.zeros(3, 6)
    labels[0, :3] = 1
    labels[1, 3:] = 1
    found = labels_to_mask(labels, (2, 3), (2, 3))
    assert found.tolist() == [[0, 0, 0], [1, 1, 1]]
    # everything is background: DINO's stretching leaves 0 everywhere, and the lowest number wins
    alone = torch.zeros(2, 6)
    alone[0] = 1
    assert labels_to_mask(alone, (2, 3), (4, 6)).eq(0).all()
