"""Settings of `dino-kd pretrain`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from dino_kd.schema.base import (
    Auto,
    CropShares,
    Interval,
    Length,
    PositiveFloat,
    PositiveInt,
    PositiveShare,
    Range,
    RunLength,
    RunSettings,
    Settings,
    Share,
    ShareRange,
    Size,
    Text,
    setting,
)


class DataSettings(Settings):
    """Which images, and how they are read."""

    train: Text = setting(
        ...,
        "Training images: a path or a dataset spec such as 'folder:/data' or 'cifar10:/data'.",
        examples=["/path/to/pictures"],
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
    workers: Literal["auto", "threads", "processes"] = setting(
        "auto",
        "What makes batches; the bytes are the same. auto: threads when the renderer lets go of "
        "Python's lock, else processes.",
        free=True,
    )
    pack: Text = setting(
        "off",
        "Folder that keeps the training images in one file, written once: pixels when all are of "
        "one size up to 64 px, else the files as they are. auto: ~/.cache/dino_kd/packed; off: "
        "read the files.",
        free=True,
    )
    pack_limit: PositiveFloat = setting(
        200.0,
        "Size of that folder; what was not used longest is deleted first.",
        unit="GB",
        free=True,
    )
    renderer: Literal["auto", "native", "torch", "pillow", "device"] = setting(
        "auto",
        "What cuts and colours crops: native (C++ compiled at first use), torch, or pillow, the "
        "reference; auto: native, without a compiler torch. device: on the device that trains, "
        "while loaders only read and decode; RGB only, and not measured on a GPU yet, so auto "
        "never takes it. Crops differ by rounding only.",
        free=True,
    )
    max_broken_share: Share = setting(
        0.01, "Stop when more than this share of all images cannot be read.", free=True
    )
    mean: list[float] | None = setting(
        None, "Channel means in 0..1 for normalisation; none: ImageNet's (0.5 if not RGB)."
    )
    std: list[PositiveFloat] | None = setting(
        None, "Channel deviations in 0..1 for normalisation; none: ImageNet's (0.25 if not RGB)."
    )


class CropSettings(Settings):
    """Multi-crop augmentation. `preset` fills in what is not given; the defaults are the
    published recipe.
    """

    preset: Literal["published", "small", "non_rgb"] = setting(
        "published",
        "published: 2x224 + 8x96 as in the DINO paper; small: 2x32 + 4x16 without blur, for 32 px "
        "images; non_rgb: no hue, saturation, grayscale or solarize, for in_chans != 3.",
    )
    global_size: Size = setting(224, "Side of the two global crops.", unit="px")
    local_size: Size = setting(96, "Side of the local crops.", unit="px")
    num_local_crops: Annotated[int, Field(ge=0, le=64)] = setting(
        8, "Local crops per image; may be 0."
    )
    global_scale: ShareRange = setting(
        (0.4, 1.0), "Area range of global crops.", unit="share of image"
    )
    local_scale: ShareRange = setting(
        (0.05, 0.4), "Area range of local crops.", unit="share of image"
    )
    aspect_ratio: Range = setting((3 / 4, 4 / 3), "Range of width / height before resizing.")
    interpolation: Literal["bicubic", "bilinear"] = setting("bicubic", "Filter for resizing.")
    horizontal_flip: Share = setting(0.5, "Probability of a left-right flip.")
    vertical_flip: Share = setting(0.0, "Probability of an upside-down flip.")
    jitter: Share = setting(0.8, "Probability of colour jitter.")
    brightness: Share = setting(0.4, "Brightness factor is drawn from 1 +- this.")
    contrast: Share = setting(0.4, "Contrast factor is drawn from 1 +- this.")
    saturation: Share = setting(0.2, "Saturation factor is drawn from 1 +- this.")
    hue: Annotated[float, Field(ge=0, le=0.5)] = setting(
        0.1, "Hue shift is drawn from +- this.", unit="turns"
    )
    grayscale: Share = setting(0.2, "Probability of dropping the colour.")
    blur: CropShares = setting((1.0, 0.1, 0.5), "Blur probability: global 1, global 2, locals.")
    blur_sigma: Range = setting((0.1, 2.0), "Range of the blur's standard deviation.", unit="px")
    solarize: CropShares = setting(
        (0.0, 0.2, 0.0), "Solarize probability: global 1, global 2, locals."
    )
    solarize_threshold: Annotated[int, Field(ge=0, le=255)] = setting(
        128, "Levels from here up are inverted."
    )

    @model_validator(mode="before")
    @classmethod
    def _fill_from_preset(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        return {**CROP_PRESETS.get(values.get("preset", "published"), {}), **values}


CROP_PRESETS: dict[str, dict[str, Any]] = {
    "published": {},
    "small": {"global_size": 32, "local_size": 16, "num_local_crops": 4, "blur": (0.0, 0.0, 0.0)},
    "non_rgb": {"saturation": 0.0, "hue": 0.0, "grayscale": 0.0, "solarize": (0.0, 0.0, 0.0)},
}


class CurriculumSettings(Settings):
    """Smaller crops first: cheaper steps, then the rest of the run at full size. Off at scale 1."""

    scale: PositiveShare = setting(
        1.0,
        "Sides of the first crops as a share of the full ones, rounded to whole patches (CNNs: to "
        "8 px); 1: always full size.",
        unit="share",
    )
    length: Length = setting(
        "80%", "How long crops are smaller than at full size.", unit="steps, 'ep' or '%'"
    )
    stages: Annotated[int, Field(ge=1, le=64)] = setting(
        1, "Sizes on the way, each for an equal part of `length`, evenly spaced up to full size."
    )

    @model_validator(mode="after")
    def _has_effect(self) -> CurriculumSettings:
        fields = type(self).model_fields
        idle = [n for n in ("length", "stages") if getattr(self, n) != fields[n].default]
        if self.scale == 1 and idle:
            raise ValueError(f"{' and '.join(idle)} without effect at scale=1; set scale below 1")
        return self


class ModelSettings(Settings):
    """The network to pretrain."""

    backbone: Text = setting("vit_small_patch16_224", "Any timm model name, ViT or CNN.")
    patch_size: PositiveInt | None = setting(
        None, "ViT patch side; none: as the name says.", unit="px"
    )
    in_chans: PositiveInt = setting(
        3, "Input channels: 1 grey, 3 RGB, others from .npy or multi-band files."
    )
    drop_path: Annotated[float, Field(ge=0, lt=1)] = setting(
        0.1, "Stochastic depth of the student; the teacher has none."
    )
    checkpoint_activations: bool = setting(
        False,
        "Keep only what goes into each block and compute the rest again in the backward pass: "
        "less memory, a slower step, the same result.",
        free=True,
    )
    pack_crops: bool = setting(
        False,
        "Global and local crops go through a plain ViT as one row of tokens, parted only in "
        "attention: fewer operations to launch, for small batches on a GPU; the same result up to "
        "rounding. A CPU is slower with it, and it has not been run on a GPU yet.",
        free=True,
    )
    args: dict[str, Any] = setting(
        {}, "Further keyword arguments of the timm model, such as depth or embed_dim."
    )
    init_from: Text | None = setting(
        None,
        "Start from this backbone: run directory, 'timm:NAME', 'torchvision:NAME', "
        "'local-dir:PATH' or a DINO checkpoint file.",
    )


class HeadSettings(Settings):
    """The DINO projection head."""

    num_prototypes: Auto | PositiveInt = setting(
        "auto", "Output width K; auto: 1024..65536 by data set size."
    )
    hidden_dim: PositiveInt = setting(2048, "Width of the hidden layers.")
    bottleneck_dim: PositiveInt = setting(256, "Width of the L2-normalised bottleneck.")
    num_layers: Annotated[int, Field(ge=1, le=8)] = setting(
        3, "Linear layers before the prototypes."
    )
    batch_norm: bool = setting(False, "Batch norm in the hidden layers.")
    unit_prototypes: bool = setting(
        True, "Keep prototype vectors at length 1 (norm_last_layer); false: learn their lengths."
    )


class TeacherSettings(Settings):
    """The EMA teacher and its targets."""

    momentum: Auto | Annotated[float, Field(ge=0, le=1)] = setting(
        "auto", "EMA coefficient at the start; auto: from horizon_images."
    )
    momentum_end: Share = setting(1.0, "EMA coefficient at the end of the cosine.")
    horizon_images: Auto | PositiveInt = setting(
        "auto",
        "EMA memory B / (1 - momentum); auto: the smaller of 256,000 and 10 % of the run, but at "
        "least 20 batches.",
        unit="images",
    )
    buffers: Literal["own", "ema", "copy"] = setting(
        "own",
        "Batch-norm statistics of the teacher. own: it normalises by its batches and tracks them "
        "itself; ema / copy: it runs in eval mode on the student's, averaged / copied.",
    )
    warmup_temp: PositiveFloat = setting(0.04, "Teacher temperature at step 0.")
    temp: PositiveFloat = setting(
        0.04, "Teacher temperature after the warm-up; 0.08 and more tends to collapse."
    )
    temp_warmup: Length = setting(
        "30%", "Length of the linear temperature warm-up.", unit="steps, 'ep' or '%'"
    )
    center_momentum: Annotated[float, Field(ge=0, lt=1)] = setting(
        0.9, "EMA coefficient of the centre."
    )
    student_temp: PositiveFloat = setting(0.1, "Student temperature.")


class OptimSettings(Settings):
    """Optimiser, schedules and length of the run."""

    name: Text = setting("adamw", "adamw, sgd or lars.")
    batch_size: PositiveInt = setting(
        256, "Images per optimiser step, over all processes and micro-batches.", unit="images"
    )
    accumulate: PositiveInt = setting(
        1,
        "Micro-batches per step: less memory, the same result but for drop path and batch norm, "
        "which see the micro-batch.",
        free=True,
    )
    shard: bool = setting(
        False,
        "Share student, teacher, gradients and optimiser state out over the processes of a "
        "torchrun job, for ViTs too large for one device; the same result, more traffic.",
        free=True,
    )
    length: RunLength = setting("100ep", "Length of the run.", unit="steps or 'ep'")
    base_lr: PositiveFloat = setting(
        5e-4, "Peak learning rate per `lr_batch` images (linear rule)."
    )
    lr_batch: PositiveInt = setting(256, "Batch size that base_lr is meant for.", unit="images")
    min_lr: Annotated[float, Field(ge=0)] = setting(1e-6, "Learning rate at the end of the cosine.")
    lr_schedule: Literal["cosine", "constant"] = setting(
        "cosine", "Shape of the learning rate after the warm-up."
    )
    warmup: Length = setting(
        "10%", "Length of the linear learning-rate warm-up.", unit="steps, 'ep' or '%'"
    )
    weight_decay: Annotated[float, Field(ge=0)] = setting(0.04, "Weight decay at the start.")
    weight_decay_end: Annotated[float, Field(ge=0)] = setting(
        0.4, "Weight decay at the end of the cosine."
    )
    sgd_momentum: Annotated[float, Field(ge=0, lt=1)] = setting(0.9, "Momentum of sgd and lars.")
    clip_grad: Annotated[float, Field(ge=0)] = setting(
        3.0, "Largest global gradient norm; 0: no clipping."
    )
    freeze_last_layer: Length = setting(
        "1%", "Prototypes stay fixed for this long.", unit="steps, 'ep' or '%'"
    )
    precision: Literal["auto", "bf16", "bf16-params", "fp16", "fp32"] = setting(
        "auto",
        "Arithmetic; auto: bf16 where the hardware has it, else fp32. bf16-params: a ViT's "
        "activations in bf16 throughout, which saves memory; weights stay fp32.",
    )
    compile: Auto | bool = setting(
        "auto",
        "torch.compile for the loss, a ViT's blocks and the colours of data.renderer=device; auto: "
        "on CUDA, where a compiler is found. The first steps wait for it.",
        free=True,
    )
    max_bad_steps: PositiveInt = setting(
        20, "Stop after this many non-finite steps in a row.", unit="steps", free=True
    )


class LogSettings(Settings):
    """What is written while training."""

    log_every: PositiveInt = setting(
        10,
        "Write metrics every so many steps; the console shows a line at most every 10 s.",
        unit="steps",
        free=True,
    )
    save_every: Interval = setting(
        "5%",
        "Write a checkpoint and the backbone this often.",
        unit="steps, 'ep' or '%'",
        free=True,
    )
    keep_checkpoints: PositiveInt = setting(2, "Checkpoints kept, newest first.", free=True)
    tensorboard: bool = setting(
        True, "Write TensorBoard files when tensorboard is installed.", free=True
    )
    tracker: Literal["none", "wandb", "mlflow"] = setting(
        "none", "Also send the metrics to this tracker.", free=True
    )


class MonitorSettings(Settings):
    """k-NN score of the teacher during training; off without `train` and `test`."""

    train: Text | None = setting(None, "Labelled images that vote, as a dataset spec.", free=True)
    test: Text | None = setting(
        None, "Labelled images that are scored; never used for training.", free=True
    )
    every: Interval = setting("10%", "How often.", unit="steps, 'ep' or '%'", free=True)
    k: PositiveInt = setting(20, "Neighbours.", free=True)
    logreg_c: PositiveFloat | None = setting(
        None,
        "Also score logistic regression with this c on the same features, as `dino-kd logreg c=C` "
        "does (such as 0.01); none: without it.",
        free=True,
    )
    max_images: PositiveInt = setting(
        10_000, "Use at most this many images of each set, evenly spaced.", unit="images", free=True
    )

    @model_validator(mode="after")
    def _both_or_neither(self) -> MonitorSettings:
        if (self.train is None) != (self.test is None):
            given, absent = ("train", "test") if self.test is None else ("test", "train")
            raise ValueError(f"{given} is given and {absent} is not; the score needs both")
        return self


class PretrainConfig(RunSettings):
    """`dino-kd pretrain`: learn a backbone from unlabelled images."""

    data: DataSettings
    crops: CropSettings = CropSettings()
    curriculum: CurriculumSettings = CurriculumSettings()
    model: ModelSettings = ModelSettings()
    head: HeadSettings = HeadSettings()
    teacher: TeacherSettings = TeacherSettings()
    optim: OptimSettings = OptimSettings()
    log: LogSettings = LogSettings()
    monitor: MonitorSettings = MonitorSettings()
