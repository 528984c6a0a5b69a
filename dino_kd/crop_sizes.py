"""The crops of a run: from settings to plain values, sizes that the network takes at every step."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from dino_kd.data.curriculum import Curriculum, make_curriculum
from dino_kd.data.multicrop import CropPolicy
from dino_kd.errors import ConfigError
from dino_kd.models.backbone import Backbone
from dino_kd.schema import CurriculumSettings, PretrainConfig

_CNN_GRID = 8  # pixels; CNNs pad where a stride does not divide, so this is for round numbers


def crop_policy(settings: PretrainConfig) -> CropPolicy:
    """The augmentation settings as plain values."""
    values = settings.crops.model_dump(exclude={"preset"})
    for name in ("global_size", "local_size"):
        values[name] = as_height_width(values[name])
    return CropPolicy(**values)


def crop_curriculum(
    settings: CurriculumSettings,
    policy: CropPolicy,
    backbone: Backbone,
    *,
    steps: int,
    total_steps: int,
) -> Curriculum:
    """What crops are drawn from at every step; at scale 1 always `policy`.

    `steps` is ``settings.length`` on this run of `total_steps`.

    Raises:
        ConfigError: a curriculum without effect, one that never reaches full size, more stages
            than steps, or a size that the network does not take.
    """
    if settings.scale == 1:
        return Curriculum(((0, policy),))
    if not 0 < steps < total_steps:
        verdict = "no step has smaller crops" if steps <= 0 else "no step has crops of full size"
        raise ConfigError(
            f"curriculum.length: {settings.length!r} is {steps:,} steps of a run of "
            f"{total_steps:,}: {verdict}; use a share such as '80%', or curriculum.scale=1"
        )
    if settings.stages > steps:
        raise ConfigError(
            f"curriculum.stages: {settings.stages} stages do not fit into {steps} steps; use "
            f"fewer stages or a longer curriculum.length"
        )
    grid = backbone.patch_size or _CNN_GRID
    curriculum = make_curriculum(
        policy, scale=settings.scale, num_stages=settings.stages, steps=steps, grid=grid
    )
    if len(curriculum.stages) == 1:
        raise ConfigError(
            f"curriculum.scale: {settings.scale} of {describe_sizes(policy)} rounds to full size "
            f"on a grid of {grid} px, so that nothing changes; use a smaller scale, or 1 for none"
        )
    _check_sizes(curriculum, backbone)
    return curriculum


def _check_sizes(curriculum: Curriculum, backbone: Backbone) -> None:
    for _, policy in curriculum.stages[:-1]:
        sizes = [policy.global_size] + [policy.local_size] * (policy.num_local_crops > 0)
        for height, width in sizes:
            reason = refusal(backbone, height, width)
            if reason:
                raise ConfigError(
                    f"curriculum.scale: {backbone.name} does not take {height} x {width} px beside "
                    f"{backbone.img_size[0]} x {backbone.img_size[1]} ({reason}); set it to 1, or "
                    "choose another network"
                )


def check_crop_sizes(settings: PretrainConfig, backbone: Backbone) -> None:
    """Both crop sizes must be whole patches."""
    patch = backbone.patch_size or 1
    names = ["global_size"] + (["local_size"] if settings.crops.num_local_crops else [])
    problems = []
    for name in names:
        for side in as_height_width(getattr(settings.crops, name)):
            if side % patch:
                below, above = side // patch * patch, (side // patch + 1) * patch
                near = " or ".join(str(s) for s in (below, above) if s)
                problems.append(
                    f"crops.{name}: {side} px is not a multiple of the {patch} px patch of "
                    f"{settings.model.backbone}; use {near}"
                )
    if problems:
        raise ConfigError(dict.fromkeys(problems))


def check_local_crops(settings: PretrainConfig, backbone: Backbone) -> None:
    """Networks of a fixed input size cannot take smaller local crops: better known now."""
    height, width = as_height_width(settings.crops.local_size)
    if not settings.crops.num_local_crops:
        return
    reason = refusal(backbone, height, width)
    if reason:
        raise ConfigError(
            f"crops.local_size: {settings.model.backbone} does not take {height} x {width} px "
            f"beside {backbone.img_size[0]} x {backbone.img_size[1]} ({reason}); set local_size to "
            "global_size, or num_local_crops=0"
        )


def refusal(backbone: Backbone, height: int, width: int) -> str:
    """Why the network cannot take images of this size, in its own words; empty if it can."""
    if (height, width) == backbone.img_size:
        return ""
    was_training = backbone.training
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            device = next(backbone.parameters()).device
            backbone.eval()(torch.zeros(1, backbone.in_chans, height, width, device=device))
    except (RuntimeError, ValueError, AssertionError) as error:
        return str(error)
    finally:
        backbone.train(was_training)
    return ""


def as_height_width(size: int | tuple[int, int]) -> tuple[int, int]:
    """One side or (height, width) as (height, width)."""
    return (size, size) if isinstance(size, int) else size


def describe_curriculum(curriculum: Curriculum) -> str:
    """One sentence for the log."""
    parts = [describe_sizes(curriculum.stages[0][1])]
    parts += [f"{describe_sizes(policy)} from step {first + 1:,}" for first, policy in
              curriculum.stages[1:]]  # fmt: skip
    return "crops: " + ", ".join(parts)


def describe_sizes(policy: CropPolicy) -> str:
    """The sizes of the crops, height x width where they are not squares."""
    sizes = [policy.global_size] + [policy.local_size] * (policy.num_local_crops > 0)
    shown = [str(h) if h == w else f"{h} x {w}" for h, w in sizes]
    return f"{' and '.join(shown)} px"


def size_changes(
    curriculum: Curriculum, say: Callable[[str], None]
) -> Callable[[int, nn.Module, dict[str, float]], dict[str, float]]:
    """A hook that says when the next step has crops of another size."""
    changes = dict(curriculum.stages[1:])

    def hook(done: int, task: nn.Module, row: dict[str, float]) -> dict[str, float]:
        if done in changes:
            say(f"step {done}: crops have {describe_sizes(changes[done])} from now on")
        return {}

    return hook
