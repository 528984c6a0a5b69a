"""Teach a small network what a backbone knows.

    dino-kd distill distill/labels data.train=/images teacher.backbone=runs/x run_dir=runs/small
    torchrun --nproc_per_node=8 -m dino_kd distill ...

Reads top to bottom: check everything, build, train, save, score. docs/distill.md has the recipes.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dino_kd.data.loader import EvalTransform, image_batches
from dino_kd.data.mixing import Views
from dino_kd.data.packed import packed
from dino_kd.data.renderers import Renderer, describe_renderer, make_renderer
from dino_kd.distill.cache import TeacherCache, teacher_folder
from dino_kd.distill.images import TrainingImages, open_images, view_batches, view_policies
from dino_kd.distill.teachers import match_classes, number_of_logits, open_teacher, randomise
from dino_kd.distill.terms import make_terms, needs_labels, needs_logits
from dino_kd.distributed import on_main, process_group, world_size
from dino_kd.engine.checkpoint import save_checkpoint
from dino_kd.engine.fidelity import FidelityMonitor
from dino_kd.engine.hooks import BrokenImages, evenly_spaced
from dino_kd.engine.loop import Hook, Progress, fit
from dino_kd.engine.optim import OPTIMIZERS, make_optimizer, parameter_groups
from dino_kd.engine.precision import DTYPES, choose_precision
from dino_kd.engine.schedules import Schedule, is_time, ramped
from dino_kd.engine.signals import StopFlag
from dino_kd.errors import CheckpointError, ConfigError, unknown_name
from dino_kd.features import default_resize
from dino_kd.files import write_tensors
from dino_kd.models.backbone import Backbone, as_size, check_input_size
from dino_kd.models.batch_norm import recalibrate
from dino_kd.models.classifier_file import write_classifier
from dino_kd.models.kernels import choose_kernels
from dino_kd.presets import Span, fit_options, make_span, single_view_schedules
from dino_kd.pretrained import backbone_from_settings, save_backbone
from dino_kd.rundir import (
    end_of_training,
    make_log,
    open_run,
    restore,
    training_state,
    with_absolute_path,
)
from dino_kd.runlog import RunLog, read_rows
from dino_kd.schema import CropSettings, DistillConfig, ModelSettings
from dino_kd.tasks.distill import DistillTask, Student, needed_taps, teacher_of
from dino_kd.tasks.teacher import Teacher
from dino_kd.terms.term import learns_scales

PROJECTORS_FILE = "projectors.safetensors"
_FIT_IMAGES = (64, 2048)  # at least and at most, to learn the scales of a teacher's features
_ROWS_PER_COLUMN = 100  # of them for every column: PHI-S needs 20


@dataclass
class Lesson:
    """One distillation: what it is made of."""

    settings: DistillConfig
    device: torch.device
    images: TrainingImages
    span: Span
    teachers: list[Teacher]
    task: DistillTask
    weights: dict[str, float]
    class_names: list[str] | None
    log: RunLog
    renderer: Renderer
    notes: list[str] = field(default_factory=list)

    @property
    def run_dir(self) -> Path:
        """The run directory."""
        return Path(self.settings.run_dir)

    def batches(
        self, start_step: int, total_steps: int, broken: BrokenImages
    ) -> Generator[Views, None, None]:
        """This process's share of every batch from `start_step` on; see `view_batches`."""
        return view_batches(
            self.settings, self.images, self.task.student.backbone.img_size, self.renderer,
            start_step=start_step, total_steps=total_steps, device=self.device, broken=broken,
        )  # fmt: skip


def distill(settings: DistillConfig, *, control: bool = False) -> Path:
    """Run one distillation from its settings to ``run_dir/backbone``; returns the run directory.

    Every process of a torchrun job calls this.

    Args:
        settings: its `arms` and `students` are not looked at.
        control: teachers get random weights.

    Raises:
        UserError: a wrong setting, teacher or data set (before the first step), too many broken
            images, a full disk, divergence, or an interruption by a signal (after a checkpoint).
    """
    stop = StopFlag()
    with stop.listening(), process_group(settings.device) as device, ExitStack() as cleanup:
        # Check: nothing is written until all of this has passed.
        lesson = prepare(settings, device, control=control)
        log, task = lesson.log, lesson.task
        cleanup.callback(log.close)
        claim = functools.partial(
            open_run, lesson.settings, log, command="distill", train_on="student.init_from"
        )
        continued = on_main(claim)
        log.write_environment(
            {
                "device": str(device),
                "precision": lesson.settings.optim.precision,
                "renderer": lesson.renderer.name,
            }
        )
        for line in describe(lesson):
            log.say(line)

        # Train.
        before = [teacher.fingerprint() for teacher in lesson.teachers]
        progress = train(lesson, continued, stop, cleanup)
        if before != [teacher.fingerprint() for teacher in lesson.teachers]:
            raise CheckpointError("the teacher changed while the student learned from it: a bug")

        # Save: the student with statistics of unmixed images, projectors apart.
        if recalibrates(lesson):
            clean = clean_batches(lesson, lesson.settings.recalibrate)
            recalibrate(task.product.backbone, clean, device)
        on_main(functools.partial(save_networks, lesson))
        log.say(f"done: {progress.step:,} steps; the student is in {lesson.run_dir}/backbone")
        if settings.data.test is None:
            log.say(
                f"score it: dino-kd knn backbone={lesson.run_dir} train=LABELLED_IMAGES "
                "test=OTHER_IMAGES"
            )
    return lesson.run_dir


def prepare(settings: DistillConfig, device: torch.device, *, control: bool = False) -> Lesson:
    """Read and build everything. Raises UserError for whatever would fail later."""
    settings = resolve(settings, choose_precision(settings.optim.precision, device))
    optim, terms = settings.optim, settings.terms
    if optim.name not in OPTIMIZERS:
        raise unknown_name("optimiser", optim.name, OPTIMIZERS, "optim.name")
    weights = terms.weights()
    labels_alone = set(weights) == {"ce"}
    images = open_images(settings, labels_for=needs_labels(terms), only_labelled=labels_alone)
    student = build_student(settings)
    teachers: list[Teacher] = []
    notes: list[str] = []
    if not labels_alone:
        teachers, notes = open_teachers(settings, images, control)
    renderer = make_renderer(settings.data.renderer, notes.append, device)
    class_names = classes_of(settings, images, teachers)
    num_classes = None if class_names is None else len(class_names)
    span = make_span(
        len(images.train),
        batch_size=optim.batch_size,
        length=optim.length,
        warmup=optim.warmup,
        accumulate=optim.accumulate,
        world_size=world_size(),
        images=f"data.train: {settings.data.train}",
    )
    learner = Student(student, num_classes, with_token="token_kd" in weights)
    made, weights = make_terms(
        settings, student, teachers, num_images=len(images.train), num_classes=num_classes,
        labelled_share=images.labelled_share,
    )  # fmt: skip
    task = DistillTask(learner, teachers, made, ema=settings.student.ema).to(device)
    check_part_of_batch(settings, task)
    for teacher in teachers:
        teacher.to(device)
    for backbone in (student, *(teacher.backbone for teacher in teachers)):
        choose_kernels(backbone, device.type, DTYPES[optim.precision])
    log = make_log(settings)
    return Lesson(
        settings, device, images, span, teachers, task, weights, class_names, log, renderer, notes
    )


def check_part_of_batch(settings: DistillConfig, task: DistillTask) -> None:
    """Raise ConfigError when one process's micro-batch is too small for what compares images."""
    optim, relation = settings.optim, settings.terms.relation_kd
    has_norms = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in task.modules())
    least, reason = (2, "batch norm") if has_norms else (1, "")
    if relation.weight:
        least, reason = (3 if relation.angle else 2), "terms.relation_kd"
    images = optim.batch_size // (optim.accumulate * world_size())
    if images < least:
        raise ConfigError(
            f"optim.batch_size: {optim.batch_size} images in {optim.accumulate} micro-batches on "
            f"{world_size()} processes are {images} at a time, and {reason} needs at least {least};"
            " take a larger batch, or a smaller optim.accumulate"
        )


def resolve(settings: DistillConfig, precision: str) -> DistillConfig:
    """The arithmetic, and absolute paths, so that a resume from anywhere finds the same."""

    def absolute(teacher: Any) -> Any:
        return teacher.model_copy(update={"backbone": with_absolute_path(teacher.backbone)})

    data = {
        name: spec if (spec := getattr(settings.data, name)) is None else with_absolute_path(spec)
        for name in ("train", "test")
    }
    return settings.model_copy(
        update={
            "optim": settings.optim.model_copy(update={"precision": precision}),
            "data": settings.data.model_copy(update=data),
            "teacher": absolute(settings.teacher),
            "more_teachers": [absolute(teacher) for teacher in settings.more_teachers],
        }
    )


def build_student(settings: DistillConfig) -> Backbone:
    """The student from the seed. Raises ConfigError or CheckpointError."""
    student = settings.student
    model = ModelSettings(
        backbone=student.backbone, drop_path=student.drop_path, args=student.args,
        init_from=student.init_from,
    )  # fmt: skip
    size = as_size(student.image_size)
    try:
        backbone = backbone_from_settings(
            model, CropSettings(global_size=size), settings.data, settings.seed
        )
        check_input_size(backbone, size, where="student.image_size")
    except (ConfigError, CheckpointError) as error:
        words = re.sub(r"\bmodel\.(?=[a-z_]+:)", "student.", str(error))
        raise type(error)(re.sub(r"^image size:", "student.image_size:", words)) from None
    return backbone


def open_teachers(
    settings: DistillConfig, images: TrainingImages, control: bool
) -> tuple[list[Teacher], list[str]]:
    """All teachers with the heads that the terms need, and sentences about them."""
    chosen = [settings.teacher, *settings.more_teachers]
    teachers: list[Teacher] = []
    notes: list[str] = []
    for number, one in enumerate(chosen):
        where = "teacher" if number == 0 else f"more_teachers[{number - 1}]"
        teacher = open_teacher(
            one,
            where,
            needs_logits=bool(needs_logits(settings.terms)),
            needs_prototypes="prototype_kd" in settings.terms.weights() and number == 0,
            label_share=float(share) if (share := settings.data.labels) not in ("auto", 0) else 1.0,
        )
        names = images.class_names or (teachers[0].class_names if teachers else None)
        if names and (note := match_classes(teacher, names, f"{where}.head")):
            notes.append(note)
        if control:
            randomise(teacher, settings.seed + number)
        notes += teacher.backbone.notes
        teachers.append(teacher)
    counts = [count for teacher in teachers if (count := number_of_logits(teacher))]
    if len(set(counts)) > 1:
        raise ConfigError(
            f"more_teachers: logits of {', '.join(map(str, counts))} classes cannot be averaged; "
            "give teachers of the same classes, or leave their logits out: terms.preset=label_free"
        )
    return teachers, notes


def classes_of(
    settings: DistillConfig, images: TrainingImages, teachers: list[Teacher]
) -> list[str] | None:
    """The names of the student's classes; None when no term has logits."""
    if images.class_names is not None:
        return images.class_names
    if not needs_logits(settings.terms):
        return None
    known = teachers[0].class_names
    if known is None:
        return [str(number) for number in range(number_of_logits(teachers[0]))]
    return known


def train(lesson: Lesson, continued: bool, stop: StopFlag, cleanup: ExitStack) -> Progress:
    """All steps that are left. Raises UserError when the run ends early, after a checkpoint."""
    settings, span, task, log = lesson.settings, lesson.span, lesson.task, lesson.log
    optim, data = settings.optim, settings.data
    lesson.images.train = packed(
        lesson.images.train, data.pack, limit_gb=data.pack_limit, say=log.say
    )
    optimizer = make_optimizer(optim.name, parameter_groups(task), momentum=optim.sgd_momentum)
    scaler = torch.amp.GradScaler(lesson.device.type, enabled=optim.precision == "fp16")
    state = None
    if continued:
        state = restore(
            lesson.run_dir, log, task, optimizer, scaler,
            num_images=span.num_images, total_steps=span.total_steps, images="data.train",
        )  # fmt: skip
    progress = Progress(**state["progress"]) if state else Progress()
    if progress.step == 0:
        fit_terms(lesson)
    log.drop_from(progress.step + 1)
    broken = BrokenImages(
        log.broken,
        stop,
        run_dir=lesson.run_dir,
        num_images=span.num_images,
        max_share=settings.data.max_broken_share,
        known=state["broken"] if state else (),
    )
    past = read_rows(lesson.run_dir) if log.is_main else ()
    monitor = FidelityMonitor(log.warn, total_steps=span.total_steps, past=past)
    hooks: list[Hook] = [monitor, broken]
    cache = open_cache(lesson)

    def save(progress: Progress) -> None:
        broken.exchange()
        if cache is not None:
            cache.flush()

        def write() -> None:
            state = training_state(
                progress, task, optimizer, scaler, num_images=span.num_images, broken=broken.paths
            )
            keep = settings.log.keep_checkpoints
            save_checkpoint(lesson.run_dir / "checkpoints", progress.step, state, keep=keep)
            save_networks(lesson)

        on_main(write)

    batches = lesson.batches(progress.step, span.total_steps, broken)
    cleanup.callback(batches.close)
    if cache is not None:
        cleanup.callback(cache.close)
        batches = cache.answered(batches, progress.step)
        cleanup.callback(batches.close)
    progress = fit(
        task,
        batches,
        optimizer,
        make_schedules(lesson),
        fit_options(settings, span, lesson.device, lesson.renderer.name),
        progress=progress,
        scaler=scaler,
        log=log,
        save=save,
        hooks=hooks,
        stop=stop,
    )
    if cache is not None:
        cache.report()
    end_of_training(settings.run_dir, progress, broken, log, command="distill")
    return progress


def open_cache(lesson: Lesson) -> TeacherCache | None:
    """The cache of the teachers' answers, claimed; None for none. Raises UserError."""
    settings, folder = lesson.settings, teacher_folder(lesson.settings)
    if folder is None or not lesson.teachers:
        return None
    size, train = lesson.task.student.backbone.img_size, lesson.images.train
    identity = {
        "images": on_main(train.fingerprint),
        "views": repr(view_policies(settings, size)),
        "renderer": describe_renderer(lesson.renderer),  # answers belong to exact pixels
        "seed": settings.seed,
        "batch_size": settings.optim.batch_size,
    }
    cache = TeacherCache(
        lesson.teachers, lesson.task.teacher_taps, folder, identity, settings.cache_limit,
        lesson.device, settings.optim.precision, settings.optim.accumulate,
        say=lesson.log.say, warn=lesson.log.warn,
    )  # fmt: skip
    return cache if cache.open(settings.optim.batch_size, lesson.span.total_steps) else None


def make_schedules(lesson: Lesson) -> dict[str, Schedule]:
    """Every value that moves with the step: learning rate, weights, when to compare gradients."""
    settings, span = lesson.settings, lesson.span
    total = span.total_steps
    # Only rows of the log hold numbers: up to the next multiple of their distance.
    rows = math.ceil(span.steps(settings.fidelity.every) / settings.log.log_every)
    compare_every = max(1, rows) * settings.log.log_every
    return {
        **single_view_schedules(settings.optim, span),
        "compare_gradients": lambda step: float(is_time(step + 1, compare_every, total)),
        **{
            f"weight/{name}": ramped(weight, term.rise, term.fade, total)
            for name, weight in lesson.weights.items()
            for term in [getattr(settings.terms, name.partition("@")[0])]
        },
    }


@torch.no_grad()
def fit_terms(lesson: Lesson) -> None:
    """Let every term learn the scale of its teacher's answers, from unmixed training images."""
    for number, teacher in enumerate(lesson.teachers):
        terms = [
            term
            for name, term in lesson.task.terms.items()
            if teacher_of(name) == number and learns_scales(term)
        ]
        names = needed_taps(terms, "teacher_taps")
        if not names:
            continue
        collected: dict[str, list[torch.Tensor]] = {name: [] for name in names}
        for pixels in clean_batches(lesson, images_to_fit(teacher, names)):
            made = teacher.answers(pixels.to(lesson.device).float(), names)
            for name, values in made.items():
                collected[name].append(values)
        answers = {name: torch.cat(values) for name, values in collected.items()}
        for term in terms:
            term.fit(answers)  # type: ignore[operator]


def images_to_fit(teacher: Teacher, names: Sequence[str]) -> int:
    """How many images hold enough places: all of them at once are kept in memory."""
    few, many = _FIT_IMAGES
    shapes = teacher.shapes(names).values()
    wanted = [_ROWS_PER_COLUMN * shape[0] / math.prod(shape[1:]) for shape in shapes]
    return min(many, max(few, *map(math.ceil, wanted)))


def recalibrates(lesson: Lesson) -> bool:
    """Whether batch-norm statistics came from mixed images, which the product will never see."""
    augment = lesson.settings.augment
    mixes = augment.mix_share > 0 and (augment.mixup > 0 or augment.cutmix > 0)
    return mixes and lesson.settings.recalibrate > 0


def clean_batches(lesson: Lesson, count: int) -> Iterator[torch.Tensor]:
    """Up to `count` unmixed, uncropped training images, uint8 ``[B, C, H, W]``, evenly spaced.

    The same on every process.
    """
    size = lesson.task.student.backbone.img_size
    chosen = evenly_spaced(len(lesson.images.train), count)
    made = image_batches(
        lesson.images.train, chosen, EvalTransform(size, default_resize(size)), batch_size=128
    )
    for images, _ in made:
        yield images


def save_networks(lesson: Lesson) -> None:
    """The student as a timm folder; its classifier and the projectors beside it."""
    product = lesson.task.product
    save_backbone(product.backbone, lesson.run_dir / "backbone")
    if product.classifier is not None:
        write_classifier(
            lesson.run_dir, lesson.class_names, product.classifier, product.token_classifier
        )
    projectors = {
        name: values.contiguous() for name, values in lesson.task.terms.state_dict().items()
    }
    if projectors:
        write_tensors(lesson.run_dir / PROJECTORS_FILE, projectors)


def describe(lesson: Lesson) -> list[str]:
    """What learns from whom, for how long: sentences for the log."""
    settings, span, student = lesson.settings, lesson.span, lesson.task.student.backbone
    millions = sum(p.numel() for p in student.parameters()) / 1e6
    terms = ", ".join(f"{weight:g} {name}" for name, weight in lesson.weights.items())
    lines = [
        f"{student.name} at {student.img_size[0]} x {student.img_size[1]} px ({millions:.1f} M "
        f"parameters), on {world_size()} x {lesson.device.type} in {settings.optim.precision}; "
        f"loss: {terms}",
        *(
            f"teacher: {teacher.name} ({teacher.backbone.name}) at {teacher.size[0]} x "
            f"{teacher.size[1]} px"
            for teacher in lesson.teachers
        ),
        f"{span.num_images:,} images, {int((lesson.images.labels >= 0).sum()):,} of them with a "
        f"label; {span.steps_per_epoch:,} steps an epoch, {span.total_steps:,} in all "
        f"({span.total_steps / span.steps_per_epoch:.1f} epochs)",
    ]
    return [*lines, *(f"note: {note}" for note in lesson.notes)]
