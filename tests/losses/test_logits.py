"""Losses of class scores, against closed forms, numpy and torch's own kl_div."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dino_kd.losses.logits import (
    dist_loss,
    dkd_loss,
    hard_label_loss,
    kd_loss,
    mean_probability_logits,
    soft_cross_entropy,
    standardise_logits,
)
from tests import tiny


def draw(*shape, seed=0, scale=2.0):
    return scale * tiny.draw(*shape, seed=seed)


def pair(batch=6, classes=7):
    return draw(batch, classes, seed=1), draw(batch, classes, seed=2)


def one_hot(batch=6, classes=7):
    return F.one_hot(torch.arange(batch) % classes, classes).float()


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_kd_is_torch_kl_div_times_t_squared(temperature):
    student, teacher = pair()
    expected = F.kl_div(
        F.log_softmax(student / temperature, 1), F.softmax(teacher / temperature, 1),
        reduction="batchmean",
    )  # fmt: skip
    loss = kd_loss(student, teacher, temperature)
    torch.testing.assert_close(loss, temperature**2 * expected)


def test_standardised_rows_are_numpys_and_forget_scale_and_shift():
    student, teacher = pair()
    rows = student.double().numpy()
    expected = (rows - rows.mean(1, keepdims=True)) / rows.std(1, keepdims=True)
    np.testing.assert_allclose(standardise_logits(student).numpy(), expected, atol=1e-5)
    plain = kd_loss(student, teacher, 2.0, standardise=True)
    torch.testing.assert_close(kd_loss(3 * student + 5, teacher, 2.0, standardise=True), plain)
    assert not torch.isclose(kd_loss(3 * student + 5, teacher, 2.0), kd_loss(student, teacher, 2.0))


def test_published_logit_standardisation_is_a_temperature():
    """With the sample deviation: T sqrt(Y/(Y-1)), and the weight times (Y-1)/Y."""
    student, teacher = pair()
    classes, temperature, weight = 7, 2.0, 9.0
    z_s, z_t = ((z - z.mean(1, keepdim=True)) / z.std(1, keepdim=True) for z in (student, teacher))
    published = weight * temperature**2 * F.kl_div(
        F.log_softmax(z_s / temperature, 1), F.softmax(z_t / temperature, 1), reduction="batchmean"
    )  # fmt: skip
    ours = kd_loss(
        student, teacher, temperature * math.sqrt(classes / (classes - 1)), standardise=True
    )
    torch.testing.assert_close(weight * (classes - 1) / classes * ours, published)


def test_deit_soft_weight_is_ours_over_the_classes():
    student, teacher = pair()
    deit = F.kl_div(
        F.log_softmax(student / 3, 1), F.log_softmax(teacher / 3, 1), reduction="sum",
        log_target=True,
    ) * 9 / student.numel()  # fmt: skip
    torch.testing.assert_close(kd_loss(student, teacher, 3.0) / 7, deit)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_kd_is_the_target_term_plus_the_rest_times_its_share(temperature):
    """KD = TCKD + (1 - p_t,y) NCKD, by rows of one image."""
    student, teacher = pair()
    shares = one_hot()
    probs = F.softmax(teacher / temperature, 1)
    for b in range(len(student)):
        row = (student[b : b + 1], teacher[b : b + 1], shares[b : b + 1])
        rest = 1 - float((probs[b] * shares[b]).sum())
        expected = kd_loss(*row[:2], temperature)
        actual = dkd_loss(*row, alpha=1.0, beta=rest, temperature=temperature)
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)


def test_dkd_terms_are_those_of_a_numpy_loop():
    student, teacher = pair()
    total = 0.0
    for b, y in enumerate(one_hot().argmax(1).tolist()):
        probs = [F.softmax(z[b].double() / 4, 0).numpy() for z in (teacher, student)]
        rest = [np.delete(p, y) / (1 - p[y]) for p in probs]
        two = [np.array([p[y], 1 - p[y]]) for p in probs]
        binary = (two[0] * np.log(two[0] / two[1])).sum()
        others = (rest[0] * np.log(rest[0] / rest[1])).sum()
        total += 16 * (0.7 * binary + 3 * others)
    loss = dkd_loss(student, teacher, one_hot(), alpha=0.7, beta=3.0, temperature=4.0)
    assert loss.item() == pytest.approx(total / 6, rel=1e-5)


def test_rows_without_a_main_class_count_as_plain_kd():
    student, teacher = pair(batch=3)
    shares = torch.zeros(3, 7)
    shares[1, :2] = 0.5
    loss = dkd_loss(student, teacher, shares, alpha=5.0, temperature=2.0)
    torch.testing.assert_close(loss, kd_loss(student, teacher, 2.0))
    shares[2, 3], shares[2, 4] = 0.6, 0.4
    mixed = dkd_loss(student, teacher, shares, temperature=2.0)
    alone = dkd_loss(student[2:], teacher[2:], one_hot(4, 7)[3:], temperature=2.0)
    expected = (2 * kd_loss(student[:2], teacher[:2], 2.0) + alone) / 3
    torch.testing.assert_close(mixed, expected)


@pytest.mark.parametrize("classes", [1, 2])
def test_dkd_refuses_two_classes(classes):
    logits = torch.zeros(3, classes)
    with pytest.raises(ValueError, match=f"at least 3 classes, got {classes}"):
        dkd_loss(logits, logits, logits)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_dist_is_numpys_correlation(temperature):
    student, teacher = pair()
    p_s, p_t = (F.softmax(z.double() / temperature, 1).numpy() for z in (student, teacher))
    inter = 1 - np.mean([np.corrcoef(p_s[b], p_t[b])[0, 1] for b in range(6)])
    intra = 1 - np.mean([np.corrcoef(p_s[:, k], p_t[:, k])[0, 1] for k in range(7)])
    loss = dist_loss(student, teacher, beta=2.0, gamma=3.0, temperature=temperature)
    assert loss.item() == pytest.approx(temperature**2 * (2 * inter + 3 * intra), rel=1e-4)


def test_dist_of_opposite_scores_is_larger_than_of_equal_ones():
    student, _ = pair()
    assert dist_loss(student, student) < 1e-6
    assert dist_loss(-student, student) > dist_loss(draw(6, 7, seed=9), student) > 0.1


def test_dist_sees_classes_of_tiny_probability():
    """A thousand classes with sharp scores: an absolute eps would hide nearly every column."""
    teacher = draw(16, 1000, scale=5.0)
    assert dist_loss(teacher, teacher) < 1e-5
    p_s, p_t = (F.softmax(z.double(), 1).numpy() for z in (draw(16, 1000, seed=3), teacher))
    intra = 1 - np.mean([np.corrcoef(p_s[:, k], p_t[:, k])[0, 1] for k in range(1000)])
    loss = dist_loss(draw(16, 1000, seed=3), teacher, beta=0.0)
    assert loss.item() == pytest.approx(intra, rel=1e-4)


def test_hard_labels_are_the_teachers_classes():
    student, teacher = pair()
    log_p = F.log_softmax(student.double(), 1)
    expected = -np.mean([log_p[b, int(teacher[b].argmax())].item() for b in range(6)])
    assert hard_label_loss(student, teacher).item() == pytest.approx(expected, rel=1e-6)


def test_soft_cross_entropy_is_torchs_and_scales_with_the_labelled_share():
    logits, other = pair()
    shares = F.softmax(other, 1)
    torch.testing.assert_close(soft_cross_entropy(logits, shares), F.cross_entropy(logits, shares))
    shares[3:] = 0  # half of the images have no label
    expected = F.cross_entropy(logits[:3], shares[:3])
    torch.testing.assert_close(soft_cross_entropy(logits, shares, 0.5), expected)
    for share in (0.0, 1.5):
        with pytest.raises(ValueError, match=f"labelled_share .* got {share}"):
            soft_cross_entropy(logits, shares, share)


def test_an_ensembles_logits_have_the_mean_of_probabilities():
    one, two = pair()
    logits = mean_probability_logits([one.requires_grad_(), two.half()])
    expected = (F.softmax(one, 1) + F.softmax(two.half().float(), 1)) / 2
    torch.testing.assert_close(F.softmax(logits, 1), expected)
    assert not logits.requires_grad
    torch.testing.assert_close(mean_probability_logits([one]), F.log_softmax(one.detach(), 1))
    assert mean_probability_logits([one * 6e4, two * 6e4]).isfinite().all()
    weighted = mean_probability_logits([one, two], [3, 1])
    close = (3 * F.softmax(one, 1) + F.softmax(two, 1)) / 4
    torch.testing.assert_close(F.softmax(weighted, 1), close)
    for weights in ([1.0], [1.0, 0.0]):
        with pytest.raises(ValueError, match="2 teachers need as many weights above 0"):
            mean_probability_logits([one, two], weights)
    with pytest.raises(ValueError, match="at least one teacher"):
        mean_probability_logits([])
    with pytest.raises(ValueError, match="must both be"):
        mean_probability_logits([one, two[:, :3]])


LOSSES = {
    "kd": lambda s, t: kd_loss(s, t, 4.0),
    "kd, standardised": lambda s, t: kd_loss(s, t, 2.0, standardise=True),
    "dkd": lambda s, t: dkd_loss(s, t, one_hot(*s.shape)),
    "dkd, no label": lambda s, t: dkd_loss(s, t, torch.zeros(s.shape)),
    "dist": lambda s, t: dist_loss(s, t, temperature=2.0),
    "hard": hard_label_loss,
    "soft cross-entropy": lambda s, t: soft_cross_entropy(s, F.softmax(t.float(), 1)),
}
EVERY = pytest.mark.parametrize("name", LOSSES)


@pytest.mark.parametrize("name", ["kd", "kd, standardised", "dkd", "dkd, no label", "dist"])
def test_equal_scores_cost_nothing(name):
    logits = pair()[0]
    assert LOSSES[name](logits, logits.clone()).abs() < 1e-6
    constant = torch.ones(6, 7)
    assert LOSSES[name](constant, constant.clone()).abs() < 1e-6


@EVERY
def test_only_the_student_gets_a_gradient(name):
    student, teacher = (z.requires_grad_() for z in pair())
    LOSSES[name](student, teacher).backward()
    assert student.grad.abs().sum() > 0
    assert teacher.grad is None


@EVERY
def test_extreme_half_precision_scores_stay_finite(name):
    rows = torch.tensor([[6e4, -6e4, 0.0, 1], [-6e4, 6e4, 6e4, 0], [0, 0, 0, 0], [1, 1, 1, 1]])
    for order in ([0, 1, 2, 3], [1, 0, 3, 2], [0, 0, 0, 0], [2, 3, 2, 3]):
        student = rows.half().requires_grad_()
        loss = LOSSES[name](student, rows[order].half())
        assert loss.dtype == torch.float32
        assert loss.isfinite()
        loss.backward()
        assert student.grad.isfinite().all(), order


@EVERY
def test_a_repeated_batch_costs_the_same(name):
    student, teacher = pair(batch=7)  # as many as classes: one_hot repeats with it
    loss = LOSSES[name](student, teacher)
    torch.testing.assert_close(LOSSES[name](student.repeat(3, 1), teacher.repeat(3, 1)), loss)


@EVERY
def test_autocast_changes_nothing(name):
    student, teacher = pair()
    with torch.autocast("cpu", torch.bfloat16):
        low = LOSSES[name](student, teacher)
    assert torch.equal(low, LOSSES[name](student, teacher))


@pytest.mark.parametrize("loss", [kd_loss, dist_loss, hard_label_loss, soft_cross_entropy])
def test_shapes_that_do_not_fit_are_named(loss):
    with pytest.raises(ValueError, match=r"must both be \[B, Y\], got \[3, 4\] and \[3, 5\]"):
        loss(torch.zeros(3, 4), torch.zeros(3, 5))
    with pytest.raises(ValueError, match="must both be"):
        loss(torch.zeros(4), torch.zeros(4))
