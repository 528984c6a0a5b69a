"""Groups by hand, clipping against torch, LARS against its formula."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dino_kd.engine.optim import (
    apply_values,
    clip_gradients,
    drop_frozen_gradients,
    make_optimizer,
    parameter_groups,
    scaled_groups,
)
from dino_kd.errors import ConfigError
from dino_kd.models.backbone import create_backbone
from dino_kd.models.head import DINOHead


def test_no_decay_on_biases_norms_positions_and_tokens():
    backbone = create_backbone(
        "vit_tiny_patch16_224",
        img_size=16,
        patch_size=8,
        args={"depth": 1, "embed_dim": 24, "num_heads": 2},
    )
    head = DINOHead(24, 8, hidden_dim=16, bottleneck_dim=4, num_layers=2)
    module = nn.ModuleDict({"backbone": backbone, "head": head})
    groups = parameter_groups(module, head.prototype_parameters())
    names = {id(p): n for n, p in module.named_parameters()}
    decayed, plain, last = ([names[id(p)] for p in g["params"]] for g in groups)
    assert len(decayed) + len(plain) + len(last) == len(names)
    assert all(n.endswith("weight") and "norm" not in n for n in decayed)
    assert {"backbone.net.cls_token", "backbone.net.pos_embed"} <= set(plain)
    assert all("head" in n for n in last)
    assert last


def test_values_reach_every_group_and_bare_ones_keep_zero_decay():
    groups = parameter_groups(nn.Linear(3, 2))
    optimizer = make_optimizer("adamw", groups)
    apply_values(optimizer, {"lr": 0.1, "weight_decay": 0.4})
    found = [(g["lr"], g["weight_decay"]) for g in optimizer.param_groups]
    assert found == [(0.1, 0.4), (0.1, 0.0)]


@pytest.mark.parametrize("max_norm", [0.5, 100.0, 0.0])
def test_clipping_equals_torch(max_norm):
    torch.manual_seed(0)
    ours, reference = nn.Linear(5, 4), nn.Linear(5, 4)
    reference.load_state_dict(ours.state_dict())
    x = torch.randn(7, 5)
    for module in (ours, reference):
        module(x).pow(2).sum().backward()
    optimizer = make_optimizer("sgd", parameter_groups(ours))
    norm = clip_gradients(optimizer, max_norm)
    limit = max_norm if max_norm else float("inf")
    expected = nn.utils.clip_grad_norm_(reference.parameters(), limit)
    torch.testing.assert_close(norm, expected)
    torch.testing.assert_close(ours.weight.grad, reference.weight.grad)


def test_frozen_last_layer_does_not_move_and_gathers_no_moments():
    layer, last = nn.Linear(3, 3), nn.Linear(3, 3, bias=False)
    module = nn.ModuleList([layer, last])
    optimizer = make_optimizer("adamw", parameter_groups(module, last.parameters()))
    apply_values(optimizer, {"lr": 0.1, "weight_decay": 0.1})
    before = last.weight.clone()
    last(layer(torch.randn(2, 3))).sum().backward()
    drop_frozen_gradients(optimizer)
    optimizer.step()
    assert torch.equal(last.weight, before)
    assert last.weight not in optimizer.state


def test_lars_first_step_is_the_trust_ratio_times_the_gradient():
    """You et al. 2017: step = lr * eta * |w| / (|g| + wd |w|) * (g + wd w), eta = 0.001."""
    weight = nn.Parameter(torch.tensor([[3.0, 4.0]]))
    group = {"params": [weight], "has_weight_decay": True, "is_last_layer": False}
    optimizer = make_optimizer("lars", [group], momentum=0.0)
    apply_values(optimizer, {"lr": 1.0, "weight_decay": 0.1})
    weight.grad = torch.tensor([[1.0, 0.0]])
    before = weight.detach().clone()
    optimizer.step()
    trust = 0.001 * 5.0 / (1.0 + 0.1 * 5.0)
    expected = before - trust * (torch.tensor([[1.0, 0.0]]) + 0.1 * before)
    torch.testing.assert_close(weight.detach(), expected, rtol=1e-5, atol=1e-6)


def test_unknown_optimiser_gets_a_suggestion():
    with pytest.raises(ConfigError, match=r"unknown optimiser 'adamv'; did you mean 'adamw'"):
        make_optimizer("adamv", [])


def test_a_group_with_a_scale_learns_at_its_share_and_one_without_at_the_full_rate():
    scaled = {
        "params": [nn.Parameter(torch.ones(2, 2))], "lr_scale": 0.25,
        "has_weight_decay": True, "is_last_layer": False,
    }  # fmt: skip
    optimizer = make_optimizer("sgd", [scaled, *parameter_groups(nn.Linear(2, 2, bias=False))])
    apply_values(optimizer, {"lr": 0.1, "weight_decay": 0.4})
    found = [(g["lr"], g["weight_decay"]) for g in optimizer.param_groups]
    assert found == [(0.025, 0.4), (0.1, 0.4)]
    assert "lr_scale" not in optimizer.param_groups[1]


def test_scaled_groups_hold_every_trainable_parameter_once():
    module = nn.ModuleDict({"low": nn.Linear(3, 3), "high": nn.Linear(3, 3)})
    module["low"].bias.requires_grad_(False)
    scales = {"low.weight": 0.5, "low.bias": 0.5, "high.weight": 1.0, "high.bias": 1.0}
    groups = scaled_groups(module, scales)
    found = {
        (group["lr_scale"], group["has_weight_decay"]): group["params"] for group in groups
    }  # fmt: skip
    assert found.keys() == {(0.5, True), (1.0, True), (1.0, False)}
    assert found[0.5, True][0] is module["low"].weight
    assert found[1.0, True][0] is module["high"].weight
    assert found[1.0, False][0] is module["high"].bias
