"""Losses of features and maps, against numpy and the published forms."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from dino_kd.losses.maps import (
    attention_loss,
    cosine_loss,
    energy_map,
    hint_loss,
    r_squared,
    resample_map,
)
from tests.tiny import draw


def test_hint_is_the_mean_squared_length_over_the_width():
    student, target = draw(3, 5, 4, 2), draw(3, 5, 4, 2, seed=1)
    lengths = ((student - target).double().numpy() ** 2).sum(1)  # [B, h, w]
    assert hint_loss(student, target).item() == pytest.approx(lengths.mean() / 5, rel=1e-6)
    pooled = hint_loss(student[:, :, 0, 0], target[:, :, 0, 0])
    assert pooled.item() == pytest.approx(lengths[:, 0, 0].mean() / 5, rel=1e-6)


def test_cosine_loss_is_two_minus_two_cosines():
    student, teacher = draw(6, 5), draw(6, 5, seed=1)
    expected = (2 - 2 * F.cosine_similarity(student.double(), teacher.double())).mean()
    torch.testing.assert_close(cosine_loss(student, teacher).double(), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(cosine_loss(-teacher, teacher), torch.tensor(4.0))
    assert cosine_loss(3 * teacher, teacher) < 1e-12


def test_maps_are_numpys():
    features = draw(2, 5, 3, 4, seed=1)
    energy = energy_map(features)
    for b, i, j in np.ndindex(2, 3, 4):
        token = features[b, :, i, j].double().numpy()
        assert energy[b, i, j].item() == pytest.approx((token**2).mean(), rel=1e-5)


def test_published_attention_weight_over_the_grid_is_ours():
    """The code of AT averages over the grid too, weight 1000: ours is 1000 / (h w)."""
    student, teacher = draw(3, 5, 14, 14), draw(3, 9, 14, 14, seed=1)
    published = [F.normalize(z.pow(2).mean(1).flatten(1)) for z in (student, teacher)]
    code = 1000 * (published[0] - published[1]).pow(2).mean()
    ours = attention_loss(energy_map(student), energy_map(teacher), form="l2")
    torch.testing.assert_close(1000 / 196 * ours, code)


def test_attention_kl_is_numpys():
    student, teacher = draw(3, 2, 4).square(), draw(3, 2, 4, seed=4)
    assert (teacher.amax((1, 2)) > 0).all()
    total = 0.0
    for b in range(3):
        q, a = student[b].double().numpy().ravel(), teacher[b].double().numpy().ravel().clip(0)
        a /= a.sum()
        z = q / q.std()
        log_p = z - np.log(np.exp(z).sum())
        total += sum(x * (np.log(x) - y) for x, y in zip(a, log_p, strict=True) if x > 0)
    assert attention_loss(student, teacher).item() == pytest.approx(total / 3, rel=1e-5)


@pytest.mark.parametrize("form", ["l2", "kl"])
def test_attention_forgets_the_scale_of_maps(form):
    """Energies of 1e-9 and of 1e9 alike, below and above every floor."""
    student, teacher = draw(3, 2, 4).square(), draw(3, 2, 4, seed=1).square()
    loss = attention_loss(student, teacher, form=form)
    for scale in (1e-9, 1e9):
        scaled = attention_loss(scale * student, scale * teacher, form=form)
        torch.testing.assert_close(scaled, loss)


def test_an_empty_teacher_map_is_uniform():
    student = draw(3, 2, 4).square()
    empty = attention_loss(student, torch.full((3, 2, 4), -1.0))
    torch.testing.assert_close(empty, attention_loss(student, torch.ones(3, 2, 4)))


def test_resampling_means_blocks_keeps_the_grid_and_interpolates():
    features = draw(2, 3, 14, 14)
    assert torch.equal(resample_map(features, (14, 14)), features)
    expected = features.double().numpy().reshape(2, 3, 7, 2, 2, 7).mean((3, 5))
    np.testing.assert_allclose(resample_map(features, (7, 2)).numpy(), expected, atol=1e-6)
    plane = Image.fromarray(features[0, 0].numpy())  # Pillow widens its filter too
    smaller = np.asarray(plane.resize((9, 11), Image.Resampling.BILINEAR))
    np.testing.assert_allclose(resample_map(features, (11, 9))[0, 0].numpy(), smaller, atol=1e-5)
    assert resample_map(features, (28, 21)).shape == (2, 3, 28, 21)


def test_r_squared_is_one_for_the_target_and_zero_for_its_mean():
    target = draw(8, 5) * torch.tensor([1.0, 2, 3, 4, 5]) + 7
    assert r_squared(target, target) == 1
    mean = target.mean(0).expand_as(target)
    assert r_squared(mean, target).abs() < 1e-6
    prediction = target + 0.1 * draw(8, 5, seed=1)
    rows, wanted = prediction.double().numpy(), target.double().numpy()
    expected = 1 - ((rows - wanted) ** 2).sum() / ((wanted - wanted.mean(0)) ** 2).sum()
    assert r_squared(prediction, target).item() == pytest.approx(expected, rel=1e-5)
    assert not r_squared(prediction.requires_grad_(), target).requires_grad


def test_r_squared_of_maps_has_channels_as_columns():
    prediction, target = draw(2, 5, 3, 4), draw(2, 5, 3, 4, seed=1)
    columns = [z.permute(0, 2, 3, 1).reshape(-1, 5) for z in (prediction, target)]
    torch.testing.assert_close(r_squared(prediction, target), r_squared(*columns))


def test_r_squared_of_a_constant_target_is_one_or_zero():
    constant = torch.ones(4, 3)
    assert r_squared(constant, constant) == 1
    assert r_squared(constant + 1, constant) == 0


LOSSES = {
    "hint": hint_loss,
    "cosine": lambda s, t: cosine_loss(s.flatten(1), t.flatten(1)),
    "l2": lambda s, t: attention_loss(energy_map(s), energy_map(t), form="l2"),
    "kl": lambda s, t: attention_loss(energy_map(s), energy_map(t), form="kl"),
}
EVERY = pytest.mark.parametrize("name", LOSSES)


@pytest.mark.parametrize("name", ["hint", "cosine", "l2"])
def test_equal_features_cost_nothing(name):
    features = draw(4, 3, 2, 5)
    assert LOSSES[name](features, features.clone()) == 0


@EVERY
def test_only_the_student_gets_a_gradient(name):
    student, teacher = (draw(4, 3, 2, 5, seed=s).requires_grad_() for s in (1, 2))
    LOSSES[name](student, teacher).backward()
    assert student.grad.abs().sum() > 0
    assert teacher.grad is None


@EVERY
def test_extreme_half_precision_features_stay_finite(name):
    """The whole range of float16, zeros and constants; rows that are equal."""
    wild = 6e4 * draw(4, 3, 2, 5).sign()
    for teacher in (wild, torch.zeros(4, 3, 2, 5), draw(4, 3, 2, 5)):
        for student in (wild, -wild, torch.zeros_like(wild), torch.full_like(wild, 6e4)):
            leaf = student.half().requires_grad_()
            loss = LOSSES[name](leaf, teacher.half())
            assert loss.dtype == torch.float32
            assert loss.isfinite()
            loss.backward()
            assert leaf.grad.isfinite().all()


@EVERY
def test_a_repeated_batch_costs_the_same(name):
    student, teacher = draw(4, 3, 2, 5), draw(4, 3, 2, 5, seed=1)
    repeated = LOSSES[name](student.repeat(3, 1, 1, 1), teacher.repeat(3, 1, 1, 1))
    torch.testing.assert_close(repeated, LOSSES[name](student, teacher))


@EVERY
def test_autocast_changes_nothing(name):
    student, teacher = draw(4, 3, 2, 5), draw(4, 3, 2, 5, seed=1)
    with torch.autocast("cpu", torch.bfloat16):
        low = LOSSES[name](student, teacher)
    assert torch.equal(low, LOSSES[name](student, teacher))


def test_shapes_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match=r"must both be \[B, C, h, w\]"):
        hint_loss(torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 2, 2))
    with pytest.raises(ValueError, match=r"must both be \[B, D\]"):
        cosine_loss(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(ValueError, match=r"must both be \[B, h, w\]"):
        attention_loss(torch.zeros(2, 3, 3), torch.zeros(2, 4, 4))
    with pytest.raises(ValueError, match="'kl' or 'l2', got 'l1'"):
        attention_loss(torch.zeros(2, 3, 3), torch.zeros(2, 3, 3), form="l1")
    with pytest.raises(ValueError, match=r"a map must be \[B, C, h, w\], got \[2, 3\]"):
        resample_map(torch.zeros(2, 3), (1, 1))
    with pytest.raises(ValueError, match="must both be"):
        r_squared(torch.zeros(2, 3), torch.zeros(2, 4))
