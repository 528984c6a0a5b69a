"""The settings of `dino-kd visualize`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from dino_kd.schema.base import Auto, InWords, PositiveInt, Share, Size, Text, setting
from dino_kd.schema.evaluators import FeatureSettings

PictureKind = Literal["attention", "pca", "neighbours", "similarity"]
Point = Annotated[
    tuple[Share, Share],  # across, down
    InWords("[across, down], each from 0 to 1"),
]


class VisualizeConfig(FeatureSettings):
    """`dino-kd visualize`: pictures of what a backbone sees, as PNG and as one HTML page."""

    input: Text = setting(
        ...,
        "What is shown: an image file, a folder or another dataset spec, or a video file.",
        examples=["/path/to/pictures"],
    )
    kinds: Auto | list[PictureKind] = setting(
        "auto",
        "Which pictures, one or a list; auto: all that the network supports, neighbours where "
        "gallery is given.",
    )
    max_images: PositiveInt = setting(
        8, "Images (of a video: frames) on a sheet, evenly spaced.", unit="images"
    )
    image_size: Size | None = setting(
        None,
        "Shorter side of the shown images, or [height, width]; rounded to whole patches. Larger "
        "gives finer maps. None: as the network was trained. Neighbours are searched at the size "
        "it was trained at.",
        unit="px",
    )
    block: int = setting(-1, "Whose attention: 0 is the first block, -1 the last.")
    keep: Annotated[float, Field(gt=0, lt=1)] = setting(
        0.6, "The masks hold this share of the attention on patches, in as few as possible."
    )
    overlay: bool = setting(True, "Draw attention over the image; false: the map alone.")
    pca_foreground: Literal["all", "positive", "negative"] = setting(
        "all",
        "Colour all patches, or those with this sign of the first component; which sign is the "
        "object depends on the network.",
    )
    gallery: Text | None = setting(
        None, "Images that neighbours are searched in, as a dataset spec."
    )
    k: PositiveInt = setting(5, "Neighbours of each image.", unit="images")
    point: Point = setting(
        (0.5, 0.5), "Whose similarity to all other patches is shown; [0, 0] is top left."
    )
    separate: bool = setting(False, "Also write every picture as a PNG of its own.")
    frame_step: PositiveInt = setting(1, "Annotate every n-th frame of a video.", unit="frames")
    output: Text | None = setting(
        None,
        "Folder for the pictures; none: visualize in the run directory (visualize_BRANCH for "
        "other branches than the teacher), or ./visualize.",
    )

    @model_validator(mode="before")
    @classmethod
    def _one_kind_is_a_list(cls, values: Any) -> Any:
        if isinstance(values, dict) and isinstance(values.get("kinds"), str):
            kinds = values["kinds"]
            return {**values, "kinds": kinds if kinds == "auto" else [kinds]}
        return values
