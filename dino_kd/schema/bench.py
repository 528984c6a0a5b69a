"""Settings of `dino-kd bench`."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from dino_kd.schema.base import PositiveFloat, Settings, Text, setting
from dino_kd.schema.pretrain import PretrainConfig


class MeasureSettings(Settings):
    """How long each part is measured, and where the numbers go."""

    seconds: PositiveFloat = setting(
        20.0, "How long each of the three parts is measured: loader, step, both.", unit="s"
    )
    warmup: Annotated[int, Field(ge=1)] = setting(
        3, "Steps before the clock starts: allocation, compilation, the first files.", unit="steps"
    )
    output: Text | None = setting(
        None, "Folder for bench.json; none: the numbers are printed and nothing is written."
    )


class BenchConfig(PretrainConfig):
    """`dino-kd bench`: how fast a pretraining runs on this machine, and what holds it up."""

    run_dir: Text = setting(
        "runs/bench",
        "Never written; accepted so that a run, or its config.yaml, can be measured as it is.",
        free=True,
    )
    bench: MeasureSettings = MeasureSettings()
