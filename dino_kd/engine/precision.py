"""Which arithmetic a run uses, and where bf16 is worth having."""

from __future__ import annotations

import torch

from dino_kd.errors import ConfigError
from dino_kd.hardware import has_bf16

DTYPES = {
    "bf16": torch.bfloat16,
    "bf16-params": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
}


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
    return "bf16" if has_bf16(device) else "fp32"


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """The autocast context of a forward pass."""
    return torch.autocast(device.type, dtype=DTYPES[precision], enabled=precision != "fp32")
