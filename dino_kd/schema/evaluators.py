"""What every evaluator asks for, and the settings of `dino-kd knn`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from dino_kd.schema.base import (
    Auto,
    PositiveFloat,
    PositiveInt,
    Settings,
    Size,
    Text,
    setting,
)


class SourceSettings(Settings):
    """Which network."""

    backbone: Text = setting(
        ...,
        "Run directory, 'local-dir:PATH', 'timm:NAME', 'torchvision:NAME', a DINO or DINOv2 "
        "checkpoint file, or 'pixels' (the image itself, resized).",
        examples=["runs/first"],
    )
    branch: Literal["teacher", "student", "untrained"] = setting(
        "teacher", "Which network of a run directory; untrained: the one it started from."
    )
    image_size: Size | None = setting(
        None, "Side of the network's input; none: as it was trained.", unit="px"
    )


class BackboneSettings(SourceSettings):
    """Which network, and how it runs."""

    batch_size: PositiveInt = setting(256, "Images per forward pass and process.", unit="images")
    num_workers: Auto | Annotated[int, Field(ge=0)] = setting("auto", "Loader processes.")
    device: Text = setting("auto", "auto, cpu, cuda, cuda:1, mps.")
    precision: Literal["auto", "bf16", "fp32"] = setting("fp32", "Arithmetic of the forward pass.")


class FeatureSettings(BackboneSettings):
    """Features of whole images, extracted once and kept."""

    resize: PositiveInt | None = setting(
        None,
        "Shorter side before the centre crop; none: 8/7 of image_size, or image_size up to 64 px.",
        unit="px",
    )
    cache: Text = setting(
        "auto",
        "Folder that keeps extracted features for the next evaluator; auto: "
        "~/.cache/dino_kd/features; off: none.",
    )
    cache_limit: PositiveFloat = setting(
        20.0, "Size of that folder; what was not used longest is deleted first.", unit="GB"
    )
    download: bool = setting(False, "Let torchvision download the data set when it is missing.")
    output: Text | None = setting(
        None, "JSON file for the result; none: eval/EVALUATOR_BRANCH.json in a run directory."
    )


class LabelledSettings(FeatureSettings):
    """Two labelled sets: one to learn from, one to score."""

    train: Text = setting(
        ...,
        "Labelled images to learn from, as a dataset spec.",
        examples=["/path/to/train"],
    )
    test: Text = setting(
        ..., "Labelled images that are scored, as a dataset spec.", examples=["/path/to/test"]
    )


class KnnConfig(LabelledSettings):
    """`dino-kd knn`: score a frozen backbone by weighted nearest neighbours."""

    k: list[PositiveInt] = setting(
        [1, 5, 10, 20, 50, 100, 200],
        "Neighbours, one number or a list; all from one search.",
        min_length=1,
    )
    temperature: PositiveFloat = setting(0.07, "A vote weighs exp(cosine / temperature).")
    search: Literal["torch", "faiss"] = setting(
        "torch", "Exact search by torch or faiss; equal answers."
    )

    @model_validator(mode="before")
    @classmethod
    def _one_k_is_a_list(cls, values: Any) -> Any:
        if isinstance(values, dict) and type(values.get("k")) is int:
            return {**values, "k": [values["k"]]}
        return values
