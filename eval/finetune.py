"""Train a backbone and a linear classifier on labelled images, and score them on others.

    dino-kd finetune backbone=runs/x train=/images/train test=/images/test run_dir=runs/x_tuned
    python -m eval.finetune backbone=random:vit_small_patch16_224 train=... test=... run_dir=...
    torchrun --nproc_per_node=8 -m eval.finetune backbone=runs/x train=... test=... run_dir=...

Reads top to bottom: check everything, train, score. docs/finetune.md describes the recipe.
"""

from __future__ import annotations

import functools
import sys
from contextlib import ExitStack
from typing import Any

import torch

from dino_kd.config import load_settings
from dino_kd.data.renderers import make_renderer
from dino_kd.distributed import is_main_process, on_main, process_group, world_size
from dino_kd.engine.checkpoint import save_checkpoint
from dino_kd.engine.hooks import BestWeights, BrokenImages
from dino_kd.engine.loop import Hook, Progress, fit
from dino_kd.engine.optim import make_optimizer, scaled_groups
from dino_kd.engine.precision import DTYPES, choose_precision
from dino_kd.engine.signals import StopFlag
from dino_kd.files import write_json
from dino_kd.models.kernels import choose_kernels
from dino_kd.models.layers import with_drop_path
from dino_kd.presets import fit_options, make_span, single_view_schedules
from dino_kd.rundir import (
    end_of_training,
    make_log,
    open_run,
    restore,
    training_state,
    with_absolute_path,
)
from dino_kd.schema import FinetuneConfig
from dino_kd.tasks.classify import ClassifyTask, Mixing

from .labelled import open_labelled_sets, training_batches
from .results import Stopwatch, notes_on_sets
from .subject import open_backbone
from .tuned import Run, describe_run, evaluate, place_classes, report, save_networks, table


def main(argv: list[str]) -> int:
    """`dino-kd finetune [CONFIG] a.b=c ...`; returns the exit code."""
    finetune(load_settings(FinetuneConfig, argv, command="finetune"))
    return 0


def finetune(settings: FinetuneConfig) -> dict[str, Any]:
    """From settings to ``run_dir/eval/finetune.json``; every process of a torchrun job calls this.

    Returns the result as it is written (empty on other processes than the main one).

    Raises:
        UserError: a wrong setting, backbone or data set (before the first step), too many broken
            images, a full disk, divergence, or an interruption by a signal (after a checkpoint).
    """
    stop, watch = StopFlag(), Stopwatch()
    with stop.listening(), process_group(settings.device) as device, ExitStack() as cleanup:
        # Check: nothing is written until all of this has passed.
        run = prepare(settings, device)
        cleanup.callback(run.log.close)
        claim = functools.partial(
            open_run, run.settings, run.log, command="finetune", train_on="backbone"
        )
        continued = on_main(claim)
        run.log.write_environment(
            {
                "device": str(device),
                "precision": run.settings.optim.precision,
                "renderer": make_renderer().name,
            }
        )
        for line in describe_run(run):
            run.log.say(line)
        watch.lap("preparation")

        # Train.
        best, step = train(run, continued, stop, cleanup)
        watch.lap("training")

        # Score: the chosen weights, on images that had no part in choosing them.
        if best is not None:
            run.task.load_state_dict(best["task"])
            step = best["step"]
        on_main(functools.partial(save_networks, run))
        places, bank = place_classes(run, run.sets.test, run.sets.test_labels)
        watch.lap("scoring")
        if not is_main_process():
            return {}
        metrics = dict(evaluate(places))
        if best is not None:
            metrics["holdout_top1"] = best["top1"]
        result = report(run, metrics, bank, step, watch.seconds)
        write_json(run.folder / "eval" / "finetune.json", result)
        for line in table(run, result):
            run.log.say(line)
    return result


def prepare(settings: FinetuneConfig, device: torch.device) -> Run:
    """Read and build everything. Raises UserError for whatever would fail later."""
    settings = resolve(settings, choose_precision(settings.optim.precision, device))
    optim, augment = settings.optim, settings.augment
    backbone, origin = open_backbone(settings, device)
    sets = open_labelled_sets(settings, backbone.in_chans)
    span = make_span(
        len(sets.train),
        batch_size=optim.batch_size,
        length=optim.length,
        warmup=optim.warmup,
        accumulate=optim.accumulate,
        world_size=world_size(),
        images=f"train: {sets.train.spec}",
    )
    classes = len(sets.class_names)
    torch.manual_seed(settings.seed)  # of the classifier
    task = ClassifyTask(
        with_drop_path(backbone, settings.drop_path),
        classes,
        label_smoothing=augment.label_smoothing,
        mixing=Mixing(classes, mixup=augment.mixup, cutmix=augment.cutmix, share=augment.mix_share),
    ).to(device)
    choose_kernels(task.backbone, device.type, DTYPES[optim.precision])
    groups = scaled_groups(task, task.lr_scales(float(optim.layer_decay)))
    log = make_log(settings)
    optimizer = make_optimizer(optim.name, groups, momentum=optim.sgd_momentum)
    return Run(
        settings, device, origin, sets, span, task, optimizer, log,
        notes=notes_on_sets(sets.train, sets.test),
    )  # fmt: skip


def resolve(settings: FinetuneConfig, precision: str) -> FinetuneConfig:
    """Every `auto` that shapes the result, and absolute paths, so that a resume finds the same."""
    decay = settings.optim.layer_decay
    if decay == "auto":
        is_untrained = settings.branch == "untrained" or settings.backbone.startswith("random:")
        decay = 1.0 if is_untrained else 0.75
    optim = settings.optim.model_copy(update={"precision": precision, "layer_decay": decay})
    paths = {
        name: with_absolute_path(getattr(settings, name)) for name in ("backbone", "train", "test")
    }
    return settings.model_copy(update={"optim": optim, **paths})


def train(
    run: Run, continued: bool, stop: StopFlag, cleanup: ExitStack
) -> tuple[dict[str, Any] | None, int]:
    """All steps that are left; returns the best weights (None: the last ones), and the step.

    Raises UserError when the run ends early, after a checkpoint.
    """
    settings, span, task, log = run.settings, run.span, run.task, run.log
    optim = settings.optim
    scaler = torch.amp.GradScaler(run.device.type, enabled=optim.precision == "fp16")
    state = None
    if continued:
        state = restore(
            run.folder, log, task, run.optimizer, scaler,
            num_images=span.num_images, total_steps=span.total_steps, images="train",
        )  # fmt: skip
    progress = Progress(**state["progress"]) if state else Progress()
    start = progress.step
    if state:
        run.origin = state["origin"]  # whatever the backbone's source has become since
        run.notes.append(f"continued from step {start}; seconds count what came after")
    log.drop_from(start + 1)
    broken = BrokenImages(
        log.broken,
        stop,
        run_dir=run.folder,
        num_images=span.num_images,
        max_share=settings.max_broken_share,
        known=state["broken"] if state else (),
        setting="max_broken_share",
    )
    hooks: list[Hook] = [broken]
    selection = select_best(run) if len(run.sets.held_out) else None
    if selection is not None:
        selection.best = state["best"] if state else None
        hooks.append(selection)

    def save(progress: Progress) -> None:
        broken.exchange()

        def write() -> None:
            trained = training_state(
                progress, task, run.optimizer, scaler,
                num_images=span.num_images, broken=broken.paths,
            )  # fmt: skip
            trained |= {"origin": run.origin, "best": selection.best if selection else None}
            keep = settings.log.keep_checkpoints
            save_checkpoint(run.folder / "checkpoints", progress.step, trained, keep=keep)
            if selection is None:
                save_networks(run)

        on_main(write)

    batches = training_batches(
        settings, run.sets, task.backbone.img_size, span, start, run.device, broken
    )
    cleanup.callback(batches.close)  # type: ignore[attr-defined]
    progress = fit(
        task,
        batches,
        run.optimizer,
        single_view_schedules(settings.optim, span),
        fit_options(settings, span, run.device),
        progress=progress,
        scaler=scaler,
        log=log,
        save=save,
        hooks=hooks,
        stop=stop,
    )
    end_of_training(settings.run_dir, progress, broken, log, command="finetune")
    if broken.paths:
        run.notes.append(f"{len(broken.paths)} broken training images were replaced by others")
    return (selection.best if selection else None), progress.step


def select_best(run: Run) -> BestWeights:
    """The hook that scores the held-out part of train and keeps the best weights."""

    def top1() -> float:
        places, _ = place_classes(run, run.sets.held_out, run.sets.held_out_labels)
        return dict(evaluate(places))["top1"]

    return BestWeights(
        top1,
        every=max(1, run.span.steps(run.settings.select_every)),
        total_steps=run.span.total_steps,
        say=run.log.say,
        on_better=lambda: on_main(functools.partial(save_networks, run)),
    )


if __name__ == "__main__":
    from dino_kd import cli

    sys.exit(cli.run(main, sys.argv[1:]))
