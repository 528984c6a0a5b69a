"""Attention by plain products against float64 and against timm's own; and what is left to timm."""

from __future__ import annotations

import copy

import pytest
import torch
from timm.models.vision_transformer import Attention
from torch import Tensor, nn
from torch.nn import functional as F

from dino_kd.models import plain_attention
from dino_kd.models.backbone import create_backbone
from dino_kd.models.kernels import choose_kernels, kernels_for

TINY = {"depth": 2, "embed_dim": 64, "num_heads": 2}


def reference(qkv: Tensor, heads: int, scale: float) -> Tensor:
    """Head by head and image by image, as the formula is written."""
    images = []
    for tokens in qkv:
        query, key, value = (part.split(part.shape[1] // heads, 1) for part in tokens.chunk(3, 1))
        seen = [
            F.softmax(scale * q @ k.T, -1) @ v for q, k, v in zip(query, key, value, strict=True)
        ]
        images.append(torch.cat(seen, 1))
    return torch.stack(images)


@pytest.mark.parametrize("tokens", [1, 17, 65])  # fewer and more than go through at a time
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)]
)
def test_value_and_gradient_are_the_formulas(tokens, dtype, tolerance) -> None:
    generator = torch.Generator().manual_seed(tokens)
    qkv = torch.randn(3, tokens, 3 * 2 * 8, generator=generator, dtype=torch.float64)
    outer = torch.randn(3, tokens, 2 * 8, generator=generator, dtype=torch.float64)
    qkv, outer = qkv.to(dtype), outer.to(dtype)
    found = []
    for function, inner in (
        (plain_attention.plain_attention, qkv.clone()),
        (reference, qkv.double()),
    ):
        made = function(inner.requires_grad_(), 2, 8**-0.5)
        (gradient,) = torch.autograd.grad(made, inner, outer.to(made.dtype))
        found.append((made.detach(), gradient))
    for mine, exact in zip(*found, strict=True):
        assert mine.dtype == dtype
        torch.testing.assert_close(mine.double(), exact, rtol=tolerance, atol=tolerance)


def test_what_is_given_stays_and_nothing_is_kept_without_gradients() -> None:
    qkv = torch.randn(2, 5, 48, requires_grad=True)
    before = qkv.detach().clone()
    with torch.no_grad():
        assert not plain_attention.plain_attention(qkv, 2, 0.5).requires_grad
    assert plain_attention.plain_attention(qkv, 2, 0.5).requires_grad
    assert torch.equal(qkv, before), "the scale went into the caller's tensor"


def module(**options: object) -> Attention:
    torch.manual_seed(0)
    return Attention(64, num_heads=2, qkv_bias=True, **options).train()  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "options",
    [{}, {"qk_norm": True, "norm_layer": nn.LayerNorm},
     {"scale_norm": True, "norm_layer": nn.LayerNorm}, {"attn_drop": 0.3}, {"proj_drop": 0.3}],
    ids=["plain", "normed queries", "normed output", "dropped scores", "dropped output"],
)  # fmt: skip
@pytest.mark.parametrize("masked", [False, True])
def test_a_module_gives_what_timms_gives(options, masked) -> None:
    """In training, with the same random numbers."""
    theirs = module(**options)
    theirs.fused_attn = False
    mine = copy.deepcopy(theirs)
    mine.__class__ = plain_attention.PlainAttention
    x = torch.randn(3, 9, 64)
    mask = torch.ones(9, 9, dtype=torch.bool).tril() if masked else None
    results = []
    for attention in (mine, theirs):
        torch.manual_seed(1)
        out = attention(x) if mask is None else attention(x, attn_mask=mask)
        out.square().sum().backward()
        results.append((out.detach(), attention.qkv.weight.grad))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", ["attn_drop", "q_norm"])
def test_whoever_listens_inside_is_heard(name: str) -> None:
    mine, heard = module().eval(), []
    mine.fused_attn = False
    mine.__class__ = plain_attention.PlainAttention
    getattr(mine, name).register_forward_hook(lambda *_: heard.append(name))
    mine(torch.randn(2, 9, 64))
    assert heard == [name]


def test_a_traced_network_has_torchs_operators_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    mine = module().eval()
    mine.fused_attn = False
    mine.__class__ = plain_attention.PlainAttention
    x = torch.randn(2, 9, 64)
    expected = mine(x)

    def refuse(*_: object) -> None:
        raise AssertionError("a function of ours would be in the trace")

    monkeypatch.setattr(plain_attention, "plain_attention", refuse)
    for asked in (torch.jit, "is_tracing"), (torch.compiler, "is_compiling"):
        with monkeypatch.context() as during:
            during.setattr(*asked, lambda: True)
            torch.testing.assert_close(mine(x), expected)


def test_it_is_taken_for_bf16_on_a_cpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    plain = plain_attention.plain_attention
    monkeypatch.setattr(
        plain_attention, "plain_attention", lambda *inputs: calls.append(1) or plain(*inputs)
    )
    backbone = create_backbone("vit_tiny_patch16_224", img_size=32, args=TINY)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        before = backbone(x)
        for device, dtype, expected in (
            ("cpu", torch.float32, 0), ("cuda", torch.bfloat16, 0), ("cpu", torch.bfloat16, 1),
        ):  # fmt: skip
            choose_kernels(backbone, device, dtype)
            torch.testing.assert_close(backbone(x), before)
            assert len(calls) == expected, "the last block computes the class token alone"
        with kernels_for(backbone, "cpu", torch.float32):
            assert {type(b.attn) for b in backbone.net.blocks} == {Attention}
        assert {type(b.attn) for b in backbone.net.blocks} == {plain_attention.PlainAttention}
        assert set(backbone.state_dict()) == set(create_backbone(
            "vit_tiny_patch16_224", img_size=32, args=TINY).state_dict())  # fmt: skip


@pytest.mark.parametrize("shape", [(6, 17, 64, 17), (2, 65, 64, 65), (1, 1, 4, 3)])
def test_a_scaled_product_reads_nothing_of_where_it_goes(shape):
    batch, rows, inner, columns = shape
    left = torch.randn(batch, rows, inner).bfloat16()
    right = torch.randn(batch, columns, inner).bfloat16().transpose(1, 2)
    out = torch.full((batch, rows, columns), float("nan"), dtype=torch.bfloat16)
    exact = 0.3 * (left.double() @ right.double())
    assert plain_attention._multiply(left, right, 0.3, out) is out
    torch.testing.assert_close(out.double(), exact, rtol=2**-8, atol=2**-8)
