"""The settings of `dino-kd embed`, `search` and `duplicates`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from dino_kd.schema.base import Auto, PositiveInt, Share, Text, setting
from dino_kd.schema.evaluators import FeatureSettings


class EmbedConfig(FeatureSettings):
    """`dino-kd embed`: write the features of images to a file."""

    data: Text = setting(..., "Images, as a dataset spec.", examples=["/path/to/images"])
    output: Text = setting(
        ...,
        "The file: .safetensors, .npy (one of `parts`; paths and the rest beside it) or .parquet.",
        examples=["features.safetensors"],
    )
    parts: list[Text] = setting(
        ["cls"],
        "cls (the network's output), patches, mean (of the patches), block-K (class token of the "
        "K-th last block).",
        min_length=1,
    )
    dtype: Literal["fp32", "fp16"] = setting("fp32", "Numbers in the file.")
    normalize: bool = setting(False, "Scale every feature vector to length 1.")
    shard_images: Auto | PositiveInt = setting(
        "auto",
        "Images per file; auto: one file up to 1 GB, else files of about 1 GB.",
        unit="images",
    )


class SearchConfig(FeatureSettings):
    """`dino-kd search`: the nearest images of a gallery."""

    image: Text = setting(
        ..., "What is looked for: an image, a folder or a dataset spec.", examples=["query.jpg"]
    )
    gallery: Text = setting(
        ...,
        "Where: a dataset spec, or a file that `dino-kd embed` wrote with this backbone.",
        examples=["/path/to/images"],
    )
    k: PositiveInt = setting(10, "Neighbours of each image.")
    sheet: Text | None = setting(None, "PNG of the queries and their neighbours; none: no picture.")


class DuplicatesConfig(FeatureSettings):
    """`dino-kd duplicates`: near-duplicates within a set, and between training and test."""

    train: Text = setting(..., "Images, as a dataset spec.", examples=["/path/to/train"])
    test: Text | None = setting(
        None, "Images that must not be among them, as a dataset spec; none: only `train`."
    )
    threshold: Annotated[float, Field(gt=-1, le=1)] = setting(
        0.8, "Cosine of two features from which on a pair is looked at."
    )
    appearance: Share = setting(
        0.75,
        "Correlation of the edges of two pictures, best over small crops and flip, from which on "
        "such a pair counts; 0: the cosine decides alone.",
    )
    neighbours: PositiveInt = setting(
        20, "So many nearest images of each are looked at.", unit="images"
    )
