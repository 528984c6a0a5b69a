"""Small crops first, full crops last: the same crops at fewer pixels, for less work a step.

A low-resolution curriculum in the manner of progressive resizing (fast.ai's DAWNBench entry, 2018;
FixRes, arXiv 1906.06423; EfficientNetV2, arXiv 2104.00298), for multi-crop pretraining.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from dino_kd.data.multicrop import CropPolicy


@dataclass(frozen=True)
class Curriculum:
    """The policy of every step; a function of the step alone.

    Attributes:
        stages: pairs of the first step of a stage and its policy, in order; the first is step 0.
    """

    stages: tuple[tuple[int, CropPolicy], ...]

    def __call__(self, step: int) -> CropPolicy:
        """What crops of the 0-based `step` are drawn from."""
        return [policy for first, policy in self.stages if first <= step][-1]


def make_curriculum(
    policy: CropPolicy, *, scale: float, num_stages: int, steps: int, grid: int
) -> Curriculum:
    """Sizes that rise from `scale` times the full ones to the full ones at step `steps`.

    Stage i of `num_stages` = n covers the steps from ``round(i * steps / n)`` on, at ``scale + (1 -
    scale) * i / n`` of the full height and width (stage n: the full ones), rounded to multiples of
    `grid` pixels; stages of equal sizes are one. What is drawn for a crop (box, flips, colours)
    stays what it was; the blur, in pixels, shrinks with the height of the global crops, so that
    the same picture comes out, only smaller.

    Args:
        policy: the crops at full size.
        scale: sides of the first stage as a share of the full ones, in (0, 1]; 1 is no curriculum.
        num_stages: stages before the full size, at least 1.
        steps: how many steps have smaller crops.
        grid: pixels; a ViT's patch side.
    """
    stages: list[tuple[int, CropPolicy]] = []
    for number in range(num_stages + 1):
        share = scale + (1 - scale) * number / num_stages
        smaller = _scaled(policy, share, grid)
        if not stages or smaller != stages[-1][1]:
            stages.append((round(number * steps / num_stages), smaller))
    return Curriculum(tuple(stages))


def _scaled(policy: CropPolicy, share: float, grid: int) -> CropPolicy:
    """The policy at `share` of its sizes; at full size exactly itself, whatever the grid."""

    def scaled(side: int) -> int:
        return min(side, max(grid, round(side * share / grid) * grid))

    global_size = scaled(policy.global_size[0]), scaled(policy.global_size[1])
    local_size = scaled(policy.local_size[0]), scaled(policy.local_size[1])
    if share == 1 or (global_size, local_size) == (policy.global_size, policy.local_size):
        return policy
    shrink = global_size[0] / policy.global_size[0]
    low, high = policy.blur_sigma
    return replace(
        policy,
        global_size=global_size,
        local_size=local_size,
        blur_sigma=(low * shrink, high * shrink),
    )
