"""Does distillation help? The same student trained in several ways, scored on the same images.

    dino-kd distill distill/labels ... data.test=/test arms=scratch,scratch_plus,kd,control

Reads top to bottom: check every arm, score the teacher, train and score arm by arm, compare.
docs/distill_arms.md says what each arm proves.
"""

from __future__ import annotations

import functools
import json
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dino_kd.distill.arm_scores import (
    RESULT_FILE,
    Exam,
    answer_of_student,
    answer_of_teachers,
    is_scored,
    open_exam,
    read_tensors,
    record,
)
from dino_kd.distill.cache import shared_cache
from dino_kd.distill.images import open_images
from dino_kd.distill.step_cost import side_by_side
from dino_kd.distill.story import distill, open_teachers, prepare, resolve
from dino_kd.distill.terms import needs_labels, needs_logits
from dino_kd.distill.verdict import Scored, as_lines, judge
from dino_kd.distributed import is_main_process, on_main, process_group
from dino_kd.engine.precision import choose_precision
from dino_kd.errors import ConfigError, DataError, Interrupted, UserError
from dino_kd.files import write_json, write_text
from dino_kd.lengths import parse_length
from dino_kd.presets import Span
from dino_kd.rundir import open_run
from dino_kd.runlog import RunLog, read_rows
from dino_kd.schema import DistillConfig, TermsSettings
from dino_kd.tasks.teacher import Teacher

EQUAL_TIME_FILE = "equal_time.json"
_TRAINING_ORDER = ("kd", "scratch", "scratch_plus", "control")
_SMOOTHING = 0.1


@dataclass(frozen=True)
class Arm:
    """One training of a comparison."""

    name: str
    seed: int
    student: str
    folder: Path


def compare(settings: DistillConfig) -> list[str]:
    """Train and score all arms; returns the lines of the table, which arms.md holds too.

    Every process of a torchrun job calls this. With ``resume=auto`` finished arms are kept.

    Raises:
        UserError: whatever would make an arm fail later, before the first one trains; and what
            `distill` raises.
    """
    with process_group(settings.device) as device:
        settings = resolve(settings, choose_precision(settings.optim.precision, device))
        settings = with_arms(settings)
        refuse(settings)
        span = check_arms(settings, device)
        exam = open_exam(settings)
        with RunLog(settings.run_dir, is_main=is_main_process()) as log:
            claim = functools.partial(
                open_run, settings, log, command="distill", train_on="student.init_from"
            )
            on_main(claim)
            score_teacher(settings, exam, device)
            arms = arms_of(settings)
            with shared_cache(settings) as shared:
                for arm in arms:
                    run_arm(shared, arm, span, exam, device, log)
            lines = on_main(functools.partial(report, settings, arms, exam))
            for line in lines:
                log.say(line)
    return lines


def with_arms(settings: DistillConfig) -> DistillConfig:
    """Arms, seeds and students filled in, each once; scratch_plus turns the cache off.

    Equal wall-clock counts the teacher's live pass, which answers read from a disk would hide.
    """
    seeds = settings.seeds if "seeds" in settings.model_fields_set else [settings.seed]
    arms = list(dict.fromkeys(settings.arms or ["kd"]))
    return settings.model_copy(
        update={
            "arms": arms,
            "seeds": list(dict.fromkeys(seeds)),
            "students": list(dict.fromkeys(settings.students or [settings.student.backbone])),
            "cache": "off" if "scratch_plus" in arms else settings.cache,
        }
    )


def refuse(settings: DistillConfig) -> None:
    """Raise ConfigError for comparisons that prove nothing, all of them at once."""
    terms, problems = settings.terms, []
    if settings.data.test is None:
        problems.append(
            "data.test: the arms are compared on labelled images that no arm trains on; give them, "
            "such as data.test=/images/test"
        )
    if not settings.seeds:
        problems.append("seeds: empty; give at least one, such as seeds=0,1,2")
    if set(terms.weights()) == {"ce"}:
        problems.append(
            "terms: only ce is on, so kd would be scratch; turn on a term that reads the teacher, "
            "such as terms.logit_kd.weight=4"
        )
    without_teacher = [arm for arm in settings.arms if arm.startswith("scratch")]
    if without_teacher and not (needs_labels(terms) or needs_logits(terms)):
        problems.append(
            f"arms: {without_teacher[0]} learns from labels alone, and these terms use none "
            f"(terms.preset={terms.preset}); compare kd with control: arms=kd,control"
        )
    missing = [arm for arm in ("kd", "scratch") if arm not in settings.arms]
    if "scratch_plus" in settings.arms and missing:
        problems.append(
            f"arms: scratch_plus trains as long as kd, and is read beside scratch; add {missing[0]}"
        )
    if problems:
        raise ConfigError(problems)


def check_arms(settings: DistillConfig, device: torch.device) -> Span:
    """Build every arm once without training it; the span of kd. Raises UserError naming the arm."""
    span: Span | None = None
    for student in settings.students:
        for name in ("kd", *(arm for arm in settings.arms if arm != "kd")):
            arm = Arm(name, settings.seeds[0], student, Path(settings.run_dir))
            steps = span.total_steps if span else 1
            try:
                made = arm_settings(settings, arm, span, steps)
                lesson = prepare(made, device, control=name == "control")
            except UserError as error:
                raise type(error)(f"arm {name} of {student}: {error}") from None
            span = lesson.span if name == "kd" else span
    assert span is not None
    return span


def arms_of(settings: DistillConfig) -> list[Arm]:
    """All arms in the order in which they train: students innermost, who share the teacher."""
    root, several = Path(settings.run_dir), len(settings.students) > 1
    return [
        Arm(name, seed, student, (root / folder_name(student) if several else root)
            / f"{name}-seed{seed}")
        for name in _TRAINING_ORDER
        if name in settings.arms
        for seed in settings.seeds
        for student in settings.students
    ]  # fmt: skip


def folder_name(student: str) -> str:
    """A student's name as a folder."""
    return re.sub(r"[^\w.-]+", "_", student)


def arm_settings(settings: DistillConfig, arm: Arm, span: Span | None, steps: int) -> DistillConfig:
    """The settings of one arm.

    scratch has cross-entropy at weight 1, whatever its weight beside the teacher: a smaller loss
    would be a smaller learning rate for some optimisers, and no fair opponent.

    Args:
        settings: of the comparison.
        arm: which one.
        span: of kd; what is written in its epochs becomes steps. None: kd itself.
        steps: length of a scratch arm.
    """
    update: dict[str, Any] = {
        "run_dir": str(arm.folder),
        "resume": "auto" if settings.resume else False,
        "seed": arm.seed,
        "student": settings.student.model_copy(update={"backbone": arm.student}),
        "arms": [],
        "seeds": [0],
        "students": [],
    }
    if arm.name.startswith("scratch"):
        assert span is not None
        optim = {"length": steps}
        if parse_length(settings.optim.warmup).unit == "ep":
            optim["warmup"] = span.warmup
        update["terms"] = TermsSettings(preset="none", ce={"weight": 1.0})  # type: ignore[arg-type]
        update["optim"] = settings.optim.model_copy(update=optim)
    if arm.name == "scratch_plus" and not settings.augment.label_smoothing:
        update["augment"] = settings.augment.model_copy(update={"label_smoothing": _SMOOTHING})
    return settings.model_copy(update=update)


def run_arm(
    settings: DistillConfig, arm: Arm, span: Span, exam: Exam, device: torch.device, log: RunLog
) -> None:
    """Train and score one arm, unless that has been done. Raises what `distill` does."""
    if is_scored(arm.folder, exam):
        log.say(f"{arm.folder}: finished before")
        return
    steps, equal_time = span.total_steps, None
    if arm.name == "scratch_plus":
        equal_time = equal_wall_clock(settings, arm, span, device)
        steps = equal_time["steps"]
    made = arm_settings(settings, arm, span, steps)
    if not on_main(lambda: (arm.folder / RESULT_FILE).is_file()):  # else: other test images
        log.say(f"{arm.folder}: training {arm.name} of {arm.student} with seed {arm.seed}")
        try:
            distill(made, control=arm.name == "control")
        except Interrupted as error:
            raise Interrupted(
                f"{error}; the whole comparison: dino-kd distill {settings.run_dir} resume=auto"
            ) from None
    answer = answer_of_student(arm.folder, exam, made, device)

    def write() -> None:
        training = training_cost(arm.folder, made.optim.batch_size)
        if equal_time is not None:
            training["equal_time"] = equal_time
        teacher = read_tensors(Path(settings.run_dir) / "teacher")
        record(arm.folder, answer, exam, made, device, training=training, teacher=teacher)

    on_main(write)


def training_cost(run_dir: Path, batch_size: int) -> dict[str, Any]:
    """Steps and training seconds of a run, from its metrics.jsonl.

    Seconds are the steps times the median cost of a step over the rows, so that neither a pause
    nor the slow first steps count. Rows that compared gradients are left out where others exist.

    Raises DataError when the file holds no speed.
    """
    rows = read_rows(run_dir)
    timed = [row for row in rows if row.get("images_per_s")]
    if not timed:
        raise DataError(
            f"{run_dir}/metrics.jsonl holds no speed, so equal wall-clock cannot be found"
        )
    later = timed[1:] or timed
    plain = [row for row in later if "gradient_cosine" not in row] or later
    cost = statistics.median(batch_size / row["images_per_s"] for row in plain)
    steps = int(rows[-1]["step"])
    return {"steps": steps, "seconds_per_step": cost, "seconds": cost * steps}


def equal_wall_clock(
    settings: DistillConfig, arm: Arm, span: Span, device: torch.device
) -> dict[str, Any]:
    """How many steps of scratch take the time of kd, and what a step of each costs.

    Measured side by side once for a student, and kept: a resumed comparison trains as long.
    """
    path = arm.folder.with_name(EQUAL_TIME_FILE)
    known = on_main(lambda: json.loads(path.read_text("utf-8")) if path.is_file() else None)
    if known:
        return known
    kd, scratch = (
        arm_settings(settings, replace(arm, name=name), span, span.total_steps)
        for name in ("kd", "scratch_plus")
    )
    kd_seconds, scratch_seconds, ratio = side_by_side(kd, scratch, device)

    def keep() -> dict[str, Any]:
        found = {
            "kd_seconds_per_step": kd_seconds,
            "scratch_seconds_per_step": scratch_seconds,
            "ratio": ratio,
            "steps": max(1, round(span.total_steps * ratio)),
        }
        write_json(path, found)
        return found

    return on_main(keep)


def score_teacher(settings: DistillConfig, exam: Exam, device: torch.device) -> None:
    """The table's first row: the teacher on the same images, with class scores if it has any."""
    folder = Path(settings.run_dir) / "teacher"
    if is_scored(folder, exam):
        return
    teachers = teachers_with_scores(settings)
    for teacher in teachers:
        teacher.to(device)
    answer = answer_of_teachers(teachers, exam, settings, device)
    write = functools.partial(
        record, folder, answer, exam, settings, device, training={}, teacher=None
    )
    on_main(write)


def teachers_with_scores(settings: DistillConfig) -> list[Teacher]:
    """The teachers, with logits even where no term reads them, if they have a head."""
    images = open_images(settings, labels_for=needs_labels(settings.terms))
    if needs_logits(settings.terms):
        return open_teachers(settings, images, control=False)[0]
    off = settings.terms.model_dump(mode="json") | {"preset": "none"}
    asking = TermsSettings(**(off | {"logit_kd": {"weight": 1.0}}))
    try:
        asked = settings.model_copy(update={"terms": asking})
        return open_teachers(asked, images, control=False)[0]
    except ConfigError:  # no head that fits
        return open_teachers(settings, images, control=False)[0]


def conclude(settings: DistillConfig, arms: Sequence[Arm], exam: Exam) -> dict[str, Any]:
    """The comparison of one student from the files of its arms."""
    everyone = {"teacher": [load_scored(Path(settings.run_dir) / "teacher")]}
    for arm in arms:
        everyone.setdefault(arm.name, []).append(load_scored(arm.folder))
    everyone, count = on_shared_images(everyone)
    (teacher,) = everyone.pop("teacher")
    result = judge(everyone, teacher, student=arms[0].student, seeds=settings.seeds)
    notes = [] if count == len(exam.test) else [f"{len(exam.test) - count} broken test images"]
    for arm in arms:
        training = json.loads((arm.folder / RESULT_FILE).read_text(encoding="utf-8"))["training"]
        if equal := training.get("equal_time"):
            notes.append(
                f"scratch_plus: side by side a step of kd takes "
                f"{1000 * equal['kd_seconds_per_step']:.1f} ms, one of scratch "
                f"{1000 * equal['scratch_seconds_per_step']:.1f} ms: {equal['steps']:,} steps take "
                "equal time"
            )
    return result | {"notes": list(dict.fromkeys(notes))}


def load_scored(folder: Path) -> Scored:
    """What `record` left in a folder; "indices" among the hits tells the images."""
    result = json.loads((folder / RESULT_FILE).read_text(encoding="utf-8"))
    tensors = read_tensors(folder)
    named = {"top1": "hits", "knn20_top1": "knn_hits", "indices": "indices"}
    hits = {key: _array(tensors[name]) for key, name in named.items() if name in tensors}
    training = result["training"]
    return Scored(result["metrics"], hits, training.get("steps"), training.get("seconds"))


def on_shared_images(
    scored: dict[str, list[Scored]],
) -> tuple[dict[str, list[Scored]], int]:
    """All networks on the images that every one of them could read, and how many these are."""
    everyone = [one for several in scored.values() for one in several]
    shared = set(everyone[0].hits["indices"].tolist())
    for one in everyone[1:]:
        shared &= set(one.hits["indices"].tolist())

    def cut(one: Scored) -> Scored:
        rows = [place for place, index in enumerate(one.hits["indices"]) if index in shared]
        kept = {name: values[rows] for name, values in one.hits.items() if name != "indices"}
        return replace(one, hits=kept)

    return {name: [cut(one) for one in several] for name, several in scored.items()}, len(shared)


def report(settings: DistillConfig, arms: Sequence[Arm], exam: Exam) -> list[str]:
    """Write arms.json and arms.md; returns the lines of the tables."""
    run_dir = Path(settings.run_dir)
    results = [
        conclude(settings, [arm for arm in arms if arm.student == student], exam)
        for student in settings.students
    ]
    lines = [line for result in results for line in (*as_lines(result), "")]
    write_json(run_dir / "arms.json", {"students": results})
    write_text(run_dir / "arms.md", "\n".join(lines))
    return [*lines, f"comparison: {run_dir}/arms.md and arms.json"]


def _array(values: Tensor) -> Any:
    return values.numpy() if values.dtype == torch.int64 else values.bool().numpy()
