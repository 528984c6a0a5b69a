"""A student, or its teacher, before test images: class scores, nearest neighbours, agreement.

Every process of a torchrun job calls these functions; the main one writes.
"""

from __future__ import annotations

import datetime
import functools
import json
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

import dino_kd
from dino_kd import knn
from dino_kd.data.dataset import ImageDataset, require_labels, subset
from dino_kd.data.loader import EvalTransform
from dino_kd.distill.images import open_images
from dino_kd.distill.terms import needs_labels
from dino_kd.distributed import on_main, processes_here, world_size
from dino_kd.errors import CheckpointError
from dino_kd.features import FeatureBank, default_resize, extract_with
from dino_kd.files import write_json, write_tensors
from dino_kd.losses.logits import mean_probability_logits
from dino_kd.models.classifier_file import CLASSIFIER_FILE, of_token, read_classifier
from dino_kd.presets import loader_processes
from dino_kd.pretrained import backbone_hash, load_backbone
from dino_kd.schema import DistillConfig
from dino_kd.tasks.classify import class_places
from dino_kd.tasks.distill import Student, fidelity
from dino_kd.tasks.teacher import Teacher

NEIGHBOURS = 20
RESULT_FILE = "eval/distill.json"
LOGITS_FILE = "eval/test_logits.safetensors"
_LARGEST = 65504.0  # of fp16


@dataclass(frozen=True)
class Exam:
    """What all arms and the teacher are scored on.

    Attributes:
        test, labels: N images, int64 ``[N]``.
        class_names: Y names, what labels are indices of.
        bank, bank_labels: the images that vote; None: the test images vote for each other.
    """

    test: ImageDataset
    labels: Tensor
    class_names: list[str]
    bank: ImageDataset | None = None
    bank_labels: Tensor | None = None

    @functools.cached_property
    def key(self) -> str:
        """Changes when other images are asked about, or vote."""
        return f"{self.test.fingerprint()} {self.bank.fingerprint() if self.bank else 'itself'}"


@dataclass
class Answer:
    """What one network says about the exam.

    Attributes:
        features: float32 ``[N, D]``; bank_features ``[M, D]`` or None.
        indices: int64 ``[N]``, which test images; bank_indices ``[M]``.
        logits: float32 ``[N, Y]`` in the exam's order of classes; None: it has no such classes.
        about: of the network, for the result.
    """

    features: Tensor
    indices: Tensor
    bank_features: Tensor | None
    bank_indices: Tensor | None
    logits: Tensor | None
    about: dict[str, Any]
    broken: int = 0
    notes: list[str] = field(default_factory=list)


def open_exam(settings: DistillConfig) -> Exam:
    """The test images, and as voters the training images whose labels are used.

    A run without labels is scored with all labels that its training images have; when they have
    none, every test image is named by the others. Raises DataError.
    """
    named = needs_labels(settings.terms)
    images = open_images(settings, labels_for=named)
    train, test = images.train, images.test
    assert test is not None  # whoever calls has asked for it
    require_labels(test, "data.test")
    assert test.labels is not None and test.class_names is not None  # noqa: PT018 - it has labels
    if train.labels is None or len(train.class_names or ()) < 2:
        return Exam(test, torch.from_numpy(test.labels), test.class_names)
    assert train.class_names is not None and images.test_labels is not None  # noqa: PT018
    labels = images.labels
    if not named and settings.data.labels != 0:
        labels = open_images(settings, labels_for=["ce"]).labels
    elif not named:
        labels = torch.from_numpy(train.labels)
    voters = torch.nonzero(labels >= 0)[:, 0]
    bank = train if len(voters) == len(labels) else subset(train, voters.numpy())
    return Exam(test, images.test_labels, train.class_names, bank, labels[voters])


def answer_of_student(
    run_dir: Path, exam: Exam, settings: DistillConfig, device: torch.device
) -> Answer:
    """Load what `dino-kd distill` saved, and ask it; in fp32.

    Raises CheckpointError when it is absent, damaged, or gives NaN.
    """
    student, names = load_student(run_dir, device)
    backbone, size = student.backbone, student.backbone.img_size
    has_scores = student.classifier is not None

    def describe(x: Tensor) -> dict[str, Tensor]:
        made = student.answers_to(x, ["output"])
        return {**made, "logits": student.logits_of(x)} if has_scores else made

    ask = functools.partial(
        extract_with,
        backbone,
        transform=EvalTransform(size, default_resize(size)),
        num_workers=loader_processes(settings.data.num_workers, processes_here()),
        batch_size=256,
        device=device,
    )
    seen, bank = ask(exam.test, describe=describe), None
    if exam.bank is not None:
        bank = ask(exam.bank, describe=lambda x: student.answers_to(x, ["output"]))
    return Answer(
        seen.features, seen.indices, *_voting(bank),
        aligned(seen.parts.get("logits"), names, exam.class_names),
        {"source": str(run_dir), "architecture": backbone.name, "sha256": backbone_hash(backbone),
         "image_size": list(size)},
        len(seen.broken),
    )  # fmt: skip


def answer_of_teachers(
    teachers: Sequence[Teacher], exam: Exam, settings: DistillConfig, device: torch.device
) -> Answer:
    """The teachers at their own sizes: mean probability as logits, features of the first."""
    logits: list[Tensor] = []
    weights: list[float] = []
    banks: list[tuple[FeatureBank, FeatureBank | None]] = []
    for teacher in teachers:
        ask = functools.partial(
            extract_with,
            teacher.backbone,
            transform=EvalTransform(teacher.size, default_resize(teacher.size)),
            num_workers=loader_processes(settings.data.num_workers, processes_here()),
            batch_size=256,
            device=device,
        )
        names = ["output", *(["logits"] if teacher.head is not None else [])]
        seen = ask(exam.test, describe=functools.partial(teacher.answers_to, names=names))
        given = aligned(seen.parts.get("logits"), teacher.class_names, exam.class_names)
        if given is not None:
            logits.append(given)
            weights.append(teacher.weight)
        if not banks:
            plain = functools.partial(teacher.answers_to, names=["output"])
            voting = None if exam.bank is None else ask(exam.bank, describe=plain)
            banks = [(seen, voting)]
    seen, bank = banks[0]
    mean = mean_probability_logits(logits, weights) if len(logits) > 1 else None
    return Answer(
        seen.features, seen.indices, *_voting(bank),
        logits[0] if len(logits) == 1 else mean,
        {"source": [teacher.name for teacher in teachers],
         "architecture": [teacher.backbone.name for teacher in teachers],
         "sha256": [backbone_hash(teacher.backbone) for teacher in teachers],
         "image_size": [list(teacher.size) for teacher in teachers]},
        len(seen.broken),
    )  # fmt: skip


def load_student(run_dir: Path, device: torch.device) -> tuple[Student, list[str] | None]:
    """The saved student in eval mode with its classifiers, and the names of its classes."""
    backbone = load_backbone(run_dir, device=device)
    path = run_dir / CLASSIFIER_FILE
    if not path.is_file():
        return Student(backbone, None).to(device).eval(), None
    names, tensors = read_classifier(path)
    token = of_token(tensors)
    student = Student(backbone, len(tensors["bias"]), with_token=bool(token))
    try:
        for layer, state in ((student.classifier, tensors), (student.token_classifier, token)):
            if layer is not None:
                layer.load_state_dict({key: state[key] for key in ("weight", "bias")})
    except (KeyError, RuntimeError) as error:
        raise CheckpointError(f"{path} is damaged or does not fit its student ({error})") from error
    return student.to(device).eval(), names


def aligned(
    logits: Tensor | None, names: Sequence[str] | None, wanted: Sequence[str]
) -> Tensor | None:
    """The columns of the classes `wanted`, in their order; None when one of them is missing.

    Raises CheckpointError for logits that are not finite.
    """
    if logits is None or names is None or set(wanted) - set(names):
        return None
    if not torch.isfinite(logits).all():
        raise CheckpointError("the network's class scores are not finite: training diverged")
    return logits[:, [list(names).index(name) for name in wanted]]


def record(
    folder: Path,
    answer: Answer,
    exam: Exam,
    settings: DistillConfig,
    device: torch.device,
    *,
    training: dict[str, Any],
    teacher: dict[str, Tensor] | None,
) -> dict[str, float]:
    """Score an answer and write `RESULT_FILE` and `LOGITS_FILE` into `folder`; main process only.

    Returns the metrics.

    Args:
        folder: an arm's run directory, or the teacher's folder.
        answer: of the network.
        exam: what was asked.
        settings: of the arm, for the record.
        device: for the record, and where neighbours are searched on a GPU.
        training: steps and seconds, for the record.
        teacher: the tensors of the teacher's own `LOGITS_FILE`; None: there is nothing to follow.
    """
    started = time.perf_counter()
    labels = exam.labels[answer.indices]  # [N]
    near, found = _neighbours(answer, exam, device)
    metrics: dict[str, Any] = dict(_flat(found))
    tensors = {"indices": answer.indices, "labels": labels, "knn_hits": near}
    if answer.logits is not None:
        places = class_places(answer.logits, labels)
        metrics |= {f"top{k}": 100 * (places < k).double().mean().item() for k in (1, 5)}
        tensors["logits"] = answer.logits.clamp(-_LARGEST, _LARGEST).half()
        tensors["hits"] = (places == 0).to(torch.uint8)
        if teacher is not None and "logits" in teacher:
            metrics |= likeness(answer, teacher)
    write_tensors(
        folder / LOGITS_FILE,
        tensors,
        {"classes": json.dumps(exam.class_names), "key": exam.key},
    )
    result = {
        "evaluator": "distill",
        "metrics": metrics,
        "training": training,
        "protocol": {
            "precision": "fp32", "k": NEIGHBOURS, "temperature": 0.07,
            "voters": exam.bank.spec if exam.bank else "the other test images",
            "transform": "shorter side resized, centre crop, bicubic",
        },
        "backbone": answer.about,
        "data": {
            "test": exam.test.spec, "images": len(labels), "broken": answer.broken,
            "classes": len(exam.class_names), "key": exam.key,
        },
        "settings": settings.model_dump(mode="json"),
        "versions": {
            "dino_kd": dino_kd.__version__, "torch": torch.__version__,
            "timm": timm.__version__, "python": platform.python_version(),
        },
        "device": str(device),
        "processes": world_size(),
        "seconds": {"neighbours": time.perf_counter() - started},
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }  # fmt: skip
    write_json(folder / RESULT_FILE, result)  # last: it says that all is there
    return metrics


def is_scored(folder: Path, exam: Exam) -> bool:
    """Whether `folder` holds the score of this exam; the main process looks for all."""

    def look() -> bool:
        try:
            result = json.loads((folder / RESULT_FILE).read_text(encoding="utf-8"))
            return result["data"]["key"] == exam.key and (folder / LOGITS_FILE).is_file()
        except (OSError, ValueError, KeyError, TypeError):
            return False

    return on_main(look)


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """What `record` wrote. Raises CheckpointError when the file is damaged."""
    path = folder / LOGITS_FILE
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); delete it to score again") from error


def likeness(answer: Answer, teacher: dict[str, Tensor]) -> dict[str, float]:
    """Agreement on the best class in percent, mean KL(teacher || student) in nats, both on test."""
    assert answer.logits is not None
    both, mine, its = np.intersect1d(
        answer.indices.numpy(), teacher["indices"].numpy(), return_indices=True
    )
    if not len(both):
        return {}
    found = fidelity(answer.logits[mine], teacher["logits"][its].float())
    return {name: value.item() for name, value in found.items()}


def _neighbours(
    answer: Answer, exam: Exam, device: torch.device
) -> tuple[Tensor, dict[str, float]]:
    """Per image whether the vote of the nearest is right, uint8 ``[N]``, and the accuracies."""
    use = device if device.type == "cuda" else torch.device("cpu")
    queries, truth = answer.features.to(use), exam.labels[answer.indices]
    if answer.bank_features is None:
        voters = truth
        near = knn.search_others(queries, min(NEIGHBOURS, len(queries) - 1))
    else:
        assert exam.bank_labels is not None and answer.bank_indices is not None  # noqa: PT018
        voters = exam.bank_labels[answer.bank_indices]
        bank = answer.bank_features.to(use)
        near = knn.search(queries, bank, min(NEIGHBOURS, len(bank)))
    similarity, index = (part.cpu() for part in near)
    scores = knn.vote_accuracy(similarity, index, truth, voters, ks=[NEIGHBOURS])
    used = similarity.shape[1]
    best = knn.vote(similarity, voters[index], len(exam.class_names), [used])[used][:, 0]
    return (best == truth).to(torch.uint8), scores[NEIGHBOURS]


def _voting(bank: FeatureBank | None) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if bank is None else (bank.features, bank.indices)


def _flat(found: dict[str, float]) -> dict[str, float]:
    return {f"knn{NEIGHBOURS}_{name}": value for name, value in found.items()}
