"""Everything that a pretraining has before its first step, from its settings.

`pretrain` trains it, `bench` times it.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass

import torch

from dino_kd.crop_sizes import (
    check_crop_sizes,
    check_local_crops,
    crop_curriculum,
    crop_policy,
    describe_curriculum,
)
from dino_kd.data.ahead import ahead_on
from dino_kd.data.curriculum import Curriculum
from dino_kd.data.dataset import ImageDataset
from dino_kd.data.decoded import check_channels
from dino_kd.data.loader import CropBatch, crop_batches
from dino_kd.data.packed import pack_folder
from dino_kd.data.renderers import Renderer, make_renderer
from dino_kd.data.specs import make_dataset
from dino_kd.distributed import processes_here, rank, world_size
from dino_kd.engine.compilation import choose_compile
from dino_kd.engine.optim import OPTIMIZERS, make_optimizer, parameter_groups
from dino_kd.engine.precision import DTYPES, choose_precision
from dino_kd.engine.schedules import Schedule, after_warmup, constant, cosine, linear, switch
from dino_kd.engine.sharding import WholeCopy, check_blocks, check_sharding, shard
from dino_kd.errors import ConfigError, unknown_name
from dino_kd.models.checkpointing import checkpoint_activations
from dino_kd.models.compiled_blocks import compile_blocks
from dino_kd.models.kernels import choose_kernels
from dino_kd.models.low_weights import check_low_weights
from dino_kd.models.packed_crops import check_packing
from dino_kd.presets import Plan, loader_processes, make_plan, resolve_auto
from dino_kd.pretrained import backbone_from_settings, head_from_settings
from dino_kd.rundir import check_readable, refuse_run_inside, with_absolute_path
from dino_kd.schema import PretrainConfig
from dino_kd.tasks.dino import DinoTask


@dataclass
class Training:
    """A pretraining that is ready to run.

    Attributes:
        settings: resolved: nothing is left at "auto" that decides what is learned.
        dataset: the images.
        plan: lengths in steps.
        task: on `device`; sharded when the settings say so.
        whole_teacher: makes the whole teacher of a sharded task for a score; else None.
        crops: what may happen to an image, at every step.
        renderer: makes pixels of it.
        notes: sentences for the log.
    """

    settings: PretrainConfig
    device: torch.device
    dataset: ImageDataset
    plan: Plan
    task: DinoTask
    whole_teacher: WholeCopy | None
    crops: Curriculum
    renderer: Renderer
    notes: list[str]

    def optimizer(self) -> torch.optim.Optimizer:
        """A new optimiser of the student."""
        optim, student = self.settings.optim, self.task.student
        groups = parameter_groups(student, student.head.prototype_parameters())
        return make_optimizer(optim.name, groups, momentum=optim.sgd_momentum)

    def schedules(self) -> dict[str, Schedule]:
        """Every value that moves with the step."""
        return make_schedules(self.settings, self.plan)

    def batches(self, start_step: int) -> Generator[CropBatch, None, None]:
        """This process's share of every batch from `start_step` on, to CUDA copied ahead."""
        data = self.settings.data
        made = crop_batches(
            self.dataset,
            self.crops,
            batch_size=self.settings.optim.batch_size,
            seed=self.settings.seed,
            start_step=start_step,
            total_steps=self.plan.total_steps,
            rank=rank(),
            world_size=world_size(),
            num_workers=loader_processes(data.num_workers, processes_here()),
            pin_memory=self.device.type == "cuda",
            workers=data.workers,
            renderer=self.renderer,
        )
        return ahead_on(self.device, made)

    def describe(self) -> str:
        """One sentence: what trains where."""
        settings, backbone = self.settings, self.task.student.backbone
        millions = sum(p.numel() for p in backbone.parameters()) / 1e6
        head = sum(p.numel() for p in self.task.student.head.parameters()) / 1e6
        shared = ", shared out over them" if settings.optim.shard else ""
        return (
            f"{settings.model.backbone} ({millions:.1f} M parameters, features "
            f"{backbone.embed_dim}) with a head of {head:.1f} M, on {world_size()} x "
            f"{self.device.type}{shared} in {settings.optim.precision}"
        )


def prepare(settings: PretrainConfig, device: torch.device) -> Training:
    """Check and build everything; nothing is written. Raises UserError for whatever is wrong."""
    precision = choose_precision(settings.optim.precision, device)
    compiles, about_compiling = choose_compile(settings.optim.compile, device)
    if settings.optim.shard:
        check_sharding(precision, settings.optim.name, device)
    settings = with_absolute_data(settings)
    dataset = training_images(settings)
    plan = make_plan(settings, len(dataset), world_size())
    settings, notes = resolve_auto(settings, plan, precision)
    renderer = make_renderer(settings.data.renderer, notes.append, device, compiled=compiles)
    if renderer.name == "device":
        check_channels(settings.model.in_chans)
    task = build_task(settings)
    crops = crop_curriculum(
        settings.curriculum,
        crop_policy(settings),
        task.student.backbone,
        steps=plan.steps(settings.curriculum.length),
        total_steps=plan.total_steps,
    )
    whole_teacher = place(task, settings, device)
    prepare_networks(task, settings, precision, compiles)
    notes += [about_compiling] if about_compiling else []
    notes.append(describe_curriculum(crops))
    return Training(settings, device, dataset, plan, task, whole_teacher, crops, renderer, notes)


def with_absolute_data(settings: PretrainConfig) -> PretrainConfig:
    """The training images by an absolute path, where they have one."""
    spec = with_absolute_path(settings.data.train)
    data = settings.data.model_copy(update={"train": spec})
    return settings.model_copy(update={"data": data})


def training_images(settings: PretrainConfig) -> ImageDataset:
    """The images to learn from; a sample of them is read, so that a wrong folder fails at once."""
    data = settings.data
    dataset = make_dataset(
        data.train, channels=settings.model.in_chans, download=data.download, where="data.train"
    )
    refuse_run_inside(settings.run_dir, data.train)
    check_readable(dataset, "data.train")
    pack_folder(data.pack)  # a mistake in it is told now
    return dataset


def build_task(settings: PretrainConfig) -> DinoTask:
    """Student, teacher and centre, from the seed. Raises ConfigError when sizes do not fit."""
    if settings.optim.name not in OPTIMIZERS:
        raise unknown_name("optimiser", settings.optim.name, OPTIMIZERS, "optim.name")
    for name in ("mean", "std"):
        values = getattr(settings.data, name)
        if values is not None and len(values) != settings.model.in_chans:
            raise ConfigError(
                f"data.{name}: {len(values)} numbers for model.in_chans={settings.model.in_chans}; "
                "give one for each channel"
            )
    backbone = backbone_from_settings(settings.model, settings.crops, settings.data, settings.seed)
    check_crop_sizes(settings, backbone)
    check_local_crops(settings, backbone)
    head = head_from_settings(settings.head, backbone.embed_dim)
    return DinoTask(
        backbone,
        head,
        student_temp=settings.teacher.student_temp,
        center_momentum=settings.teacher.center_momentum,
        buffers=settings.teacher.buffers,
    )


def place(task: DinoTask, settings: PretrainConfig, device: torch.device) -> WholeCopy | None:
    """Move the task to its device; with `optim.shard`, this process's slices of it.

    Returns then what makes the whole teacher for the in-training score. Raises ConfigError for a
    network that cannot be sharded.
    """
    if not settings.optim.shard:
        task.to(device)
        return None
    check_blocks(task.student.backbone)
    whole_teacher = WholeCopy(task.teacher.backbone)
    student, teacher = task.student, task.teacher
    shard([student.backbone, student.head, teacher.backbone, teacher.head], device)
    task.to(device)  # what is left: the centre
    return whole_teacher


def prepare_networks(
    task: DinoTask, settings: PretrainConfig, precision: str, compiles: bool
) -> None:
    """How the networks compute, not what: kernels, checkpointing, packing, compilation; in place.

    Raises:
        ConfigError: the network cannot do what the settings ask for.
    """
    checkpointing, sharded = settings.model.checkpoint_activations, settings.optim.shard
    if precision == "bf16-params":
        check_low_weights(task.student.backbone, checkpointing=checkpointing, sharded=sharded)
    if settings.model.pack_crops:
        backbone = task.student.backbone
        check_packing(backbone.net, backbone.name, checkpointing=checkpointing, sharded=sharded)
        task.student.packs_crops = True
    if checkpointing:
        checkpoint_activations(task.student.backbone)
    for network in (task.student, task.teacher):
        device = next(network.parameters()).device
        choose_kernels(network, device.type, DTYPES[precision])
        network.low_dtype = DTYPES[precision] if precision == "bf16-params" else None
        if compiles:
            compile_blocks(network.backbone.net)
    task.compiles_loss = compiles


def make_schedules(settings: PretrainConfig, plan: Plan) -> dict[str, Schedule]:
    """Every value that moves with the step."""
    optim, teacher, total = settings.optim, settings.teacher, plan.total_steps
    peak = plan.peak_lr

    def main_part(steps: int) -> Schedule:
        return (
            cosine(peak, optim.min_lr, steps) if optim.lr_schedule == "cosine" else constant(peak)
        )

    return {
        "lr": after_warmup(main_part, peak, plan.warmup, total),
        "weight_decay": cosine(optim.weight_decay, optim.weight_decay_end, total),
        "momentum": cosine(float(teacher.momentum), teacher.momentum_end, total),
        "teacher_temp": linear(teacher.warmup_temp, teacher.temp, plan.temp_warmup),
        "freeze_last_layer": switch(plan.freeze_last_layer),
    }
