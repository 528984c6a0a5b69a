"""`unit_rows` against the plain operations of PyTorch in float64."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from dino_kd.models import unit_rows as module
from dino_kd.models.unit_rows import unit_rows
from tests.tiny import draw

EPS = 1e-6


@pytest.fixture(params=[1, 7, 2**18], ids="block of {}".format)
def blocks(request, monkeypatch):
    """Blocks of one row, of one or two, and all rows in one."""
    monkeypatch.setattr(module, "_BLOCK", request.param)


def plain(rows, gradient):
    """The quotient and its gradient by automatic differentiation in float64."""
    rows = rows.detach().double().requires_grad_()
    made = F.normalize(rows, dim=1, eps=EPS)
    return made.detach(), torch.autograd.grad(made, rows, gradient.double())[0]


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_value_is_the_plain_one_bit_for_bit_and_the_gradient_up_to_rounding(dtype):
    rows = (draw(11, 5) * 0.02).requires_grad_()
    made = unit_rows(rows, EPS, dtype)
    assert torch.equal(made, F.normalize(rows, dim=1, eps=EPS).to(dtype))
    gradient = draw(11, 5, seed=1).to(dtype)
    (found,) = torch.autograd.grad(made, rows, gradient)
    expected = plain(rows, gradient)[1]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5 * expected.max())


@pytest.mark.usefixtures("blocks")
def test_rows_shorter_than_eps_are_divided_by_it():
    rows = draw(4, 3)
    rows[1] *= 1e-8
    rows[2] = 0
    rows.requires_grad_()
    gradient = draw(4, 3, seed=1)
    made = unit_rows(rows, EPS, torch.float32)
    made.backward(gradient)
    value, expected = plain(rows, gradient)
    torch.testing.assert_close(made.double(), value, rtol=1e-5, atol=0)
    torch.testing.assert_close(rows.grad.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(rows.grad[1:3], gradient[1:3] / EPS)


@pytest.mark.usefixtures("blocks")
def test_a_gradient_in_another_layout_is_the_same():
    rows = draw(11, 5).requires_grad_()
    gradient = draw(5, 11, seed=1).T
    (found,) = torch.autograd.grad(unit_rows(rows, EPS, torch.float32), rows, gradient)
    (again,) = torch.autograd.grad(unit_rows(rows, EPS, torch.float32), rows, gradient.contiguous())
    assert torch.equal(found, again)


def test_moving_along_a_row_changes_nothing():
    """The closed form: the gradient is at right angles to its row."""
    rows = draw(6, 4).requires_grad_()
    (found,) = torch.autograd.grad(unit_rows(rows, EPS, torch.float32), rows, draw(6, 4, seed=1))
    assert (found * rows).sum(1).abs().max() < 1e-6
    assert found.abs().min() > 0


def test_rows_in_half_precision_get_a_gradient_of_their_type():
    rows = draw(6, 4).bfloat16().requires_grad_()
    unit_rows(rows, EPS, torch.float32).sum().backward()
    assert rows.grad.dtype == torch.bfloat16
