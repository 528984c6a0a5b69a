"""Measure how fast a pretraining runs on this machine, and say what holds it up.

    dino-kd bench pretrain/folder data.train=/my/photos
    dino-kd bench runs/photos bench.seconds=60 bench.output=speed/
    torchrun --nproc_per_node=8 -m dino_kd bench pretrain/vits16_imagenet data.train=...

Three parts with the run's own settings: the loader alone, the step alone on batches that are
already there, and both together. No run directory is made and no weights are kept.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import resource
import sys
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dino_kd.config import load_settings
from dino_kd.data.loader import CropBatch
from dino_kd.data.multicrop import Crops
from dino_kd.data.packed import packed
from dino_kd.distributed import (
    broadcast,
    is_main_process,
    process_group,
    processes_here,
    world_size,
)
from dino_kd.engine.loop import Progress, Silence, fit
from dino_kd.engine.signals import StopFlag
from dino_kd.engine.speed import Setup, Speed, bottleneck, count_flops, peak_of, show_rate
from dino_kd.errors import Interrupted
from dino_kd.files import write_json
from dino_kd.presets import fit_options, loader_processes
from dino_kd.schema import BenchConfig, MeasureSettings
from dino_kd.training import Training, prepare

_HELD = 4  # batches that the step alone goes round
_LAST_STEP = 10**6  # no measurement gets there


def main(argv: list[str]) -> int:
    """`dino-kd bench [CONFIG] a.b=c ...`."""
    bench(load_settings(BenchConfig, argv, command="bench"))
    return 0


def bench(settings: BenchConfig) -> dict[str, Any]:
    """Measure, print and return the numbers; every process of a torchrun job calls this.

    Raises:
        UserError: whatever `pretrain` would refuse, or a signal.
    """
    stop = StopFlag()
    with stop.listening(), process_group(settings.device) as device:
        timed = prepared(settings, device, stop)
        say = print if is_main_process() else _hush
        say(timed.training.describe())
        numbers = broadcast(measure_all(timed))  # the main process's own
        say(table(numbers))
        if settings.bench.output is not None and is_main_process():
            file = Path(settings.bench.output).expanduser() / "bench.json"
            write_json(file, numbers)
            say(f"written to {file}")
        return numbers


def measure_all(timed: Timed) -> dict[str, Any]:
    """All numbers as they are written to bench.json."""
    settings, device, precision = timed.training.settings, timed.device, timed.options.precision
    with contextlib.closing(timed.batches()) as batches:
        loader, held = measure_loader(batches, timed)
    alone, flops = measure_step(held, timed)
    del held  # on a GPU they would count as memory of the training
    if device.type == "cuda":  # what counts operations runs uncompiled, and needs more
        torch.cuda.reset_peak_memory_stats(device)
    with contextlib.closing(timed.batches()) as batches:
        both = timed.measure(batch.crops for batch in batches)
    memory = peak_memory(device)
    peak = peak_of(device, precision)  # may multiply large matrices to know
    speed = Speed(
        loader=loader,
        step=alone.images_per_s,
        together=both.images_per_s,
        waiting=both.waiting,
        mfu=flops * alone.images_per_s / settings.optim.batch_size / peak.flops,
    )
    kind, sentence = bottleneck(speed, Setup(device, precision, timed.options.loading_advice))
    return {
        "images_per_s": {"loader": loader, "step": speed.step, "together": speed.together},
        "waiting": speed.waiting,
        "mfu": speed.mfu,
        "flops_per_step_and_process": flops,
        "peak": dataclasses.asdict(peak),
        "peak_memory_bytes": memory,
        "bottleneck": kind,
        "sentence": sentence,
        "processes": world_size(),
        "device": device_name(device),
        "precision": precision,
        "threads": torch.get_num_threads(),
        "num_workers": timed.num_workers,
        "renderer": timed.training.renderer.name,
        "torch": torch.__version__,
        "settings": settings.model_dump(mode="json", exclude={"run_dir", "resume"}),
    }


def _hush(*words: object) -> None:
    """What other processes than the main one say."""


@dataclass
class Rate:
    """Images per second over all processes, and the share of the time spent waiting for them."""

    images_per_s: float
    waiting: float


@dataclass
class Timed:
    """A pretraining that is run for a while to be timed."""

    training: Training
    wanted: MeasureSettings
    stop: StopFlag

    def __post_init__(self) -> None:
        training = self.training
        self.device = training.device
        self.options = fit_options(
            training.settings, training.plan, self.device, training.renderer.name
        )
        self.optimizer = training.optimizer()
        self.scaler = torch.amp.GradScaler(
            self.device.type, enabled=self.options.precision == "fp16"
        )

    def batches(self) -> Generator[CropBatch, None, None]:
        """The loader as a pretraining starts it."""
        return self.training.batches(0)

    @property
    def num_workers(self) -> int:
        """Loaders of one process."""
        return loader_processes(self.training.settings.data.num_workers, processes_here())

    def run(
        self, crops: Iterable[Crops], *, steps: int, after_step: Callable[[], object] = lambda: None
    ) -> None:
        """Train with the loop of `pretrain`, up to `steps` steps. Raises Interrupted by a signal.

        `after_step` may end it by returning something true.
        """
        ending = StopFlag()

        def hook(done: int, task: torch.nn.Module, row: dict[str, float]) -> dict[str, float]:
            if after_step():
                ending.request("measured")
            if self.stop.reason:
                ending.request(self.stop.reason)
            return {}

        fit(
            self.training.task,
            iter(crops),
            self.optimizer,
            self.training.schedules(),
            dataclasses.replace(self.options, total_steps=steps),
            progress=Progress(),
            scaler=self.scaler,
            log=Silence(),
            save=_hush,
            hooks=[hook],
            stop=ending,
        )
        if self.stop.reason:
            raise Interrupted(f"{self.stop.reason}; nothing was written")

    def measure(self, crops: Iterable[Crops]) -> Rate:
        """Train for `bench.seconds` after the warm-up, at least one step more than that."""
        clock = _Clock(self.wanted.warmup, self.wanted.seconds)
        self.run(clock.watch(crops), steps=_LAST_STEP, after_step=clock.step_done)
        return Rate(clock.steps * self.options.batch_size / clock.elapsed, clock.share_waited)


class _Clock:
    """Steps and waiting since the warm-up ended."""

    def __init__(self, warmup: int, seconds: float) -> None:
        self.warmup, self.seconds = warmup, seconds
        self.steps, self.elapsed, self._waited = -warmup, 0.0, 0.0
        self._started = time.perf_counter()

    @property
    def share_waited(self) -> float:
        return self._waited / self.elapsed

    def watch(self, crops: Iterable[Crops]) -> Iterator[Crops]:
        """`crops`, with the time that each is waited for."""
        source = iter(crops)
        while True:
            before = time.perf_counter()
            batch = next(source)
            self._waited += time.perf_counter() - before
            yield batch

    def step_done(self) -> bool:
        """Count a step; True when enough have been seen."""
        self.steps += 1
        if self.steps == 0:
            self._started, self._waited = time.perf_counter(), 0.0
        self.elapsed = time.perf_counter() - self._started
        return self.steps >= 1 and self.elapsed >= self.seconds


def prepared(settings: BenchConfig, device: torch.device, stop: StopFlag) -> Timed:
    """What `pretrain` would train, as in the middle of a long run. Raises UserError."""
    # nothing is written, so no place is wrong
    settings = settings.model_copy(update={"run_dir": os.devnull})
    training = prepare(settings, device)
    data = training.settings.data
    training.dataset = packed(training.dataset, data.pack, limit_gb=data.pack_limit, say=_hush)
    training.plan = dataclasses.replace(training.plan, total_steps=_LAST_STEP, freeze_last_layer=0)
    return Timed(training, settings.bench, stop)


def measure_loader(batches: Iterator[CropBatch], timed: Timed) -> tuple[float, list[Crops]]:
    """Images per second of the loader alone, over all processes; and some of its batches.

    Loader processes finish their first batches at the same time, so that the clock starts when
    each of them has.
    """
    wanted = timed.wanted
    clock = _Clock(max(wanted.warmup, timed.num_workers), wanted.seconds)
    held: list[Crops] = []
    for batch in batches:
        if len(held) < _HELD:
            held.append(batch.crops)
        if clock.step_done() and len(held) == _HELD:
            break
        if timed.stop.reason:
            raise Interrupted(f"{timed.stop.reason}; nothing was written")
    return clock.steps * timed.options.batch_size / clock.elapsed, held


def measure_step(held: list[Crops], timed: Timed) -> tuple[Rate, float]:
    """The training step alone, on batches that are there; and what it computes, in FLOPs."""
    alone = timed.measure(itertools.cycle(held))
    return alone, count_flops(lambda: timed.run(itertools.cycle(held), steps=1))


def peak_memory(device: torch.device) -> int:
    """Bytes: what torch held on the GPU at most, else the whole process without its loaders'."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else largest * 1024


def device_name(device: torch.device) -> str:
    """The GPU's own name, or the kind of device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def table(numbers: dict[str, Any]) -> str:
    """The numbers for the console."""
    speed, peak = numbers["images_per_s"], numbers["peak"]
    rows = [
        ("loader alone", f"{show_rate(speed['loader'])} images/s (crops by {numbers['renderer']})"),
        ("step alone", f"{show_rate(speed['step'])} images/s"),
        ("together", f"{show_rate(speed['together'])} images/s"),
        ("waiting for images", f"{100 * numbers['waiting']:.1f} % of the time"),
        ("peak memory", f"{numbers['peak_memory_bytes'] / 2**30:.2f} GiB"),
        (
            "step, share of peak",
            f"{100 * numbers['mfu']:.1f} % of {peak['flops'] / 1e12:,.3g} TFLOP/s "
            f"({peak['source']})",
        ),
    ]
    return "\n".join([*(f"  {name:<20} {value}" for name, value in rows), numbers["sentence"]])
