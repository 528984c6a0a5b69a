"""Learn a backbone from unlabelled images.

    dino-kd pretrain pretrain/folder data.train=/my/photos run_dir=runs/photos
    torchrun --nproc_per_node=8 -m dino_kd pretrain pretrain/vits16_imagenet data.train=...

Reads top to bottom: check everything, build, train, save.
"""

from __future__ import annotations

import functools
from collections.abc import Generator
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor

from dino_kd.config import load_settings
from dino_kd.data.dataset import ImageDataset, labels_as, require_labels
from dino_kd.data.loader import CropBatch, crop_batches
from dino_kd.data.multicrop import CropPolicy
from dino_kd.data.specs import make_dataset
from dino_kd.distributed import (
    is_main_process,
    on_main,
    process_group,
    processes_here,
    rank,
    world_size,
)
from dino_kd.engine.checkpoint import save_checkpoint
from dino_kd.engine.health import HealthMonitor
from dino_kd.engine.hooks import BrokenImages, KnnMonitor
from dino_kd.engine.loop import Hook, Progress, fit
from dino_kd.engine.optim import OPTIMIZERS, make_optimizer, parameter_groups
from dino_kd.engine.precision import DTYPES, choose_precision
from dino_kd.engine.schedules import Schedule, after_warmup, constant, cosine, linear, switch
from dino_kd.engine.sharding import WholeCopy, check_blocks, check_sharding, gather, shard
from dino_kd.engine.signals import StopFlag
from dino_kd.errors import ConfigError, unknown_name
from dino_kd.features import extract_features
from dino_kd.files import write_tensors
from dino_kd.models.backbone import Backbone, attention_backend
from dino_kd.presets import Plan, fit_options, loader_processes, make_plan, resolve_auto, warn_about
from dino_kd.pretrained import backbone_from_settings, head_from_settings, save_backbone
from dino_kd.rundir import (
    check_readable,
    end_of_training,
    make_log,
    open_run,
    refuse_run_inside,
    restore,
    training_state,
    watched,
    with_absolute_path,
)
from dino_kd.runlog import RunLog
from dino_kd.schema import PretrainConfig
from dino_kd.tasks.dino import DinoTask


def main(argv: list[str]) -> int:
    """`dino-kd pretrain [CONFIG] a.b=c ...`."""
    pretrain(load_settings(PretrainConfig, argv, command="pretrain"))
    return 0


def pretrain(settings: PretrainConfig) -> Path:
    """Run one pretraining from its settings to ``run_dir/backbone``; returns the run directory.

    Every process of a torchrun job calls this.

    Raises:
        UserError: a wrong setting or data set (before the first step), too many broken images, a
            full disk, divergence, or an interruption by a signal (after a checkpoint).
    """
    stop = StopFlag()
    with stop.listening(), process_group(settings.device) as device, ExitStack() as cleanup:
        # Check: nothing is written until all of this has passed.
        precision = choose_precision(settings.optim.precision, device)
        if settings.optim.shard:
            check_sharding(precision, settings.optim.name, device)
        settings = with_absolute_data(settings)
        dataset = training_images(settings)
        plan = make_plan(settings, len(dataset), world_size())
        settings, notes = resolve_auto(settings, plan, precision)
        monitor_sets = monitor_images(settings)
        task = build_task(settings)
        whole_teacher = place(task, settings, device)
        for network in (task.student, task.teacher):
            attention_backend(network.backbone, device.type, DTYPES[precision])

        # Open the run directory, new or continued.
        run_dir = Path(settings.run_dir)
        log = make_log(settings)
        cleanup.callback(log.close)
        continued = on_main(
            functools.partial(
                open_run, settings, log, command="pretrain", train_on="model.init_from"
            )
        )
        log.write_environment({"device": str(device), "precision": precision})
        for line in [describe_run(settings, task, device, precision), plan.describe(), *notes]:
            log.say(line)
        for line in [] if continued else warn_about(settings, plan):
            log.warn(line)

        # Build what trains.
        head = task.student.head
        groups = parameter_groups(task.student, head.prototype_parameters())
        optimizer = make_optimizer(
            settings.optim.name, groups, momentum=settings.optim.sgd_momentum
        )
        scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
        progress, broken_before = Progress(), list[str]()
        if continued:
            progress, broken_before = restore_run(run_dir, task, optimizer, scaler, plan, log)
        log.drop_from(progress.step + 1)
        broken = BrokenImages(
            log.broken,
            stop,
            run_dir=run_dir,
            num_images=len(dataset),
            max_share=settings.data.max_broken_share,
            known=broken_before,
        )
        hooks: list[Hook] = [
            HealthMonitor(
                log.warn, num_prototypes=head.num_prototypes, total_steps=plan.total_steps
            ),
            broken,
        ]
        if monitor_sets:
            hooks.append(
                knn_monitor(settings, plan, monitor_sets, task, whole_teacher, precision, log)
            )

        def save(progress: Progress) -> None:
            broken.exchange()
            slices = training_state(
                progress, task, optimizer, scaler, num_images=plan.num_images, broken=broken.paths
            )
            state = gather(slices)

            def write() -> None:
                keep = settings.log.keep_checkpoints
                save_checkpoint(run_dir / "checkpoints", progress.step, state, keep=keep)
                save_result(run_dir, task, state["task"])

            on_main(write)

        # Train.
        batches = training_batches(settings, dataset, plan, progress.step, device)
        cleanup.callback(batches.close)
        progress = fit(
            task,
            (batch.crops for batch in watched(batches, broken, run_dir, progress.step)),
            optimizer,
            make_schedules(settings, plan),
            fit_options(settings, plan, device),
            progress=progress,
            scaler=scaler,
            log=log,
            save=save,
            hooks=hooks,
            stop=stop,
        )
        finish(settings, progress, broken, log)
    return run_dir


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
    return dataset


def monitor_images(settings: PretrainConfig) -> tuple[ImageDataset, ImageDataset] | None:
    """The labelled sets of the in-training k-NN, if both are set."""
    monitor = settings.monitor
    if monitor.train is None or monitor.test is None:
        return None
    sets = []
    for name, spec in (("monitor.train", monitor.train), ("monitor.test", monitor.test)):
        dataset = make_dataset(
            spec, channels=settings.model.in_chans, download=settings.data.download, where=name
        )
        require_labels(dataset, name)
        sets.append(dataset)
    labels_as(sets[1], sets[0].class_names or [], "monitor.test")  # same classes, or an error now
    return sets[0], sets[1]


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


def check_crop_sizes(settings: PretrainConfig, backbone: Backbone) -> None:
    """Both crop sizes must be whole patches."""
    patch = backbone.patch_size or 1
    names = ["global_size"] + (["local_size"] if settings.crops.num_local_crops else [])
    problems = []
    for name in names:
        for side in as_height_width(getattr(settings.crops, name)):
            if side % patch:
                below, above = side // patch * patch, (side // patch + 1) * patch
                near = " or ".join(str(s) for s in (below, above) if s)
                problems.append(
                    f"crops.{name}: {side} px is not a multiple of the {patch} px patch of "
                    f"{settings.model.backbone}; use {near}"
                )
    if problems:
        raise ConfigError(dict.fromkeys(problems))


def check_local_crops(settings: PretrainConfig, backbone: Backbone) -> None:
    """Networks of a fixed input size cannot take smaller local crops: better known now."""
    height, width = as_height_width(settings.crops.local_size)
    if not settings.crops.num_local_crops or (height, width) == backbone.img_size:
        return
    was_training = backbone.training
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            backbone.eval()(torch.zeros(1, backbone.in_chans, height, width))
    except (RuntimeError, ValueError, AssertionError) as error:
        raise ConfigError(
            f"crops.local_size: {settings.model.backbone} does not take {height} x {width} px "
            f"beside {backbone.img_size[0]} x {backbone.img_size[1]} ({error}); set local_size to "
            "global_size, or num_local_crops=0"
        ) from None
    finally:
        backbone.train(was_training)


def as_height_width(size: int | tuple[int, int]) -> tuple[int, int]:
    """One side or (height, width) as (height, width)."""
    return (size, size) if isinstance(size, int) else size


def restore_run(
    run_dir: Path,
    task: DinoTask,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    plan: Plan,
    log: RunLog,
) -> tuple[Progress, list[str]]:
    """The newest checkpoint into everything that trains: progress, and broken images so far."""
    state = restore(
        run_dir, log, task, optimizer, scaler,
        num_images=plan.num_images, total_steps=plan.total_steps, images="data.train",
    )  # fmt: skip
    if state is None:
        return Progress(), []
    if is_main_process():
        save_result(
            run_dir, task, state["task"]
        )  # a kill may have come between the checkpoint and the backbone
    return Progress(**state["progress"]), state["broken"]


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


def crop_policy(settings: PretrainConfig) -> CropPolicy:
    """The augmentation settings as plain values."""
    values = settings.crops.model_dump(exclude={"preset"})
    for name in ("global_size", "local_size"):
        values[name] = as_height_width(values[name])
    return CropPolicy(**values)


def training_batches(
    settings: PretrainConfig,
    dataset: ImageDataset,
    plan: Plan,
    start_step: int,
    device: torch.device,
) -> Generator[CropBatch, None, None]:
    """This process's share of every batch from `start_step` on."""
    return crop_batches(
        dataset,
        crop_policy(settings),
        batch_size=settings.optim.batch_size,
        seed=settings.seed,
        start_step=start_step,
        total_steps=plan.total_steps,
        rank=rank(),
        world_size=world_size(),
        num_workers=loader_processes(settings.data.num_workers, processes_here()),
        pin_memory=device.type == "cuda",
    )


def knn_monitor(
    settings: PretrainConfig,
    plan: Plan,
    sets: tuple[ImageDataset, ImageDataset],
    task: DinoTask,
    whole_teacher: WholeCopy | None,
    precision: str,
    log: RunLog,
) -> KnnMonitor:
    """The hook that scores the teacher while it trains, of a sharded one a whole copy."""
    backbone = task.teacher.backbone
    extract = functools.partial(
        extract_features,
        size=backbone.img_size,
        num_workers=loader_processes(settings.data.num_workers, processes_here()),
        device=next(backbone.parameters()).device,
        precision="bf16" if precision == "bf16" else "fp32",
    )
    return KnnMonitor(
        backbone,
        *sets,
        extract=whole_teacher.instead(extract) if whole_teacher else extract,
        every=plan.monitor_every,
        total_steps=plan.total_steps,
        k=settings.monitor.k,
        max_images=settings.monitor.max_images,
        say=log.say,
    )


def save_result(run_dir: Path, task: DinoTask, state: dict[str, Tensor]) -> None:
    """The teacher as a timm folder, and both heads beside it, from the task's whole state dict."""

    def below(prefix: str) -> dict[str, Tensor]:
        return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}

    save_backbone(task.teacher.backbone, run_dir / "backbone", below("teacher.backbone.net."))
    heads = {
        f"{branch}.{name}": tensor
        for branch in ("teacher", "student")
        for name, tensor in below(f"{branch}.head.").items()
    }
    write_tensors(run_dir / "heads.safetensors", heads)


def describe_run(
    settings: PretrainConfig, task: DinoTask, device: torch.device, precision: str
) -> str:
    """One sentence: what trains where."""
    backbone = task.student.backbone
    millions = sum(p.numel() for p in backbone.parameters()) / 1e6
    head = sum(p.numel() for p in task.student.head.parameters()) / 1e6
    shared = ", shared out over them" if settings.optim.shard else ""
    return (
        f"{settings.model.backbone} ({millions:.1f} M parameters, features {backbone.embed_dim}) "
        f"with a head of {head:.1f} M, on {world_size()} x {device.type}{shared} in {precision}"
    )


def finish(settings: PretrainConfig, progress: Progress, broken: BrokenImages, log: RunLog) -> None:
    """Say how it ended. Raises DataError or Interrupted when it ended early."""
    run_dir = settings.run_dir
    end_of_training(run_dir, progress, broken, log, command="pretrain")
    log.say(f"done: {progress.step:,} steps; the backbone is in {run_dir}/backbone")
    log.say(f"score it: dino-kd knn backbone={run_dir} train=LABELLED_IMAGES test=OTHER_IMAGES")
