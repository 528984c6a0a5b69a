"""Backbones in bf16 throughout, on float32 masters: numerics against float32 and autocast."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dino_kd.data.multicrop import Crops
from dino_kd.engine.loop import FitOptions, Progress, Silence, fit
from dino_kd.engine.optim import make_optimizer, parameter_groups
from dino_kd.engine.schedules import constant
from dino_kd.engine.signals import StopFlag
from dino_kd.errors import ConfigError
from dino_kd.models import compiled_blocks
from dino_kd.models.backbone import create_backbone
from dino_kd.models.compiled_blocks import compile_blocks
from dino_kd.models.head import DINOHead
from dino_kd.models.kernels import choose_kernels
from dino_kd.models.low_weights import check_low_weights, with_low_weights
from dino_kd.tasks.dino import DinoTask

SMALL = {"depth": 4, "embed_dim": 64, "num_heads": 2, "init_values": 0.5}
CPU = torch.device("cpu")


def build(drop_path: float = 0.0):
    torch.manual_seed(0)
    return create_backbone(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, drop_path=drop_path, args=SMALL
    )


def gradients(backbone, forward) -> tuple[Tensor, list[Tensor]]:
    """Features of two sizes of images, and every parameter's gradient."""
    generator = torch.Generator().manual_seed(1)
    groups = [torch.randn(6, 3, side, side, generator=generator) for side in (32, 16)]
    backbone.zero_grad(set_to_none=True)
    features = torch.cat(forward(groups))
    (features.float() * torch.linspace(-1, 1, features.shape[1])).sum(1).square().mean().backward()
    return features.detach().float(), [p.grad for p in backbone.parameters()]


def distance(found: list[Tensor], exact: list[Tensor]) -> float:
    """Relative length of the difference of all together."""
    difference = sum((a - b).square().sum() for a, b in zip(found, exact, strict=True))
    return (difference / sum(b.square().sum() for b in exact)).sqrt().item()


def test_features_and_gradients_are_near_those_of_float32():
    backbone = build()
    choose_kernels(backbone, "cpu", torch.bfloat16)
    exact, exact_gradients = gradients(backbone, lambda groups: [backbone(x) for x in groups])

    def autocast(groups: list[Tensor]) -> list[Tensor]:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return [backbone(x) for x in groups]

    usual, usual_gradients = gradients(backbone, autocast)
    low, low_gradients = gradients(
        backbone, lambda groups: with_low_weights(backbone, groups, torch.bfloat16)
    )
    assert all(g.dtype == torch.float32 for g in low_gradients)
    assert 0 < distance([low], [exact]) < 3 * distance([usual], [exact]) < 0.03
    assert distance(low_gradients, exact_gradients) < 3 * distance(usual_gradients, exact_gradients)
    assert distance(low_gradients, exact_gradients) < 0.05


def test_in_float32_it_is_the_network_itself():
    """Exactly: what differs above is rounding."""
    backbone = build()
    exact, exact_gradients = gradients(backbone, lambda groups: [backbone(x) for x in groups])
    same, same_gradients = gradients(
        backbone, lambda groups: with_low_weights(backbone, groups, torch.float32)
    )
    assert torch.equal(same, exact)
    assert distance(same_gradients, exact_gradients) < 1e-6


def losses(precision: str, low: bool, steps: int = 40) -> tuple[Tensor, DinoTask]:
    """Of a short training on fixed images, as `fit` takes its steps."""
    backbone = build(drop_path=0.1)
    head = DINOHead(backbone.embed_dim, 64, hidden_dim=64, bottleneck_dim=32, num_layers=2)
    task = DinoTask(backbone, head)
    for network in (task.student, task.teacher):
        network.low_dtype = torch.bfloat16 if low else None
    generator = torch.Generator().manual_seed(2)

    def pixels(count: int, side: int) -> Tensor:
        shape = (count, 16, 3, side, side)
        return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)

    found = []

    class Kept(Silence):
        def numbers(self, step: int, values: dict[str, float]) -> None:
            found.append(values["loss"])

    values = {
        "lr": 1e-3, "weight_decay": 0.04, "momentum": 0.95, "teacher_temp": 0.04,
        "freeze_last_layer": 0.0,
    }  # fmt: skip
    fit(
        task,
        iter([Crops(pixels(2, 32), pixels(4, 16)) for _ in range(4)] * (steps // 4)),
        make_optimizer("adamw", parameter_groups(task.student)),
        {name: constant(value) for name, value in values.items()},
        FitOptions(steps, 16, CPU, precision=precision, clip_grad=3.0, log_every=1),
        progress=Progress(),
        scaler=torch.amp.GradScaler("cpu", enabled=False),
        log=Kept(),
        save=lambda progress: None,
        stop=StopFlag(),
    )
    return torch.tensor(found), task


def test_a_training_follows_the_one_in_float32():
    """The whole curve within twice of what autocast's own rounding does to it, or 1 %."""
    exact, usual = losses("fp32", low=False)[0], losses("bf16", low=False)[0]
    low, task = losses("bf16-params", low=True)
    assert exact.std() > 0.2 * exact.mean()  # there is a curve to follow
    off, usually_off = (low - exact).abs().mean(), (usual - exact).abs().mean()
    assert 0 < off < max(2 * usually_off, 0.01 * exact.mean())
    assert {v.dtype for v in task.state_dict().values() if v.is_floating_point()} == {torch.float32}


def test_compiled_blocks_take_new_weights_without_compiling_again(compiled_eagerly):
    counter = compiled_eagerly(compiled_blocks)
    backbone = build()
    compile_blocks(backbone.net)
    x = [torch.randn(2, 3, 32, 32)]
    programs = []
    for _ in range(3):
        features = with_low_weights(backbone, x, torch.bfloat16)[0]
        features.float().sum().backward()
        with torch.no_grad():
            for parameter in backbone.parameters():
                parameter.add_(0.01 * torch.randn_like(parameter))
        programs.append(counter.frame_count)
    assert programs[0] == programs[-1] == 1


def test_what_goes_together_is_let_through():
    check_low_weights(build(drop_path=0.1), checkpointing=False, sharded=False)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("resnet10t", {}, "resnet10t has batch norms"),
        ("vit_relpos_small_patch16_224", {}, "cannot be computed in bf16 throughout"),
        ("vit_tiny_patch16_224", {"checkpointing": True}, "model.checkpoint_activations"),
        ("vit_tiny_patch16_224", {"sharded": True}, "optim.shard"),
    ],
)
def test_what_does_not_go_together_is_said(name, options, words):
    args = SMALL if name == "vit_tiny_patch16_224" else None
    backbone = create_backbone(name, img_size=32, args=args)
    with pytest.raises(ConfigError, match=f"optim.precision: bf16-params.*{words}.*precision=bf16"):
        check_low_weights(backbone, **{"checkpointing": False, "sharded": False, **options})
