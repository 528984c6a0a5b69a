"""Every warning about a student that does not follow: it comes when it should, and only then."""

from __future__ import annotations

import pytest
from torch import nn

from dino_kd.engine.fidelity import FidelityMonitor, capacity_gap, diagnose

TASK = nn.Identity()


def heard(rows: dict[int, dict[str, float]], total_steps: int = 1000) -> list[str]:
    """What the monitor says about rows by step."""
    said: list[str] = []
    monitor = FidelityMonitor(said.append, total_steps=total_steps)
    for step, row in rows.items():
        assert monitor(step, TASK, row) == {}
    return said


def steady(row: dict[str, float], first: int = 200, count: int = 3) -> dict[int, dict[str, float]]:
    return {first + 10 * number: row for number in range(count)}


TROUBLES = {
    "opposite directions": ({"gradient_cosine": -0.2}, {"gradient_cosine": 0.1}),
    "labels hardly count": ({"gradient_ratio": 11.0}, {"gradient_ratio": 9.0}),
    "teacher hardly count": ({"gradient_ratio": 0.09}, {"gradient_ratio": 0.11}),
    "projector of cosine_kd": ({"spread/cosine_kd": 0.005}, {"spread/cosine_kd": 0.02}),
    "projection of feature_kd@1": ({"r2/feature_kd@1": -0.1}, {"r2/feature_kd@1": 0.05}),
    "were skipped": ({"skipped_steps": 20.0}, {"skipped_steps": 9.0}),
}


@pytest.mark.parametrize("words", TROUBLES)
def test_each_trouble_is_told_once_and_health_is_not(words: str) -> None:
    bad, good = TROUBLES[words]
    (sentence,) = heard(steady(bad, count=6))
    assert words in sentence
    assert sentence.startswith("step 220: ")
    assert heard(steady(good, count=6)) == []


@pytest.mark.parametrize("words", TROUBLES)
def test_two_rows_are_no_proof_and_a_good_one_starts_anew(words: str) -> None:
    bad, good = TROUBLES[words]
    assert heard(steady(bad, count=2)) == []
    assert heard({200: bad, 210: bad, 220: good, 230: bad, 240: bad}) == []


def test_rows_that_compared_no_gradients_neither_count_nor_interrupt() -> None:
    bad: dict[str, float] = {"gradient_cosine": -0.5}
    rows: dict[int, dict[str, float]] = {200: bad, 210: {"kl": 1.0}, 220: bad, 230: {}, 240: bad}
    (sentence,) = heard(rows)
    assert sentence.startswith("step 240: ")


def test_the_start_is_quiet() -> None:
    assert heard(steady({"gradient_cosine": -0.5}, first=10, count=9)) == []
    assert heard(steady({"gradient_cosine": -0.5}, first=10, count=12)) != []  # 100, 110, 120
    late = heard(steady({"gradient_cosine": -0.5}, first=150, count=9), total_steps=5000)
    assert late == []


@pytest.mark.parametrize("cut", range(0, 7))
def test_a_resumed_run_hears_what_an_uninterrupted_one_does(cut: int) -> None:
    """Once in all: neither again after the resume, nor later because of it."""
    rows = steady({"gradient_cosine": -0.2}, count=6)
    steps = sorted(rows)
    before: list[str] = []
    first = FidelityMonitor(before.append, total_steps=1000)
    for step in steps[:cut]:
        first(step, TASK, rows[step])
    after: list[str] = []
    past = [{"step": step, **rows[step]} for step in steps[:cut]]
    second = FidelityMonitor(after.append, total_steps=1000, past=past)
    for step in steps[cut:]:
        second(step, TASK, rows[step])
    assert before + after == heard(rows)
    assert len(before + after) == 1


def test_a_resumed_run_can_tell_a_capacity_gap() -> None:
    """The middle of the run was before the resume."""
    row = {"kl": 2.0, "agreement": 40.0}
    rows = dict.fromkeys(range(10, 1001, 10), row)
    said: list[str] = []
    past = [{"step": step, **row} for step in range(10, 801, 10)]
    monitor = FidelityMonitor(said.append, total_steps=1000, past=past)
    for step in range(810, 1001, 10):
        monitor(step, TASK, row)
    assert said == heard(rows)
    assert "stopped to approach" in said[0]


def test_the_cure_names_the_setting_of_a_second_teacher() -> None:
    sentence = diagnose({"spread/cosine_kd@1": 0.0}, 500)["collapsed/cosine_kd@1"]
    assert "terms.cosine_kd.weight" in sentence


def curve(kl_middle: float, kl_last: float, middle: float = 60.0, last: float = 60.0) -> str:
    steps = list(range(10, 1001, 10))
    kl = [kl_last if step > 700 else kl_middle for step in steps]
    agreement = [last if step > 700 else middle for step in steps]
    return capacity_gap(steps, kl, agreement, 1000)


def test_a_student_that_stopped_far_from_its_teacher_has_a_capacity_gap() -> None:
    assert "KL 0.80 in the middle of the run, 0.79 nats" in curve(0.8, 0.79)


@pytest.mark.parametrize(
    ("why", "told"),
    {
        "still falling": curve(0.8, 0.7),
        "close": curve(0.4, 0.4),
        "agreement rises, scale of the logits does not": curve(0.8, 0.8, 60.0, 62.0),
        "agrees, whatever the scale": curve(0.8, 0.8, 95.0, 95.0),
        "too few rows": capacity_gap([500, 900], [0.8, 0.8], [60.0, 60.0], 1000),
    }.items(),
)
def test_other_students_have_none(why: str, told: str) -> None:
    assert told == "", why


def test_the_capacity_gap_is_told_at_the_end() -> None:
    rows = {step: {"kl": 0.8, "agreement": 60.0} for step in range(10, 1000, 10)}
    assert heard(rows) == []
    (sentence,) = heard({**rows, 1000: {"kl": 0.8, "agreement": 60.0}})
    assert sentence.startswith("step 1000: the student has stopped to approach its teacher")


def test_a_run_without_logits_ends_in_silence() -> None:
    assert heard({1000: {"loss": 1.0}}) == []
