"""The one training loop. It knows the Task protocol and hooks; it does not know DINO.

A Task is an ``nn.Module`` with ``forward(batch, values) -> (loss, metrics)`` and
``after_step(values, skipped)``. What may differ between two runs of the same seed is nothing: all
randomness of a step follows from (seed, step, rank).
"""

from __future__ import annotations

import contextlib
import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dino_kd.distributed import all_reduce_mean, all_reduce_sum, is_grouped, rank, world_size
from dino_kd.engine.health import DataWait
from dino_kd.engine.optim import apply_values, clip_gradients, drop_frozen_gradients
from dino_kd.engine.precision import autocast
from dino_kd.engine.schedules import Schedule, is_time
from dino_kd.engine.sharding import drop_gathered, is_sharded
from dino_kd.engine.signals import StopFlag
from dino_kd.errors import Diverged

# A scalar on the task's device; or what gives it, called when the backward pass has been launched.
Metric = Tensor | Callable[[], Tensor]


class Task(Protocol):
    """What `fit` trains."""

    def __call__(self, batch: Any, values: dict[str, float]) -> tuple[Tensor, dict[str, Metric]]:
        """The mean loss of a batch, and metrics to log (only needed if values["measure"])."""

    def after_step(self, values: dict[str, float], skipped: bool) -> None:
        """After the optimiser step: EMA, centre. `skipped`: forget the step, it was not applied."""


class Batch(Protocol):
    """What the loader yields: a batch that moves to a device and splits into micro-batches."""

    def to(self, device: torch.device) -> Any: ...
    def chunk(self, parts: int) -> list[Any]: ...


class Log(Protocol):
    """Where numbers, sentences and progress go."""

    def numbers(self, step: int, values: dict[str, float]) -> None: ...
    def warn(self, text: str) -> None: ...
    def progress(self, step: int, total: int, values: dict[str, float]) -> None: ...


class Silence:
    """A log that keeps nothing, for steps that are only timed."""

    def numbers(self, step: int, values: dict[str, float]) -> None: ...
    def warn(self, text: str) -> None: ...
    def progress(self, step: int, total: int, values: dict[str, float]) -> None: ...


Hook = Callable[[int, nn.Module, dict[str, float]], dict[str, float]]


@dataclass(frozen=True)
class FitOptions:
    """Plain values of one run; lengths in steps."""

    total_steps: int
    batch_size: int  # images per optimiser step, over all processes
    device: torch.device
    precision: str = "fp32"
    accumulate: int = 1
    clip_grad: float = 0.0
    max_bad_steps: int = 20
    seed: int = 0
    log_every: int = 10
    save_every: int = 0
    loading_advice: str = ""  # what to change when training waits for its images


@dataclass
class Progress:
    """The loop's own state; saved in every checkpoint."""

    step: int = 0  # optimiser steps done, skipped ones included
    skipped: int = 0  # steps whose loss or gradient was not finite
    bad_in_a_row: int = 0
    loss_sum: float = 0.0  # of the steps since the last row of metrics
    loss_count: int = 0
    stopped: str = ""  # why the run ended early; never saved

    def count(self, done: int, loss: float, is_finite: bool) -> None:
        """Record one more step."""
        self.step = done
        if is_finite:
            self.bad_in_a_row = 0
            self.loss_sum += loss
            self.loss_count += 1
        else:
            self.bad_in_a_row += 1
            self.skipped += 1

    def state_dict(self) -> dict[str, float]:
        """Numbers only."""
        return {k: v for k, v in asdict(self).items() if k != "stopped"}


@dataclass
class _Clock:
    """Speed since the last row of metrics, and the share of it spent waiting for data."""

    started: float = field(default_factory=time.perf_counter)
    waited: float = 0.0
    steps: int = 0

    def next(self, batches: Iterator[Batch]) -> Batch:
        """The next batch, with the waiting time counted."""
        before = time.perf_counter()
        batch = next(batches)
        self.waited += time.perf_counter() - before
        self.steps += 1
        return batch

    def read(self, batch_size: int) -> dict[str, float]:
        """Images per second over all processes, and the share of time spent waiting."""
        elapsed = max(time.perf_counter() - self.started, 1e-9)
        return {
            "images_per_s": self.steps * batch_size / elapsed,
            "data_wait": self.waited / elapsed,
        }

    def restart(self) -> tuple[float, float]:
        """Begin a new stretch; seconds waited and passed in the old one."""
        now = time.perf_counter()
        stretch = self.waited, now - self.started
        self.started, self.waited, self.steps = now, 0.0, 0
        return stretch


def fit(
    task: nn.Module,
    batches: Iterator[Batch],
    optimizer: torch.optim.Optimizer,
    schedules: dict[str, Schedule],
    options: FitOptions,
    *,
    progress: Progress,
    scaler: torch.amp.GradScaler,
    log: Log,
    save: Callable[[Progress], None],
    hooks: Iterable[Hook] = (),
    stop: StopFlag,
) -> Progress:
    """Train `task` from ``progress.step`` to ``options.total_steps``, or until `stop` is raised.

    One optimiser step: every micro-batch adds its share of the gradient; a non-finite step is
    skipped whole (network, EMA and centre stay as they were); all ranks agree on ending. Up to
    rounding the result does not depend on the number of micro-batches, unless the network draws
    random numbers (drop path) or normalises over the batch.

    Raises:
        Diverged: `max_bad_steps` non-finite steps in a row.
    """
    sharded = is_sharded(task)
    module = _data_parallel(task, options.device) if is_grouped() and not sharded else task
    clock, data_wait = _Clock(), DataWait(options.loading_advice)
    for step in range(progress.step, options.total_steps):
        done = step + 1
        batch = clock.next(batches)
        values = {name: schedule(step) for name, schedule in schedules.items()}
        measure = done == 1 or is_time(done, options.log_every, options.total_steps)
        torch.manual_seed(step_seed(options.seed, step, rank()))

        apply_values(optimizer, values)
        values["measure"] = float(measure)
        loss, metrics = _accumulate_gradients(module, batch, values, scaler, options)
        if sharded:
            drop_gathered(task)
        if values.get("freeze_last_layer"):
            drop_frozen_gradients(optimizer)
        scaler.unscale_(optimizer)
        norm = clip_gradients(optimizer, options.clip_grad)
        loss_now, norm_now, must_stop = _agree(loss, norm, stop)

        is_finite = math.isfinite(loss_now) and math.isfinite(norm_now)
        if is_finite:
            scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        task.after_step(values, skipped=not is_finite)  # type: ignore[operator]
        progress.count(done, loss_now, is_finite)

        row: dict[str, float] = {}
        if measure:
            row = _metrics_row(progress, values, metrics, norm_now)
        for hook in hooks:
            row.update(hook(done, task, row))
        speed = clock.read(options.batch_size)
        log.progress(done, options.total_steps, {"loss": loss_now, **speed})
        if row:
            log.numbers(done, {**row, **speed})
            data_wait.watch(*clock.restart(), say=log.warn)
        if progress.bad_in_a_row >= options.max_bad_steps:
            raise Diverged(_divergence_report(progress, loss_now, norm_now, options))
        if must_stop and done < options.total_steps:
            progress.stopped = stop.reason or "another process asked to stop"
        if progress.stopped or is_time(done, options.save_every, options.total_steps):
            save(progress)
        if progress.stopped:
            break
    return progress


def _data_parallel(task: nn.Module, device: torch.device) -> nn.Module:
    """Gradients are averaged; buffers stay each task's own business.

    After its first step DDP sorts gradients into new buckets, which changes the order in which
    more than two ranks are summed: a resumed run then differs in the last bits of that step. With
    `find_unused_parameters` it keeps its buckets, so that on a CPU a resume is exact. Elsewhere it
    costs a walk through the graph, and only a task that says so (`skips_parameters`) needs it.
    """
    on_cpu = device.type == "cpu"
    search = on_cpu or bool(getattr(task, "skips_parameters", False))
    # Said of every channels-last network with 1 x 1 convolutions, whose two layouts are the same.
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view", UserWarning)
    with warnings.catch_warnings():
        # torch 2.15 announces another name for the argument, which older versions do not know
        warnings.filterwarnings("ignore", "`broadcast_buffers`", FutureWarning)
        warnings.filterwarnings("ignore", "find_unused_parameters=True was spec", UserWarning)
        if on_cpu:
            _spend_warning()
        return DistributedDataParallel(task, broadcast_buffers=False, find_unused_parameters=search)


def _spend_warning() -> None:
    """Let torch's advice against `find_unused_parameters`, given once per process, go unheard.

    It comes from C++ and bypasses Python's filters, except under a tensor's own method, where
    warnings of C++ become Python's. So a network of one layer earns it there, inside `apply_`.
    """
    probe = DistributedDataParallel(
        nn.LayerNorm(1), broadcast_buffers=False, find_unused_parameters=True
    )
    torch.zeros(1).apply_(lambda value: float(probe(torch.zeros(1, 1)).numel()))


def step_seed(seed: int, step: int, rank_number: int) -> int:
    """The seed of everything random in one step of one process (drop path, dropout).

    Seeding each step leaves no generator state to save, on any device, for any number of
    processes. SplitMix64 finaliser: neighbouring inputs give unrelated seeds.
    """
    mixed = (seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9 + rank_number) % 2**64
    for factor in (0xBF58476D1CE4E5B9, 0x94D049BB133111EB):
        mixed = (mixed ^ (mixed >> 30)) * factor % 2**64
    return mixed >> 1  # manual_seed takes a signed 64-bit number


def _accumulate_gradients(
    module: nn.Module,
    batch: Batch,
    values: dict[str, float],
    scaler: torch.amp.GradScaler,
    options: FitOptions,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Backward over all micro-batches; the mean loss and metrics of this process, on the device."""
    parts = batch.chunk(options.accumulate)
    losses: list[Tensor] = []
    collected: list[dict[str, Tensor]] = []
    for number, part in enumerate(parts):
        is_last = number == len(parts) - 1
        wait = isinstance(module, DistributedDataParallel) and not is_last
        with module.no_sync() if wait else contextlib.nullcontext():  # type: ignore[operator]
            with autocast(options.precision, options.device):
                loss, metrics = module(part.to(options.device), values)
            scaler.scale(loss / len(parts)).backward()
        losses.append(loss.detach())
        collected.append({name: m() if callable(m) else m for name, m in metrics.items()})
    names = collected[0].keys()
    means = {name: torch.stack([m[name] for m in collected]).mean() for name in names}
    return torch.stack(losses).mean(), means


def _agree(loss: Tensor, norm: Tensor, stop: StopFlag) -> tuple[float, float, bool]:
    """Mean loss over ranks, gradient norm, and whether any rank wants to stop.

    The step's only collective besides the gradients', and its only wait for the device.
    """
    wants = torch.full_like(loss, float(bool(stop.reason)))
    shared = all_reduce_sum(torch.stack([loss / world_size(), wants]).float())
    loss_now, stops, norm_now = torch.cat([shared, norm[None].float()]).tolist()
    return loss_now, norm_now, stops > 0


def _metrics_row(
    progress: Progress, values: dict[str, float], metrics: dict[str, Tensor], norm: float
) -> dict[str, float]:
    """One row for metrics.jsonl; `loss` is the mean of all finite steps since the last row."""
    names = sorted(metrics)
    means = (
        all_reduce_mean(torch.stack([metrics[n].float() for n in names])).tolist() if names else []
    )
    schedule_values = {name: value for name, value in values.items() if name != "measure"}
    row = {
        "loss": progress.loss_sum / progress.loss_count if progress.loss_count else math.nan,
        **dict(zip(names, means, strict=True)),
        "grad_norm": norm,
        **schedule_values,
        "skipped_steps": float(progress.skipped),
    }
    progress.loss_sum, progress.loss_count = 0.0, 0
    return row


def _divergence_report(progress: Progress, loss: float, norm: float, options: FitOptions) -> str:
    """Name the likely cause of a run of bad steps and what to change."""
    culprit = "the loss" if not math.isfinite(loss) else "the gradient norm"
    value = loss if not math.isfinite(loss) else norm
    advice = (
        "fp16 overflows easily here; try optim.precision=bf16 or fp32"
        if options.precision == "fp16"
        else "try a lower optim.base_lr, a longer optim.warmup, or optim.precision=fp32"
    )
    return (
        f"training diverged: {culprit} was {value} for {progress.bad_in_a_row} steps in a row "
        f"(up to step {progress.step}); none of them was applied. {advice}. "
        "Earlier checkpoints are kept."
    )
