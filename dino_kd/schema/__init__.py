"""Every setting of every command: name, type, default, unit, meaning. The one source for the
YAML files, `a.b=c` overrides, `--help`, docs/config.md and the checks.

Lengths (`Length`) are steps (`500`), epochs (`"10ep"`) or a share of the run (`"5%"`).
`"auto"` values are resolved from the data set's size when the run is built, and printed.
"""

from __future__ import annotations

from dino_kd.schema.base import InWords, Settings
from dino_kd.schema.evaluators import (
    BackboneSettings,
    FeatureSettings,
    KnnConfig,
    LabelledSettings,
)
from dino_kd.schema.launch import LaunchConfig, PipelineConfig, SlurmSettings, StageSettings
from dino_kd.schema.pretrain import (
    CROP_PRESETS,
    CropSettings,
    DataSettings,
    HeadSettings,
    LogSettings,
    ModelSettings,
    MonitorSettings,
    OptimSettings,
    PretrainConfig,
    TeacherSettings,
)
from dino_kd.schema.suite import EvaluateConfig

__all__ = [
    "COMMANDS",
    "CROP_PRESETS",
    "BackboneSettings",
    "CropSettings",
    "DataSettings",
    "EvaluateConfig",
    "FeatureSettings",
    "HeadSettings",
    "InWords",
    "KnnConfig",
    "LabelledSettings",
    "LaunchConfig",
    "LogSettings",
    "ModelSettings",
    "MonitorSettings",
    "OptimSettings",
    "PipelineConfig",
    "PretrainConfig",
    "Settings",
    "SlurmSettings",
    "StageSettings",
    "TeacherSettings",
]

COMMANDS: dict[str, type[Settings]] = {
    "pretrain": PretrainConfig,
    "evaluate": EvaluateConfig,
    "knn": KnnConfig,
    "launch": LaunchConfig,
}
