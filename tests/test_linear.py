"""The grid of heads against torch's own layers and optimiser, scikit-learn, and sorting by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from dino_kd.linear import LinearGrid, Score, Tally, choose_head, score_grid, train_grid

COLUMNS = {"narrow": slice(2, 5), "wide": slice(0, 7)}
RATES = [0.01, 0.3, 2.0]


def batches(num_classes, count=12, size=20, seed=0):
    g = torch.Generator().manual_seed(seed)
    for _ in range(count):
        labels = torch.randint(0, num_classes, (size,), generator=g)
        features = torch.randn(size, 7, generator=g) + labels[:, None] * 0.2
        yield features, labels


@pytest.mark.parametrize("num_classes", [3, 20])  # the written-out softmax, and torch's
@pytest.mark.parametrize("name", list(COLUMNS))
def test_every_head_equals_a_torch_loop(num_classes, name):
    """nn.Linear, cross_entropy, backward and optim.SGD, one head at a time on the same batches."""

    def schedule(step):
        return 1 - step / 12

    grid = LinearGrid(COLUMNS, num_classes, RATES)
    train_grid(grid, batches(num_classes), batch_size=20, schedule=schedule)
    for position, rate in enumerate(RATES):
        head = nn.Linear(COLUMNS[name].stop - COLUMNS[name].start, num_classes)
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
        optimiser = torch.optim.SGD(head.parameters(), lr=rate, momentum=0.9)
        for step, (features, labels) in enumerate(batches(num_classes)):
            optimiser.param_groups[0]["lr"] = rate * schedule(step)
            optimiser.zero_grad()
            nn.functional.cross_entropy(head(features[:, COLUMNS[name]]), labels).backward()
            optimiser.step()
        weight, bias = grid.head(name, position)
        torch.testing.assert_close(weight, head.weight.data, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(bias, head.bias.data, atol=1e-5, rtol=1e-4)
        features, _ = next(batches(num_classes, seed=1))
        expected = head(features[:, COLUMNS[name]]).detach()
        found = grid.logits(features, name)[:, position]
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_long_training_reaches_the_optimum_of_scikit_learn():
    """Cross-entropy of a linear head is convex; the classes overlap, so its optimum is finite."""
    from sklearn.linear_model import LogisticRegression

    features, labels = next(batches(3, count=1, size=400))
    oracle = LogisticRegression(C=np.inf, tol=1e-8, max_iter=10_000).fit(features, labels)
    grid = LinearGrid({"all": slice(0, 7)}, 3, [0.5])
    train_grid(grid, iter([(features, labels)] * 3000), batch_size=400, schedule=lambda _: 1.0)
    found = grid.logits(features, "all")[:, 0].softmax(-1)
    np.testing.assert_allclose(found, oracle.predict_proba(features), atol=1e-3)


def test_equal_and_nearly_equal_rates_are_different_heads():
    """Heads named by a rounded rate would collide: 0.00001 and 0.00002 print alike at 4 digits."""
    grid = LinearGrid(COLUMNS, 3, [1e-5, 2e-5, 1e-5])
    train_grid(grid, batches(3), batch_size=20, schedule=lambda _: 1.0)
    first, second, third = (grid.head("wide", i)[0] for i in range(3))
    torch.testing.assert_close(third, first, atol=1e-9, rtol=1e-4)
    torch.testing.assert_close(second, 2 * first, atol=1e-7, rtol=1e-2)


@pytest.mark.parametrize("num_classes", [3, 20])
def test_a_head_that_overflows_leaves_the_others_alone(num_classes):
    alone = LinearGrid(COLUMNS, num_classes, [0.1, 0.1])
    beside = LinearGrid(COLUMNS, num_classes, [0.1, 3e38])
    for grid in (alone, beside):
        train_grid(grid, batches(num_classes), batch_size=20, schedule=lambda _: 1.0)
    assert beside.is_finite("wide") == [True, False]
    for name in COLUMNS:
        assert torch.equal(beside.head(name, 0)[0], alone.head(name, 0)[0])
    scores = score_grid(beside, batches(num_classes))
    winner = choose_head(scores, {name: beside.is_finite(name) for name in COLUMNS})
    assert winner is not None
    assert winner[1] == 0


def test_accuracy_equals_sorting_by_hand():
    """Against numpy's stable sort: the lower class comes first among equal logits."""
    rng = np.random.default_rng(0)
    logits = rng.integers(0, 4, (50, 2, 9)).astype(np.float32)  # many ties
    labels = rng.integers(0, 9, 50)
    tally = Tally(2)
    for rows in (slice(0, 13), slice(13, 50)):
        tally.add(torch.from_numpy(logits[rows]), torch.from_numpy(labels[rows]))
    for head, score in enumerate(tally.scores()):
        order = np.argsort(-logits[:, head], axis=1, kind="stable")
        assert score.top1 == pytest.approx(100 * (order[:, 0] == labels).mean())
        assert score.top5 == pytest.approx(100 * (order[:, :5] == labels[:, None]).any(1).mean())
        exact = logits[:, head].astype(np.float64)
        loss = np.log(np.exp(exact).sum(1)) - exact[np.arange(50), labels]
        assert score.cross_entropy == pytest.approx(loss.mean(), rel=1e-6)


def test_logits_that_are_not_numbers_are_errors():
    tally = Tally(1)
    tally.add(torch.tensor([[[float("nan"), 0.0]], [[float("inf"), 0.0]]]), torch.tensor([0, 0]))
    assert (tally.scores()[0].top1, tally.scores()[0].top5) == (0, 0)


def test_the_winner_is_the_best_that_is_finite():
    """By hand: accuracy first, then cross-entropy, then order."""
    scores = {
        "a": [Score(90, 100, 0.5), Score(95, 100, 0.4), Score(99, 100, 0.1)],
        "b": [Score(95, 100, 0.3), Score(95, 100, 0.3), Score(98, 100, float("nan"))],
    }
    finite = {"a": [True, True, False], "b": [True, True, True]}
    assert choose_head(scores, finite) == ("b", 0)
    assert choose_head(scores, {"a": [False] * 3, "b": [False] * 3}) is None
