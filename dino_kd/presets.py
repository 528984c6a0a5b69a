"""What `auto` means: values that fit the data set's size and the length of the run.

Published ImageNet settings assume a million images. On ten thousand, an EMA memory of 256,000
images never leaves the random start and 65,536 prototypes outnumber the images.
"""

from __future__ import annotations

import functools
import os
from dataclasses import asdict, dataclass

import torch

from dino_kd.distributed import processes_here
from dino_kd.engine.loop import FitOptions
from dino_kd.engine.schedules import Schedule, after_warmup, constant, cosine
from dino_kd.errors import ConfigError, DataError
from dino_kd.lengths import in_steps
from dino_kd.schema import (
    DistillConfig,
    FinetuneConfig,
    PretrainConfig,
    SupervisedOptimSettings,
)

# Data sets of fewer images than the first number use the second as K.
_PROTOTYPES = ((20_000, 1024), (50_000, 2048), (100_000, 4096), (200_000, 16384), (500_000, 32768))
_FULL_PROTOTYPES = 65_536
_PUBLISHED_HORIZON = 256_000  # images: batch 1024, momentum 0.996
_SHORTEST_HORIZON_STEPS = 20


@dataclass(frozen=True)
class Span:
    """How long a run is, in optimiser steps, on its data set."""

    num_images: int
    steps_per_epoch: int
    total_steps: int
    warmup: int

    def steps(self, length: int | str) -> int:
        """A length of this run in steps."""
        return in_steps(length, steps_per_epoch=self.steps_per_epoch, total_steps=self.total_steps)


def make_span(
    num_images: int,
    *,
    batch_size: int,
    length: int | str,
    warmup: int | str,
    accumulate: int,
    world_size: int,
    images: str,
) -> Span:
    """The span of a run of `length` over `num_images`; `images` names them in messages.

    Raises:
        DataError: fewer images than one batch.
        ConfigError: a batch that does not divide, a run of no step, a warm-up as long as the run.
    """
    if num_images < batch_size:
        raise DataError(
            f"{images} has {num_images} images, fewer than "
            f"optim.batch_size={batch_size}; set optim.batch_size to at most {num_images}"
        )
    parts = world_size * accumulate
    if batch_size % parts:
        raise ConfigError(
            f"optim.batch_size: {batch_size} images do not divide into {world_size} "
            f"processes x optim.accumulate={accumulate}; use a multiple of {parts}"
        )
    steps_per_epoch = num_images // batch_size
    try:
        total = in_steps(length, steps_per_epoch=steps_per_epoch)
    except ValueError as error:
        raise ConfigError(f"optim.length: {error}") from None
    if total < 1:
        raise ConfigError(f"optim.length: {length!r} is less than one step")
    rise = in_steps(warmup, steps_per_epoch=steps_per_epoch, total_steps=total)
    if rise >= total:
        raise ConfigError(
            f"optim.warmup: {warmup!r} is {rise} steps, but the whole run has {total}; "
            "use a share such as '10%'"
        )
    return Span(num_images, steps_per_epoch, total, rise)


def fit_options(
    settings: PretrainConfig | FinetuneConfig | DistillConfig,
    span: Span,
    device: torch.device,
    renderer: str = "",
) -> FitOptions:
    """What the loop is told about a run; `settings` with their arithmetic chosen.

    `renderer`: what makes its crops, by name.
    """
    optim, log = settings.optim, settings.log
    return FitOptions(
        total_steps=span.total_steps,
        batch_size=optim.batch_size,
        device=device,
        precision=optim.precision,
        accumulate=optim.accumulate,
        clip_grad=optim.clip_grad,
        max_bad_steps=optim.max_bad_steps,
        seed=settings.seed,
        log_every=log.log_every,
        save_every=max(1, span.steps(log.save_every)),
        loading_advice=loading_advice(settings, renderer, device.type),
    )


def single_view_schedules(optim: SupervisedOptimSettings, span: Span) -> dict[str, Schedule]:
    """The learning rate, a warm-up and a cosine, and the weight decay, which stays."""
    peak = optim.base_lr * optim.batch_size / optim.lr_batch
    fall = functools.partial(cosine, peak, optim.min_lr)
    return {
        "lr": after_warmup(fall, peak, span.warmup, span.total_steps),
        "weight_decay": constant(optim.weight_decay),
    }


@dataclass(frozen=True)
class Plan(Span):
    """Lengths in optimiser steps, resolved against the data set."""

    temp_warmup: int
    freeze_last_layer: int
    monitor_every: int
    peak_lr: float

    def describe(self) -> str:
        """One sentence for the log."""
        epochs = self.total_steps / self.steps_per_epoch
        return (
            f"{self.num_images:,} images, {self.steps_per_epoch:,} steps an epoch, "
            f"{self.total_steps:,} steps in all ({epochs:.1f} epochs); "
            f"warm-up {self.warmup:,}, last layer fixed for {self.freeze_last_layer:,}, "
            f"peak learning rate {self.peak_lr:.3g}"
        )


def make_plan(settings: PretrainConfig, num_images: int, world_size: int) -> Plan:
    """Turn every length into steps. Raises DataError or ConfigError when the run cannot work."""
    optim = settings.optim
    span = make_span(
        num_images,
        batch_size=optim.batch_size,
        length=optim.length,
        warmup=optim.warmup,
        accumulate=optim.accumulate,
        world_size=world_size,
        images=f"data.train: {settings.data.train}",
    )
    total = span.total_steps
    return Plan(
        **asdict(span),
        temp_warmup=min(span.steps(settings.teacher.temp_warmup), total),
        freeze_last_layer=min(span.steps(optim.freeze_last_layer), total),
        monitor_every=max(1, span.steps(settings.monitor.every)),
        peak_lr=optim.base_lr * optim.batch_size / optim.lr_batch,
    )


def resolve_auto(
    settings: PretrainConfig, plan: Plan, precision: str
) -> tuple[PretrainConfig, list[str]]:
    """Replace every `auto` that shapes the result; returns the settings and a line for each.

    `precision` is what this machine chose for `optim.precision`.
    """
    notes: list[str] = []
    batch = settings.optim.batch_size
    prototypes = settings.head.num_prototypes
    if prototypes == "auto":
        fitting = (k for limit, k in _PROTOTYPES if plan.num_images < limit)
        prototypes = next(fitting, _FULL_PROTOTYPES)
        notes.append(f"head.num_prototypes: {prototypes} (for {plan.num_images:,} images)")
    horizon, momentum = settings.teacher.horizon_images, settings.teacher.momentum
    if momentum == "auto":
        if horizon == "auto":
            tenth = plan.total_steps * batch // 10
            horizon = max(min(_PUBLISHED_HORIZON, tenth), _SHORTEST_HORIZON_STEPS * batch)
            notes.append(f"teacher.horizon_images: {horizon:,}")
        momentum = max(0.0, 1 - batch / float(horizon))
        notes.append(f"teacher.momentum: {momentum:.5f} (batch {batch} over the horizon)")
    elif horizon != "auto" and abs(momentum - (1 - batch / horizon)) > 1e-9:
        raise ConfigError(
            f"teacher.momentum={momentum} and teacher.horizon_images={horizon} both set the EMA; "
            "leave one of them at auto"
        )
    teacher = settings.teacher.model_copy(update={"momentum": momentum})
    head = settings.head.model_copy(update={"num_prototypes": prototypes})
    optim = settings.optim.model_copy(update={"precision": precision})
    return settings.model_copy(update={"teacher": teacher, "head": head, "optim": optim}), notes


def warn_about(settings: PretrainConfig, plan: Plan) -> list[str]:
    """Sentences about settings that run but are known to disappoint."""
    warnings: list[str] = []
    momentum = float(settings.teacher.momentum)
    horizon = settings.optim.batch_size / max(1 - momentum, 1e-9)
    seen = plan.total_steps * settings.optim.batch_size
    if horizon > seen / 2:
        warnings.append(
            f"the teacher averages over {horizon:,.0f} images and the run sees {seen:,}; it "
            "will hardly leave its random start. Train longer (optim.length)"
        )
    if settings.teacher.temp > 0.075:
        warnings.append(
            f"teacher.temp={settings.teacher.temp} is in the range that collapsed in the paper's "
            "ablation (0.08); 0.04 to 0.07 is usual"
        )
    return warnings


def loading_advice(
    settings: PretrainConfig | FinetuneConfig | DistillConfig,
    renderer: str = "",
    device_type: str = "",
) -> str:
    """What to change when training waits for its images, the cheapest first.

    `renderer` is the name of the one in use, and `device_type` says where training runs.
    """
    own = settings if isinstance(settings, FinetuneConfig) else settings.data
    section = "" if isinstance(settings, FinetuneConfig) else "data."
    workers = loader_processes(own.num_workers, processes_here())
    most = loader_processes("auto", processes_here())
    tips = []
    if workers < most:
        tips.append(f"raise {section}num_workers from {workers} to {most}")
    if not isinstance(settings, FinetuneConfig):
        tips += _renderer_advice(settings.data.renderer, renderer, device_type)
    if not isinstance(settings, FinetuneConfig) and settings.data.pack == "off":
        tips.append("set data.pack=auto, which pays for images up to 64 px and on network disks")
    if isinstance(settings, PretrainConfig):
        tips.append("make fewer or smaller crops (crops.num_local_crops, crops.global_size)")
    tips.append("store the images at a smaller size, or use a machine with more cores")
    return "; ".join(tips)


def _renderer_advice(wanted: str, used: str, device_type: str) -> list[str]:
    if wanted == "device" and device_type == "cpu":
        return ["set data.renderer=auto, many times as fast as device on a CPU"]
    if wanted in ("torch", "pillow"):
        return [f"set data.renderer=native, several times as fast as {wanted}"]
    if used == "torch":
        return [
            "install a C++ compiler (pip install ziglang brings one), which makes crops several "
            "times as fast"
        ]
    return []


def loader_processes(num_workers: int | str, processes_per_machine: int) -> int:
    """`auto`: the cores of one training process less one, at most 16."""
    if num_workers != "auto":
        return int(num_workers)
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS and Windows
        cores = os.cpu_count() or 1
    return max(0, min(16, cores // processes_per_machine - 1))
