"""What the hardware computes natively: asked by whoever chooses between fp32, bf16 and float64."""

from __future__ import annotations

import contextlib
from pathlib import Path

import torch


def has_bf16(device: torch.device) -> bool:
    """Whether bf16 matrix products are native there, and so faster than float32 ones."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and cpu_has_bf16()


def widest(values: torch.Tensor) -> torch.Tensor:
    """`values` in float64, or in float32 on Apple's MPS, which has none."""
    return values.float() if values.device.type == "mps" else values.double()


def cpu_has_bf16() -> bool:
    """Whether this CPU has bf16 dot products (AVX512-BF16 or AMX); False where nobody tells."""
    about = _cpuinfo()
    return "avx512_bf16" in about or "amx_bf16" in about


def cpu_is_intel() -> bool:
    """Whether Intel made this CPU; True where nobody tells."""
    about = _cpuinfo()
    return not about or "GenuineIntel" in about


def _cpuinfo() -> str:
    """What Linux tells about the processor; "" elsewhere."""
    with contextlib.suppress(OSError):
        return Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    return ""
