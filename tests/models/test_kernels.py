"""Which attention a network uses; its linear layers are tested in test_products."""

from __future__ import annotations

import pytest
import torch
from timm.layers import Mlp

from dino_kd import products
from dino_kd.models import cls_only
from dino_kd.models.backbone import create_backbone
from dino_kd.models.fused_mlp import FusedMlp
from dino_kd.models.kernels import choose_kernels, kernels_for

TINY = {"depth": 2, "embed_dim": 64, "num_heads": 2}


@pytest.mark.parametrize(
    ("device", "dtype", "fused"),
    [
        ("cpu", torch.bfloat16, False),
        ("cpu", torch.float32, True),
        ("cuda", torch.bfloat16, True),
    ],
)
def test_only_bf16_on_cpu_uses_plain_attention(device, dtype, fused):
    backbone = create_backbone("vit_tiny_patch16_224", img_size=32, args=TINY).eval()
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        before = backbone(x)
        choose_kernels(backbone, device, dtype)
        assert {block.attn.fused_attn for block in backbone.net.blocks} == {fused}
        torch.testing.assert_close(backbone(x), before)


@pytest.mark.parametrize(
    ("device", "dtype", "fused"),
    [("cpu", torch.bfloat16, True), ("cpu", torch.float32, False), ("cuda", torch.bfloat16, False)],
)
def test_gelu_is_within_the_product_for_bf16_on_a_cpu_alone(monkeypatch, device, dtype, fused):
    monkeypatch.setattr(products, "is_faster", lambda dtype: True)
    backbone = create_backbone("vit_tiny_patch16_224", img_size=32, args=TINY)
    blocks = backbone.net.blocks
    with kernels_for(backbone, device, dtype):
        assert {type(block.mlp) for block in blocks} == {FusedMlp if fused else Mlp}
        assert cls_only.fits(backbone.net), "the last block still computes the class token alone"
    assert {type(block.mlp) for block in blocks} == {Mlp}
