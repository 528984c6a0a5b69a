"""Which attention a network uses; its linear layers are tested in test_products."""

from __future__ import annotations

import pytest
import torch

from dino_kd.models.backbone import create_backbone
from dino_kd.models.kernels import choose_kernels

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
