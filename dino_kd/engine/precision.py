"""Which arithmetic a run uses, and where bf16 is worth having."""

from __future__ import annotations

import contextlib
from pathlib import Path

import torch

from dino_kd.errors import ConfigError

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def choose_precision(wanted: str, device: torch.device) -> str:
    """Resolve "auto" to "bf16" where the hardware multiplies it natively, else "fp32".

    Raises ConfigError for fp16 away from CUDA, where nothing speeds it up.
    """
    if wanted == "fp16" and device.type != "cuda":
        raise ConfigError(
            f"optim.precision: fp16 needs a CUDA device, this run uses {device.type}; "
            "use bf16, fp32 or auto"
        )
    if wanted != "auto":
        return wanted
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp32"
    return "bf16" if device.type == "cpu" and cpu_has_bf16() else "fp32"


def cpu_has_bf16() -> bool:
    """Whether this CPU has bf16 dot products (AVX512-BF16 or AMX); read from /proc/cpuinfo."""
    with contextlib.suppress(OSError):
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
        return "avx512_bf16" in flags or "amx_bf16" in flags
    return False


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """The autocast context of a forward pass."""
    return torch.autocast(device.type, dtype=DTYPES[precision], enabled=precision != "fp32")
