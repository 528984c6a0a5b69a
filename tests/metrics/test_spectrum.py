"""Label-free metrics against numpy and scipy, and against numbers known in closed form."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.linalg
import torch

from dino_kd.metrics import spectrum as m


@pytest.fixture
def features():
    """Correlated, not centred, of unequal scales."""
    rng = np.random.default_rng(0)
    mix = rng.normal(size=(12, 12)) * (np.arange(1, 13) ** -0.8)
    return torch.from_numpy(rng.normal(size=(80, 12)) @ mix.T + 0.3).float()


@pytest.fixture
def views():
    rng = np.random.default_rng(1)
    return torch.from_numpy(rng.normal(size=(30, 1, 6)) + 0.4 * rng.normal(size=(30, 5, 6))).float()


def smooth_rank(values, epsilon=1e-7):
    p = values / np.abs(values).sum() + epsilon
    return math.exp(-sum(x * math.log(x) for x in p))


def test_rankme_is_the_papers_formula(features):
    expected = smooth_rank(np.linalg.svd(features.double().numpy(), compute_uv=False))
    assert m.rankme(features) == pytest.approx(expected, rel=1e-9)


def test_rankme_of_known_cases():
    g = torch.Generator().manual_seed(0)
    assert m.rankme(torch.randn(20000, 32, generator=g)) == pytest.approx(32, rel=2e-3)
    line = torch.randn(50, 1, generator=g) @ torch.randn(1, 16, generator=g)
    assert m.rankme(line) == pytest.approx(1, abs=1e-3)
    assert m.rankme(torch.eye(8)) == pytest.approx(8, rel=1e-5)
    assert m.rankme(torch.zeros(5, 4)) == 1.0


def test_covariance_spectrum_is_numpys(features):
    expected = np.linalg.eigvalsh(np.cov(features.double().numpy().T, bias=True))[::-1]
    np.testing.assert_allclose(m.covariance_spectrum(features).numpy(), expected, rtol=1e-8)


def test_alpha_of_an_exact_power_law():
    ranks = torch.arange(1, 301, dtype=torch.float64)
    assert m.alpha_req(5 * ranks**-1.3) == pytest.approx(1.3, abs=1e-10)


def test_alpha_is_numpys_weighted_fit_over_the_same_ranks(features):
    values = m.covariance_spectrum(features)
    ranks = np.arange(3, 13)
    slope = np.polyfit(np.log(ranks), np.log(values.numpy()[2:]), 1, w=np.sqrt(1 / ranks))[0]
    assert m.alpha_req(values) == pytest.approx(-slope, rel=1e-9)


@pytest.mark.parametrize(("values", "alpha"), [([], 0.0), ([0.0, 0.0], 0.0), ([1.0, 0.0], 0.0)])
def test_alpha_without_a_decay_is_zero(values, alpha):
    assert m.alpha_req(torch.tensor(values)) == alpha


def test_alpha_of_few_eigenvalues_uses_all_of_them():
    assert m.alpha_req(torch.tensor([1.0, 0.25])) == pytest.approx(2.0)


def test_effective_rank_and_participation_ratio(features):
    values = m.covariance_spectrum(features).numpy()
    assert m.effective_rank(torch.from_numpy(values)) == pytest.approx(smooth_rank(values, 0.0))
    expected = values.sum() ** 2 / (values**2).sum()
    assert m.participation_ratio(torch.from_numpy(values)) == pytest.approx(expected)
    for rank in (m.effective_rank, m.participation_ratio):
        assert rank(torch.full((7,), 3.0)) == pytest.approx(7)
        assert rank(torch.tensor([2.0, 0.0, 0.0])) == pytest.approx(1)
        assert rank(torch.zeros(3)) == 0.0


def test_alignment_is_the_mean_over_pairs_of_views(views):
    z = views.double().numpy()
    z /= np.linalg.norm(z, axis=-1, keepdims=True)
    pairs = [
        ((one[a] - one[b]) ** 2).sum() for one in z for a in range(5) for b in range(5) if a != b
    ]
    assert m.alignment(views) == pytest.approx(np.mean(pairs), rel=1e-10)


def test_alignment_of_known_cases():
    same = torch.randn(4, 1, 3).expand(4, 6, 3)
    assert m.alignment(same) == pytest.approx(0, abs=1e-12)
    assert m.alignment(torch.tensor([[[1.0, 0], [-1.0, 0]]])) == pytest.approx(4)
    assert m.alignment(torch.tensor([[[1.0, 0], [0, 2.0]]])) == pytest.approx(2)
    with pytest.raises(ValueError, match="at least 2 views"):
        m.alignment(torch.ones(3, 1, 2))


def test_uniformity_is_the_log_mean_over_pairs(features):
    z = features.double().numpy()
    z /= np.linalg.norm(z, axis=-1, keepdims=True)
    kernel = [
        math.exp(-2 * ((z[i] - z[j]) ** 2).sum()) for i in range(80) for j in range(80) if i != j
    ]
    assert m.uniformity(features, chunk=7) == pytest.approx(math.log(np.mean(kernel)), rel=1e-9)


def test_uniformity_of_known_cases():
    """On the circle E exp(-2|x-y|^2) = E exp(-4 + 4 cos a) = exp(-4) I0(4)."""
    angles = 2 * math.pi * torch.arange(3000, dtype=torch.float64) / 3000
    circle = torch.stack([angles.cos(), angles.sin()], 1)
    mean = math.exp(-4) * float(np.i0(4.0))
    without_itself = (3000 * mean - 1) / 2999
    assert m.uniformity(circle) == pytest.approx(math.log(without_itself), abs=1e-9)
    assert m.uniformity(torch.ones(9, 4)) == pytest.approx(0, abs=1e-12)
    assert m.uniformity(torch.tensor([[1.0, 0], [-3.0, 0]])) == pytest.approx(-8)
    with pytest.raises(ValueError, match="at least 2 images"):
        m.uniformity(torch.ones(1, 2))


def test_lidar_is_the_papers_matrix(views):
    """Sw^-1/2 by scipy's matrix functions, loops for the scatter."""
    x = views.double().numpy()
    mu = x.mean(1)
    overall = mu.mean(0)
    between = sum(np.outer(a - overall, a - overall) for a in mu) / 30
    within = sum(np.outer(x[i, q] - mu[i], x[i, q] - mu[i]) for i in range(30) for q in range(5))
    within = within / 150 + 1e-4 * np.eye(6)
    root = np.linalg.inv(scipy.linalg.sqrtm(within))
    expected = smooth_rank(np.linalg.eigvalsh(root @ between @ root))
    assert m.lidar(views) == pytest.approx(expected, rel=1e-8)


def test_lidar_of_known_cases():
    """Isotropic noise around isotropic means: near D; means on a line: near 1."""
    g = torch.Generator().manual_seed(0)
    noise = 0.1 * torch.randn(4000, 4, 8, generator=g)
    assert m.lidar(torch.randn(4000, 1, 8, generator=g) + noise) == pytest.approx(8, rel=1e-2)
    line = torch.randn(4000, 1, 1, generator=g) * torch.ones(8)
    assert m.lidar(line + 0.01 * noise) == pytest.approx(1, abs=0.05)
    for shape in ((1, 5, 3), (5, 1, 3)):
        with pytest.raises(ValueError, match="at least 2 images of 2 views"):
            m.lidar(torch.ones(shape))


def test_collapsed_features_give_finite_numbers():
    """Equal up to rounding of single precision."""
    g = torch.Generator().manual_seed(0)
    base = torch.randn(1, 1, 16, generator=g)
    same = base * (1 + 1e-8 * torch.randn(20, 4, 16, generator=g))
    flat = same.flatten(0, 1)
    values = m.covariance_spectrum(flat)
    assert values.sum() == 0
    found = [m.rankme(flat), m.alpha_req(values), m.effective_rank(values)]
    found += [m.participation_ratio(values), m.uniformity(flat), m.alignment(same), m.lidar(same)]
    assert found == pytest.approx([1, 0, 0, 0, 0, 0, 1], abs=1e-4)
    assert m.mean_std(flat) == pytest.approx(0, abs=1e-6)
    assert m.dead_dimensions(flat) == 1.0


def test_mean_std_and_dead_dimensions():
    g = torch.Generator().manual_seed(0)
    features = torch.randn(5000, 16, generator=g)
    assert m.mean_std(features) == pytest.approx(1 / 4, rel=1e-2)
    assert m.dead_dimensions(features) == 0.0
    features[:, :4] = 2.5
    features[:, 4] *= 1e-5
    assert m.dead_dimensions(features) == 5 / 16
