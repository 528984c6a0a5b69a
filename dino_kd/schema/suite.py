"""Settings of `dino-kd evaluate`."""

from __future__ import annotations

from typing import Any

from dino_kd.schema.base import Auto, Text, setting
from dino_kd.schema.evaluators import LabelledSettings


class EvaluateConfig(LabelledSettings):
    """`dino-kd evaluate RUN`: the standard evaluators of a backbone, and one table of all."""

    suite: dict[str, dict[str, Any]] = setting(
        {"linear": {}, "knn": {}, "logreg": {}, "fewshot": {}, "quality": {}},
        "What runs, in this order: the name of a command, and its own settings; what they share "
        "(backbone, data, arithmetic) is given once. linear first: its features serve the rest.",
        min_length=1,
    )
    compare: Auto | list[Text] = setting(
        "auto",
        "What the same suite also runs on: other branches (untrained, student), pixels, or any "
        "backbone; auto: untrained for a run directory, else nothing.",
    )
    output: Text | None = setting(
        None, "Folder for the JSON files; none: eval/ in a run directory, else nowhere."
    )
