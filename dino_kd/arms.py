"""Does distillation help? The same student, trained with and without its teacher, in one table.

    dino-kd distill CONFIG data.test=/images/test arms=scratch,scratch_plus,kd,control seeds=0,1,2

Every arm is an ordinary distillation in its own folder of the run directory; docs/distill_arms.md
says what each one proves.
"""

from __future__ import annotations

import functools
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from torch import Tensor

from dino_kd.config import load_settings
from dino_kd.data.dataset import subset
from dino_kd.data.loader import EvalTransform
from dino_kd.distill import build_student, distill, open_teachers
from dino_kd.distributed import is_main_process, on_main, process_group, processes_here
from dino_kd.errors import ConfigError, DataError
from dino_kd.features import FeatureBank, default_resize, extract_with
from dino_kd.files import write_json, write_tensors, write_text
from dino_kd.knn import knn_accuracy
from dino_kd.metrics.paired import bootstrap_difference, gap_recovered, mcnemar, mean_interval
from dino_kd.presets import loader_processes, make_span
from dino_kd.pretrained import CLASSIFIER_FILE, load_backbone
from dino_kd.schema import DistillConfig
from dino_kd.tasks.distill import Student
from dino_kd.teacher_cache import shared_cache
from dino_kd.teaching.images import TrainingImages, open_images
from dino_kd.teaching.terms import needs_labels

_NEIGHBOURS = 20
_SMOOTHING = 0.1  # of scratch_plus: the usual regulariser that a teacher would make superfluous
_ORDER = ("scratch", "kd", "scratch_plus", "control")  # scratch_plus needs both times


@dataclass
class Scored:
    """One network on the test images.

    Attributes:
        right: bool ``[N]``, whether its classifier names the class; None without classifier.
        numbers: top1, knn_top1, agreement, kl, steps, seconds; what is known of them.
        logits: ``[N, Y]``.
    """

    right: np.ndarray | None
    numbers: dict[str, float] = field(default_factory=dict)
    logits: Tensor | None = None


def compare(settings: DistillConfig) -> list[str]:
    """Train and score every arm, seed and student; returns a table for each student.

    Every process of a torchrun job calls this. Finished arms are not trained again with
    ``resume=auto``.

    Raises:
        UserError: an arm that these settings cannot have (before anything trains), or whatever
            `distill` raises.
    """
    check_arms(settings)
    students = settings.students or [settings.student.backbone]
    tables = []
    with shared_cache(settings) as shared:
        for student in students:
            folder = Path(settings.run_dir) / (student if len(students) > 1 else "")
            network = settings.student.model_copy(update={"backbone": student})
            one = shared.model_copy(update={"student": network, "run_dir": str(folder)})
            result = compare_arms(one, folder)
            if result:
                tables.append(table(result))
    return tables


def check_arms(settings: DistillConfig) -> None:
    """Refuse what cannot be compared, before anything trains. Raises ConfigError."""
    arms = settings.arms or ["kd"]
    problems = []
    if settings.data.test is None:
        problems.append("data.test: arms are scored on labelled test images; name them here")
    without = [arm for arm in arms if arm.startswith("scratch")]
    if without and not needs_labels(settings.terms):
        problems.append(
            f"arms: {without[0]} learns from labels alone, and no term of this loss reads any; "
            "leave it out, or set terms.preset=labels"
        )
    if "scratch_plus" in arms and not {"scratch", "kd"} <= set(arms):
        problems.append(
            "arms: scratch_plus gets the time that kd takes at the speed of scratch; add both: "
            "arms=scratch,scratch_plus,kd"
        )
    if len(set(settings.seeds)) < len(settings.seeds) or not settings.seeds:
        problems.append(f"seeds: expected different numbers, got {settings.seeds}")
    if problems:
        raise ConfigError(problems)
    open_images(settings, labels_for=needs_labels(settings.terms))
    build_student(settings)


def compare_arms(settings: DistillConfig, folder: Path) -> dict[str, Any]:
    """All arms of one student: train, score, and write the table; {} but on the main process."""
    arms = [arm for arm in _ORDER if arm in (settings.arms or ["kd"])]
    scored: dict[str, list[Scored]] = {arm: [] for arm in arms}
    for seed in settings.seeds:
        for arm in arms:
            run_dir = folder / f"{arm}-seed{seed}"
            if not on_main((run_dir / "eval" / "distill.json").is_file) or not settings.resume:
                of_arm = arm_settings(settings, arm, seed, folder)
                distill(of_arm, control=arm == "control")
            scored[arm].append(score_arm(settings, run_dir))
    teacher = score_teacher(settings)
    if not is_main_process():
        return {}
    result = summary(scored, teacher, settings)
    write_json(folder / "arms.json", result)
    write_text(folder / "arms.md", table(result) + "\n")
    return result


def arm_settings(settings: DistillConfig, arm: str, seed: int, folder: Path) -> DistillConfig:
    """The settings of one arm: what it shares with the others stays as it is."""
    changed: dict[str, Any] = {
        "run_dir": str(folder / f"{arm}-seed{seed}"),
        "seed": seed,
        "resume": "auto" if settings.resume else False,
        "arms": [],
        "students": [],
    }
    if arm in ("scratch", "scratch_plus"):
        changed["terms"] = labels_alone(settings)
        steps = total_steps(settings)
        if arm == "scratch_plus":
            kd, scratch = (folder / f"{other}-seed{seed}" for other in ("kd", "scratch"))
            steps = on_main(functools.partial(equal_time, kd, scratch))
            smoothing = settings.augment.label_smoothing or _SMOOTHING
            changed["augment"] = settings.augment.model_copy(update={"label_smoothing": smoothing})
        changed["optim"] = settings.optim.model_copy(update={"length": steps})
    return settings.model_copy(update=changed)


def labels_alone(settings: DistillConfig) -> Any:
    """The terms less everything that reads the teacher."""
    off = {
        name: getattr(settings.terms, name).model_copy(update={"weight": 0.0})
        for name in settings.terms.weights()
        if name != "ce"
    }
    ce = settings.terms.ce.model_copy(update={"weight": settings.terms.ce.weight or 1.0})
    return settings.terms.model_copy(update={**off, "ce": ce, "preset": "none"})


def total_steps(settings: DistillConfig) -> int:
    """Optimiser steps of the distilled arm."""
    images = open_images(settings, labels_for=needs_labels(settings.terms))
    optim = settings.optim
    return make_span(
        len(images.train), batch_size=optim.batch_size, length=optim.length, warmup=optim.warmup,
        accumulate=1, world_size=1, images="data.train",
    ).total_steps  # fmt: skip


def equal_time(kd: Path, scratch: Path) -> int:
    """Steps that scratch makes in the time that kd took."""
    kd_seconds, kd_steps = training_cost(kd)
    scratch_seconds, scratch_steps = training_cost(scratch)
    return max(1, round(kd_seconds / (scratch_seconds / scratch_steps))) if kd_steps else 1


def training_cost(run_dir: Path) -> tuple[float, int]:
    """Seconds of training and steps of a run, from its metrics.

    The median cost of a step times their number, so that a pause of the machine does not count.
    """
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    stored = load_settings(DistillConfig, [str(run_dir / "config.yaml")], command="distill")
    costs = [stored.optim.batch_size / row["images_per_s"] for row in rows]
    return float(np.median(costs)) * rows[-1]["step"], int(rows[-1]["step"])


def score_arm(settings: DistillConfig, run_dir: Path) -> Scored:
    """The student of a finished run on the test images; its numbers and answers stay in ``eval/``.

    top1: its own classifier; knn_top1: weighted k-NN (k=20) among the labelled training images;
    agreement and kl: with the teacher's logits, for arms that had them.
    """
    with process_group(settings.device) as device:
        images = open_images(settings, labels_for=["ce"] if _has_labels(settings) else [])
        student = load_student(run_dir).to(device)
        names = ["output"] + (["logits"] if student.classifier is not None else [])

        def describe(x: Tensor) -> dict[str, Tensor]:
            made = student.answers_to(x, names)
            if student.token_classifier is not None:
                made["logits"] = student.logits_of(x)
            return {name: made[name] for name in names}

        bank = _score(student.backbone, images, settings, device, describe)
        knn = _knn(student.backbone, bank, images, settings, device, describe)
    seconds, steps = training_cost(run_dir)
    numbers = {"steps": float(steps), "seconds": seconds, "knn_top1": knn}
    right = None
    if "logits" in bank.parts:
        right = _right(bank, images)
        numbers["top1"] = 100 * float(right.mean())
    if is_main_process():
        if "logits" in bank.parts:
            logits = {"logits": bank.parts["logits"].half(), "indices": bank.indices}
            write_tensors(run_dir / "eval" / "test_logits.safetensors", logits)
        write_json(run_dir / "eval" / "distill.json", numbers | {"k": _NEIGHBOURS})
    return Scored(right, numbers, bank.parts.get("logits"))


def score_teacher(settings: DistillConfig) -> Scored:
    """The teacher on the test images at its own size: its head and its neighbours."""
    with process_group(settings.device) as device:
        images = open_images(settings, labels_for=["ce"] if _has_labels(settings) else [])
        teacher = open_teachers(settings, images, False)[0][0].to(device)
        names = ["output"] + (["logits"] if teacher.head is not None else [])

        def describe(x: Tensor) -> dict[str, Tensor]:
            return teacher.answers_to(x, names)

        bank = _score(teacher.backbone, images, settings, device, describe)
        numbers = {"knn_top1": _knn(teacher.backbone, bank, images, settings, device, describe)}
    right = None
    if "logits" in bank.parts and images.test_labels is not None:
        right = _right(bank, images)
        numbers["top1"] = 100 * float(right.mean())
    return Scored(right, numbers, bank.parts.get("logits"))


def load_student(run_dir: Path) -> Student:
    """Backbone and classifiers of a finished run, in eval mode."""
    backbone = load_backbone(run_dir)
    path = run_dir / CLASSIFIER_FILE
    tensors: dict[str, Tensor] = {}
    if path.is_file():
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    count = len(tensors["bias"]) if tensors else None
    student = Student(backbone, count, with_token="token_weight" in tensors)
    for prefix, layer in (("", student.classifier), ("token_", student.token_classifier)):
        if layer is not None:
            layer.load_state_dict({name: tensors[prefix + name] for name in ("weight", "bias")})
    return student.eval()


def summary(
    scored: dict[str, list[Scored]], teacher: Scored, settings: DistillConfig
) -> dict[str, Any]:
    """The numbers of the table: a row for each arm, differences to the distilled one, a verdict."""
    for arm in ("kd", "control"):
        for one in scored.get(arm, []):
            one.numbers |= _fidelity(one, teacher)
    rows: dict[str, Any] = {"teacher": teacher.numbers}
    for arm, runs in scored.items():
        names = dict.fromkeys(name for run in runs for name in run.numbers)
        values = {name: [run.numbers[name] for run in runs] for name in names}
        rows[arm] = {
            name: mean_interval(np.array(found))._asdict() if "top1" in name else
            float(np.mean(found))
            for name, found in values.items()
        }  # fmt: skip
    metric = "top1" if all(run.right is not None for r in scored.values() for run in r) else None
    differences = _differences(scored, teacher) if metric else {}
    return {
        "seeds": settings.seeds,
        "student": settings.student.backbone,
        "teacher": settings.teacher.backbone,
        "rows": rows,
        "differences": differences,
        "verdict": verdict(differences),
    }


def _differences(scored: dict[str, list[Scored]], teacher: Scored) -> dict[str, Any]:
    """kd less every other arm, in points of top-1, with what is known about chance."""
    found: dict[str, Any] = {}
    right = {arm: np.stack([r.right for r in runs if r.right is not None])
             for arm, runs in scored.items()}  # fmt: skip
    for other in ("scratch", "scratch_plus", "control"):
        if "kd" not in right or other not in right:
            continue
        entry: dict[str, Any] = bootstrap_difference(right["kd"], right[other])._asdict()
        entry["mcnemar_p"] = [mcnemar(a, b) for a, b in zip(right["kd"], right[other], strict=True)]
        if "top1" in teacher.numbers:
            entry["gap_recovered"] = gap_recovered(
                100 * float(right["kd"].mean()),
                100 * float(right[other].mean()),
                teacher.numbers["top1"],
            )
        found[other] = entry
    if len(right.get("scratch", ())) > 1:
        pair = right["scratch"][:1], right["scratch"][1:2]
        found["seed_noise"] = bootstrap_difference(*pair)._asdict()
    return found


def verdict(differences: dict[str, Any]) -> str:
    """One sentence; against scratch_plus when it was trained, else against scratch."""
    against = "scratch_plus" if "scratch_plus" in differences else "scratch"
    words = {"scratch_plus": "scratch with equal time", "scratch": "scratch with equal steps"}
    gain = differences.get(against)
    if gain is None:
        return "not compared: add arms=scratch,scratch_plus,kd,control"
    size = f"{gain['value']:+.2f} points over {words[against]} (95 % CI {gain['low']:+.2f} to "
    size += f"{gain['high']:+.2f})"
    if gain["high"] < 0:
        return f"distillation hurts: {size}"
    if gain["low"] <= 0:
        return f"no effect that these images and seeds can show: {size}"
    control = differences.get("control")
    if control is not None and control["low"] <= 0:
        return (
            f"it helps, but not by what the teacher knows: {size}, and a teacher of random weights "
            f"helps as much ({control['value']:+.2f} to it)"
        )
    return f"distillation helps: {size}"


def table(result: dict[str, Any]) -> str:
    """The comparison in Markdown."""
    lines = [
        "| arm | steps | training time | top-1 % | k-NN % | agreement % |",
        "|---|---|---|---|---|---|",
    ]
    for arm, row in result["rows"].items():
        seconds = row.get("seconds")
        cells = [
            arm,
            f"{row['steps']:,.0f}" if "steps" in row else "",
            f"{seconds:,.0f} s" if seconds else "",
            _interval(row.get("top1")),
            _interval(row.get("knn_top1")),
            f"{row['agreement']:.1f}" if "agreement" in row else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", f"{len(result['seeds'])} seed(s); +- is the 95 % interval of their mean."]
    for other, entry in result["differences"].items():
        first = "scratch of one seed" if other == "seed_noise" else "kd"
        second = "of another" if other == "seed_noise" else other
        gap = entry.get("gap_recovered")
        more = f", {100 * gap:.0f} % of the way to the teacher" if gap is not None else ""
        lines.append(
            f"{first} - {second}: {entry['value']:+.2f} points "
            f"({entry['low']:+.2f} to {entry['high']:+.2f}){more}"
        )
    return "\n".join([*lines, "", result["verdict"]])


def _interval(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.2f}"
    half = value["high"] - value["value"]
    return f"{value['value']:.2f}" + ("" if math.isnan(half) else f" +- {half:.2f}")


def _has_labels(settings: DistillConfig) -> bool:
    return settings.data.labels != 0


def _score(backbone, images, settings, device, describe) -> FeatureBank:  # type: ignore[no-untyped-def]
    """Features, and logits beside them, of the test images."""
    size = backbone.img_size
    return extract_with(
        backbone, images.test, EvalTransform(size, default_resize(size)), describe, batch_size=256,
        num_workers=loader_processes(settings.data.num_workers, processes_here()), device=device,
    )  # fmt: skip


def _knn(backbone, queries, images, settings, device, describe) -> float:  # type: ignore[no-untyped-def]
    """Weighted k-NN accuracy in percent with the labelled training images as the bank."""
    known = np.flatnonzero(images.labels.numpy() >= 0)
    if not len(known):
        raise DataError(
            "data.train: no image has a label, so nothing can vote in the k-NN score of the arms; "
            "give a labelled set (terms may still leave the labels out)"
        )
    bank = _score(
        backbone, TrainingImages(images.train, images.labels, None, subset(images.train, known)),
        settings, device, describe,
    )  # fmt: skip
    scored = knn_accuracy(
        queries.features, images.test_labels[queries.indices],
        bank.features, images.labels[known][bank.indices], ks=[_NEIGHBOURS],
    )  # fmt: skip
    return float(scored[_NEIGHBOURS]["top1"])


def _right(bank: FeatureBank, images: TrainingImages) -> np.ndarray:
    assert images.test_labels is not None  # check_arms asked for labelled test images
    truth = images.test_labels[bank.indices]
    return (bank.parts["logits"].argmax(1) == truth).numpy()


def _fidelity(one: Scored, teacher: Scored) -> dict[str, float]:
    """Agreement with the teacher in percent, KL(teacher || student) in nats, on test images."""
    if one.logits is None or teacher.logits is None or one.logits.shape != teacher.logits.shape:
        return {}
    same = (one.logits.argmax(1) == teacher.logits.argmax(1)).float().mean()
    ours, theirs = one.logits.log_softmax(1), teacher.logits.log_softmax(1)
    kl = (theirs.exp() * (theirs - ours)).sum(1).mean()
    return {"agreement": 100 * float(same), "kl": float(kl)}
