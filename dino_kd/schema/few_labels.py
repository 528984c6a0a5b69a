"""The settings of `dino-kd logreg` and `dino-kd fewshot`: classifiers on frozen features."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from dino_kd.lengths import parse_length
from dino_kd.schema.base import InWords, PositiveFloat, PositiveInt, setting
from dino_kd.schema.evaluators import LabelledSettings

Seed = Annotated[int, Field(ge=0)]
Scaling = Literal["standard", "l2", "none"]


def _check_fraction(value: str) -> str:
    try:
        length = parse_length(value)
    except ValueError:
        length = parse_length("0%")
    if length.unit != "%" or length.amount == 0:
        raise ValueError(f"expected a share such as '1%', above 0% and up to 100%, got {value!r}")
    return value.strip()


Fraction = Annotated[
    str, AfterValidator(_check_fraction), InWords("shares such as '1%', up to '100%'")
]


class LogregConfig(LabelledSettings):
    """`dino-kd logreg`: multinomial logistic regression on frozen features."""

    c: list[PositiveFloat] = setting(
        [float(f"{digit}e{power}") for power in range(-6, 2) for digit in (1, 3)] + [100.0],
        "Inverse strengths of the penalty, one number or a list; the best on held-out training "
        "images is used. Loss: sum of cross-entropies + |W|^2 / (2 c).",
        min_length=1,
    )
    scaling: Scaling = setting(
        "standard",
        "Of the features. standard: mean 0 and deviation 1 over the training images; l2: length 1.",
    )
    held_out: Annotated[float, Field(gt=0, le=0.5)] = setting(
        0.1, "Share of the training images that chooses c, stratified."
    )
    seed: Seed = setting(0, "Draws the held-out images.")
    tolerance: PositiveFloat = setting(
        1e-4, "Largest entry of the scaled gradient at which the search has converged."
    )
    max_iterations: PositiveInt = setting(1000, "Of L-BFGS, for each c.", unit="steps")

    @model_validator(mode="before")
    @classmethod
    def _one_is_a_list(cls, values: Any) -> Any:
        return _as_lists(values, "c")


class FewshotConfig(LabelledSettings):
    """`dino-kd fewshot`: classifiers that see a few labels, over several draws."""

    shots: list[PositiveInt] = setting(
        [1, 2, 5, 10], "Labelled images per class, one number or a list.", unit="images"
    )
    fractions: list[Fraction] = setting(
        ["1%", "10%"], "Shares of the training images of each class, one or a list."
    )
    draws: PositiveInt = setting(5, "Draws of labelled images, for each number and share.")
    seed: Seed = setting(0, "Of the first draw; the next ones count upwards.")
    classifier: Literal["logreg", "knn", "prototype", "ridge"] = setting(
        "logreg", "What learns from them. prototype: the nearest class mean."
    )
    scaling: Scaling = setting(
        "l2",
        "Of the features. l2: length 1; standard: mean 0 and deviation 1 over the labelled images.",
    )
    c: PositiveFloat = setting(100.0, "logreg: loss = sum of cross-entropies + |W|^2 / (2 c).")
    alpha: PositiveFloat = setting(0.1, "ridge: loss = sum of squares + alpha |W|^2.")
    k: PositiveInt = setting(20, "knn: neighbours; all labelled images where they are fewer.")
    temperature: PositiveFloat = setting(0.07, "knn: a vote weighs exp(cosine / temperature).")

    @model_validator(mode="before")
    @classmethod
    def _one_is_a_list(cls, values: Any) -> Any:
        return _as_lists(values, "shots", "fractions")

    @model_validator(mode="after")
    def _something_is_drawn(self) -> FewshotConfig:
        if not self.shots and not self.fractions:
            raise ValueError("shots and fractions are both empty: nothing to draw")
        return self


def _as_lists(values: Any, *names: str) -> Any:
    """`values` with single numbers and words of these settings as lists of one."""
    if not isinstance(values, dict):
        return values
    single = {n: [values[n]] for n in names if type(values.get(n)) in (int, float, str)}
    return {**values, **single}
