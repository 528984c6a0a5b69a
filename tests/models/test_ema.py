"""update_teacher against a numpy loop, for parameters and the three policies for buffers."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from dino_kd.models.ema import update_teacher


def make_pair():
    torch.manual_seed(0)
    student = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))
    teacher = copy.deepcopy(student).requires_grad_(False)
    for parameter in student.parameters():
        nn.init.normal_(parameter)
    student(torch.randn(8, 3, 1, 1))  # moves running statistics and the counter
    return student, teacher


@pytest.mark.parametrize("momentum", [0.0, 0.3, 0.9, 0.996, 1.0])
@pytest.mark.parametrize("buffers", ["own", "ema", "copy"])
def test_matches_a_loop(momentum, buffers):
    student, teacher = make_pair()
    expected = {k: v.numpy().copy() for k, v in teacher.state_dict().items()}
    parameters = dict(student.named_parameters())
    for name, value in student.state_dict().items():
        new = value.numpy()
        if name in parameters or (buffers == "ema" and new.dtype.kind == "f"):
            expected[name] = momentum * expected[name] + (1 - momentum) * new
        elif buffers != "own":
            expected[name] = new
    before = copy.deepcopy(student.state_dict())

    update_teacher(student, teacher, momentum, buffers)

    for name, value in teacher.state_dict().items():
        np.testing.assert_allclose(value.numpy(), expected[name], atol=1e-6, err_msg=name)
        assert torch.equal(student.state_dict()[name], before[name])


def test_momentum_one_leaves_the_parameters_bit_for_bit():
    student, teacher = make_pair()
    before = [p.clone() for p in teacher.parameters()]
    update_teacher(student, teacher, 1.0)
    assert all(torch.equal(a, b) for a, b in zip(teacher.parameters(), before, strict=True))


def test_many_updates_converge_to_a_fixed_student():
    student, teacher = make_pair()
    for _ in range(200):
        update_teacher(student, teacher, 0.9, "ema")
    for ours, theirs in zip(student.parameters(), teacher.parameters(), strict=True):
        torch.testing.assert_close(ours.detach(), theirs, atol=1e-6, rtol=1e-5)


def test_different_networks_are_refused():
    with pytest.raises(AssertionError, match="different networks"):
        update_teacher(nn.Linear(2, 2), nn.Linear(2, 2, bias=False), 0.9)
