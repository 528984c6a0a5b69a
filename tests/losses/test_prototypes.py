"""Prototype distillation against DINO's own cross-entropy; Sinkhorn against plain divisions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dino_kd.distributed import process_group
from dino_kd.losses.prototypes import prototype_loss, sinkhorn
from tests.tiny import draw
from tests.two_ranks import on_two_ranks


def test_prototype_loss_is_the_cross_entropy_less_the_entropy():
    student, probs = draw(5, 9), F.softmax(3 * draw(5, 9, seed=1), 1)
    entropy = -(probs * probs.log()).sum(1).mean()
    expected = F.cross_entropy(student / 0.1, probs) - entropy
    torch.testing.assert_close(prototype_loss(student, probs), expected)


def test_prototype_loss_of_equal_probabilities_is_zero():
    student = draw(5, 9)
    assert prototype_loss(student, F.softmax(student / 0.1, 1)).abs() < 1e-6
    one_hot = F.one_hot(torch.arange(5), 9).float()  # exact zeros in the target
    assert prototype_loss(100 * one_hot, one_hot).abs() < 1e-6


def test_only_the_student_gets_a_gradient():
    student, probs = draw(5, 9).requires_grad_(), F.softmax(draw(5, 9), 1).requires_grad_()
    prototype_loss(student, probs).backward()
    assert student.grad.abs().sum() > 0
    assert probs.grad is None


def test_no_masked_token_costs_nothing():
    student = torch.zeros(0, 9, requires_grad=True)
    loss = prototype_loss(student, torch.zeros(0, 9))
    loss.backward()
    assert loss == 0


def test_extreme_half_precision_logits_stay_finite():
    student = (6e4 * draw(4, 9).sign()).half().requires_grad_()
    probs = sinkhorn((6e4 * draw(4, 9, seed=1).sign()).half(), 0.04)
    loss = prototype_loss(student, probs)
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.isfinite()
    assert student.grad.isfinite().all()


def test_a_repeated_batch_costs_the_same():
    student, probs = draw(5, 9), F.softmax(draw(5, 9, seed=1), 1)
    repeated = prototype_loss(student.repeat(3, 1), probs.repeat(3, 1))
    torch.testing.assert_close(repeated, prototype_loss(student, probs))


@pytest.mark.parametrize("iterations", [1, 3])
def test_sinkhorn_is_alternating_division(iterations):
    logits = 0.3 * draw(6, 4)
    q = np.exp(logits.double().numpy() / 0.07)
    for _ in range(iterations):
        q /= q.sum(0, keepdims=True)
        q /= q.sum(1, keepdims=True)
    np.testing.assert_allclose(sinkhorn(logits, 0.07, iterations).numpy(), q, atol=1e-5)


def test_sinkhorn_uses_every_prototype_where_the_softmax_uses_one():
    logits = draw(64, 8)
    logits[:, 0] += 20
    plain = F.softmax(logits / 0.5, 1).sum(0)
    balanced = sinkhorn(logits, 0.5, 50).sum(0)
    assert plain[1:].sum() < 1e-6
    torch.testing.assert_close(balanced, torch.full((8,), 8.0), rtol=1e-3, atol=0)


@pytest.mark.parametrize("scale", [0.0, 1.0, 6e4])
def test_sinkhorn_rows_sum_to_one_and_are_never_nan(scale):
    logits = (scale * draw(6, 40).sign()).half()
    logits[1] = logits[0]
    logits[:, 3] = -scale
    probs = sinkhorn(logits.requires_grad_(), 0.04)
    assert probs.dtype == torch.float32
    assert not probs.requires_grad
    torch.testing.assert_close(probs.sum(1), torch.ones(6))
    assert sinkhorn(torch.zeros(0, 5), 0.04).shape == (0, 5)


def check_balance(rank):
    logits = draw(7, 5)
    expected = sinkhorn(logits, 0.1)
    with process_group("cpu"):
        for cut in (3, 0):  # ragged, and a process without any image
            part = slice(0, cut) if rank == 0 else slice(cut, None)
            torch.testing.assert_close(sinkhorn(logits[part], 0.1), expected[part])


@pytest.mark.dist
def test_two_processes_balance_over_all_images():
    on_two_ranks(check_balance)


def test_shapes_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match=r"must both be \[B, K\]"):
        prototype_loss(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(ValueError, match=r"logits must be \[B, K\], got \[3\]"):
        sinkhorn(torch.zeros(3), 0.1)
    with pytest.raises(ValueError, match="at least one iteration, got 0"):
        sinkhorn(torch.zeros(3, 2), 0.1, 0)
