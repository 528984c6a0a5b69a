"""Linear probes on kept features against the usual ways: a forward pass in every epoch of each.

python benchmarks/linear.py

First a sweep of 8 learning rates for 100 epochs over 20,000 images, as the original evaluator
would do it: one run for each rate, each passing all images through the frozen backbone in each
epoch. Nobody waits for that here: one pass and one epoch are measured on 2,000 images, and what
is multiplied from them is marked "extrapolated". Then the 52 heads of `dino-kd linear`.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

from dino_kd.features import evaluation_mode
from dino_kd.hardware import cpu_has_bf16
from dino_kd.linear import LinearGrid
from dino_kd.models.backbone import Backbone
from dino_kd.pretrained import load_backbone

IMAGES = 2_000  # every time below grows in proportion; ratios do not
CLASSES, BATCH, EPOCHS, RATES = 10, 1000, 100, 26
SWEEP_RATES, SWEEP_IMAGES = 8, 20_000
NETWORK, SIDE = "random:resnet10t", 48


def seconds(work: Callable[[], object]) -> float:
    """CPU seconds of all threads: busy neighbours bent the wall clock from 2.2 to 3.2 passes."""
    started = time.process_time()
    work()
    return time.process_time() - started


def epoch_of_grid(grid: LinearGrid, features: torch.Tensor, labels: torch.Tensor) -> None:
    """All heads, as `dino-kd linear` steps."""
    for rows in torch.randperm(len(features)).split(BATCH):
        grid.step(features[rows], labels[rows], len(rows), 0.5)


def epoch_of_one_head(features: torch.Tensor, labels: torch.Tensor) -> None:
    """One head, by autograd and torch.optim.SGD."""
    head = nn.Linear(features.shape[1], CLASSES)
    optimiser = torch.optim.SGD(head.parameters(), lr=0.1, momentum=0.9)
    for rows in torch.randperm(len(features)).split(BATCH):
        optimiser.zero_grad()
        nn.functional.cross_entropy(head(features[rows]), labels[rows]).backward()
        optimiser.step()


def median_seconds(rivals: dict[str, Callable[[], object]], rounds: int = 5) -> dict[str, float]:
    """CPU seconds of each, in turn, so that a drifting machine drifts for all."""
    spent: dict[str, list[float]] = {name: [] for name in rivals}
    for work in rivals.values():
        work()  # warm-up
    for _ in range(rounds):
        for name, work in rivals.items():
            spent[name].append(seconds(work))
    return {name: statistics.median(values) for name, values in spent.items()}


def sweep(backbone: Backbone, images: torch.Tensor, labels: torch.Tensor) -> None:
    """8 rates, 100 epochs, 20,000 images: what both ways cost."""

    @torch.no_grad()
    def forward(precision: str) -> torch.Tensor:
        device = torch.device("cpu")
        with (
            evaluation_mode(backbone, device, precision),
            torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"),
        ):
            parts = [backbone(backbone.preprocess(batch)).float() for batch in images.split(256)]
        return torch.cat(parts)

    # heads on as many rows as the sweep has: they are cheap enough to be measured whole
    copies = SWEEP_IMAGES // IMAGES
    features, truth = forward("fp32").repeat(copies, 1), labels.repeat(copies)
    grid = LinearGrid({"last1": slice(0, features.shape[1])}, CLASSES, [0.1] * SWEEP_RATES)
    rivals: dict[str, Callable[[], object]] = {
        "pass in fp32": lambda: forward("fp32"),
        "epoch of all heads": lambda: epoch_of_grid(grid, features, truth),
        "epoch of one head": lambda: epoch_of_one_head(features, truth),
    }
    if cpu_has_bf16():
        rivals["pass in bf16"] = lambda: forward("bf16")
    spent = median_seconds(rivals)
    one_pass, heads = copies * spent["pass in fp32"], EPOCHS * spent["epoch of all heads"]
    reference = SWEEP_RATES * EPOCHS * (one_pass + spent["epoch of one head"])
    print(
        f"{SWEEP_RATES} learning rates, {EPOCHS} epochs, {SWEEP_IMAGES:,} images, "
        f"{backbone.name} at {SIDE} px, no decoding; {torch.get_num_threads()} threads; CPU time"
    )
    rows = {
        f"{SWEEP_RATES * EPOCHS} passes, one head after the other (extrapolated)": reference,
        "features once in fp32, all heads at once": one_pass + heads,
    }
    if "pass in bf16" in spent:
        rows["features once in bf16, all heads at once"] = copies * spent["pass in bf16"] + heads
    for name, value in rows.items():
        print(f"  {name:<58} {value:10.1f} s   x{reference / value:6.1f}")
    print(f"  (one pass {one_pass:.1f} s, {EPOCHS} epochs of all heads {heads:.1f} s)")


def main() -> None:
    """ResNet-10-T at 48 px: last stage (512 columns) and last four (960), 26 rates each."""
    torch.manual_seed(0)
    backbone = load_backbone(NETWORK, img_size=SIDE)
    parts = ["block-4", "block-3", "block-2", "output"]
    images = torch.randint(0, 256, (IMAGES, 3, SIDE, SIDE), dtype=torch.uint8)
    labels = torch.randint(0, CLASSES, (IMAGES,))
    sweep(backbone, images, labels)
    made: list[torch.Tensor] = []

    @torch.no_grad()
    def forward() -> None:
        made.clear()
        for batch in images.split(256):
            found = backbone.parts(backbone.preprocess(batch), parts)
            made.append(torch.cat([found[name] for name in parts], dim=1))

    forward()  # warm-up
    features = torch.cat(made)
    width, last = features.shape[1], made[0].shape[1] - backbone.embed_dim
    columns = {"last1": slice(last, width), "last4": slice(0, width)}
    grid = LinearGrid(columns, CLASSES, [0.1] * RATES)
    epoch_of_grid(grid, features, labels)  # warm-up
    epoch_of_one_head(features, labels)

    passes, grids, singles = [], [], []
    for _ in range(5):  # interleaved: machines drift
        passes.append(seconds(forward))
        epochs = [seconds(lambda: epoch_of_grid(grid, features, labels)) for _ in range(20)]
        grids.append(sum(epochs) / len(epochs))
        one = [features[:, part].contiguous() for part in columns.values()]
        singles.append(
            sum(seconds(functools.partial(epoch_of_one_head, x, labels)) for x in one) * RATES
        )
    one_pass, all_heads, in_turn = (sorted(t)[2] for t in (passes, grids, singles))
    heads = RATES * len(columns)
    print(
        f"{heads} heads, {EPOCHS} epochs, {IMAGES:,} images, {backbone.name} at {SIDE} px; "
        f"{torch.get_num_threads()} threads; CPU time, medians of 5"
    )
    rows = {
        "one forward pass (no decoding)": one_pass,
        f"{heads} heads at once, kept features": EPOCHS * all_heads,
        f"{heads} heads one after the other, kept features": EPOCHS * in_turn,
        f"{heads} heads at once, a forward pass every epoch": EPOCHS * (all_heads + one_pass),
    }
    for name, value in rows.items():
        print(f"  {name:<50} {value:10.1f} s   {value / one_pass:8.2f} forward passes")


if __name__ == "__main__":
    main()
