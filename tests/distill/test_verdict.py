"""One sentence from the differences of the arms."""

from __future__ import annotations

import re

import numpy as np
import pytest

from dino_kd.distill.verdict import Scored, as_lines, judge, verdict


def points(value: float, low: float, high: float) -> dict[str, float]:
    return {"points": value, "low": low, "high": high, "mcnemar_p": 0.5}


UP, FLAT, DOWN = points(2.1, 1.2, 3.0), points(0.2, -0.7, 1.1), points(-2.0, -3.0, -1.0)


@pytest.mark.parametrize(
    ("differences", "noise", "name", "words"),
    [
        ({"scratch_plus": UP, "scratch": UP}, None, "HELPS",
         r"helps: \+2.1 points of top-1 over equal time \(95 % CI 1.2 to 3.0\)"),
        ({"scratch": UP, "control": UP}, None, "HELPS", "over equal steps .* over a control"),
        ({"scratch_plus": DOWN, "scratch": UP}, None, "HURTS", "hurts: -2.0 points"),
        ({"scratch_plus": FLAT}, None, "NO-EFFECT", "no effect"),
        ({"scratch": UP, "control": FLAT}, None, "NOT-KNOWLEDGE", "control teacher helps as much"),
        ({"scratch": UP, "control": DOWN}, None, "NOT-KNOWLEDGE", "no knowledge"),
        ({"scratch": FLAT, "control": UP}, None, "NO-EFFECT", "no effect"),
        ({"scratch": UP}, 3.0, "INCONCLUSIVE", "another seed alone makes 3.0"),
        ({"scratch": DOWN}, 2.5, "INCONCLUSIVE", "inconclusive"),
        ({"scratch": UP}, 1.0, "HELPS", "helps"),
        ({"control": UP}, None, "KNOWLEDGE", "knowledge arrives"),
        ({"control": FLAT}, None, "NOT-KNOWLEDGE", "helps as much"),
        ({"control": DOWN}, None, "HURTS", "is the better one"),
    ],
)  # fmt: skip
def test_the_sentence(differences, noise, name, words):
    floor = None if noise is None else {"difference": noise, "churn": 9.0}
    found = verdict(differences, floor, "top1")
    assert found is not None
    assert found["name"] == name
    assert re.search(words, found["sentence"]), found["sentence"]


@pytest.mark.parametrize(
    ("seeds", "name"), [(1, "INCONCLUSIVE"), (2, "INCONCLUSIVE"), (3, "HELPS"), (4, "HELPS")]
)
def test_the_mean_of_several_seeds_moves_less_than_one(seeds, name):
    """3.2 points from seed to seed are 2.26 in the mean of two and 1.85 in the mean of three."""
    found = verdict({"scratch": UP}, {"difference": 3.2, "churn": 9.0}, "top1", seeds=seeds)
    assert found is not None
    assert found["name"] == name
    if name == "INCONCLUSIVE" and seeds == 2:
        assert "another seed alone makes 3.2, 2.3 in the mean of 2" in found["sentence"]


def test_kd_alone_has_no_verdict():
    assert verdict({}, None, "top1") is None


def scored(share: float, seed: int = 0, *, logits: bool = True, **more: int) -> Scored:
    hits = np.random.default_rng(seed).random(1000) < share
    made = {"knn20_top1": hits} | ({"top1": hits} if logits else {})
    return Scored({name: 100 * hits.mean() for name in made}, made, **more)


def test_a_clear_gain_is_found_and_shown():
    result = judge(
        {"kd": [scored(0.8, 1, steps=10)], "scratch": [scored(0.6, 2, steps=10)]},
        scored(0.9, 3), student="x", seeds=[0],
    )  # fmt: skip
    assert result["verdict"]["name"] == "HELPS"
    assert 0.3 < result["gap_recovered"] < 1
    lines = as_lines(result)
    assert [line.split(" |")[0] for line in lines if line.startswith("| ")] == [
        "| arm", "| teacher", "| scratch", "| kd",
    ]  # fmt: skip
    assert lines[-1] == f"**{result['verdict']['sentence']}**"


def test_a_teacher_without_class_scores_has_no_gap():
    arms = {"kd": [scored(0.8, 1)], "scratch": [scored(0.6, 2)]}
    result = judge(arms, scored(0.9, 3, logits=False), student="x", seeds=[0])
    assert result["measure"] == "top1"
    assert result["gap_recovered"] is None
    assert any("undefined" in line for line in as_lines(result))
