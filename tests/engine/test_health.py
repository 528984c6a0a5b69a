"""Label-free numbers against numpy, and the sentences for each known failure."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from dino_kd.engine.health import (
    DataWait,
    HealthMonitor,
    diagnose,
    perplexity,
    rankme,
    rankme_later,
)

HEALTHY = {
    "teacher_entropy": 3.0,
    "kl": 1.0,
    "prototypes_used": 80.0,
    "rankme": 30.0,
    "skipped_steps": 0.0,
}


def test_rankme_equals_numpy():
    x = np.random.default_rng(0).normal(size=(40, 12))
    s = np.linalg.svd(x, compute_uv=False)
    p = s / s.sum()
    assert rankme(torch.from_numpy(x)).item() == pytest.approx(
        np.exp(-(p * np.log(p)).sum()), rel=1e-5
    )


def test_rankme_of_identical_rows_is_one_and_of_an_isometry_is_full():
    assert rankme(torch.ones(20, 5)).item() == pytest.approx(1.0, abs=1e-3)
    assert rankme(torch.eye(6)).item() == pytest.approx(6.0, rel=1e-5)


def test_rankme_of_features_that_are_not_finite_is_no_number():
    """And no error: the step that made them is skipped, and the run says why when it ends."""
    x = torch.eye(6)
    x[2, 3] = math.nan
    assert math.isnan(rankme(x).item())
    assert math.isnan(rankme(torch.full((3, 3), math.inf)).item())


def test_rankme_can_be_had_later():
    x = torch.from_numpy(np.random.default_rng(0).normal(size=(40, 12)))
    assert torch.equal(rankme_later(x)(), rankme(x))


def test_perplexity_counts_used_prototypes():
    one_hot = torch.eye(16)[torch.arange(64) % 4]
    assert perplexity(one_hot).item() == pytest.approx(4.0, rel=1e-5)


@pytest.mark.parametrize(
    ("change", "finding"),
    [
        ({"teacher_entropy": math.log(1024)}, "uniform"),
        ({"kl": 1e-5}, "no_kl"),
        ({"prototypes_used": 1.1}, "one_prototype"),
        ({"rankme": 1.0}, "low_rank"),
        ({"skipped_steps": 60.0}, "skipped"),
        ({}, None),
    ],
)
def test_each_failure_is_named(change, finding):
    findings = diagnose({**HEALTHY, **change}, done=500, num_prototypes=1024)
    assert list(findings) == ([finding] if finding else [])


def test_warnings_come_once_and_not_in_the_first_steps():
    said = []
    monitor = HealthMonitor(said.append, num_prototypes=1024, total_steps=1000)
    bad = {**HEALTHY, "prototypes_used": 1.0}
    for step in (1, 50, 100, 150, 200):
        monitor(step, torch.nn.Identity(), bad)
    assert len(said) == 1
    assert said[0].startswith("step 100: one prototype")


def test_waiting_for_images_is_told_once_after_a_full_window() -> None:
    """By hand: the first stretch does not count, then 100 s at 50 %."""
    watch = DataWait("raise num_workers", share=0.3, window=100)
    assert watch.add(60, 60) == ""  # start-up
    assert watch.add(20, 60) == ""  # 60 s seen
    told = watch.add(30, 40)
    assert told == "training waits for its images 50% of the time; raise num_workers"
    assert watch.add(100, 100) == ""


def test_short_waits_are_forgotten_with_their_window() -> None:
    watch = DataWait("x", share=0.3, window=100)
    watch.add(0, 1)
    assert watch.add(30, 100) == ""  # exactly the share
    assert watch.add(31, 100) != ""
