"""dino_kd: from a folder of unlabelled images to a small model you can ship.

``import dino_kd`` is cheap; `load_backbone` and friends import torch on first use.
"""

from __future__ import annotations

import typing

__version__ = "0.1.0"
__all__ = ["load_backbone", "make_dataset"]

if typing.TYPE_CHECKING:
    from dino_kd.data.specs import make_dataset
    from dino_kd.pretrained import load_backbone


def __getattr__(name: str) -> object:
    """Import the public functions on first use, so that `dino-kd --help` never loads torch."""
    if name == "load_backbone":
        from dino_kd.pretrained import load_backbone

        return load_backbone
    if name == "make_dataset":
        from dino_kd.data.specs import make_dataset

        return make_dataset
    raise AttributeError(f"module 'dino_kd' has no attribute {name!r}")
