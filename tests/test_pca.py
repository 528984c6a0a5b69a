"""Principal components against scikit-learn, and the colours made of them against hand counts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA

from dino_kd.pca import fit_patch_colours, fit_pca


def tokens(rows, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    scales = 3.0 / torch.arange(1, width + 1)  # clearly separated variances
    return torch.randn(rows, width, generator=generator) * scales + 5


@pytest.mark.parametrize(("rows", "width"), [(200, 12), (9, 40), (40, 40), (5, 4)])
def test_components_are_those_of_scikit_learn(rows, width):
    """More tokens than dimensions and fewer, signs included."""
    x = tokens(rows, width)
    found = fit_pca(x)
    expected = PCA(n_components=3, svd_solver="full").fit(x.double().numpy())
    np.testing.assert_allclose(found.components, expected.components_, atol=1e-7)
    np.testing.assert_allclose(found.variance_share, expected.explained_variance_ratio_, atol=1e-9)
    np.testing.assert_allclose(found.project(x), expected.transform(x.double()), atol=1e-6)


def test_signs_do_not_depend_on_the_order_of_tokens():
    x = tokens(60, 8)
    first, second = fit_pca(x), fit_pca(x.flip(0))
    torch.testing.assert_close(first.components, second.components)
    largest = first.components.abs().argmax(1)
    assert (first.components[range(3), largest] > 0).all()


def test_missing_directions_are_zero_and_not_noise():
    """Two distinct tokens vary in one direction only; equal ones in none."""
    x = torch.tensor([[1.0, 2.0, 3.0, 4.0], [3.0, 2.0, 3.0, 4.0], [1.0, 2.0, 3.0, 4.0]])
    pca = fit_pca(x)
    assert pca.components[0].tolist() == pytest.approx([1, 0, 0, 0])
    assert pca.components[1:].abs().max() == 0
    assert pca.variance_share.tolist() == pytest.approx([1, 0, 0])
    same = torch.full((50, 6), 0.1)
    assert fit_pca(same).components.abs().max() == 0
    assert torch.equal(fit_patch_colours(same)(same), torch.full((50, 3), 0.5))


def test_one_token_is_grey():
    assert fit_patch_colours(torch.ones(1, 8))(torch.ones(2, 3, 8)).unique().tolist() == [0.5]


def test_colours_span_the_range_and_equal_tokens_have_equal_ones():
    x = tokens(300, 10)
    colours = fit_patch_colours(x)(x.reshape(20, 15, 10))
    assert colours.shape == (20, 15, 3)
    assert colours.dtype == torch.float32
    assert colours.amin((0, 1)).tolist() == [0, 0, 0]
    assert colours.amax((0, 1)).tolist() == [1, 1, 1]
    again = fit_patch_colours(x)(x[37])
    torch.testing.assert_close(again, colours.reshape(-1, 3)[37])


def test_the_first_component_is_red_in_order():
    x = tokens(100, 6)
    red = fit_patch_colours(x)(x)[:, 0]
    first = PCA(n_components=1, svd_solver="full").fit_transform(x.double())[:, 0]
    assert (np.diff(red.numpy()[np.argsort(first)]) >= 0).all()


@pytest.mark.parametrize("sign", ["positive", "negative"])
def test_foreground_is_one_sign_of_the_first_component_coloured_again(sign):
    """Both fits against scikit-learn, on a grid that is no square."""
    x = tokens(120, 7)
    first = PCA(n_components=1, svd_solver="full").fit_transform(x.double().numpy())[:, 0]
    kept = first > 0 if sign == "positive" else first < 0
    fitted = fit_patch_colours(x, sign)
    colours = fitted(x.reshape(10, 12, 7)).reshape(-1, 3)
    assert (colours[~kept] == 0).all()
    expected = PCA(n_components=3, svd_solver="full").fit(x.double().numpy()[kept])
    np.testing.assert_allclose(fitted.pca.components, expected.components_, atol=1e-7)
    assert colours[kept].max() == 1


def test_without_a_foreground_all_are_coloured():
    same = torch.ones(10, 4)
    assert fit_patch_colours(same, "positive").foreground == "all"
