"""52 linear heads at once against one forward pass over the images, and against the usual ways.

python benchmarks/linear.py
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import nn

from dino_kd.linear import LinearGrid
from dino_kd.pretrained import load_backbone

IMAGES = 2_000  # every time below grows in proportion; ratios do not
CLASSES, BATCH, EPOCHS, RATES = 10, 1000, 100, 26
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


def main() -> None:
    """ResNet-10-T at 48 px: last stage (512 columns) and last four (960), 26 rates each."""
    torch.manual_seed(0)
    backbone = load_backbone(NETWORK, img_size=SIDE)
    parts = ["block-4", "block-3", "block-2", "output"]
    images = torch.randint(0, 256, (IMAGES, 3, SIDE, SIDE), dtype=torch.uint8)
    labels = torch.randint(0, CLASSES, (IMAGES,))
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
        singles.append(sum(seconds(lambda x=x: epoch_of_one_head(x, labels)) for x in one) * RATES)
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
