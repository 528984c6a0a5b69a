"""How much faster and smaller is a default training step than the original's float32 step?

python benchmarks/step.py                   # both sizes, on generated images; about four minutes
python benchmarks/step.py --size small --batch 64 --rounds 7

The same network, crops and batch. The original's step is written as its paper and code give it:
one pass per resolution, softmax(q k) v, every token through the last block, the loss pair by pair,
gradients clipped one parameter at a time, AdamW without fusion, and a loop for the teacher. Times
are processor time at one thread, so that neighbours disturb little, of processes that take turns,
each with the environment that its users have; memory is the peak of a fresh process.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import re
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from loss import pair_by_pair
from plain import plain_kernels
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from dino_kd.data.multicrop import Crops
from dino_kd.engine.loop import FitOptions, Progress, fit
from dino_kd.engine.optim import make_optimizer, parameter_groups
from dino_kd.engine.precision import DTYPES, autocast, choose_precision
from dino_kd.engine.signals import StopFlag
from dino_kd.models.backbone import create_backbone
from dino_kd.models.head import DINOHead
from dino_kd.models.kernels import choose_kernels
from dino_kd.process import ENVIRONMENT, with_defaults
from dino_kd.tasks.dino import DinoTask, Network

CPU = torch.device("cpu")
VALUES = {
    "lr": 1e-4, "weight_decay": 0.04, "momentum": 0.996, "teacher_temp": 0.04, "measure": 0.0,
    "freeze_last_layer": 0.0,
}  # fmt: skip
SIZES = {  # network, timm arguments, pixels and patch, local crops of how many pixels, K
    "small": ("vit_tiny_patch16_224", {"depth": 12, "num_heads": 3}, 32, 4, (6, 16), 4096),
    "224 px": ("vit_small_patch16_224", {}, 224, 16, (8, 96), 65_536),
}
BATCH = {"small": 16, "224 px": 4}  # for the times; memory is measured at the next ones
FULL_BATCH = {"small": 64, "224 px": 8}


def build(size: str) -> DinoTask:
    """Student and teacher of one size, from a fixed seed."""
    name, args, pixels, patch, _, prototypes = SIZES[size]
    torch.manual_seed(0)
    backbone = create_backbone(name, img_size=pixels, patch_size=patch, drop_path=0.1, args=args)
    return DinoTask(backbone, DINOHead(backbone.embed_dim, prototypes))


def make_crops(size: str, batch: int) -> Crops:
    """Generated pixels; what they show costs nothing."""
    _, _, pixels, _, (count, local), _ = SIZES[size]
    draw = functools.partial(torch.randint, 0, 256, dtype=torch.uint8)
    return Crops(
        draw(size=(2, batch, 3, pixels, pixels)), draw(size=(count, batch, 3, local, local))
    )


class OriginalStep:
    """The step of the paper's code, on the task's own networks."""

    def __init__(self, task: DinoTask, precision: str) -> None:
        self.task, self.precision = task, precision
        for network in (task.student, task.teacher):
            plain_kernels(network)
        groups = parameter_groups(task.student)
        for group in groups:
            group["weight_decay"] = VALUES["weight_decay"] if group["has_weight_decay"] else 0.0
        self.optimizer = torch.optim.AdamW(groups, lr=VALUES["lr"])
        self.center = torch.zeros(1, task.student.head.num_prototypes)

    def __call__(self, crops: Crops) -> None:
        task = self.task
        with autocast(self.precision, CPU):
            with torch.no_grad():
                teacher = self.outputs(task.teacher, [crops.global_crops])
                targets = torch.softmax((teacher - self.center) / VALUES["teacher_temp"], dim=-1)
            student = self.outputs(task.student, [crops.global_crops, crops.local_crops])
            loss = pair_by_pair(student, targets, 0.1)
            self.update_center(teacher)
        if not torch.isfinite(loss):
            raise SystemExit(f"loss is {loss.item()}")
        self.optimizer.zero_grad()
        loss.backward()
        self.clip(3.0)
        self.optimizer.step()
        with torch.no_grad():
            for source, target in zip(
                task.student.parameters(), task.teacher.parameters(), strict=True
            ):
                target.data.mul_(VALUES["momentum"]).add_((1 - VALUES["momentum"]) * source.data)

    @staticmethod
    def outputs(network: Network, groups: list[Tensor]) -> Tensor:
        """Logits ``[S, B, K]``; every token goes through every block."""
        backbone = network.backbone
        features = [backbone.net(backbone.preprocess(crops.flatten(0, 1))) for crops in groups]
        z = F.normalize(network.head.mlp(torch.cat(features)).float(), dim=-1)
        last_layer = network.head.last_layer
        prototypes = torch._weight_norm(last_layer, torch.ones(len(last_layer), 1), 0)
        return F.linear(z, prototypes).unflatten(0, (-1, groups[0].shape[1]))

    @torch.no_grad()
    def update_center(self, teacher: Tensor) -> None:
        """The running mean of the teacher's logits ``[G, B, K]``."""
        mean = teacher.flatten(0, 1).sum(0, keepdim=True) / teacher.shape[:2].numel()
        self.center = self.center * 0.9 + mean * 0.1

    def clip(self, limit: float) -> None:
        """Every parameter's gradient to a norm of at most `limit`, one after the other."""
        norms = []
        for parameter in self.task.student.parameters():
            if parameter.grad is not None:
                norm = parameter.grad.data.norm(2)
                norms.append(norm.item())
                share = limit / (norm + 1e-6)
                if share < 1:
                    parameter.grad.data.mul_(share)


class DefaultStep:
    """One step of `fit` as a run with default settings takes it."""

    def __init__(self, task: DinoTask, precision: str) -> None:
        self.task, self.precision = task, precision
        self.progress = Progress(step=1)  # a run's first step makes a row of metrics
        self.stop = StopFlag()
        self.stop.request("one step")
        for network in (task.student, task.teacher):
            choose_kernels(network, "cpu", DTYPES[precision])
        groups = parameter_groups(task.student, task.student.head.prototype_parameters())
        self.optimizer = make_optimizer("adamw", groups)

    def __call__(self, crops: Crops) -> None:
        self.progress.stopped = ""
        fit(
            self.task,
            iter([crops]),
            self.optimizer,
            {name: functools.partial(lambda value, step: value, value)
             for name, value in VALUES.items()},
            FitOptions(10**9, crops.global_crops.shape[1], CPU, precision=self.precision,
                       clip_grad=3.0, log_every=10**9),
            progress=self.progress,
            scaler=torch.amp.GradScaler("cpu", enabled=False),
            log=Silence(),
            save=lambda progress: None,
            stop=self.stop,
        )  # fmt: skip


class Silence:
    """A log that keeps nothing."""

    numbers = warn = progress = staticmethod(lambda *found: None)


RIVALS: dict[str, Callable[[DinoTask], Callable[[Crops], None]]] = {
    "original, fp32": lambda task: OriginalStep(task, "fp32"),
    "original, bf16 autocast": lambda task: OriginalStep(task, "bf16"),
    "dino_kd, fp32": lambda task: DefaultStep(task, "fp32"),
    "dino_kd, bf16": lambda task: DefaultStep(task, "bf16"),
}


COUNTED = ("original, fp32", "dino_kd, bf16")  # each is a process of its own


def measure_time(
    size: str, batch: int, rounds: int, names: Iterable[str] = RIVALS
) -> dict[str, list[float]]:
    """Seconds of processor time of every rival, in rounds of one step each.

    Each lives in a process of its own, with the environment that its users have.
    """
    with contextlib.ExitStack() as stack:
        rivals = {name: stack.enter_context(in_turn(size, batch, name)) for name in names}
        times: dict[str, list[float]] = {name: [] for name in rivals}
        for _ in range(rounds):
            for name, step in rivals.items():
                times[name].append(step())
    return times


@contextlib.contextmanager
def in_turn(size: str, batch: int, name: str) -> Iterator[Callable[[], float]]:
    """A process with one rival; every call makes it take two steps and returns what one took."""
    words = ["--size", size, "--batch", str(batch), "--steps-of", name]
    with subprocess.Popen(
        [sys.executable, __file__, *words], text=True, env=environment(name),
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    ) as process:  # fmt: skip
        asked, answer = process.stdin, process.stdout
        assert asked is not None
        assert answer is not None

        def step() -> float:
            asked.write("step\n")
            asked.flush()
            return float(answer.readline())

        yield step
        asked.close()


def environment(name: str) -> dict[str, str]:
    """Of this process, and what `dino-kd` adds for itself."""
    plain = {key: value for key, value in os.environ.items() if key not in ENVIRONMENT}
    return with_defaults(plain) if name.startswith("dino_kd") else plain


def steps_of(size: str, batch: int, name: str) -> None:
    """Two steps of one rival for every line read; prints the second's seconds of processor time.

    The first finds caches and memory as a process does that has slept.
    """
    torch.set_num_threads(1)
    crops, step = make_crops(size, batch), RIVALS[name](build(size))
    for _ in sys.stdin:
        step(crops)
        started = time.process_time()
        step(crops)
        print(time.process_time() - started, flush=True)


class Counting(TorchDispatchMode):
    """Counts operations less views, which a GPU would launch, and numbers read back from it."""

    def __init__(self) -> None:
        super().__init__()
        self.launches = self.reads = 0
        self._tolist = torch.Tensor.tolist

    def __enter__(self) -> Counting:
        """Reads by `tolist` too, which is no operation and passes by the dispatcher."""

        def tolist(tensor: torch.Tensor) -> Any:
            self.reads += 1
            return self._tolist(tensor)

        torch.Tensor.tolist = tolist  # type: ignore[assignment, method-assign]
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        """As it was."""
        super().__exit__(*error)
        torch.Tensor.tolist = self._tolist  # type: ignore[method-assign]

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.launches += not function.is_view
        self.reads += function.overloadpacket is torch.ops.aten._local_scalar_dense
        return function(*args, **kwargs or {})


def measure_memory(size: str, batch: int, name: str) -> tuple[float, int, int]:
    """Peak resident MB of a fresh process that takes two steps; launches and reads of a third."""
    words = ["--size", size, "--batch", str(batch), "--peak-of", name]
    command = [sys.executable, __file__, *words]
    made = subprocess.run(
        command, check=True, capture_output=True, text=True, env=environment(name)
    )
    peak, launches, reads = made.stdout.splitlines()[-1].split()
    return float(peak), int(launches), int(reads)


def peak_of(size: str, batch: int, name: str) -> None:
    """Two steps of one rival; prints the peak of this process in MB, and a third step's counts."""
    step = RIVALS[name](build(size))
    for _ in range(2):
        step(make_crops(size, batch))
    peak = peak_mb()
    with Counting() as counting:
        step(make_crops(size, 2))  # as many operations as for a large batch
    print(peak, counting.launches, counting.reads)


def peak_mb() -> float:
    """Peak resident MB of this program; `ru_maxrss` would start from the parent's."""
    status = Path("/proc/self/status")
    if status.is_file():
        return int(re.findall(r"VmHWM:\s*(\d+) kB", status.read_text())[0]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    """A table of times, ratios and peaks for each size."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, help="one size only")
    parser.add_argument(
        "--batch", type=int, help="images a step; default 16 and 4, memory 64 and 8"
    )
    parser.add_argument("--rounds", type=int, default=5, help="0: memory and counts only")
    parser.add_argument("--peak-of", choices=RIVALS, help=argparse.SUPPRESS)
    parser.add_argument("--steps-of", choices=RIVALS, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.peak_of:
        peak_of(chosen.size, chosen.batch, chosen.peak_of)
        return
    if chosen.steps_of:
        steps_of(chosen.size, chosen.batch, chosen.steps_of)
        return
    if choose_precision("auto", CPU) != "bf16":
        print("this processor has no bf16: a default run takes the fp32 step")
    for size in [chosen.size] if chosen.size else SIZES:
        batch = chosen.batch or BATCH[size]
        if chosen.rounds:
            print(f"one step, {size}, batch {batch}, one thread", flush=True)
            show_times(measure_time(size, batch, chosen.rounds))
        batch = chosen.batch or FULL_BATCH[size]
        print(f"one step, {size}, batch {batch}, a process each", flush=True)
        show_counts({name: measure_memory(size, batch, name) for name in COUNTED})


def show_times(times: dict[str, list[float]]) -> None:
    """Median ms, and median ratios to the original in float32 and in the same arithmetic."""
    for name, seconds in times.items():
        same = "original, fp32" if name.endswith("fp32") else "original, bf16 autocast"
        plain, equal = (
            statistics.median(a / b for a, b in zip(times[first], seconds, strict=True))
            for first in ("original, fp32", same)
        )
        print(
            f"  {name:<26} {statistics.median(seconds) * 1e3:9.0f} ms   x{plain:.2f}"
            f"   same arithmetic x{equal:.2f}",
            flush=True,
        )


def show_counts(counts: dict[str, tuple[float, int, int]]) -> None:
    """Peak memory and its ratio to the first, operations launched, numbers read back."""
    first = next(iter(counts.values()))[0]
    for name, (peak, launches, reads) in counts.items():
        print(
            f"  {name:<26} peak {peak:6.0f} MB   x{peak / first:.2f}   launches {launches:5d}"
            f"   numbers read back {reads}"
        )


if __name__ == "__main__":
    main()
