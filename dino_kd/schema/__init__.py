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
from dino_kd.schema.retrieval import (
    BenchmarkSettings,
    CopydetectConfig,
    RetrievalConfig,
    VideoConfig,
)

__all__ = [
    "COMMANDS",
    "CROP_PRESETS",
    "BackboneSettings",
    "BenchmarkSettings",
    "CopydetectConfig",
    "CropSettings",
    "DataSettings",
    "FeatureSettings",
    "HeadSettings",
    "InWords",
    "KnnConfig",
    "LabelledSettings",
    "LogSettings",
    "ModelSettings",
    "MonitorSettings",
    "OptimSettings",
    "PretrainConfig",
    "RetrievalConfig",
    "Settings",
    "TeacherSettings",
    "VideoConfig",
]

COMMANDS: dict[str, type[Settings]] = {
    "pretrain": PretrainConfig,
    "knn": KnnConfig,
    "retrieval": RetrievalConfig,
    "copydetect": CopydetectConfig,
    "video": VideoConfig,
}
