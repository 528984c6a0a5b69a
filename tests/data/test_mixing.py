"""Mixup and CutMix: pixels and class shares by loops, draws that follow from numbers alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dino_kd.data.loader import CropBatch
from dino_kd.data.mixing import Mix, MixPolicy, Views, draw_mix
from dino_kd.data.multicrop import Crops

BOX = Mix(1 - 12 / 48, (1, 2, 3, 4))  # of 6 x 8 pixels


def make_batch(count=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (count, 3, 6, 8)
    images = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    return CropBatch(Crops(images[None], images[None, :0]), torch.arange(10, 10 + count), [])


def make_views(mix, labels=(2, 0, 1, -1)):
    everything = torch.full((20,), 4)
    everything[10 : 10 + len(labels)] = torch.tensor(labels)
    return Views.of(make_batch(len(labels)), everything, mix)


def mixed_by_hand(images, mix):
    """Every pixel by itself; the partner of image b is image b - 1."""
    made = images.double().numpy().copy()
    source = images.double().numpy()
    count, channels, height, width = made.shape
    for b in range(count):
        for c, y, x in np.ndindex(channels, height, width):
            own, other = source[b, c, y, x], source[b - 1, c, y, x]
            if mix.box is None:
                made[b, c, y, x] = mix.own * own + (1 - mix.own) * other
            else:
                top, left, tall, wide = mix.box
                inside = top <= y < top + tall and left <= x < left + wide
                made[b, c, y, x] = other if inside else own
    return made


@pytest.mark.parametrize("mix", [Mix(0.3), Mix(0.0), Mix(1.0), BOX], ids=str)
def test_pixels_by_a_loop(mix):
    views = make_views(mix)
    source = views.images.clone()
    expected = mixed_by_hand(source, mix)
    for _ in range(2):  # asking twice gives the same, and changes nothing
        pixels = views.pixels()
        assert pixels.dtype == torch.float32
        np.testing.assert_allclose(pixels.numpy(), expected, atol=1e-4)
    assert torch.equal(views.images, source)


@pytest.mark.parametrize("mix", [Mix(0.3), BOX], ids=str)
def test_shares_by_a_loop_and_nothing_where_no_label_is_known(mix):
    labels = [2, 0, 1, -1]
    expected = np.zeros((4, 3))
    for b, (own, other) in enumerate(zip(labels, [labels[-1], *labels[:-1]], strict=True)):
        for label, share in ((own, mix.own), (other, 1 - mix.own)):
            if label >= 0:
                expected[b, label] += share
    shares = make_views(mix).shares(3)
    np.testing.assert_allclose(shares.numpy(), expected, atol=1e-6)
    # the third image is all known, the first and the last are in part, by their shares
    np.testing.assert_allclose(shares.sum(1).numpy(), [mix.own, 1, 1, 1 - mix.own], atol=1e-6)


def test_without_a_mix_images_and_labels_are_themselves():
    views = make_views(None)
    assert views.partners is None
    assert torch.equal(views.pixels(), views.images.float())
    assert views.shares(3).tolist() == [[0, 0, 1], [1, 0, 0], [0, 1, 0], [0, 0, 0]]


def test_labels_are_those_of_the_images_that_came():
    """A stand-in for a broken image brings its own label."""
    batch = make_batch(3)
    batch.indices[1] = 0
    views = Views.of(batch, torch.arange(100, 120), None)
    assert views.labels.tolist() == [110, 100, 112]
    assert views.indices.tolist() == [10, 0, 12]


@pytest.mark.parametrize("mix", [None, Mix(0.3), BOX], ids=str)
def test_parts_of_a_batch_are_parts_of_the_mixed_batch(mix):
    views = make_views(mix)
    views.answers = [{"logits": torch.arange(8.0).view(4, 2)}, {"output": torch.arange(4.0)}]
    for count in (1, 2, 4):
        parts = [part.to(torch.device("cpu")) for part in views.chunk(count)]
        assert len(parts) == count
        for made in (
            lambda v: v.pixels(), lambda v: v.shares(3), lambda v: v.labels, lambda v: v.indices,
            lambda v: v.answers[0]["logits"], lambda v: v.answers[1]["output"],
        ):  # fmt: skip
            assert torch.equal(torch.cat([made(part) for part in parts]), made(views))
    for wrong in (0, 3):
        with pytest.raises(ValueError, match="4 images cannot be split"):
            views.chunk(wrong)


def test_a_draw_follows_from_seed_step_and_rank_alone():
    policy = MixPolicy(0.4, 1.0, 1.0)

    def draws(seed, rank, steps=range(8)):
        return [draw_mix(policy, 6, 8, seed, step, rank) for step in steps]

    assert draws(0, 0) == draws(0, 0)
    assert draws(0, 0)[::-1] == draws(0, 0, reversed(range(8)))
    assert len(set(draws(0, 0))) == 8
    assert not set(draws(0, 0)) & set(draws(1, 0))
    assert not set(draws(0, 0)) & set(draws(0, 1))


@pytest.mark.parametrize("alpha", [0.2, 0.7, 2.0])
def test_the_share_of_an_image_has_the_moments_of_the_beta_distribution(alpha):
    """Of Beta(a, a): mean 1/2, variance 1 / (4 (2a + 1))."""
    policy = MixPolicy(mixup=alpha, share=1.0)
    own = np.array([draw_mix(policy, 8, 8, 3, step, 0).own for step in range(6000)])
    assert own.mean() == pytest.approx(0.5, abs=0.02)
    assert own.var() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.05)


def test_a_box_has_the_shape_of_the_image_and_any_size():
    policy = MixPolicy(cutmix=1.0, share=1.0)
    boxes = [draw_mix(policy, 200, 400, 3, step, 0).box for step in range(2000)]
    inside = [
        (tall, wide)
        for top, left, tall, wide in boxes
        if top > 0 and left > 0 and top + tall < 200 and left + wide < 400
    ]
    assert len(inside) > 200
    assert all(abs(2 * tall - wide) <= 3 for tall, wide in inside)
    heights = np.array(inside)[:, 0]
    assert heights.min() < 20
    assert heights.max() > 150


def test_a_box_is_cut_at_the_border_and_counts_what_is_left():
    cut = 0
    for step in range(500):
        mix = draw_mix(MixPolicy(0, 1.0, 1.0), 30, 50, 0, step, 0)
        top, left, height, width = mix.box
        assert 0 <= top <= top + height <= 30
        assert 0 <= left <= left + width <= 50
        painted = np.zeros((30, 50), dtype=bool)
        painted[top : top + height, left : left + width] = True
        assert mix.own == pytest.approx(1 - painted.mean(), abs=1e-12)
        cut += top == 0 or left == 0 or top + height == 30 or left + width == 50
    assert 200 < cut < 500


@pytest.mark.parametrize(
    ("policy", "mixup", "cutmix"),
    [
        (MixPolicy(0.2, 1.0, 0.5), 0.25, 0.25),
        (MixPolicy(0.2, 0, 0.3), 0.3, 0),
        (MixPolicy(0, 1.0, 1.0), 0, 1),
        (MixPolicy(0, 0, 1.0), 0, 0),
        (MixPolicy(0.2, 1.0, 0.0), 0, 0),
    ],
    ids=str,
)
def test_how_often_batches_are_mixed(policy, mixup, cutmix):
    drawn = [draw_mix(policy, 8, 8, 0, step, 0) for step in range(3000)]
    shares = {
        "mixup": np.mean([mix is not None and mix.box is None for mix in drawn]),
        "cutmix": np.mean([mix is not None and mix.box is not None for mix in drawn]),
    }
    assert shares["mixup"] == pytest.approx(mixup, abs=0.03)
    assert shares["cutmix"] == pytest.approx(cutmix, abs=0.03)
