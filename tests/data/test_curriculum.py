"""Sizes step by step against hand-written lists; the crops themselves stay the same crops."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from dino_kd.data.curriculum import make_curriculum
from dino_kd.data.loader import crop_batches
from dino_kd.data.multicrop import CropPolicy, crop_rng, sample_crops

FULL = CropPolicy(global_size=(32, 32), local_size=(16, 16), num_local_crops=2)


class Memory:
    """Twelve images of noise."""

    spec, labels, class_names = "memory", None, None

    def __init__(self) -> None:
        self.images = np.random.default_rng(0).integers(0, 256, (12, 20, 24, 3), dtype=np.uint8)

    def __len__(self) -> int:
        return len(self.images)

    def read(self, index: int) -> np.ndarray:
        return self.images[index]

    def path(self, index: int) -> str:
        return f"memory[{index}]"


def sizes(policy: CropPolicy, **options: float) -> list[tuple[int, int]]:
    """(global height, local height) of ten steps."""
    curriculum = make_curriculum(policy, **options)  # type: ignore[arg-type]
    return [(curriculum(s).global_size[0], curriculum(s).local_size[0]) for s in range(10)]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"scale": 0.5, "num_stages": 1, "steps": 8, "grid": 4}, [(16, 8)] * 8 + [(32, 16)] * 2),
        # 0.5, 0.75: 24 and 12
        (
            {"scale": 0.5, "num_stages": 2, "steps": 8, "grid": 4},
            [(16, 8)] * 4 + [(24, 12)] * 4 + [(32, 16)] * 2,
        ),
        # 0.6 x 32 = 19.2 and 0.6 x 16 = 9.6, to the grid of 8: 16 and 8
        ({"scale": 0.6, "num_stages": 1, "steps": 3, "grid": 8}, [(16, 8)] * 3 + [(32, 16)] * 7),
        # never less than one patch; steps split as 0, round(7 / 3), round(14 / 3)
        (
            {"scale": 0.1, "num_stages": 3, "steps": 7, "grid": 16},
            [(16, 16)] * 5 + [(16, 16)] * 2 + [(32, 16)] * 3,
        ),
        ({"scale": 1, "num_stages": 1, "steps": 8, "grid": 4}, [(32, 16)] * 10),
    ],
)
def test_sizes_follow_the_step_alone(
    options: dict[str, float], expected: list[tuple[int, int]]
) -> None:
    assert sizes(FULL, **options) == expected


def test_oblong_and_odd_sizes_keep_the_full_ones_at_the_end() -> None:
    """A CNN's sizes need not lie on the grid: the last stage is the policy itself."""
    odd = replace(FULL, global_size=(50, 34), local_size=(21, 9))
    curriculum = make_curriculum(odd, scale=0.5, num_stages=1, steps=1, grid=8)
    assert curriculum(0).global_size == (24, 16)  # 25 and 17 on a grid of 8
    assert curriculum(0).local_size == (8, 8)  # 10.5; 4.5 is less than the grid
    assert curriculum(1) is odd


def test_a_crop_keeps_its_numbers_and_its_blur_its_share() -> None:
    curriculum = make_curriculum(FULL, scale=0.5, num_stages=1, steps=1, grid=4)
    small, full = (sample_crops(curriculum(s), 20, 24, crop_rng(0, 0, 3)) for s in (0, 1))
    assert len(small) == 4
    for a, b in zip(small, full, strict=True):
        assert [2 * side for side in a.size] == list(b.size)
        assert 2 * a.blur_sigma == pytest.approx(b.blur_sigma)
        assert replace(a, size=b.size, blur_sigma=b.blur_sigma) == b
    assert any(crop.blur_sigma > 0 for crop in full)


@pytest.mark.parametrize(
    ("workers", "kind"),
    [(0, "auto"), (3, "threads"), pytest.param(2, "processes", marks=pytest.mark.dist)],
)
@pytest.mark.parametrize("start", [0, 2, 3, 4])
def test_batches_change_size_at_their_step_wherever_a_run_begins(
    start: int, workers: int, kind: str
) -> None:
    """Against two streams of one size each, joined by hand."""
    curriculum = make_curriculum(FULL, scale=0.5, num_stages=1, steps=3, grid=4)
    options = {"batch_size": 4, "seed": 1, "total_steps": 6}
    mixed = crop_batches(
        Memory(), curriculum, start_step=start, num_workers=workers, workers=kind, **options
    )
    small = list(crop_batches(Memory(), curriculum(0), start_step=0, **options))
    full = list(crop_batches(Memory(), FULL, start_step=0, **options))
    for made, expected in zip(mixed, (small[:3] + full[3:])[start:], strict=True):
        assert torch.equal(made.indices, expected.indices)
        assert torch.equal(made.crops.global_crops, expected.crops.global_crops)
        assert torch.equal(made.crops.local_crops, expected.crops.local_crops)


def test_ranks_share_the_smaller_batch() -> None:
    curriculum = make_curriculum(FULL, scale=0.5, num_stages=1, steps=1, grid=4)
    options = {"batch_size": 4, "seed": 1, "start_step": 0, "total_steps": 2}
    whole = crop_batches(Memory(), curriculum, **options)
    parts = [crop_batches(Memory(), curriculum, rank=r, world_size=2, **options) for r in (0, 1)]
    for batch, first, second in zip(whole, *parts, strict=True):
        together = torch.cat([first.crops.global_crops, second.crops.global_crops], 1)
        assert torch.equal(batch.crops.global_crops, together)
