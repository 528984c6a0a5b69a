"""Settings of `dino-kd retrieval`, `dino-kd copydetect` and `dino-kd video`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from dino_kd.schema.base import PositiveFloat, PositiveInt, Text, setting
from dino_kd.schema.evaluators import BackboneSettings

NotNegative = Annotated[int, Field(ge=0)]
Parts = Literal["cls", "gem", "cls+gem"]


class BenchmarkSettings(BackboneSettings):
    """A benchmark in its official folders, scored into one file."""

    output: Text | None = setting(
        None, "JSON file for the result; none: eval/EVALUATOR_BRANCH.json in a run directory."
    )


class RetrievalConfig(BenchmarkSettings):
    """`dino-kd retrieval`: find images of the same building, revisited Oxford and Paris."""

    root: Text = setting(
        ...,
        "Folder that holds roxford5k/ and/or rparis6k/, each with gnd_NAME.pkl and jpg/.",
        examples=["/path/to/revisited"],
    )
    dataset: Literal["auto", "roxford5k", "rparis6k"] = setting(
        "auto", "Which of them; auto: every one that is in `root`."
    )
    image_size: PositiveInt = setting(
        512,
        "Longer side of an image; smaller ones are not enlarged. A ViT sees whole patches of it.",
        unit="px",
    )
    batch_size: Literal[1] = setting(
        1, "Images keep their aspect ratio, so each one is a batch of its own.", unit="images"
    )
    multiscale: bool = setting(True, "Average over scales 1, 0.71 and 0.5, as DINO; false: 1 only.")
    features: Parts = setting(
        "cls", "The network's output, its GeM-pooled patches, or both side by side."
    )
    gem_power: PositiveFloat = setting(3.0, "Exponent of GeM pooling; 1 is the mean.")
    whiten: Text | None = setting(
        None, "Other images, as a dataset spec, that a PCA whitening is learned from; none: none."
    )
    crop_queries: bool = setting(
        True, "Cut queries to their box, as the benchmark demands; false: whole, as DINO's code."
    )
    k: list[PositiveInt] = setting(
        [1, 5, 10], "Where precision is measured, one number or a list.", min_length=1
    )

    @model_validator(mode="before")
    @classmethod
    def _one_k_is_a_list(cls, values: Any) -> Any:
        if isinstance(values, dict) and type(values.get("k")) is int:
            return {**values, "k": [values["k"]]}
        return values


class CopydetectConfig(BenchmarkSettings):
    """`dino-kd copydetect`: find the original of an altered copy, INRIA Copydays."""

    root: Text = setting(
        ...,
        "Folder that holds original/ and altered copies in strong/, crops/ and jpegqual/.",
        examples=["/path/to/copydays"],
    )
    distractors: Text | None = setting(
        None, "More images to search in, as a dataset spec; none: the originals alone."
    )
    image_size: PositiveInt = setting(
        320, "Side of the square that images are stretched to; whole patches of it.", unit="px"
    )
    batch_size: PositiveInt = setting(
        32, "Images per batch and process; a CPU takes them a few at a time.", unit="images"
    )
    features: Parts = setting(
        "cls+gem", "The network's output, its GeM-pooled patches, or both side by side."
    )
    gem_power: PositiveFloat = setting(4.0, "Exponent of GeM pooling; 1 is the mean.")
    whiten: Text | None = setting(
        None, "Other images, as a dataset spec, that a PCA whitening is learned from; none: none."
    )


class VideoConfig(BenchmarkSettings):
    """`dino-kd video`: follow objects through videos by patch features, DAVIS 2017."""

    root: Text = setting(
        ...,
        "Folder that holds ImageSets/2017/, JPEGImages/ and Annotations/.",
        examples=["/path/to/DAVIS"],
    )
    split: Text = setting("val", "List of sequences: ImageSets/2017/SPLIT.txt.")
    sequences: list[Text] | None = setting(
        None, "Only these sequences of it, a name or a list; none: all.", min_length=1
    )
    resolution: Text = setting("480p", "Folder below JPEGImages/ and Annotations/.")
    predictions: Text | None = setting(
        None, "Folder for the predicted masks, as SEQUENCE/00000.png with a palette; none: none."
    )
    image_size: PositiveInt = setting(
        480, "Shorter side of a frame; the longer one is rounded down to a multiple.", unit="px"
    )
    batch_size: PositiveInt = setting(4, "Frames per forward pass.", unit="images")
    queue: NotNegative = setting(
        7, "Earlier frames that labels come from, besides the first.", unit="frames"
    )
    topk: PositiveInt = setting(5, "Neighbours of a patch among all those frames.")
    temperature: PositiveFloat = setting(0.1, "A neighbour weighs exp(cosine / temperature).")
    radius: NotNegative | None = setting(
        12, "Rows and columns that a neighbour may be away; none: anywhere.", unit="patches"
    )

    @model_validator(mode="before")
    @classmethod
    def _one_sequence_is_a_list(cls, values: Any) -> Any:
        if isinstance(values, dict) and isinstance(values.get("sequences"), str):
            return {**values, "sequences": [values["sequences"]]}
        return values
