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

    batch_size: PositiveInt = setting(
        256, "Images per batch and process; a CPU takes them a few at a time.", unit="images"
    )
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


class KnnConfig(FeatureSettings):
    """`dino-kd knn`: score a frozen backbone by weighted nearest neighbours."""

    train: Text = setting(
        ..., "Labelled images that vote, as a dataset spec.", examples=["/path/to/train"]
    )
    test: Text | None = setting(
        None,
        "Labelled images that are scored, as a dataset spec; none only with leave_one_out.",
        examples=["/path/to/test"],
    )
    leave_one_out: bool = setting(
        False, "Score every image of train by all others of train; there is no test set then."
    )
    k: list[PositiveInt] = setting(
        [1, 5, 10, 20, 50, 100, 200],
        "Neighbours, one number or a list; all from one search.",
        min_length=1,
    )
    temperature: PositiveFloat = setting(0.07, "A vote weighs exp(cosine / temperature).")
    search: Literal["torch", "faiss"] = setting(
        "torch", "Exact search by torch or faiss; equal answers."
    )
    per_class: PositiveInt | None = setting(
        None, "Only so many images of each class vote, drawn several times; none: all of train."
    )
    draws: PositiveInt = setting(5, "Draws of the images that vote, with per_class.")
    seed: Annotated[int, Field(ge=0)] = setting(
        0, "Seed of the first draw; the following draws count up from it."
    )
    labels: Text | None = setting(
        None,
        "CSV file for images with several labels, 'path,label1|label2' a line, paths relative to "
        "the file; none: the class of each image is its label.",
        examples=["/path/to/labels.csv"],
    )

    @model_validator(mode="before")
    @classmethod
    def _one_k_is_a_list(cls, values: Any) -> Any:
        if isinstance(values, dict) and type(values.get("k")) is int:
            return {**values, "k": [values["k"]]}
        return values

    @model_validator(mode="after")
    def _modes_fit_together(self) -> KnnConfig:
        if self.test is None and not self.leave_one_out:
            raise ValueError(
                "test: required, and not given; name labelled images, or set leave_one_out=true to "
                "score every image of train by the others"
            )
        if self.test is not None and self.leave_one_out:
            raise ValueError(
                f"test: leave_one_out=true scores the images of train, and test={self.test} was "
                "given too; leave out one of the two (test=none)"
            )
        if self.per_class is not None and self.leave_one_out:
            raise ValueError(
                f"per_class: {self.per_class} images per class vote for a test set, and "
                "leave_one_out=true has none; leave out one of the two"
            )
        if self.per_class is not None and self.labels is not None:
            raise ValueError(
                f"per_class: {self.per_class} images per class need one class per image, and "
                f"labels={self.labels} gives several; leave out one of the two"
            )
        return self
