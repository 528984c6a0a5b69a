"""Settings of `dino-kd finetune`. The defaults are MAE's for a ViT-B (arXiv 2111.06377, table 9)
where it has them; docs/finetune.md says which differ.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from dino_kd.schema.base import (
    Auto,
    Half,
    Interval,
    Length,
    Part,
    PositiveFloat,
    PositiveInt,
    PositiveShare,
    RunLength,
    RunSettings,
    Settings,
    Share,
    ShareRange,
    Text,
    setting,
)
from dino_kd.schema.evaluators import SourceSettings
from dino_kd.schema.pretrain import LogSettings


class AugmentSettings(Settings):
    """What happens to a training image and its label."""

    scale: ShareRange = setting((0.08, 1.0), "Area range of the crop.", unit="share of image")
    horizontal_flip: Share = setting(0.5, "Probability of a left-right flip.")
    mixup: Annotated[float, Field(ge=0)] = setting(
        0.8, "Mixup: parameter of the Beta distribution; 0: off."
    )
    cutmix: Annotated[float, Field(ge=0)] = setting(
        1.0, "CutMix: parameter of the Beta distribution; 0: off."
    )
    mix_share: Share = setting(
        1.0, "Share of the batches that are mixed, by mixup or CutMix at even odds."
    )
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = setting(
        0.1, "Share of the target that is spread over all classes."
    )


class SupervisedOptimSettings(Settings):
    """Optimiser, schedules and length of a run on single views."""

    name: Text = setting("adamw", "adamw, sgd or lars.")
    batch_size: PositiveInt = setting(
        256, "Images per optimiser step, over all processes and micro-batches.", unit="images"
    )
    accumulate: PositiveInt = setting(
        1,
        "Micro-batches per step: less memory, the same result but for drop path, mixing and batch "
        "norm, which see the micro-batch.",
        free=True,
    )
    length: RunLength = setting("100ep", "Length of the run.", unit="steps or 'ep'")
    base_lr: PositiveFloat = setting(
        5e-4, "Peak learning rate of the classifier per `lr_batch` images (linear rule)."
    )
    lr_batch: PositiveInt = setting(256, "Batch size that base_lr is meant for.", unit="images")
    min_lr: Annotated[float, Field(ge=0)] = setting(1e-6, "Learning rate at the end of the cosine.")
    warmup: Length = setting(
        "5%", "Length of the linear learning-rate warm-up.", unit="steps, 'ep' or '%'"
    )
    weight_decay: Annotated[float, Field(ge=0)] = setting(
        0.05, "Weight decay; none on biases, norms, positions and tokens."
    )
    sgd_momentum: Annotated[float, Field(ge=0, lt=1)] = setting(0.9, "Momentum of sgd and lars.")
    clip_grad: Annotated[float, Field(ge=0)] = setting(
        3.0, "Largest global gradient norm; 0: no clipping."
    )
    precision: Literal["auto", "bf16", "fp16", "fp32"] = setting(
        "auto",
        "Arithmetic of training; auto: bf16 where the hardware has it, else fp32. "
        "Scores are taken in fp32.",
    )
    max_bad_steps: PositiveInt = setting(
        20, "Stop after this many non-finite steps in a row.", unit="steps", free=True
    )


class FinetuneOptimSettings(SupervisedOptimSettings):
    """Optimiser, schedules and length of the run."""

    layer_decay: Auto | PositiveShare = setting(
        "auto",
        "Factor on the learning rate from each layer to the one below (a block of a ViT, a stage "
        "of a CNN); 1: none; auto: 0.75, or 1 when the network starts untrained.",
    )


class FinetuneConfig(RunSettings, SourceSettings):
    """`dino-kd finetune`: train a backbone and a classifier on labelled images."""

    backbone: Text = setting(
        ...,
        "Where training starts: run directory, 'local-dir:PATH', 'timm:NAME', 'torchvision:NAME', "
        "'random:NAME', or a DINO or DINOv2 checkpoint file.",
        examples=["runs/pretrained"],
    )
    train: Text = setting(
        ..., "Labelled images to learn from, as a dataset spec.", examples=["/path/to/train"]
    )
    test: Text = setting(
        ...,
        "Labelled images that are scored at the end, as a dataset spec; never used to choose.",
        free=True,
        examples=["/path/to/test"],
    )
    fraction: Part = setting(
        1.0, "Part of train that is used: the same of every class, at least one image each."
    )
    select: Literal["last", "best"] = setting(
        "last",
        "Which weights are scored on test. last: the final ones; best: those with the best top-1 "
        "on a held-out part of train.",
    )
    holdout: Half = setting(0.1, "Part of the training images that select=best holds out.")
    select_every: Interval = setting(
        "1ep", "How often select=best scores the held-out part.", unit="steps, 'ep' or '%'"
    )
    resize: PositiveInt | None = setting(
        None,
        "Shorter side before the centre crop of scored images; none: 8/7 of image_size, or "
        "image_size up to 64 px.",
        unit="px",
        free=True,
    )
    drop_path: Annotated[float, Field(ge=0, lt=1)] = setting(
        0.1, "Stochastic depth while training."
    )
    download: bool = setting(
        False, "Let torchvision download the data set when it is missing.", free=True
    )
    num_workers: Auto | Annotated[int, Field(ge=0)] = setting(
        "auto",
        "Loader threads or processes per training process; auto: cores per process - 1, at most "
        "16.",
        free=True,
    )
    max_broken_share: Share = setting(
        0.01, "Stop when more than this share of the training images cannot be read.", free=True
    )
    augment: AugmentSettings = AugmentSettings()
    optim: FinetuneOptimSettings = FinetuneOptimSettings()
    log: LogSettings = LogSettings()
