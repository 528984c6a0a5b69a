"""The loop on a toy task whose every step can be computed by hand."""

from __future__ import annotations

import functools
import itertools
import math
import os
import re
import signal
import time
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from dino_kd.engine import loop
from dino_kd.engine.health import DataWait
from dino_kd.engine.loop import FitOptions, Progress, fit, step_seed
from dino_kd.engine.optim import make_optimizer, parameter_groups
from dino_kd.engine.signals import StopFlag
from dino_kd.errors import Diverged


@dataclass
class Rows:
    x: torch.Tensor

    def to(self, device):
        return self

    def chunk(self, parts):
        return [Rows(x) for x in self.x.chunk(parts)]


class Mean(nn.Module):
    """loss = mean((w - x)^2); gradient 2 (w - mean x)."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(1, 1))
        self.after = []
        self.draws = []

    def forward(self, batch, values):
        self.draws.append(torch.rand(()).item())
        loss = (self.w - batch.x).pow(2).mean()
        return loss, {"distance": loss.detach().sqrt()} if values["measure"] else {}

    def after_step(self, values, skipped):
        self.after.append(skipped)


class Record:
    def __init__(self):
        self.rows, self.shown = {}, []

    def numbers(self, step, values):
        assert step not in self.rows
        self.rows[step] = values

    def warn(self, text):
        raise AssertionError(text)

    def progress(self, step, total, values):
        self.shown.append(step)


def run(batches, total, *, task=None, start=None, stop=None, hooks=(), **options):
    task = task or Mean()
    optimizer = make_optimizer("sgd", parameter_groups(task), momentum=0.0)
    saved, log = [], Record()
    progress = fit(
        task,
        iter([Rows(torch.as_tensor(b, dtype=torch.float32)[:, None]) for b in batches]),
        optimizer,
        {"lr": lambda step: 0.1, "weight_decay": lambda step: 0.0},
        FitOptions(total, batch_size=4, device=torch.device("cpu"), **options),
        progress=start or Progress(),
        scaler=torch.amp.GradScaler("cpu", enabled=False),
        log=log,
        save=lambda p: saved.append((p.step, task.w.item())),
        hooks=hooks,
        stop=stop or StopFlag(),
    )
    return task, progress, saved, log


def test_weights_follow_the_hand_computed_descent():
    batches = [[1.0, 3.0], [5.0, 7.0], [0.0, 2.0]]
    task, progress, saved, _ = run(batches, 3, save_every=2)
    w = 0.0
    for batch in batches:
        w -= 0.1 * 2 * (w - sum(batch) / 2)
    assert task.w.item() == pytest.approx(w)
    assert progress.step == 3
    assert [step for step, _ in saved] == [2, 3]


@pytest.mark.parametrize("accumulate", [1, 2, 4])
def test_micro_batches_do_not_change_the_result(accumulate):
    batches = [[1.0, 3.0, 2.0, 8.0]] * 5
    task, *_ = run(batches, 5, accumulate=accumulate)
    reference, *_ = run(batches, 5)
    assert task.w.item() == pytest.approx(reference.w.item(), rel=1e-6)


def test_a_metric_that_takes_long_is_asked_for_behind_the_backward_pass():
    """By then a GPU has something to do."""

    class Slow(Mean):
        def forward(self, batch, values):
            loss, _ = super().forward(batch, values)

            def measure():
                assert self.w.grad is not None
                return loss.detach() * 2

            return loss, {"twice": measure} if values["measure"] else {}

    _, _, _, log = run([[1.0] * 4] * 3, 3, task=Slow(), log_every=1, accumulate=2)
    assert [row["twice"] for row in log.rows.values()] == pytest.approx(
        [2 * row["loss"] for row in log.rows.values()]
    )


def test_logged_loss_is_the_mean_of_the_steps_since_the_last_row():
    batches = [[float(i)] for i in range(1, 7)]
    _, _, _, every = run(batches, 6, log_every=1)
    _, _, _, thirds = run(batches, 6, log_every=3)
    assert sorted(thirds.rows) == [1, 3, 6]
    losses = {step: row["loss"] for step, row in every.rows.items()}
    assert thirds.rows[3]["loss"] == pytest.approx((losses[2] + losses[3]) / 2)
    assert thirds.rows[6]["loss"] == pytest.approx((losses[4] + losses[5] + losses[6]) / 3)
    assert thirds.rows[6]["lr"] == 0.1
    assert 0 <= thirds.rows[6]["data_wait"] <= 1


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_non_finite_step_changes_nothing_and_is_counted(bad):
    task, progress, saved, log = run([[1.0], [bad], [1.0]], 3, save_every=1, log_every=1)
    assert saved[0][1] == saved[1][1] != saved[2][1]
    assert task.after == [False, True, False]
    assert progress.skipped == 1
    assert log.rows[3]["skipped_steps"] == 1
    assert math.isfinite(log.rows[3]["loss"])


def test_many_bad_steps_in_a_row_stop_with_a_named_cause():
    with pytest.raises(Diverged, match=r"the loss was nan for 3 steps in a row \(up to step 5\)"):
        run([[1.0], [2.0], *[[math.nan]] * 5], 7, max_bad_steps=3)
    _, progress, *_ = run([[math.nan], [1.0]] * 4, 8, max_bad_steps=2)
    assert progress.skipped == 4


def test_resuming_repeats_exactly_what_was_not_done():
    batches = [[float(i % 5)] for i in range(9)]
    whole, _, _, log = run(batches, 9, log_every=4)
    first = Mean()
    stop = StopFlag()
    _, progress, saved, log_1 = run(
        batches, 9, task=first, stop=stop, log_every=4,
        hooks=[lambda done, *_: (done == 5 and stop.request("enough")) or {}],
    )  # fmt: skip
    assert progress.stopped == "enough"
    assert saved[-1][0] == progress.step == 6  # the flag is read at the next step's boundary
    again = Progress(**progress.state_dict())
    second, _, _, log_2 = run(batches[6:], 9, task=first, start=again, log_every=4)
    assert second.w.item() == whole.w.item()
    assert first.draws == whole.draws
    losses = {s: r["loss"] for s, r in {**log_1.rows, **log_2.rows}.items()}
    assert losses == {s: r["loss"] for s, r in log.rows.items()}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR2])
def test_signals_end_the_run_at_a_step_boundary_with_a_save(number):
    before = signal.getsignal(number)
    with StopFlag().listening() as stop:
        _, progress, saved, _ = run(
            [[1.0]] * 10, 10, stop=stop,
            hooks=[lambda done, *_: os.kill(os.getpid(), number) or {} if done == 4 else {}],
        )  # fmt: skip
    assert progress.stopped == f"received {signal.Signals(number).name}"
    assert saved == [(progress.step, saved[0][1])]
    assert progress.step == 5
    assert signal.getsignal(number) == before


def test_a_second_interrupt_ends_at_once():
    with StopFlag().listening() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.reason == "received SIGINT"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_step_seeds_differ_by_seed_step_and_rank():
    seeds = {step_seed(*key) for key in itertools.product(range(3), range(200), range(8))}
    assert len(seeds) == 3 * 200 * 8


def test_a_run_that_waits_for_its_images_is_told_what_to_change(monkeypatch):
    told = []
    monkeypatch.setattr(Record, "warn", lambda _, text: told.append(text))
    monkeypatch.setattr(loop, "DataWait", functools.partial(DataWait, window=0.03))
    task = Mean()

    def rows():
        for _ in range(20):
            time.sleep(0.01)
            yield Rows(torch.ones(1, 1))

    fit(
        task,
        rows(),
        make_optimizer("sgd", parameter_groups(task), momentum=0.0),
        {"lr": lambda step: 0.1, "weight_decay": lambda step: 0.0},
        FitOptions(
            20, batch_size=1, device=torch.device("cpu"), log_every=2, loading_advice="more"
        ),
        progress=Progress(),
        scaler=torch.amp.GradScaler("cpu", enabled=False),
        log=Record(),
        save=lambda p: None,
        stop=StopFlag(),
    )
    assert len(told) == 1
    assert re.fullmatch(r"training waits for its images \d+% of the time; more", told[0])
