"""Products by oneDNN against float64: values, gradients, odd layouts; and what goes elsewhere."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from timm.layers import Mlp
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from dino_kd import products
from dino_kd.engine.speed import count_flops
from dino_kd.models.backbone import create_backbone
from dino_kd.models.fused_mlp import FusedMlp
from dino_kd.models.head import DINOHead
from dino_kd.models.kernels import choose_kernels, kernels_for
from dino_kd.products import linear
from dino_kd.tasks.dino import Network

Product = Callable[..., Tensor]
FAST = torch.float32, torch.bfloat16
TINY = {"depth": 2, "embed_dim": 64, "num_heads": 2}


@pytest.fixture
def onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a processor where it is faster; sizes that are too small for it too."""
    if products.OPERATOR is None:
        pytest.skip("this torch has no oneDNN")
    monkeypatch.setattr(products, "is_faster", lambda dtype: dtype in FAST)
    monkeypatch.setattr(products, "_SMALLEST", 0)


@pytest.fixture
def onednn_in_bf16(onednn: None) -> None:
    """Skip where oneDNN has no products in bf16: they need AVX-512 at least."""
    if not products._works(torch.bfloat16):
        pytest.skip("oneDNN has no bf16 on this processor")


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
def test_other_types_are_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Tensor | None) -> Tensor:
        raise AssertionError("went to oneDNN")

    monkeypatch.setattr(products, "_multiply", refuse)
    x, weight, bias = (t.detach() for t in tensors(7, 40))
    assert linear(x, weight, bias).dtype == torch.float64
    single = [t.float() for t in (x, weight, bias)]
    with torch.autocast("cpu", dtype=torch.float16):
        assert linear(*single).dtype == torch.float16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert linear(x, weight, bias).dtype == torch.float64, "autocast leaves float64"
        with pytest.raises(AssertionError, match="went to oneDNN"):
            linear(*single)
    for dtype in FAST:
        with pytest.raises(AssertionError, match="went to oneDNN"):
            linear(*(t.to(dtype) for t in single))
    for wrong in (
        (single[0], single[1].bfloat16()),
        (single[0][:, :-1], single[1]),
        (*(t.bfloat16() for t in single[:2]), single[2]),
    ):
        with pytest.raises(RuntimeError, match=r"dtype|shapes"):  # as torch says it
            linear(*wrong)


@pytest.mark.usefixtures("onednn_in_bf16")
@pytest.mark.parametrize("is_low", [True, False])  # x comes from a layer norm, or from a product
@pytest.mark.parametrize("has_bias", [True, False])
def test_under_autocast_value_and_gradients_are_those_of_bf16(is_low: bool, has_bias: bool) -> None:
    exact = tensors(3, 5, 40)[: 3 if has_bias else 2]
    inputs = [x.detach().float().requires_grad_() for x in exact]
    if is_low:
        inputs[0] = inputs[0].detach().bfloat16().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = with_gradients(linear, inputs)
    assert [t.dtype for t in found] == [torch.bfloat16, *(t.dtype for t in inputs)]
    for mine, reference in zip(found, with_gradients(F.linear, exact), strict=True):
        torch.testing.assert_close(mine.double(), reference, rtol=2e-2, atol=0.1)


@pytest.mark.usefixtures("onednn_in_bf16")
def test_a_parameter_is_turned_into_bf16_once_and_never_kept() -> None:
    x, weight, bias = (t.detach().float() for t in tensors(7, 40))
    weight, bias = nn.Parameter(weight), nn.Parameter(bias)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        alone = linear(x, weight, bias) + linear(2 * x, weight, bias)
        (apart,) = torch.autograd.grad(alone.sum(), weight)
        with conversions() as copies, products.low_copies():
            with torch.no_grad():
                linear(x, weight, bias)
            both = linear(x, weight, bias) + linear(2 * x, weight, bias)
        assert len([c for c in copies if c is weight]) == 2, "without and with a graph"
        assert torch.equal(both, alone)
        (together,) = torch.autograd.grad(both.sum(), weight)
        torch.testing.assert_close(together, apart, rtol=1e-2, atol=0.1)
        with torch.no_grad():
            weight.mul_(2)
        with products.low_copies():
            torch.testing.assert_close(linear(x, weight), 2 * F.linear(x, weight / 2))


@pytest.mark.usefixtures("onednn_in_bf16")
def test_global_and_local_crops_share_the_copies_of_a_pass() -> None:
    backbone = create_backbone("vit_tiny_patch16_224", img_size=32, patch_size=8, args=TINY)
    choose_kernels(backbone, "cpu", torch.bfloat16)
    network = Network(backbone, DINOHead(64, 16, hidden_dim=32, bottleneck_dim=8))
    groups = [torch.zeros(2, 2, 3, side, side, dtype=torch.uint8) for side in (32, 16)]
    with conversions() as copies, torch.autocast("cpu", dtype=torch.bfloat16):
        network.features(groups)
    weight = backbone.net.blocks[0].mlp.fc1.weight
    assert len([found for found in copies if found is weight]) == 1


@contextlib.contextmanager
def conversions() -> Iterator[list[object]]:
    """The tensors that are turned into another type."""
    found: list[object] = []

    class Watch(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            if function is torch.Tensor.to:
                found.append(args[0])
            return function(*args, **(kwargs or {}))

    with Watch():
        yield found


@pytest.mark.usefixtures("onednn_in_bf16")
def test_gelu_within_the_product_is_gelu_after_it() -> None:
    exact = [t.detach() for t in tensors(9, 40)]
    low = [t.bfloat16() for t in exact]
    with torch.no_grad():
        found = products.linear_gelu(*low)
        assert found is not None
        torch.testing.assert_close(found.double(), F.gelu(F.linear(*exact)), rtol=2e-2, atol=5e-2)
        assert products.linear_gelu(*(t.float() for t in exact)) is None
    assert products.linear_gelu(*low) is None, "with gradients"


@pytest.mark.usefixtures("onednn_in_bf16")
@pytest.mark.parametrize(
    ("change", "fused"),
    [(None, True), ("train", False), ("tanh", False), ("relu", False), ("hook", False)],
)
def test_an_mlp_gives_what_timms_gives(
    monkeypatch: pytest.MonkeyPatch, change: str | None, fused: bool
) -> None:
    torch.manual_seed(0)
    theirs = Mlp(40, 160, drop=0.5).eval()
    if change == "train":
        theirs.train()
    elif change in ("tanh", "relu"):
        theirs.act = nn.GELU("tanh") if change == "tanh" else nn.ReLU()
    mine = copy.deepcopy(theirs)
    mine.__class__ = FusedMlp
    heard: list[int] = []
    if change == "hook":
        mine.fc1.register_forward_hook(lambda *_: heard.append(1))
    calls: list[str] = []
    multiply = products._multiply
    monkeypatch.setattr(
        products, "_multiply", lambda *inputs: (calls.extend(inputs[3:]), multiply(*inputs))[1]
    )
    x = torch.randn(5, 7, 40)
    results = []
    for mlp in (mine, theirs):
        torch.manual_seed(1)
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            results.append(mlp(x))
    torch.testing.assert_close(*results, rtol=3e-2, atol=1e-2)
    assert ("gelu" in calls) == fused
    assert bool(heard) == (change == "hook")


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
    monkeypatch.setattr(products, "cpu_has_bf16", lambda: True)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    decide = products.is_faster.__wrapped__
    assert decide(torch.float32) == decide(torch.bfloat16) == works
    assert not decide(torch.float16)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert not decide(torch.float32)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(products, "cpu_is_intel", lambda: True)
    assert not decide(torch.float32)
    assert decide(torch.bfloat16) == works, "the bias is within on any processor"
    monkeypatch.setattr(products, "cpu_has_bf16", lambda: False)
    assert not decide(torch.bfloat16)


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
        with kernels_for(backbone, "cuda", torch.bfloat16):
            assert type(layer) is nn.Linear
        assert type(layer) is products.Linear
    assert not any(isinstance(module, products.Linear) for module in backbone.modules())


@pytest.mark.usefixtures("onednn")
def test_a_copy_of_a_network_uses_its_own_weights() -> None:
    """The teacher is a copy of the student, and an average is copied too."""
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
