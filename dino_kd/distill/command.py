"""`dino-kd distill`: one student, or several arms and students side by side."""

from __future__ import annotations

from dino_kd.config import load_settings
from dino_kd.distill.arms import compare
from dino_kd.distill.story import distill
from dino_kd.schema import DistillConfig


def main(argv: list[str]) -> int:
    """`dino-kd distill [CONFIG] a.b=c ...`."""
    settings = load_settings(DistillConfig, argv, command="distill")
    if settings.arms or settings.students:
        compare(settings)
    else:
        distill(settings)
    return 0
