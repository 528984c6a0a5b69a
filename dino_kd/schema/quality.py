"""The settings of `dino-kd quality`."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from dino_kd.schema.base import PositiveInt, Text, setting
from dino_kd.schema.evaluators import FeatureSettings


class QualityConfig(FeatureSettings):
    """`dino-kd quality`: how good do features look, without any label?"""

    data: Text = setting(
        ..., "Images, as a dataset spec; labels are not read.", examples=["/path/to/images"]
    )
    images: PositiveInt = setting(
        10_000,
        "At most so many of them, spread evenly over the set, give the numbers of whole images.",
        unit="images",
    )
    view_images: PositiveInt = setting(
        500, "At most so many of those are also seen in augmented views.", unit="images"
    )
    views: Annotated[int, Field(ge=2)] = setting(
        10, "Augmented views of each; the LiDAR paper takes 50."
    )
    seed: Annotated[int, Field(ge=0)] = setting(0, "Of the views.")
