"""The benchmarks' ratios, small and with slack: what was made fast stays so.

Processor time, so that neighbours disturb little, and the best of a few rounds.
"""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch

from dino_kd import products
from dino_kd.data.renderers import make_renderer
from dino_kd.errors import ConfigError
from dino_kd.hardware import cpu_has_bf16

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def benchmark_named(monkeypatch):
    """Import a script as it imports its neighbours."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


def test_a_step_is_faster_than_the_original(benchmark_named):
    """At 32 px; a tiny batch, where everything but the products weighs most."""
    step = benchmark_named("step")
    names = ["original, fp32", "dino_kd, fp32"] + ["dino_kd, bf16"] * cpu_has_bf16()
    times = {name: min(found) for name, found in step.measure_time("small", 2, 3, names).items()}
    original = times.pop("original, fp32")
    ratios = {name: original / seconds for name, seconds in times.items()}
    assert ratios["dino_kd, fp32"] > (1.4 if products.is_faster(torch.float32) else 1.1), ratios
    if "dino_kd, bf16" in ratios:
        assert ratios["dino_kd, bf16"] > 1.5, ratios


def test_the_loss_is_faster_than_pair_by_pair_and_keeps_less(benchmark_named):
    loss = benchmark_named("loss")
    student = torch.randn(10, 8, 16_384, requires_grad=True)
    targets = torch.softmax(torch.randn(2, 8, 16_384), -1)
    ways = {"plain": loss.pair_by_pair, "ours": loss.dino_cross_entropy}
    seconds = benchmark_named("linear").median_seconds(
        {name: lambda way=way: way(student, targets, 0.1).backward() for name, way in ways.items()}
    )
    assert seconds["plain"] > 1.2 * seconds["ours"], seconds
    kept = {name: loss.kept_bytes(way, student, targets) for name, way in ways.items()}
    assert kept["ours"] <= 0.4 * kept["plain"]


def test_all_heads_at_once_are_faster_than_one_after_the_other(benchmark_named):
    """Measured five times for 52 heads of 960 columns, and asserted for 16 of 128."""
    linear = benchmark_named("linear")
    features, labels = torch.randn(2000, 128), torch.randint(0, linear.CLASSES, (2000,))
    grid = linear.LinearGrid({"last1": slice(0, 128)}, linear.CLASSES, [0.1] * 16)

    def in_turn():
        for _ in range(16):
            linear.epoch_of_one_head(features, labels)

    seconds = linear.median_seconds(
        {
            "at once": lambda: linear.epoch_of_grid(grid, features, labels),
            "one after the other": in_turn,
        }
    )
    assert seconds["one after the other"] > 1.5 * seconds["at once"], seconds


def test_one_search_is_faster_than_a_search_for_each_k(benchmark_named):
    """Measured eight times with bf16 and 3.5 without it, on a larger bank."""
    knn = benchmark_named("knn")
    bank, queries = knn.vectors(20_000, 256, 0), knn.vectors(500, 256, 1)
    labels = torch.randint(0, 10, (len(bank),), generator=torch.Generator().manual_seed(2))
    seconds = benchmark_named("linear").median_seconds(
        {
            "each": lambda: knn.search_for_each_k(queries, bank, labels),
            "once": lambda: knn.search_once(queries, bank, labels, None),
        }
    )
    assert seconds["each"] > (3 if cpu_has_bf16() else 2) * seconds["once"], seconds


@pytest.mark.parametrize(("name", "least"), [("native", 3.5), ("torch", 2.7)])
def test_crops_are_made_faster_than_by_torchvision(benchmark_named, tmp_path, name, least):
    """Of photographs; measured 7.2 and 4.1 times."""
    augment = benchmark_named("augment")
    try:
        renderer = make_renderer(name)
    except ConfigError as error:
        pytest.skip(str(error))
    task = augment.task_of(augment.generated(tmp_path, 6)[0], 6)
    seconds = benchmark_named("linear").median_seconds(
        {"usual": lambda: augment.usual_way(task), "ours": lambda: augment.ours(task, renderer)}
    )
    assert seconds["usual"] > least * seconds["ours"], seconds
