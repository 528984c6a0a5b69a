"""Schedules against hand-computed values and the published formula."""

from __future__ import annotations

import math

import pytest

from dino_kd.engine.schedules import after_warmup, constant, cosine, is_time, linear, switch
from dino_kd.lengths import in_steps, parse_length


def test_cosine_starts_ends_and_halves_where_it_should():
    schedule = cosine(0.04, 0.4, 101)
    assert schedule(0) == pytest.approx(0.04)
    assert schedule(50) == pytest.approx(0.22)
    assert schedule(100) == pytest.approx(0.4)
    assert schedule(500) == pytest.approx(0.4)


def test_cosine_follows_the_formula_at_every_step():
    values = [cosine(0.996, 1.0, 37)(i) for i in range(37)]
    expected = [1.0 + (0.996 - 1.0) / 2 * (1 + math.cos(math.pi * i / 36)) for i in range(37)]
    assert values == pytest.approx(expected)


def test_a_run_of_one_step_is_at_its_start():
    assert cosine(1.0, 0.0, 1)(0) == 1.0


def test_warmup_never_learns_at_zero_and_meets_the_peak_once():
    schedule = after_warmup(lambda n: cosine(1.0, 0.0, n), 1.0, 4, 20)
    values = [schedule(i) for i in range(20)]
    assert values[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert values.count(max(values)) == 1
    assert values[-1] == pytest.approx(0.0)


def test_linear_constant_and_switch():
    temp = linear(0.04, 0.07, 30)
    assert [temp(0), temp(15), temp(30), temp(99)] == pytest.approx([0.04, 0.055, 0.07, 0.07])
    assert linear(0.04, 0.07, 0)(0) == 0.07
    assert constant(3.0)(17) == 3.0
    assert [switch(2)(i) for i in range(4)] == [1.0, 1.0, 0.0, 0.0]


def test_is_time_always_includes_the_end():
    assert [n for n in range(1, 11) if is_time(n, 4, 10)] == [4, 8, 10]
    assert [n for n in range(1, 11) if is_time(n, 0, 10)] == [10]


@pytest.mark.parametrize(
    ("text", "steps"),
    [(500, 500), ("500", 500), ("3 steps", 3), ("10ep", 70), ("0.5 epochs", 4), ("5%", 10)],
)
def test_lengths_in_steps(text, steps):
    assert in_steps(text, steps_per_epoch=7, total_steps=200) == steps


@pytest.mark.parametrize("text", ["", "ten", "-5", "1.5", "10 hours", "120%"])
def test_wrong_lengths_name_the_value(text):
    with pytest.raises(ValueError, match=r"expected|whole|at most"):
        parse_length(text)
