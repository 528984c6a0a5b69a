"""Settings of the classifiers that are trained on frozen features."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from dino_kd.schema.base import Auto, Part, PositiveFloat, PositiveInt, setting
from dino_kd.schema.evaluators import LabelledSettings


class LinearConfig(LabelledSettings):
    """`dino-kd linear`: score a frozen backbone by linear classifiers on its features."""

    mode: Literal["cached", "augmented"] = setting(
        "cached",
        "cached: features of centre crops, extracted once; augmented: a forward pass over random "
        "crops at every step, as the DINO paper does.",
    )
    fraction: Part = setting(
        1.0,
        "Part of train that is used, the same of every class; of equal seeds the images of "
        "'dino-kd finetune fraction=...' and 'dino-kd distill data.labels=...'.",
    )
    inputs: list[Literal["last1", "last1+mean", "last4", "last4+mean"]] = setting(
        ["last1", "last1+mean", "last4", "last4+mean"],
        "What the heads see: the class token of the last block, or of the last four; +mean: with "
        "the mean patch. Inputs that coincide for a network are trained once.",
        min_length=1,
    )
    learning_rates: list[PositiveFloat] = setting(
        [
            *(1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3),
            *(0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5),
        ],
        "Peak learning rates per 256 images; one head for each and each input, all at once. The "
        "large ones are for features without a final norm, as CNNs have.",
        min_length=1,
    )
    epochs: PositiveInt = setting(100, "Passes over the training images.", unit="epochs")
    train_batch: Auto | PositiveInt = setting(
        "auto",
        "Images of one step of the heads over all processes; auto: 1024, less for fewer than "
        "16,384 training images.",
        unit="images",
    )
    held_out: Annotated[float, Field(gt=0, lt=1)] = setting(
        0.1,
        "Share of the training images that chooses the winner; the test images never do.",
    )
    retrain: Auto | bool = setting(
        "auto",
        "Train the winner once more on all training images, the held-out ones too, before it is "
        "scored; auto: when cached, where it is cheap.",
    )
    seed: Annotated[int, Field(ge=0)] = setting(
        0, "Draws the held-out images, the order of the images and the crops."
    )

    @model_validator(mode="before")
    @classmethod
    def _one_is_a_list(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        lists = {"inputs": (str,), "learning_rates": (int, float)}
        single = {
            key: [values[key]]
            for key, kinds in lists.items()
            if isinstance(values.get(key), kinds) and not isinstance(values[key], bool)
        }
        return {**values, **single}
