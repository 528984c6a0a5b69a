"""Products by oneDNN against float64: values, gradients, odd layouts; and what goes elsewhere."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dino_kd import products
from dino_kd.engine.speed import count_flops
from dino_kd.models.backbone import create_backbone
from dino_kd.models.kernels import choose_kernels, kernels_for
from dino_kd.products import linear

Product = Callable[..., Tensor]
TINY = {"depth": 2, "embed_dim": 64, "num_heads": 2}


@pytest.fixture
def onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a processor where it is faster; sizes that are too small for it too."""
    if products.OPERATOR is None:
        pytest.skip("this torch has no oneDNN")
    monkeypatch.setattr(products, "by_onednn", lambda: True)
    monkeypatch.setattr(products, "_SMALLEST", 0)


def tensors(*shape: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """x ``[..., D]``, weight ``[K, D]``, bias ``[K]``."""
    generator = torch.Generator().manual_seed(0)
    sizes = shape, (48, shape[-1]), (48,)
    return [torch.randn(size, generator=generator, dtype=dtype).requires_grad_() for size in sizes]


def with_gradients(product: Product, inputs: list[Tensor]) -> list[Tensor]:
    """The result, and the gradients of all inputs for a fixed one of it."""
    made = product(*inputs)
    outer = torch.linspace(-1, 1, made.numel(), dtype=made.dtype).view(made.shape)
    return [made.detach(), *torch.autograd.grad(made, inputs, outer)]


@pytest.mark.usefixtures("onednn")
@pytest.mark.parametrize("shape", [(7, 40), (3, 5, 40), (2, 3, 5, 40), (1, 40)])
@pytest.mark.parametrize("has_bias", [True, False])
def test_value_and_gradients_are_those_of_float64(shape: tuple[int, ...], has_bias: bool) -> None:
    exact = tensors(*shape)[: 3 if has_bias else 2]
    found = with_gradients(linear, [x.detach().float().requires_grad_() for x in exact])
    assert found[0].dtype == torch.float32
    for mine, reference in zip(found, with_gradients(F.linear, exact), strict=True):
        assert mine.shape == reference.shape
        torch.testing.assert_close(mine.double(), reference, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("onednn")
def test_any_layout_will_do() -> None:
    x, weight, bias = tensors(6, 4, 40)
    turned = x.transpose(0, 1).detach().requires_grad_(), weight.T.contiguous().T.detach(), bias
    inputs = [t.detach().float() for t in turned]
    torch.testing.assert_close(
        linear(*inputs).double(), F.linear(*turned).detach(), rtol=1e-5, atol=1e-5
    )
    x = turned[0].detach().float().requires_grad_()
    linear(x, inputs[1]).sum().backward()  # an expanded gradient
    torch.testing.assert_close(x.grad, inputs[1].sum(0).expand_as(x), rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("onednn")
def test_what_needs_no_gradient_gets_none() -> None:
    x, weight, bias = (t.detach().float() for t in tensors(7, 40))
    made = linear(x, weight.requires_grad_(), bias)
    made.sum().backward()
    assert weight.grad is not None
    assert x.grad is None
    assert not linear(x, weight.detach(), bias).requires_grad


@pytest.mark.usefixtures("onednn")
def test_other_types_and_autocast_are_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Tensor | None) -> Tensor:
        raise AssertionError("went to oneDNN")

    monkeypatch.setattr(products, "_multiply", refuse)
    x, weight, bias = (t.detach() for t in tensors(7, 40))
    assert linear(x, weight, bias).dtype == torch.float64
    single = [t.float() for t in (x, weight, bias)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert linear(*single).dtype == torch.bfloat16
    with pytest.raises(AssertionError, match="went to oneDNN"):
        linear(*single)


@pytest.mark.parametrize("works", [True, False])
def test_it_is_chosen_where_it_is_faster_and_works(
    monkeypatch: pytest.MonkeyPatch, works: bool
) -> None:
    """On AVX-512 that is not Intel's; unless this torch calls the operator otherwise."""

    def multiply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if works:
            return F.linear(x, weight, bias)
        raise RuntimeError("_linear_pointwise() takes other arguments")

    if products.OPERATOR is None or not torch.backends.mkl.is_available():
        pytest.skip("this torch has no oneDNN, or no MKL")
    monkeypatch.setattr(products, "_multiply", multiply)
    monkeypatch.setattr(products, "cpu_is_intel", lambda: False)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    decide = products.by_onednn.__wrapped__
    assert decide() == works
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert not decide()
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(products, "cpu_is_intel", lambda: True)
    assert not decide()


@pytest.mark.usefixtures("onednn")
def test_a_network_computes_the_same_and_can_be_set_back() -> None:
    backbone = create_backbone("vit_tiny_patch16_224", img_size=32, args=TINY)
    x = torch.randn(3, 3, 32, 32)
    plain = with_gradients(lambda *_: backbone(x), list(backbone.parameters()))
    calls = []

    def counted(*inputs: Tensor | None) -> Tensor:
        calls.append(inputs)
        return F.linear(*inputs)

    with kernels_for(backbone, "cpu", torch.float32):
        found = with_gradients(lambda *_: backbone(x), list(backbone.parameters()))
        for mine, reference in zip(found, plain, strict=True):
            torch.testing.assert_close(mine, reference, rtol=1e-5, atol=1e-5)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(products, "_multiply", counted)
            with torch.no_grad():
                backbone(x)
        assert len(calls) == 7  # four in the first block; of the last, three for one row
        layer = backbone.net.blocks[0].attn.qkv
        assert type(layer) is products.Linear
        with kernels_for(backbone, "cpu", torch.bfloat16):
            assert type(layer) is nn.Linear
        assert type(layer) is products.Linear
    assert not any(isinstance(module, products.Linear) for module in backbone.modules())


@pytest.mark.usefixtures("onednn")
def test_a_copy_of_a_network_uses_its_own_weights() -> None:
    """The teacher is a copy of the student, and an average is copied too."""
    import copy

    backbone = create_backbone("vit_tiny_patch16_224", img_size=32, args=TINY)
    choose_kernels(backbone, "cpu", torch.float32)
    other = copy.deepcopy(backbone)
    x = torch.randn(2, 3, 32, 32)
    before = backbone(x)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0)
    torch.testing.assert_close(backbone(x), before)
    assert (other(x) == 0).all()


@pytest.mark.usefixtures("onednn")
def test_its_work_is_counted() -> None:
    x, weight = (t.detach().float().requires_grad_() for t in tensors(7, 40)[:2])
    forward = 2 * 7 * 40 * 48
    assert count_flops(lambda: linear(x, weight).sum().backward()) == 3 * forward
