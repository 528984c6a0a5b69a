"""What a step of two ways of training costs, measured side by side.

Equal wall-clock compares two speeds. Those of two runs that trained at different hours are as far
apart as their neighbours on the machine were busy; those of a few steps of each in turn are not.
"""

from __future__ import annotations

import itertools
import statistics
import time
from contextlib import closing
from dataclasses import replace

import torch
from torch import nn

from dino_kd.distill.story import make_schedules, prepare
from dino_kd.engine.hooks import BrokenImages
from dino_kd.engine.loop import Progress, Silence, fit
from dino_kd.engine.optim import make_optimizer, parameter_groups
from dino_kd.engine.schedules import constant
from dino_kd.engine.signals import StopFlag
from dino_kd.presets import fit_options
from dino_kd.schema import DistillConfig

_SETTLING, _TIMED, _ROUNDS = 4, 16, 3  # steps that are left out; steps; turns of each side


def side_by_side(
    first: DistillConfig, second: DistillConfig, device: torch.device, *, rounds: int = _ROUNDS
) -> tuple[float, float, float]:
    """Median seconds of a step of both, and the median over the rounds of first / second.

    Every process of a torchrun job calls this. Nothing is written, and nothing stays trained. On a
    run that waits for its images, the loader's queue shortens the few steps that are timed here, so
    that the ratio leans to that of the arithmetic.

    Raises:
        UserError: what `prepare` raises.
    """
    costs = [(median_step(first, device), median_step(second, device)) for _ in range(rounds)]
    ratio = statistics.median(one / other for one, other in costs)
    one, other = (statistics.median(side) for side in zip(*costs, strict=True))
    return one, other, ratio


def median_step(settings: DistillConfig, device: torch.device) -> float:
    """Seconds of one step of a run with these settings, data and teacher included."""
    lesson = prepare(settings, device)
    optim, task, span = lesson.settings.optim, lesson.task, lesson.span
    total, stop = _SETTLING + _TIMED, StopFlag()
    broken = BrokenImages(
        lambda found: None, stop, run_dir=lesson.run_dir, num_images=span.num_images, max_share=1.0
    )
    ends: list[float] = []

    def note(done: int, task: nn.Module, row: dict[str, float]) -> dict[str, float]:
        ends.append(time.perf_counter())
        return {}

    batches = lesson.batches(1, total + 1, broken)  # the first one, of step 0, leaves a picture
    with closing(batches):
        fit(
            task,
            batches,
            make_optimizer(optim.name, parameter_groups(task), momentum=optim.sgd_momentum),
            {**make_schedules(lesson), "compare_gradients": constant(0.0)},
            replace(fit_options(lesson.settings, span, device), total_steps=total),
            progress=Progress(),
            scaler=torch.amp.GradScaler(device.type, enabled=optim.precision == "fp16"),
            log=Silence(),
            save=lambda progress: None,
            hooks=[note],
            stop=stop,
        )
    costs = [later - earlier for earlier, later in itertools.pairwise(ends)]
    return statistics.median(costs[_SETTLING - 1 :])
