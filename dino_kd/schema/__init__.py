"""Every setting of every command: name, type, default, unit, meaning. The one source for the
YAML files, `a.b=c` overrides, `--help`, docs/config.md and the checks.

Lengths (`Length`) are steps (`500`), epochs (`"10ep"`) or a share of the run (`"5%"`).
`"auto"` values are resolved from the data set's size when the run is built, and printed.
"""

from __future__ import annotations

from dino_kd.schema.base import InWords, RunSettings, Settings
from dino_kd.schema.bench import BenchConfig, MeasureSettings
from dino_kd.schema.distill import (
    TERM_PRESETS,
    DistillConfig,
    DistillTeacherSettings,
    StudentSettings,
    TermSettings,
    TermsSettings,
)
from dino_kd.schema.embed import DuplicatesConfig, EmbedConfig, SearchConfig
from dino_kd.schema.evaluators import (
    BackboneSettings,
    FeatureSettings,
    KnnConfig,
    LabelledSettings,
    SourceSettings,
)
from dino_kd.schema.few_labels import FewshotConfig, LogregConfig
from dino_kd.schema.finetune import (
    AugmentSettings,
    FinetuneConfig,
    FinetuneOptimSettings,
    SupervisedOptimSettings,
)
from dino_kd.schema.launch import LaunchConfig, PipelineConfig, SlurmSettings, StageSettings
from dino_kd.schema.pretrain import (
    CROP_PRESETS,
    CropSettings,
    CurriculumSettings,
    DataSettings,
    HeadSettings,
    LogSettings,
    ModelSettings,
    MonitorSettings,
    OptimSettings,
    PretrainConfig,
    TeacherSettings,
)
from dino_kd.schema.probes import LinearConfig
from dino_kd.schema.quality import QualityConfig
from dino_kd.schema.retrieval import (
    BenchmarkSettings,
    CopydetectConfig,
    RetrievalConfig,
    VideoConfig,
)
from dino_kd.schema.suite import EvaluateConfig
from dino_kd.schema.visualize import VisualizeConfig

__all__ = [
    "COMMANDS",
    "CROP_PRESETS",
    "TERM_PRESETS",
    "AugmentSettings",
    "BackboneSettings",
    "BenchConfig",
    "BenchmarkSettings",
    "CopydetectConfig",
    "CropSettings",
    "CurriculumSettings",
    "DataSettings",
    "DistillConfig",
    "DistillTeacherSettings",
    "DuplicatesConfig",
    "EmbedConfig",
    "EvaluateConfig",
    "FeatureSettings",
    "FewshotConfig",
    "FinetuneConfig",
    "FinetuneOptimSettings",
    "HeadSettings",
    "InWords",
    "KnnConfig",
    "LabelledSettings",
    "LaunchConfig",
    "LinearConfig",
    "LogSettings",
    "LogregConfig",
    "MeasureSettings",
    "ModelSettings",
    "MonitorSettings",
    "OptimSettings",
    "PipelineConfig",
    "PretrainConfig",
    "QualityConfig",
    "RetrievalConfig",
    "RunSettings",
    "SearchConfig",
    "Settings",
    "SlurmSettings",
    "SourceSettings",
    "StageSettings",
    "StudentSettings",
    "SupervisedOptimSettings",
    "TeacherSettings",
    "TermSettings",
    "TermsSettings",
    "VideoConfig",
    "VisualizeConfig",
]

COMMANDS: dict[str, type[Settings]] = {
    "pretrain": PretrainConfig,
    "bench": BenchConfig,
    "distill": DistillConfig,
    "evaluate": EvaluateConfig,
    "knn": KnnConfig,
    "finetune": FinetuneConfig,
    "visualize": VisualizeConfig,
    "linear": LinearConfig,
    "embed": EmbedConfig,
    "search": SearchConfig,
    "duplicates": DuplicatesConfig,
    "quality": QualityConfig,
    "retrieval": RetrievalConfig,
    "copydetect": CopydetectConfig,
    "video": VideoConfig,
    "logreg": LogregConfig,
    "fewshot": FewshotConfig,
    "launch": LaunchConfig,
}
