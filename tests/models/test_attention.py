"""Attention maps against the probabilities of timm's own unfused attention, taken by a hook."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dino_kd.errors import ConfigError, UserError
from dino_kd.models.attention import (
    attention_maps,
    check_cls_attention,
    cls_attention,
    cls_attention_and_tokens,
    threshold_mass,
)
from dino_kd.models.backbone import create_backbone

TINY = {"embed_dim": 32, "depth": 3, "num_heads": 4}
NETWORKS = [
    ("vit_tiny_patch16_224", TINY),
    ("vit_tiny_patch16_224", {**TINY, "qk_norm": True}),
    ("deit_tiny_distilled_patch16_224", TINY),
    ("vit_small_patch14_reg4_dinov2", {**TINY, "patch_size": 16}),
]


def probabilities_by_hook(backbone, x, block):
    """What the dropout on attention probabilities receives when attention is not fused."""
    seen = []
    for b in backbone.net.blocks:
        b.attn.fused_attn = False
    drop = backbone.net.blocks[block].attn.attn_drop
    handle = drop.register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.no_grad():
        backbone(x)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize(("name", "args"), NETWORKS)
@pytest.mark.parametrize("block", [-1, 0, 1])
def test_maps_equal_the_unfused_attention(name, args, block):
    torch.manual_seed(0)
    backbone = create_backbone(name, img_size=(48, 32), args=args).eval()
    x = torch.randn(2, 3, 48, 32)
    found = attention_maps(backbone, x, block)
    tokens = backbone.num_prefix_tokens + 3 * 2
    assert found.shape == (2, 4, tokens, tokens)
    torch.testing.assert_close(found, probabilities_by_hook(backbone, x, block))
    torch.testing.assert_close(found.sum(-1), torch.ones(2, 4, tokens))


@pytest.mark.parametrize(("name", "args"), NETWORKS)
def test_class_token_row_becomes_a_grid_without_prefix_tokens(name, args):
    backbone = create_backbone(name, img_size=(48, 32), args=args).eval()
    x = torch.randn(1, 3, 48, 32)
    found = cls_attention(backbone, x)
    assert found.shape == (1, 4, 3, 2)
    full = attention_maps(backbone, x)
    assert torch.equal(found[0, 1].flatten(), full[0, 1, 0, backbone.num_prefix_tokens :])


@pytest.mark.parametrize(("name", "args"), NETWORKS)
def test_attention_and_tokens_of_one_pass_are_those_of_two(name, args):
    backbone = create_backbone(name, img_size=(48, 32), args=args).eval()
    x = torch.randn(2, 3, 48, 32)
    attention, tokens = cls_attention_and_tokens(backbone, x, 1)
    rows = attention_maps(backbone, x, 1)[:, :, 0, backbone.num_prefix_tokens :]
    torch.testing.assert_close(attention.flatten(2), rows)
    with torch.no_grad():
        torch.testing.assert_close(tokens.patches, backbone.tokens(x).patches)


def test_checking_needs_no_forward_pass():
    backbone = create_backbone("vit_tiny_patch16_224", img_size=32, args=TINY).eval()
    check_cls_attention(backbone, -3)
    with pytest.raises(ConfigError, match=r"block: .* has blocks 0 to 2, got -4"):
        check_cls_attention(backbone, -4)


def test_looking_leaves_no_hook_behind():
    backbone = create_backbone("vit_tiny_patch16_224", img_size=32, args=TINY).eval()
    attention_maps(backbone, torch.randn(1, 3, 32, 32))
    assert not any(m._forward_pre_hooks for m in backbone.modules())


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.6, 1.0])
def test_threshold_keeps_the_fewest_patches_that_hold_the_mass(keep):
    """Against a greedy numpy loop."""
    attention = torch.rand(3, 2, 17, generator=torch.Generator().manual_seed(0))
    found = threshold_mass(attention, keep)
    for row, mask in zip(attention.reshape(-1, 17), found.reshape(-1, 17), strict=True):
        expected, mass = np.zeros(17, dtype=bool), 0.0
        for i in np.argsort(-row.numpy()):
            if mass >= keep * row.sum().item() - 1e-6:
                break
            expected[i] = True
            mass += row[i].item()
        assert mask.tolist() == expected.tolist()


def test_networks_without_attention_are_refused():
    with pytest.raises(UserError, match="resnet18 is no ViT"):
        attention_maps(create_backbone("resnet18", img_size=32).eval(), torch.randn(1, 3, 32, 32))


def test_other_kinds_of_attention_and_blocks_are_refused():
    x = torch.randn(1, 3, 32, 32)
    backbone = create_backbone("vit_tiny_patch16_224", img_size=32, args=TINY).eval()
    with pytest.raises(UserError, match="blocks 0 to 2, got 3"):
        attention_maps(backbone, x, block=3)
    args = {**TINY, "class_token": False, "global_pool": "avg"}
    pooled = create_backbone("vit_tiny_patch16_224", img_size=32, args=args).eval()
    with pytest.raises(UserError, match="no class token"):
        cls_attention(pooled, x)
    rope = create_backbone("eva02_tiny_patch14_224", img_size=28, args={"depth": 1}).eval()
    with pytest.raises(UserError, match="in its own way"):
        attention_maps(rope, torch.randn(1, 3, 28, 28))
