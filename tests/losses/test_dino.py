"""The DINO loss against a double loop over view pairs, and the centre against numpy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from dino_kd.engine.compilation import compiler_works
from dino_kd.losses import dino
from dino_kd.losses.dino import Center, center_and_sharpen, dino_cross_entropy


def brute_force(student, teacher_probs, temp):
    """Every pair of different views, one at a time, in float64."""
    total, pairs = 0.0, 0
    for u in range(len(teacher_probs)):
        for v in range(len(student)):
            if u == v:
                continue
            log_p = torch.log_softmax(student[v].double() / temp, dim=-1)
            total = total - (teacher_probs[u].double() * log_p).sum(-1).mean()
            pairs += 1
    return total / pairs


@pytest.mark.parametrize("block", [1, 40, 2**18])
@pytest.mark.parametrize(("num_global", "num_local"), [(2, 0), (2, 1), (2, 8), (3, 2)])
def test_loss_and_gradient_equal_the_double_loop(num_global, num_local, block, monkeypatch):
    """In blocks of one row, of two and a rest, and of all rows."""
    monkeypatch.setattr(dino, "_BLOCK", block)
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(num_global + num_local, 5, 17, generator=generator).requires_grad_()
    targets = torch.softmax(torch.randn(num_global, 5, 17, generator=generator) * 3, -1)
    loss = dino_cross_entropy(student, targets, 0.1)
    expected = brute_force(student, targets, 0.1)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    (gradient,) = torch.autograd.grad(loss, student)
    (expected_gradient,) = torch.autograd.grad(expected, student)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=1e-6)


def test_gradient_is_that_of_finite_differences():
    student = torch.randn(4, 3, 6, dtype=torch.float64, requires_grad=True)
    targets = torch.softmax(torch.randn(2, 3, 6, dtype=torch.float64), -1)
    assert torch.autograd.gradcheck(lambda s: dino_cross_entropy(s, targets, 0.7), (student,))


def test_gradient_follows_what_comes_after_the_loss():
    """A scaled loss scales its gradient, and a graph that is kept gives it twice."""
    student = torch.randn(3, 2, 9, requires_grad=True)
    targets = torch.softmax(torch.randn(2, 2, 9), -1)
    loss = dino_cross_entropy(student, targets, 0.1)
    (plain,) = torch.autograd.grad(loss, student, retain_graph=True)
    (scaled,) = torch.autograd.grad(loss * 1024, student)
    torch.testing.assert_close(scaled, plain * 1024)


def test_the_forward_pass_keeps_one_gradient_of_the_logits_size():
    student = torch.randn(10, 4, 256).bfloat16().requires_grad_()
    targets = torch.softmax(torch.randn(2, 4, 256), -1)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        dino_cross_entropy(student, targets, 0.1)
    assert [(t.shape, t.dtype) for t in kept] == [(student.shape, torch.bfloat16)]


def test_autocast_changes_neither_loss_nor_gradient():
    student = torch.randn(4, 3, 64).bfloat16().requires_grad_()
    targets = torch.softmax(torch.randn(2, 3, 64), -1)
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = dino_cross_entropy(student, targets, 0.1)
            results.append((loss, *torch.autograd.grad(loss, student)))
    assert results[0][0].dtype == torch.float32
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_half_precision_gradients_do_not_drown_at_many_prototypes():
    """fp16 with a loss scale of 2^16, K = 65536: relative error of the gradient below 1 %."""
    student = torch.randn(3, 2, 65_536).half().requires_grad_()
    targets = torch.softmax(torch.randn(2, 2, 65_536), -1)
    (found,) = torch.autograd.grad(dino_cross_entropy(student, targets, 1.0) * 65_536, student)
    exact = student.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(brute_force(exact, targets, 1.0) * 65_536, exact)
    assert (found.double() - expected).norm() < 0.01 * expected.norm()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_compiled_region_gives_the_same(dtype):
    if not compiler_works("cpu"):
        pytest.skip("no compiler here")
    student = torch.randn(6, 5, 300).to(dtype).requires_grad_()
    targets = torch.softmax(torch.randn(2, 5, 300), -1)
    losses = [dino_cross_entropy(student, targets, 0.1, compiled=c) for c in (False, True)]
    torch.testing.assert_close(*losses, rtol=1e-6, atol=0)
    eager, fused = [torch.autograd.grad(loss, student)[0] for loss in losses]
    torch.testing.assert_close(
        fused, eager, rtol=1e-2 if dtype != torch.float32 else 1e-4, atol=1e-6
    )


def test_same_view_pairs_are_skipped():
    """A global crop's own target never reaches it: with G = 2, S = 2 each sees the other's only."""
    student = torch.randn(2, 3, 7)
    targets = torch.softmax(torch.randn(2, 3, 7), -1)
    swapped = -(targets.flip(0) * torch.log_softmax(student / 0.1, -1)).sum(-1).mean()
    torch.testing.assert_close(dino_cross_entropy(student, targets, 0.1), swapped)


@pytest.mark.parametrize("num_prototypes", [1024, 4096, 65536])
def test_untrained_loss_is_ln_k(num_prototypes):
    """The plateau users report: 6.9315, 8.3178, 11.0904."""
    logits = torch.zeros(4, 2, num_prototypes)
    targets = center_and_sharpen(logits[:2], torch.zeros(num_prototypes), 0.04)
    loss = dino_cross_entropy(logits, targets, 0.1)
    assert loss.item() == pytest.approx(math.log(num_prototypes), rel=1e-6)


def test_low_precision_logits_are_summed_in_float32():
    student = torch.randn(4, 3, 4096)
    targets = torch.softmax(torch.randn(2, 3, 4096), -1)
    low = student.bfloat16()
    assert dino_cross_entropy(low, targets, 0.1).dtype == torch.float32
    torch.testing.assert_close(
        dino_cross_entropy(low, targets, 0.1).double(),
        brute_force(low, targets, 0.1),
        rtol=1e-6,
        atol=0,
    )


def test_targets_are_centred_then_sharpened_without_gradient():
    logits = torch.randn(2, 3, 5, requires_grad=True)
    center = torch.randn(5)
    probs = center_and_sharpen(logits, center, 0.04)
    raw = (logits.detach().numpy().astype(np.float64) - center.numpy()) / 0.04
    expected = np.exp(raw - raw.max(-1, keepdims=True))
    expected /= expected.sum(-1, keepdims=True)
    np.testing.assert_allclose(probs.numpy(), expected, rtol=1e-4, atol=1e-6)
    assert not probs.requires_grad


def test_extreme_logits_stay_finite():
    student = torch.tensor([[[6e4, -6e4]], [[-6e4, 6e4]]], dtype=torch.float16)
    targets = center_and_sharpen(student, torch.zeros(2), 0.04)
    assert torch.isfinite(dino_cross_entropy(student, targets, 0.1))


def test_center_follows_numpy_over_uneven_micro_batches():
    """One commit is one EMA step towards the mean of all rows, however they were split."""
    rows = np.random.default_rng(0).normal(size=(2, 12, 6)).astype(np.float32)
    center = Center(6, momentum=0.9)
    expected = np.zeros(6)
    for _ in range(3):
        for part in np.split(rows, [5, 6], axis=1):
            center.observe(torch.from_numpy(part))
        center.commit()
        expected = 0.9 * expected + 0.1 * rows.reshape(-1, 6).mean(0)
    np.testing.assert_allclose(center.center.numpy(), expected, rtol=1e-5, atol=1e-7)


def test_discarded_and_empty_commits_leave_the_center():
    center = Center(4, momentum=0.9)
    center.observe(torch.ones(1, 2, 4))
    center.commit()
    before = center.center.clone()
    center.observe(torch.full((1, 2, 4), torch.nan))
    center.discard()
    center.commit()
    assert torch.equal(center.center, before)
