"""Time until a k-NN score is reached: the plain recipe against the fast one, one after the other.

python benchmarks/time_to_accuracy.py                        made-up textures, a minute; no proof
python benchmarks/time_to_accuracy.py --data CIFAR10         the real thing, tens of minutes
python benchmarks/time_to_accuracy.py --data CIFAR10 --sides plain --out plain.json

CIFAR10 is a folder with train/ and test/, each of class folders. Both sides train the same network
from the same seed with `fit`, on one thread and without loader processes; both are scored on the
same images at full size, and the clocks stand still meanwhile. A side ends at the first score that
reaches the target. Processor time is the measure where neighbours disturb; both are printed.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from plain import plain_kernels
from torch import Tensor, nn

from dino_kd.config import load_settings
from dino_kd.crop_sizes import describe_sizes
from dino_kd.data.curriculum import Curriculum
from dino_kd.data.loader import crop_batches
from dino_kd.data.multicrop import CropPolicy
from dino_kd.data.specs import make_dataset
from dino_kd.engine.hooks import KnnMonitor
from dino_kd.engine.loop import Progress, Silence, fit
from dino_kd.engine.precision import choose_precision
from dino_kd.engine.signals import StopFlag
from dino_kd.features import extract_features
from dino_kd.models.backbone import Backbone
from dino_kd.presets import fit_options
from dino_kd.schema import PretrainConfig
from dino_kd.tasks.dino import DinoTask
from dino_kd.training import Training, prepare

PLAIN = ["optim.precision=fp32", "data.renderer=pillow"]  # and `make_plain`
CIFAR = {
    "plain": ["pretrain/cifar10_cpu", *PLAIN, "optim.length=2ep"],
    "fast": ["pretrain/cifar10_fast"],
}
_SHORT = ["pretrain/demo", "optim.batch_size=32", "optim.length=40", "optim.warmup=4"]
TEXTURES = {
    "plain": [*_SHORT, *PLAIN],
    "fast": [*_SHORT, "curriculum.scale=0.5", "curriculum.length=75%"],
}
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Score:
    """One measurement on the way; seconds without those of scoring."""

    images: int  # seen so far
    wall: float  # seconds
    processor: float  # seconds
    top1: float  # percent


class Watch:
    """A hook of `fit` with two clocks that stand still while it scores."""

    def __init__(self, monitor: KnnMonitor, *, batch_size: int, target: float, stop: StopFlag):
        self.monitor, self.batch_size, self.target, self.stop = monitor, batch_size, target, stop
        self.scores: list[Score] = []
        self.began = time.perf_counter(), time.process_time()

    def __call__(self, done: int, task: nn.Module, row: dict[str, float]) -> dict[str, float]:
        paused = time.perf_counter(), time.process_time()
        found = self.monitor(done, task, row)
        if found:
            wall, processor = (now - then for now, then in zip(paused, self.began, strict=True))
            score = Score(done * self.batch_size, wall, processor, found["knn_top1"])
            self.scores.append(score)
            print(
                f"    {score.images:>9,} images   {processor:7.1f} s processor   "
                f"{wall:7.1f} s wall   k-NN {score.top1:.2f} %",
                flush=True,
            )
            if score.top1 >= self.target:
                self.stop.request("the target is reached")
            resumed = time.perf_counter(), time.process_time()
            self.began = tuple(  # type: ignore[assignment]
                b + r - p for b, r, p in zip(self.began, resumed, paused, strict=True)
            )
        return found


class Warnings(Silence):
    """The loop's log; the scores are printed by `Watch`."""

    def warn(self, text: str) -> None:
        """Rare, and worth knowing."""
        print(f"    warning: {text}")


def train(
    side: Training, policy: Curriculum | CropPolicy, steps: int, hooks: list[Watch], stop: StopFlag
) -> None:
    """The first `steps` steps from the present weights, fed as `dino-kd pretrain` is."""
    settings = side.settings
    batches = crop_batches(
        side.dataset, policy, batch_size=settings.optim.batch_size, seed=settings.seed,
        start_step=0, total_steps=steps, renderer=side.renderer,
    )  # fmt: skip
    options = fit_options(settings, side.plan, CPU)
    fit(
        side.task,
        (batch.crops for batch in batches),
        side.optimizer(),
        side.schedules(),
        replace(options, total_steps=steps, log_every=0, save_every=0),
        progress=Progress(),
        scaler=torch.amp.GradScaler("cpu", enabled=False),
        log=Warnings(),
        save=lambda progress: None,
        hooks=hooks,
        stop=stop,
    )


def build(words: list[str], data: str) -> Training:
    """One side from its settings; the plain one without what the library does for speed alone."""
    given = [f"data.train={data}", "run_dir=unused", "device=cpu"]
    made = prepare(load_settings(PretrainConfig, [*words, *given], command="pretrain"), CPU)
    if set(PLAIN) <= set(words):
        make_plain(made.task)
    return made


def race(side: Training, test: str, args: argparse.Namespace) -> list[Score]:
    """Train until the target or the end; the scores on the way."""
    backbone, batch = side.task.teacher.backbone, side.settings.optim.batch_size
    monitor = KnnMonitor(
        backbone, side.dataset, make_dataset(test),
        extract=functools.partial(
            extract_features, size=backbone.img_size, precision=args.scoring
        ),
        every=max(1, args.every // batch), total_steps=side.plan.total_steps, k=20,
        max_images=args.images, say=lambda text: None,
    )  # fmt: skip
    stop = StopFlag()
    watch = Watch(monitor, batch_size=batch, target=args.target, stop=stop)
    train(side, side.crops, side.plan.total_steps, [watch], stop)
    return watch.scores


def costs(sides: dict[str, Training], images: int, rounds: int = 3) -> dict[str, list[float]]:
    """Processor seconds per image of each stage of each side, median of interleaved rounds.

    Prints them with the ratio to the first. These are what busy neighbours disturb least.
    """
    stages = [(name, policy) for name in sides for _, policy in sides[name].crops.stages]
    times: list[list[float]] = [[] for _ in stages]
    for number in range(rounds + 1):  # the first warms up
        for (name, policy), seconds in zip(stages, times, strict=True):
            side = sides[name]
            steps = max(1, images // side.settings.optim.batch_size)
            began = time.process_time()
            train(side, policy, steps, [], StopFlag())
            if number:
                spent = time.process_time() - began
                seconds.append(spent / steps / side.settings.optim.batch_size)
    print("processor time per image, data included, interleaved rounds:")
    medians: dict[str, list[float]] = {name: [] for name in sides}
    for (name, policy), seconds in zip(stages, times, strict=True):
        ratio = statistics.median(a / b for a, b in zip(times[0], seconds, strict=True))
        medians[name].append(statistics.median(seconds))
        print(f"  {name:<8} {describe_sizes(policy):<16} {medians[name][-1] * 1e3:6.2f} ms"
              f"   x{ratio:.2f}")  # fmt: skip
    return medians


def make_plain(task: DinoTask) -> None:
    """Undo what the library does for speed alone: memory layout, attention, linear layers."""
    for network in (task.student, task.teacher):
        plain_kernels(network)
        network.backbone.preprocess = functools.partial(normalise, network.backbone)  # type: ignore[method-assign]


def normalise(backbone: Backbone, images: Tensor) -> Tensor:
    """``(x / 255 - mean) / std``, as the original transform writes it."""
    mean, std = torch.tensor(backbone.mean), torch.tensor(backbone.std)
    return (images / 255 - mean[:, None, None]) / std[:, None, None]


def first(scores: list[Score], target: float) -> Score | None:
    """The first score that reaches the target."""
    return next((score for score in scores if score.top1 >= target), None)


def work(side: Training, score: Score, seconds: list[float]) -> float:
    """Processor seconds until `score` at the interleaved costs per image of each stage."""
    batch = side.settings.optim.batch_size
    starts = [first * batch for first, _ in side.crops.stages]
    ends = [*starts[1:], score.images]
    seen = [max(0, min(end, score.images) - start) for start, end in zip(starts, ends, strict=True)]
    return sum(count * cost for count, cost in zip(seen, seconds, strict=True))


def report(
    found: dict[str, list[Score]],
    sides: dict[str, Training],
    medians: dict[str, list[float]],
    target: float,
) -> None:
    """Both times and their ratio, as they passed and at the interleaved costs per image."""
    print(f"first score of at least {target} %:")
    reached: dict[str, dict[str, float]] = {}
    for name, scores in found.items():
        score = first(scores, target)
        if score is None:
            best = max(s.top1 for s in scores)
            print(f"  {name:<8} not within {scores[-1].processor:.1f} s (best {best:.2f} %)")
            continue
        times = {"processor": score.processor, "wall": score.wall}
        if medians:
            times["at the costs above"] = work(sides[name], score, medians[name])
        reached[name] = times
        shown = "   ".join(f"{seconds:.1f} s {what}" for what, seconds in times.items())
        print(f"  {name:<8} {shown}   {score.images:,} images   {score.top1:.2f} %")
    if len(reached) == 2:
        plain, fast = reached["plain"], reached["fast"]
        print("  ratio    " + "   ".join(f"x{plain[w] / fast[w]:.2f} {w}" for w in plain))


def main() -> None:
    """Textures by default; --data is the measurement."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="folder with train/ and test/ of class folders")
    parser.add_argument("--target", type=float, help="k-NN top-1 in percent (k = 20)")
    parser.add_argument("--images", type=int, help="at most so many vote, and are scored")
    parser.add_argument("--every", type=int, help="images seen between scores")
    parser.add_argument("--sides", nargs="+", choices=["plain", "fast"], default=["plain", "fast"])
    parser.add_argument(
        "--with", nargs="*", default=[], dest="words", help="settings for all sides"
    )
    parser.add_argument("--out", type=Path, help="keep the scores as JSON")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.scoring = choose_precision("auto", CPU)  # of both sides, whatever they train in
    if args.data:
        sides, train, test = CIFAR, f"{args.data}/train", f"{args.data}/test"
        defaults = {"target": 39.5, "images": 5_000, "every": 6_400}
    else:
        sides, train, test = (
            TEXTURES,
            "synthetic:textures:train:2000",
            "synthetic:textures:test:500",
        )
        defaults = {"target": 25.0, "images": 500, "every": 640}
        print("made-up textures and a run of seconds: this shows that it works, and proves nothing")
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    built = {name: build([*sides[name], *args.words], train) for name in args.sides}
    medians = costs(built, images=512 if args.data else 64) if len(built) == 2 else {}
    found = {}
    for name in args.sides:  # anew: the costs were measured by training
        print(f"{name}: {' '.join([*sides[name], *args.words])}")
        found[name] = race(build([*sides[name], *args.words], train), test, args)
    report(found, built, medians, args.target)
    if args.out:
        rows = {name: [asdict(score) for score in scores] for name, scores in found.items()}
        args.out.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
