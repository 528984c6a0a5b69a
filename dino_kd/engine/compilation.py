"""Whether a run compiles its hot parts with torch.compile: where it pays, and where it can."""

from __future__ import annotations

import functools
import logging

import torch

from dino_kd.errors import ConfigError


def choose_compile(wanted: str | bool, device: torch.device) -> tuple[bool, str]:
    """Resolve "auto", True or False; returns the choice and a sentence about it, or "".

    auto: on a CUDA device with a working compiler. A CPU spends its time in matrix products, which
    a compiler leaves as they are.

    Raises:
        ConfigError: True without a working compiler.
    """
    if not wanted or (wanted == "auto" and device.type != "cuda"):
        return False, ""
    if compiler_works(device.type):
        return True, ""
    if wanted is True:
        raise ConfigError(
            f"optim.compile: true, but torch.compile cannot build for {device.type} here; it needs "
            f"{'Triton' if device.type == 'cuda' else 'a C++ compiler such as g++'}. Install that, "
            "or set it to auto or false"
        )
    return False, "torch.compile does not work here: uncompiled, slower, with the same results"


@functools.cache
def compiler_works(device_type: str) -> bool:
    """Compile and run the smallest function there is; seconds at first, then cached on disk."""
    logger = logging.getLogger("torch._inductor")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        numbers = torch.ones(8, device=device_type)
        return bool((torch.compile(lambda x: x * 2 + 1)(numbers) == 3).all())
    except Exception:  # whatever it is, there is no compiler to count on
        return False
    finally:
        logger.setLevel(level)
