"""Learn a backbone from unlabelled images.

    dino-kd pretrain pretrain/folder data.train=/my/photos run_dir=runs/photos
    torchrun --nproc_per_node=8 -m dino_kd pretrain pretrain/vits16_imagenet data.train=...

Reads top to bottom: check everything, build, train, save.
"""

from __future__ import annotations

import functools
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor

from dino_kd.config import load_settings
from dino_kd.crop_sizes import size_changes
from dino_kd.data.dataset import (
    ImageDataset,
    labels_as,
    notes_on_shared_images,
    require_labels,
)
from dino_kd.data.packed import packed
from dino_kd.data.specs import make_dataset
from dino_kd.distributed import is_main_process, on_main, process_group, processes_here
from dino_kd.engine.checkpoint import save_checkpoint
from dino_kd.engine.health import HealthMonitor
from dino_kd.engine.hooks import BrokenImages, KnnMonitor
from dino_kd.engine.loop import Hook, Progress, fit
from dino_kd.engine.sharding import gather
from dino_kd.engine.signals import StopFlag
from dino_kd.features import extract_features
from dino_kd.files import write_tensors
from dino_kd.presets import Plan, fit_options, loader_processes, warn_about
from dino_kd.pretrained import save_backbone
from dino_kd.rundir import (
    end_of_training,
    make_log,
    open_run,
    restore,
    training_state,
    watched,
)
from dino_kd.runlog import RunLog
from dino_kd.schema import PretrainConfig
from dino_kd.tasks.dino import DinoTask
from dino_kd.training import Training, prepare


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
        training = prepare(settings, device)
        settings, plan, task = training.settings, training.plan, training.task
        precision = settings.optim.precision
        monitor_sets = monitor_images(settings)

        # Open the run directory, new or continued.
        run_dir = Path(settings.run_dir)
        log = make_log(settings)
        cleanup.callback(log.close)
        continued = on_main(
            functools.partial(
                open_run, settings, log, command="pretrain", train_on="model.init_from"
            )
        )
        log.write_environment(
            {"device": str(device), "precision": precision, "renderer": training.renderer.name}
        )
        for line in [training.describe(), plan.describe(), *training.notes]:
            log.say(line)
        for line in [] if continued else warn_about(settings, plan):
            log.warn(line)
        for line in notes_on_shared_images(*monitor_sets) if monitor_sets and log.is_main else []:
            log.warn(f"monitor: {line}")

        # Build what trains.
        data = settings.data
        training.dataset = packed(
            training.dataset, data.pack, limit_gb=data.pack_limit, say=log.say
        )
        optimizer = training.optimizer()
        scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
        progress, broken_before = Progress(), list[str]()
        if continued:
            progress, broken_before = restore_run(run_dir, task, optimizer, scaler, plan, log)
        log.drop_from(progress.step + 1)
        broken = BrokenImages(
            log.broken,
            stop,
            run_dir=run_dir,
            num_images=plan.num_images,
            max_share=settings.data.max_broken_share,
            known=broken_before,
        )
        hooks: list[Hook] = [
            HealthMonitor(
                log.warn,
                num_prototypes=task.student.head.num_prototypes,
                total_steps=plan.total_steps,
            ),
            broken,
            size_changes(training.crops, log.say),
        ]
        if monitor_sets:
            hooks.append(knn_monitor(training, monitor_sets, log))

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
        batches = training.batches(progress.step)
        cleanup.callback(batches.close)
        progress = fit(
            task,
            (batch.crops for batch in watched(batches, broken, run_dir, progress.step)),
            optimizer,
            training.schedules(),
            fit_options(settings, plan, device, training.renderer.name),
            progress=progress,
            scaler=scaler,
            log=log,
            save=save,
            hooks=hooks,
            stop=stop,
        )
        finish(settings, progress, broken, log)
    return run_dir


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


def knn_monitor(
    training: Training, sets: tuple[ImageDataset, ImageDataset], log: RunLog
) -> KnnMonitor:
    """The hook that scores the teacher while it trains, of a sharded one a whole copy."""
    settings, plan, backbone = training.settings, training.plan, training.task.teacher.backbone
    extract = functools.partial(
        extract_features,
        size=backbone.img_size,
        num_workers=loader_processes(settings.data.num_workers, processes_here()),
        device=training.device,
        precision="bf16" if settings.optim.precision.startswith("bf16") else "fp32",
    )
    whole = training.whole_teacher
    return KnnMonitor(
        backbone,
        *sets,
        extract=whole.instead(extract) if whole else extract,
        every=plan.monitor_every,
        total_steps=plan.total_steps,
        k=settings.monitor.k,
        logreg_c=settings.monitor.logreg_c,
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


def finish(settings: PretrainConfig, progress: Progress, broken: BrokenImages, log: RunLog) -> None:
    """Say how it ended. Raises DataError or Interrupted when it ended early."""
    run_dir = settings.run_dir
    end_of_training(run_dir, progress, broken, log, command="pretrain")
    log.say(f"done: {progress.step:,} steps; the backbone is in {run_dir}/backbone")
    log.say(f"score it: dino-kd knn backbone={run_dir} train=LABELLED_IMAGES test=OTHER_IMAGES")
