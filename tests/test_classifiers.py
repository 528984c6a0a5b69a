"""Closed-form classifiers against scikit-learn's, scaling and accuracy against plain numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import RidgeClassifier
from sklearn.neighbors import NearestCentroid
from sklearn.preprocessing import StandardScaler, normalize

from dino_kd.classifiers import (
    CHUNK,
    LinearClassifier,
    accuracy,
    learn_scaling,
    nearest_mean,
    ridge,
)


def clusters(count, width, classes, seed=0):
    g = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, width, generator=torch.Generator().manual_seed(99))
    labels = torch.arange(count) % classes
    return 3.0 + centres[labels] + 1.5 * torch.randn(count, width, generator=g), labels


def test_nearest_mean_is_that_of_sklearn():
    features, labels = clusters(60, 12, 4)
    test, _ = clusters(500, 12, 4, seed=1)
    found = nearest_mean(features, labels, 4).logits(test).argmax(1)
    expected = NearestCentroid().fit(features.numpy(), labels.numpy()).predict(test.numpy())
    assert np.array_equal(found, expected)


@pytest.mark.parametrize("alpha", [0.01, 1.0, 100.0])
@pytest.mark.parametrize(("count", "width"), [(60, 12), (12, 60)])
def test_ridge_is_that_of_sklearn(count, width, alpha):
    """More images than dimensions and the reverse: coefficients, intercepts, classes."""
    features, labels = clusters(count, width, 4)
    test, _ = clusters(500, width, 4, seed=1)
    found = ridge(features, labels, 4, alpha)
    expected = RidgeClassifier(alpha=alpha).fit(features.double().numpy(), labels.numpy())
    np.testing.assert_allclose(found.weight, expected.coef_, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(found.bias, expected.intercept_, rtol=1e-6, atol=1e-9)
    assert np.array_equal(found.logits(test).argmax(1), expected.predict(test.double().numpy()))


def test_ridge_of_two_classes_chooses_as_sklearn():
    """There scikit-learn has one row and a sign."""
    features, labels = clusters(40, 6, 2)
    test, _ = clusters(300, 6, 2, seed=1)
    expected = RidgeClassifier(alpha=1.0).fit(features.numpy(), labels.numpy())
    found = ridge(features, labels, 2, 1.0).logits(test).argmax(1)
    assert np.array_equal(found, expected.predict(test.numpy()))


def test_a_class_without_images_is_never_chosen():
    features, labels = clusters(30, 5, 3)
    for model in (nearest_mean(features, labels, 5), ridge(features, labels, 5, 1.0)):
        logits = model.logits(features)
        assert logits.argmax(1).max() <= 2
        assert not logits.isnan().any()
        assert accuracy(logits, torch.full((30,), 4))["top5"] == 0.0


def test_scaling_is_that_of_sklearn():
    features, _ = clusters(CHUNK + 10, 3, 2)
    features[:, 1] = 0.1  # constant: left as it is, not blown up
    new, _ = clusters(20, 3, 2, seed=1)
    standard = learn_scaling("standard", features)
    expected = StandardScaler().fit(features.double().numpy()).transform(new.double().numpy())
    np.testing.assert_allclose(standard.apply(new)[:, [0, 2]], expected[:, [0, 2]], atol=1e-5)
    assert standard.apply(features)[:, 1].abs().max() < 1e-6
    np.testing.assert_allclose(
        learn_scaling("l2", features).apply(new), normalize(new.numpy()), atol=1e-6
    )
    assert learn_scaling("l2", features).apply(torch.zeros(2, 3)).eq(0).all()
    assert torch.equal(learn_scaling("none", features).apply(new), new)


def test_one_image_can_be_standardised():
    features = torch.tensor([[1.0, -2.0]])
    assert learn_scaling("standard", features).apply(features).abs().max() == 0


def test_accuracy_counts_as_a_loop_does():
    g = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(200, 9, generator=g), torch.randint(0, 9, (200,), generator=g)
    logits[:20] = 0.5  # ties: lower classes first
    logits[20:30, 3:] = -torch.inf
    hits = {"top1": 0, "top5": 0}
    for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
        order = sorted(range(9), key=lambda y: (-row[y], y))
        seen = [y for y in order if row[y] > -np.inf]
        hits["top1"] += label in seen[:1]
        hits["top5"] += label in seen[:5]
    assert accuracy(logits, labels) == {name: 100 * n / 200 for name, n in hits.items()}


def test_logits_of_many_rows_are_those_of_one_product():
    g = torch.Generator().manual_seed(0)
    model = LinearClassifier(
        torch.randn(2, 3, generator=g, dtype=torch.float64), torch.ones(2, dtype=torch.float64)
    )
    features = torch.randn(CHUNK + 5, 3, generator=g)
    expected = features.double().numpy() @ model.weight.numpy().T + 1
    np.testing.assert_allclose(model.logits(features), expected, atol=1e-12)
