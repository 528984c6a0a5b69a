"""The short last block against the network's own forward pass: features, gradients, exceptions."""

from __future__ import annotations

import pytest
import torch
from timm.layers import RmsNorm
from torch import nn

from dino_kd.models import cls_only
from dino_kd.models.attention import kept_input
from dino_kd.models.backbone import create_backbone
from dino_kd.models.kernels import choose_kernels
from dino_kd.models.taps import taps

SMALL = {"depth": 3, "embed_dim": 24, "num_heads": 2}
VARIANTS = {
    "plain": ("vit_tiny_patch16_224", {}),
    "registers": ("vit_tiny_patch16_224", {"reg_tokens": 4}),
    "layer scale": ("vit_tiny_patch16_224", {"init_values": 0.1}),
    "q and k norm": ("vit_tiny_patch16_224", {"qk_norm": True, "norm_layer": RmsNorm}),
    "normed attention and MLP": (
        "vit_tiny_patch16_224", {"scale_attn_norm": True, "scale_mlp_norm": True},
    ),
    "no bias": ("vit_tiny_patch16_224", {"qkv_bias": False}),
    "distilled": ("deit_tiny_distilled_patch16_224", {}),
}  # fmt: skip
OTHERS = {
    "mean of patches": ("vit_tiny_patch16_224", {"global_pool": "avg", **SMALL}),
    "attention pool": ("vit_tiny_patch16_224", {"global_pool": "map", **SMALL}),
    "late class token": ("cait_xxs24_224", {"depth": 1, "embed_dim": 24, "num_heads": 2}),
    "hierarchical": ("swin_tiny_patch4_window7_224", {"depths": (1, 1), "embed_dim": 24}),
    "CNN": ("resnet18_cifar", {}),
}


def build(name, args, **more):
    torch.manual_seed(0)
    patch = None if name.startswith(("resnet", "swin")) else 8
    side = 32 if patch else 56
    backbone = create_backbone(name, img_size=side, patch_size=patch, args=args, **more)
    for parameter in backbone.parameters():  # biases and scales start at 0 or 1
        nn.init.normal_(parameter, std=0.2)
    return backbone.train()


def small(variant, **more):
    name, args = VARIANTS[variant]
    return build(name, {**SMALL, **args}, **more)


def gradients(backbone, forward, x):
    """Features and every parameter's gradient, with the random numbers of seed 1."""
    torch.manual_seed(1)
    backbone.zero_grad(set_to_none=True)
    made = forward(x)
    weights = torch.randn(made.shape, generator=torch.Generator().manual_seed(2))
    (made * weights).mean().backward()
    return made.detach(), {n: p.grad.clone() for n, p in backbone.named_parameters()}


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("variant", VARIANTS)
def test_features_and_gradients_are_the_whole_networks(variant, fused):
    """With stochastic depth, whose numbers are the same, for both kinds of attention."""
    backbone = small(variant, drop_path=0.5)
    choose_kernels(backbone, "cpu", torch.float32 if fused else torch.bfloat16)
    assert cls_only.fits(backbone.net)
    x = torch.randn(6, 3, 32, 32)
    found, found_gradients = gradients(backbone, backbone, x)
    expected, expected_gradients = gradients(backbone, backbone.net, x)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    for name, gradient in expected_gradients.items():
        error = (found_gradients[name] - gradient).norm()
        assert error <= 1e-5 * gradient.norm() + 1e-9, name


def test_in_float64_the_two_agree_to_the_last_digits():
    backbone = small("plain").double()
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(backbone(x), backbone.net(x), rtol=1e-12, atol=1e-12)


def test_under_bf16_autocast_the_error_is_no_larger_than_the_whole_networks():
    backbone = small("plain")
    x = torch.randn(16, 3, 32, 32)
    exact = backbone.net(x)
    with torch.autocast("cpu", torch.bfloat16):
        short, whole = backbone(x), backbone.net(x)
    assert (short - exact).norm() <= 1.5 * (whole - exact).norm()


def test_activation_checkpointing_gives_the_same_gradients():
    backbone = small("plain", drop_path=0.5)
    x = torch.randn(4, 3, 32, 32)
    expected = gradients(backbone, backbone, x)
    backbone.net.set_grad_checkpointing(True)
    torch.testing.assert_close(gradients(backbone, backbone, x), expected)


@pytest.mark.parametrize("kind", OTHERS)
def test_other_networks_are_left_alone(kind):
    backbone = build(*OTHERS[kind]).eval()
    assert not cls_only.fits(backbone.net)
    x = torch.randn(2, 3, *backbone.img_size)
    assert torch.equal(backbone(x), backbone.net(x))


def test_a_hook_in_the_last_block_sees_all_tokens():
    backbone = small("plain")
    x = torch.randn(2, 3, 32, 32)
    for module in (backbone.net.blocks[-1], backbone.net.blocks[-1].mlp.fc1, backbone.net.norm):
        with kept_input(module) as seen:
            backbone(x)
        assert seen[0].shape[:2] == (2, 17)
    assert cls_only.fits(backbone.net)


def test_tokens_parts_and_taps_still_give_every_patch():
    backbone = small("plain").eval()
    x = torch.randn(2, 3, 32, 32)
    patches = backbone.net.forward_features(x)[:, 1:]
    torch.testing.assert_close(backbone.tokens(x).patches, patches)
    torch.testing.assert_close(backbone.parts(x, ["output", "patches"])["patches"], patches)
    torch.testing.assert_close(taps(backbone, x, ["map"])["map"].flatten(2).mT, patches)


def test_only_the_output_of_parts_takes_the_short_way():
    backbone = small("plain").eval()
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(backbone.parts(x, ["output"])["output"], backbone(x))


@pytest.mark.parametrize("argument", ["attn_drop_rate", "proj_drop_rate"])
def test_dropout_is_drawn_for_every_token_while_training(argument):
    backbone = build("vit_tiny_patch16_224", {**SMALL, argument: 0.1})
    assert not cls_only.fits(backbone.net)
    assert cls_only.fits(backbone.eval().net)


def test_another_kind_of_layer_inside_the_last_block_is_respected():
    backbone = small("plain")

    class LowRank(nn.Linear):
        pass

    backbone.net.blocks[-1].attn.qkv = LowRank(24, 72)
    assert not cls_only.fits(backbone.net)
    backbone = small("plain")
    backbone.net.blocks[-1].attn.adapter = nn.Identity()
    assert not cls_only.fits(backbone.net)


def test_the_last_block_multiplies_for_one_token():
    """The linear layers behind the attention see one row an image."""
    backbone = small("plain")
    rows = []
    inner = backbone.net.blocks[-1].mlp.fc1.forward
    backbone.net.blocks[-1].mlp.fc1.forward = lambda x: (rows.append(x.shape[1]), inner(x))[1]
    backbone(torch.randn(2, 3, 32, 32))
    assert rows == [1]
