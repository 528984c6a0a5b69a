"""Logistic regression against scikit-learn on the same numbers, and its own formula in numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from dino_kd import logistic
from dino_kd.classifiers import CHUNK, accuracy
from dino_kd.logistic import fit_logistic


def correlated(count, width, classes, seed=0):
    """Clusters in directions of very different variance around a mean far from zero."""
    fixed, drawn = (torch.Generator().manual_seed(s) for s in (7, seed))
    centres = torch.randn(classes, width, generator=fixed, dtype=torch.float64)
    mixing = torch.linalg.qr(torch.randn(width, width, generator=fixed, dtype=torch.float64)).Q
    labels = torch.randint(0, classes, (count,), generator=drawn)
    labels[:classes] = torch.arange(classes)
    values = centres[labels] + torch.randn(count, width, generator=drawn, dtype=torch.float64)
    return 5.0 + (values / torch.arange(1, width + 1)) @ mixing, labels


def exact(features, labels, c):
    model = LogisticRegression(C=c, tol=1e-10, max_iter=20_000, solver="newton-cg")
    return model.fit(features.double().numpy(), labels.numpy())


@pytest.mark.parametrize("c", [0.01, 1.0, 30.0])
@pytest.mark.parametrize(("count", "width"), [(300, 20), (15, 40)])
def test_coefficients_are_those_of_sklearn(count, width, c):
    """The penalty makes the optimum unique: many images, and fewer images than dimensions."""
    features, labels = correlated(count, width, 4)
    (fit,) = fit_logistic(features, labels, 4, [c], tolerance=1e-8)
    expected = exact(features, labels, c)
    assert fit.converged
    size = np.abs(expected.coef_).max()
    np.testing.assert_allclose(fit.weight, expected.coef_, atol=2e-5 * size)
    np.testing.assert_allclose(
        fit.bias, expected.intercept_ - expected.intercept_.mean(), atol=1e-3 * max(size, 1)
    )
    probs = torch.softmax(fit.logits(features), 1)
    np.testing.assert_allclose(probs, expected.predict_proba(features.numpy()), atol=1e-5)


def test_two_classes_are_sklearns_at_twice_its_c():
    """Two rows of opposite sign share the penalty that one row bears there."""
    features, labels = correlated(200, 8, 2)
    (fit,) = fit_logistic(features, labels, 2, [0.5], tolerance=1e-8)
    expected = exact(features, labels, 1.0)
    np.testing.assert_allclose(fit.weight[1] - fit.weight[0], expected.coef_[0], atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_accuracy_is_that_of_sklearn_at_the_default_tolerance(dtype):
    """Within 0.2 points, along a path of warm starts."""
    (features, labels), (test, truth) = correlated(1000, 32, 5), correlated(4000, 32, 5, seed=1)
    for fit in fit_logistic(features.to(dtype), labels, 5, [1e-3, 0.1, 10.0]):
        assert fit.converged
        found = accuracy(fit.logits(test.to(dtype)), truth)["top1"]
        expected = 100 * exact(features, labels, fit.c).score(test.numpy(), truth.numpy())
        assert abs(found - expected) <= 0.2


def test_a_path_ends_where_single_fits_do():
    features, labels = correlated(300, 10, 3)
    path = list(fit_logistic(features, labels, 3, [0.1, 1.0, 10.0], tolerance=1e-8))
    for fit in path:
        (alone,) = fit_logistic(features, labels, 3, [fit.c], tolerance=1e-8)
        torch.testing.assert_close(fit.weight, alone.weight, atol=1e-5, rtol=1e-5)
        assert fit.loss == pytest.approx(alone.loss, abs=1e-10)


def test_the_loss_is_that_of_the_formula_and_no_step_lowers_it():
    """By the formula in plain numpy, at the optimum and around it."""
    features, labels = correlated(100, 5, 3)
    (fit,) = fit_logistic(features, labels, 3, [2.0], tolerance=1e-8)

    def loss(weight, bias):
        logits = features.numpy() @ weight.T + bias
        nats = np.log(np.exp(logits).sum(1)) - logits[np.arange(100), labels.numpy()]
        return nats.mean() + (weight**2).sum() / (2 * 2.0 * 100)

    weight, bias = fit.weight.numpy(), fit.bias.numpy()
    assert fit.loss == pytest.approx(loss(weight, bias), abs=1e-12)
    rng = np.random.default_rng(0)
    for _ in range(50):
        moved = loss(
            weight + 1e-3 * rng.normal(size=weight.shape), bias + 1e-3 * rng.normal(size=3)
        )
        assert moved > fit.loss


def test_rotation_in_chunks_and_constant_dimensions_change_nothing():
    features, labels = correlated(CHUNK + 100, 4, 3)
    padded = torch.cat([features, torch.full((len(features), 2), 0.3)], dim=1)
    (plain,) = fit_logistic(features, labels, 3, [1.0], tolerance=1e-8)
    (more,) = fit_logistic(padded, labels, 3, [1.0], tolerance=1e-8)
    torch.testing.assert_close(more.weight[:, :4], plain.weight, atol=1e-5, rtol=1e-5)
    assert more.weight[:, 4:].abs().max() < 1e-8


def test_scores_that_are_formed_in_parts_give_the_same_loss_and_gradient(monkeypatch):
    features, labels = correlated(700, 4, 3)
    axes = logistic._principal_axes(features)
    problem = logistic._Problem(axes.rotate(features), labels, 3, axes.variances, 0.1)
    unknowns = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    whole = problem.loss_and_gradient(unknowns)
    monkeypatch.setattr(logistic, "_SCORES", 3 * 64)
    largest, addmm = [], torch.addmm
    monkeypatch.setattr(torch, "addmm", lambda *a: (largest.append(len(a[1])), addmm(*a))[1])
    torch.testing.assert_close(problem.loss_and_gradient(unknowns), whole, rtol=1e-12, atol=1e-14)
    assert largest == [64] * 10 + [60]


def test_features_without_information_give_the_frequencies():
    labels = torch.tensor([0] * 6 + [1] * 3 + [2])
    (fit,) = fit_logistic(torch.ones(10, 4), labels, 3, [1.0])
    probs = torch.softmax(fit.logits(torch.ones(1, 4)), 1)[0]
    np.testing.assert_allclose(probs, [0.6, 0.3, 0.1], atol=1e-4)
    assert fit.converged


def test_absent_classes_are_never_predicted():
    features, labels = correlated(60, 5, 3)
    (fit,) = fit_logistic(features, 2 * labels, 6, [1.0], tolerance=1e-8)
    (dense,) = fit_logistic(features, labels, 3, [1.0], tolerance=1e-8)
    logits = fit.logits(features)
    torch.testing.assert_close(logits[:, [0, 2, 4]], dense.logits(features))
    assert (logits[:, [1, 3, 5]] == -torch.inf).all()


def test_a_single_class_is_always_predicted():
    (fit,) = fit_logistic(torch.randn(5, 3), torch.ones(5, dtype=torch.int64), 2, [1.0])
    assert fit.logits(torch.randn(4, 3)).argmax(1).eq(1).all()


def test_a_search_that_is_cut_short_says_so():
    features, labels = correlated(300, 20, 4)
    (fit,) = fit_logistic(features, labels, 4, [100.0], tolerance=1e-10, max_iterations=3)
    assert not fit.converged
    assert fit.iterations == 3
    assert fit.gradient > 1e-10
