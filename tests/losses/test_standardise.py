"""Standard units of features, against numpy's moments and the definition of a Hadamard matrix."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dino_kd.losses.standardise import PhiS, Standardise, hadamard

BOTH = pytest.mark.parametrize("make", [Standardise, PhiS])


def features(rows, dim, seed=0):
    """Correlated columns of very different size, away from 0."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(dim, dim, generator=generator)
    scales = torch.logspace(-2, 2, dim)
    return (torch.randn(rows, dim, generator=generator) @ mix) * scales + 3 * scales


def test_columns_get_numpys_moments():
    rows = features(400, 12)
    standardise = Standardise(12)
    standardise.fit(rows)
    exact = rows.double().numpy()
    expected = (exact - exact.mean(0)) / exact.std(0)
    np.testing.assert_allclose(standardise(rows).numpy(), expected, atol=1e-4)


@pytest.mark.parametrize("dim", [8, 12, 20, 24])
def test_every_column_of_phi_s_has_variance_one(dim):
    rows = features(40 * dim, dim)
    phi_s = PhiS(dim)
    phi_s.fit(rows)
    standard = phi_s(rows).double()
    torch.testing.assert_close(standard.mean(0), torch.zeros(dim).double(), atol=1e-4, rtol=0)
    torch.testing.assert_close(
        standard.var(0, correction=0), torch.ones(dim).double(), atol=1e-3, rtol=0
    )


def test_phi_s_without_a_matrix_is_near_one_and_says_so():
    assert hadamard(10) is None
    rows = features(400, 10)
    phi_s, again = PhiS(10), PhiS(10)
    phi_s.fit(rows)
    again.fit(rows)
    assert torch.equal(phi_s.rotation, again.rotation)
    variance = phi_s(rows).var(0, correction=0)
    assert variance.mean().item() == pytest.approx(1, rel=1e-3)
    assert (variance - 1).abs().max() > 1e-2


@pytest.mark.parametrize("dim", [10, 12, 16])
def test_phi_s_errors_count_alike_in_every_direction(dim):
    """|y - y'| is |x - x'| over one number: the root mean variance of the columns."""
    rows, others = features(400, dim), features(400, dim, seed=1)
    phi_s = PhiS(dim)
    phi_s.fit(rows)
    phi = rows.double().var(0, correction=0).mean().sqrt().float()
    before, after = (rows - others).norm(dim=1), (phi_s(rows) - phi_s(others)).norm(dim=1)
    torch.testing.assert_close(after, before / phi, rtol=1e-4, atol=1e-5)


@BOTH
@pytest.mark.parametrize("dim", [10, 12])
def test_inverse_returns_the_features(make, dim):
    rows = features(400, dim)
    module = make(dim)
    assert torch.equal(module(rows), rows)  # until fitted
    module.fit(rows)
    size = rows.norm(dim=1).mean()
    torch.testing.assert_close(module.inverse(module(rows)) / size, rows / size, atol=1e-5, rtol=0)
    images = rows[:24].reshape(2, 3, 4, dim)
    torch.testing.assert_close(module(images).reshape(24, dim), module(rows[:24]))


@BOTH
def test_constant_columns_and_extremes_stay_finite(make):
    module = make(4)
    module.fit(torch.full((30, 4), 7.0))
    assert module(torch.full((2, 4), 7.0)).abs().max() < 1e-5
    wild = (6e4 * torch.randn(30, 4).sign()).half()
    wild[:, 2] = 0
    module.fit(wild)
    assert module(wild).isfinite().all()
    assert module(wild).dtype == torch.float32


@BOTH
def test_a_state_dict_fits_either_and_gives_the_same_numbers(make):
    rows = features(400, 12)
    module = make(12)
    module.fit(rows)
    for other in (Standardise(12), PhiS(12)):
        other.load_state_dict(module.state_dict())
        assert torch.equal(other(rows), module(rows))


@BOTH
def test_autocast_changes_nothing(make):
    rows = features(400, 12)
    module = make(12)
    module.fit(rows)
    with torch.autocast("cpu", torch.bfloat16):
        low = module(rows), module.inverse(rows)
    assert torch.equal(low[0], module(rows))
    assert torch.equal(low[1], module.inverse(rows))


@BOTH
def test_what_cannot_be_measured_is_refused(make):
    module = make(4)
    with pytest.raises(ValueError, match="at least 2 rows of features, got 1"):
        module.fit(torch.zeros(1, 4))
    with pytest.raises(ValueError, match=r"must be \[M, 4\], got \[5, 3\]"):
        module.fit(torch.zeros(5, 3))
    with pytest.raises(ValueError, match="must be finite"):
        module.fit(torch.full((5, 4), float("nan")))


@pytest.mark.parametrize(
    "order", [1, 2, 4, 12, 20, 24, 96, 192, 320, 384, 576, 768, 960, 1024, 1280, 1536]
)
def test_hadamard_matrices_are_orthonormal_with_equal_entries(order):
    matrix = hadamard(order)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(order).double(), atol=1e-10, rtol=0)
    entries = torch.full_like(matrix, order**-0.5)
    torch.testing.assert_close(matrix.abs(), entries, atol=1e-12, rtol=0)


@pytest.mark.parametrize("order", [3, 6, 10, 28])
def test_orders_without_a_built_matrix_are_none(order):
    assert hadamard(order) is None
