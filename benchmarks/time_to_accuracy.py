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
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from dino_kd import pretrain as story
from dino_kd.config import load_settings
from dino_kd.crop_sizes import crop_curriculum
from dino_kd.data.dataset import ImageDataset
from dino_kd.data.loader import crop_batches
from dino_kd.data.multicrop import Crops
from dino_kd.data.renderers import make_renderer
from dino_kd.data.specs import make_dataset
from dino_kd.engine.hooks import KnnMonitor
from dino_kd.engine.loop import Progress, fit
from dino_kd.engine.optim import make_optimizer, parameter_groups
from dino_kd.engine.precision import DTYPES, choose_precision
from dino_kd.engine.signals import StopFlag
from dino_kd.features import extract_features
from dino_kd.models.backbone import Backbone, attention_backend
from dino_kd.presets import Plan, fit_options, make_plan, resolve_auto
from dino_kd.schema import PretrainConfig
from dino_kd.tasks.dino import DinoTask

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


class Silent:
    """Where the loop's log goes."""

    def numbers(self, step: int, values: dict[str, float]) -> None:
        """Nothing: the scores are printed by `Watch`."""

    def progress(self, step: int, total: int, values: dict[str, float]) -> None:
        """Nothing."""

    def warn(self, text: str) -> None:
        """Rare, and worth knowing."""
        print(f"    warning: {text}")


def run(
    words: list[str], args: argparse.Namespace, train: str, test: str, plain: bool
) -> list[Score]:
    """Train one side until the target or its end; its scores."""
    given = [f"data.train={train}", "run_dir=unused", "device=cpu"]
    settings = load_settings(PretrainConfig, [*words, *given], command="pretrain")
    precision = choose_precision(settings.optim.precision, CPU)
    images, queries = make_dataset(train), make_dataset(test)
    plan = make_plan(settings, len(images), 1)
    settings, _ = resolve_auto(settings, plan, precision)
    task = story.build_task(settings)
    for network in (task.student, task.teacher):
        attention_backend(network.backbone, "cpu", DTYPES[precision])
    if plain:
        make_plain(task)
    groups = parameter_groups(task.student, task.student.head.prototype_parameters())
    optimizer = make_optimizer(settings.optim.name, groups, momentum=settings.optim.sgd_momentum)
    batch = settings.optim.batch_size
    monitor = KnnMonitor(
        task.teacher.backbone, images, queries,
        extract=functools.partial(
            extract_features, size=task.teacher.backbone.img_size, precision=args.scoring
        ),
        every=max(1, args.every // batch), total_steps=plan.total_steps, k=20,
        max_images=args.images, say=lambda text: None,
    )  # fmt: skip
    stop = StopFlag()
    watch = Watch(monitor, batch_size=batch, target=args.target, stop=stop)
    fit(
        task, batches_of(settings, images, plan, task.student.backbone), optimizer,
        story.make_schedules(settings, plan),
        replace(fit_options(settings, plan, CPU), log_every=0, save_every=0),
        progress=Progress(), scaler=torch.amp.GradScaler("cpu", enabled=False), log=Silent(),
        save=lambda progress: None, hooks=[watch], stop=stop,
    )  # fmt: skip
    return watch.scores


def batches_of(
    settings: PretrainConfig, images: ImageDataset, plan: Plan, net: Backbone
) -> Iterator[Crops]:
    """As `dino-kd pretrain` feeds itself, in this process."""
    curriculum = crop_curriculum(
        settings.curriculum, story.crop_policy(settings), net,
        steps=plan.steps(settings.curriculum.length), total_steps=plan.total_steps,
    )  # fmt: skip
    for batch in crop_batches(
        images, curriculum, batch_size=settings.optim.batch_size, seed=settings.seed,
        start_step=0, total_steps=plan.total_steps,
        renderer=make_renderer(settings.data.renderer),
    ):  # fmt: skip
        yield batch.crops


def make_plain(task: DinoTask) -> None:
    """Undo what the library does for speed alone: images in torch's default memory layout."""
    for network in (task.student, task.teacher):
        network.backbone.preprocess = functools.partial(normalise, network.backbone)  # type: ignore[method-assign]


def normalise(backbone: Backbone, images: Tensor) -> Tensor:
    """``(x / 255 - mean) / std``, as the original transform writes it."""
    mean, std = torch.tensor(backbone.mean), torch.tensor(backbone.std)
    return (images / 255 - mean[:, None, None]) / std[:, None, None]


def first(scores: list[Score], target: float) -> Score | None:
    """The first score that reaches the target."""
    return next((score for score in scores if score.top1 >= target), None)


def report(found: dict[str, list[Score]], target: float) -> None:
    """Both times and their ratio."""
    reached = {name: first(scores, target) for name, scores in found.items()}
    print(f"first score of at least {target} %:")
    for name, score in reached.items():
        if score is None:
            best = max(s.top1 for s in found[name])
            last = found[name][-1]
            print(f"  {name:<8} not within {last.processor:.1f} s processor (best {best:.2f} %)")
        else:
            print(f"  {name:<8} {score.processor:8.1f} s processor   {score.wall:8.1f} s wall   "
                  f"{score.images:>9,} images   {score.top1:.2f} %")  # fmt: skip
    plain, fast = reached.get("plain"), reached.get("fast")
    if plain and fast:
        print(f"  ratio    x{plain.processor / fast.processor:.2f} processor"
              f"   x{plain.wall / fast.wall:.2f} wall")  # fmt: skip


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
        defaults = {"target": 40.0, "images": 5_000, "every": 6_400}
    else:
        sides, train, test = (
            TEXTURES,
            "synthetic:textures:train:2000",
            "synthetic:textures:test:500",
        )
        defaults = {"target": 38.0, "images": 500, "every": 640}
        print("made-up textures and a run of seconds: this shows that it works, and proves nothing")
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    found = {}
    for side in args.sides:
        print(f"{side}: {' '.join([*sides[side], *args.words])}")
        found[side] = run([*sides[side], *args.words], args, train, test, plain=side == "plain")
    report(found, args.target)
    if args.out:
        rows = {name: [asdict(score) for score in scores] for name, scores in found.items()}
        args.out.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
