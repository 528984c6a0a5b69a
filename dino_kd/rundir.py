"""The life of a run directory: claimed, continued, saved and closed; shared by all that train.

Every process calls these functions; the main one touches the files.
"""

from __future__ import annotations

import functools
from collections.abc import Generator, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dino_kd.config import changed_settings, dump_settings, load_settings
from dino_kd.data.dataset import ImageDataset
from dino_kd.data.images import BrokenImage
from dino_kd.data.loader import CropBatch
from dino_kd.data.pictures import save_crop_picture
from dino_kd.distributed import is_main_process, on_main
from dino_kd.engine.checkpoint import list_checkpoints, load_checkpoint, read_checkpoint
from dino_kd.engine.hooks import BrokenImages
from dino_kd.engine.loop import Progress
from dino_kd.engine.sharding import optimizer_slices, slices_like
from dino_kd.errors import CheckpointError, ConfigError, DataError, Interrupted
from dino_kd.files import remove_leftovers, write_text
from dino_kd.runlog import RunLog
from dino_kd.schema import DistillConfig, FinetuneConfig, PretrainConfig, RunSettings


def with_absolute_path(spec: str) -> str:
    """A relative folder, list or pattern of tar files made absolute: a resume works anywhere."""
    if spec.startswith("webdataset:"):
        return f"webdataset:{Path(spec.removeprefix('webdataset:')).expanduser().absolute()}"
    path = Path(spec.removeprefix("folder:")).expanduser()
    if not path.exists():
        return spec
    prefix = "folder:" if spec.startswith("folder:") else ""
    return f"{prefix}{path.absolute()}"


def refuse_run_inside(run_dir: str, spec: str) -> None:
    """Raise ConfigError when the run would write among the training images of `spec`."""
    root = Path(spec.removeprefix("folder:")).expanduser()
    if root.is_dir() and Path(run_dir).resolve().is_relative_to(root.resolve()):
        raise ConfigError(
            f"run_dir: {run_dir} lies inside the training folder {root}, which would then "
            "hold this run's own pictures; choose a folder outside it"
        )


def check_readable(dataset: ImageDataset, where: str) -> None:
    """Read a sample of the images, so that a wrong folder fails at once. Raises DataError."""
    reasons = []
    for index in {0, len(dataset) // 3, 2 * len(dataset) // 3, len(dataset) - 1}:
        try:
            dataset.read(index)
            return
        except BrokenImage as error:
            reasons.append(f"{error.path}: {error.reason}")
    raise DataError(
        f"{where}: none of {len(reasons)} sampled images can be read:\n" + "\n".join(reasons)
    )


def make_log(settings: PretrainConfig | FinetuneConfig | DistillConfig) -> RunLog:
    """The log of a run; it writes nothing yet."""
    return RunLog(
        settings.run_dir,
        is_main=is_main_process(),
        tensorboard=settings.log.tensorboard,
        tracker=settings.log.tracker,
    )


def open_run(settings: RunSettings, log: RunLog, *, command: str, train_on: str) -> bool:
    """Take the run directory and store the settings; returns whether an earlier run goes on.

    Args:
        settings: resolved; stored as ``config.yaml``.
        log: of the same directory; gets the lock.
        command: whose settings these are.
        train_on: how to start another run from this one's weights, for the message.

    Raises:
        CheckpointError: there is nothing to resume.
        ConfigError: there is a run that is not to be resumed, or one whose fixed settings differ.
    """
    run_dir = Path(settings.run_dir)
    exists = (run_dir / "config.yaml").is_file()
    if settings.resume is True and not exists:
        raise CheckpointError(
            f"resume=true, but {run_dir} holds no run; check run_dir, or start one without resume"
        )
    log.lock()
    if settings.resume is False and exists:
        saved = list_checkpoints(run_dir / "checkpoints")
        state = f"last checkpoint {saved[0].name}" if saved else "no checkpoint yet"
        raise ConfigError(
            f"run_dir: {run_dir} already holds a run ({state}); add resume=true to continue it, or "
            "choose another run_dir"
        )
    if exists:
        _refuse_changes(settings, run_dir, command, train_on)
    for folder in (run_dir, run_dir / "checkpoints", run_dir / "backbone"):
        remove_leftovers(folder)
    # Without `resume`, so that the file can start another run.
    stored = settings.model_copy(update={"resume": False})
    write_text(run_dir / "config.yaml", dump_settings(stored))
    return exists


def _refuse_changes(settings: RunSettings, run_dir: Path, command: str, train_on: str) -> None:
    """A continued run keeps all settings that shape its result. Raises ConfigError with a diff."""
    stored = load_settings(type(settings), [str(run_dir / "config.yaml")], command=command)
    fixed = [
        f"  {path}: {old!r} -> {new!r}"
        for path, old, new, free in changed_settings(stored, settings)
        if not free
    ]
    if fixed:
        raise ConfigError(
            f"these settings cannot change when {run_dir} is resumed (stored -> given):\n"
            + "\n".join(fixed)
            + "\nGive the stored values, or start a new run in another run_dir; to train on from "
            f"these weights, give it {train_on}={run_dir}."
        )


def watched(
    batches: Generator[CropBatch, None, None],
    broken: BrokenImages,
    run_dir: str | Path,
    start_step: int,
) -> Generator[CropBatch, None, None]:
    """The same batches; broken images are reported, and a new run's first batch is drawn.

    ``crops.png`` shows what the network really sees. Closing this closes `batches`.
    """
    try:
        for step, batch in enumerate(batches, start=start_step):
            broken.record(batch.broken)
            if step == 0 and is_main_process():
                save_crop_picture(batch.crops, Path(run_dir) / "crops.png")
            yield batch
    finally:
        batches.close()


def training_state(
    progress: Progress,
    task: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    *,
    num_images: int,
    broken: Iterable[str],
) -> dict[str, Any]:
    """What a checkpoint holds, and `restore` reads; of a sharded task it has yet to be gathered."""
    return {
        "step": progress.step,
        "progress": progress.state_dict(),
        "task": task.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scaler": scaler.state_dict(),
        "num_images": num_images,
        "broken": sorted(broken),
    }


def restore(
    run_dir: Path,
    log: RunLog,
    task: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    *,
    num_images: int,
    total_steps: int,
    images: str,
) -> dict[str, Any] | None:
    """Load the newest undamaged checkpoint into everything that trains; returns it, None for none.

    The main process chooses, so that all load the same one. Raises DataError, naming the setting
    `images`, when the run was started on another number of images.
    """
    chosen = on_main(functools.partial(_newest_checkpoint, run_dir, log))
    if chosen is None:
        log.say(f"{run_dir} has no checkpoint yet: starting from step 0")
        return None
    state = read_checkpoint(chosen)
    if state["num_images"] != num_images:
        raise DataError(
            f"{images}: the run was started on {state['num_images']} images, now there are "
            f"{num_images}; the order of the data would change. Restore the data set, or "
            "start a new run"
        )
    task.load_state_dict(slices_like(state["task"], task))
    optimizer.load_state_dict(optimizer_slices(state["optimizer"], optimizer))
    scaler.load_state_dict(state["scaler"])
    log.say(f"resuming {chosen} at step {state['step']:,} of {total_steps:,}")
    return state


def _newest_checkpoint(run_dir: Path, log: RunLog) -> Path | None:
    """The newest undamaged checkpoint, warning about damaged ones; None before the first."""
    if not list_checkpoints(run_dir / "checkpoints"):
        return None
    _, folder, warnings = load_checkpoint(run_dir / "checkpoints")
    for line in warnings:
        log.warn(line)
    return folder


def end_of_training(
    run_dir: str, progress: Progress, broken: BrokenImages, log: RunLog, *, command: str
) -> None:
    """Report broken images. Raises DataError or Interrupted when the run ended early."""
    if broken.too_many():
        log.record(broken.verdict())
        raise DataError(broken.verdict())
    if broken.paths:
        log.warn(
            f"{len(broken.paths)} images could not be read and were replaced by others; they are "
            f"listed in {run_dir}/broken_images.txt"
        )
    if progress.stopped:
        reason = (
            f"stopped after step {progress.step}: {progress.stopped}. Everything is saved; "
            f"continue with: dino-kd {command} {run_dir} resume=true"
        )
        log.record(reason)
        raise Interrupted(reason)
