"""How fast a device can be, how fast a training is, and what holds it up.

FLOPs are those of the matrix products and convolutions of one step, multiply and add counted as
two; the share of the peak is the MFU of Chowdhery et al. (arXiv 2204.02311, appendix B).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from dino_kd import products
from dino_kd.engine.precision import DTYPES
from dino_kd.hardware import has_bf16

# Dense bf16 TFLOP/s with float32 sums, from the vendors' data sheets. The first that fits counts.
_PEAKS = (
    ("B200", 2250.0),
    ("H200", 989.0),
    ("H100 NVL", 835.0),
    ("H100 PCIe", 756.0),
    ("H100", 989.0),
    ("A100", 312.0),
    ("L40S", 362.0),
    ("A10G", 70.0),
    ("RTX 4090", 165.0),
    ("RTX 3090", 71.0),
)
_WAITS = 0.2  # share of the time; loading between the steps (num_workers=0) costs a little of it
_IDLE = 0.2  # below this share of a GPU's peak its time goes to launches and memory


@dataclass(frozen=True)
class Peak:
    """FLOP/s that a device can do at best, and where the number comes from."""

    flops: float
    source: str


def peak_of(device: torch.device, precision: str) -> Peak:
    """The data sheet's bf16 peak of a known GPU, else the best of some large matrix products."""
    if device.type == "cuda" and DTYPES[precision] != torch.float32:
        name = torch.cuda.get_device_name(device)
        for known, tera in _PEAKS:
            if known in name:
                return Peak(tera * 1e12, f"data sheet of {known}, dense bf16")
    size = 8192 if device.type == "cuda" else 2048
    dtype = DTYPES[precision]
    flops = measured_peak(device, dtype, size)
    kind = str(dtype).removeprefix("torch.")
    return Peak(flops, f"measured here: product of two {size} x {size} matrices in {kind}")


def measured_peak(device: torch.device, dtype: torch.dtype, size: int, rounds: int = 5) -> float:
    """FLOP/s of the fastest of some products of two square matrices."""
    left, right = (torch.ones(size, size, dtype=dtype, device=device) for _ in range(2))
    products.linear(left, right)  # warm-up
    best = float("inf")
    for _ in range(rounds):
        _finish(device)
        started = time.perf_counter()
        products.linear(left, right)
        _finish(device)
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def count_flops(work: Callable[[], object]) -> int:
    """FLOPs of everything that `work` computes in this process, forward and backward.

    What torch.compile fuses is run unfused meanwhile, since only single operations can be counted.
    """
    from torch.utils import flop_counter

    aten = torch.ops.aten
    # What torch's own table leaves out: attention on a CPU, and the products of `products`.
    on_cpu: dict[Any, Any] = {
        aten._scaled_dot_product_flash_attention_for_cpu: (
            lambda q, k, v, *_, **__: flop_counter.sdpa_flop_count(q, k, v)
        ),
        aten._scaled_dot_product_flash_attention_for_cpu_backward: (
            lambda grad, q, k, v, *_, **__: flop_counter.sdpa_backward_flop_count(grad, q, k, v)
        ),
        products.OPERATOR: lambda x, weight, *_, **__: 2 * math.prod(x) * weight[0],
    }
    counter = flop_counter.FlopCounterMode(display=False, custom_mapping=on_cpu)
    with torch.compiler.set_stance("force_eager"), counter:
        work()
    return int(counter.get_total_flops())


@dataclass(frozen=True)
class Speed:
    """What was measured; images per second are those of all processes.

    Attributes:
        loader: images/s of the loader alone.
        step: images/s of the optimiser step alone, on batches that are already there.
        together: images/s of both, as a training runs.
        waiting: share of that time in which the step waited for a batch, 0..1.
        mfu: FLOPs of the step alone per second, as a share of the peak.
    """

    loader: float
    step: float
    together: float
    waiting: float
    mfu: float


@dataclass(frozen=True)
class Setup:
    """What a sentence about the speed must know; `loading_advice` makes images come faster."""

    device: torch.device
    precision: str
    loading_advice: str


def show_rate(rate: float) -> str:
    """Images per second for people: 9.87, 123.4, 21,170."""
    return f"{rate:,.0f}" if rate >= 1000 else f"{rate:.4g}"


def bottleneck(speed: Speed, setup: Setup) -> tuple[str, str]:
    """("loader", "step" or "cores", one sentence that says why and what to change).

    Loader or step: whichever is slower alone. Cores: alone the loader would be fast enough, but
    beside the step it is not, since both compute on the same cores.
    """
    numbers = (
        f"alone the loader makes {show_rate(speed.loader)} images/s and the step "
        f"{show_rate(speed.step)}"
    )
    waiting = f"the step waits {100 * speed.waiting:.0f} % of the time"
    if speed.loader < speed.step:
        return "loader", (
            f"The loader is the bottleneck: {numbers}, so that {waiting}; {setup.loading_advice}."
        )
    if speed.waiting > _WAITS:
        return "cores", (
            f"Loader and step take cores from each other: {numbers}, but together "
            f"{show_rate(speed.together)}, and {waiting}; {setup.loading_advice}."
        )
    return "step", (
        f"The step is the bottleneck: {numbers} ({show_rate(speed.together)} together); "
        f"{_step_advice(speed, setup)}."
    )


def _step_advice(speed: Speed, setup: Setup) -> str:
    if setup.precision == "fp32" and has_bf16(setup.device):
        return "this hardware multiplies bf16 faster: optim.precision=auto"
    if setup.device.type == "cuda" and speed.mfu < _IDLE:
        return (
            f"at {100 * speed.mfu:.0f} % of the peak a larger optim.batch_size per GPU would fill "
            "it better"
        )
    return (
        "a smaller model.backbone, fewer or smaller crops, or more devices (torchrun) make it "
        "shorter; faster files would not"
    )
