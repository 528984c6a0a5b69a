"""From the settings of a distillation to its teachers: weights, heads, classes that fit."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from dino_kd.config import load_settings
from dino_kd.errors import CheckpointError, ConfigError, did_you_mean
from dino_kd.models.backbone import Backbone, as_size, check_input_size
from dino_kd.models.classifier_file import CLASSIFIER_FILE, of_token, read_classifier
from dino_kd.models.head import DINOHead
from dino_kd.models.linear_head import LinearHead, check_head, head_file, load_linear_head
from dino_kd.pretrained import backbone_hash, head_from_settings, load_backbone
from dino_kd.schema import DistillTeacherSettings, PretrainConfig
from dino_kd.tasks.teacher import Teacher


def open_teacher(
    settings: DistillTeacherSettings,
    where: str,
    *,
    needs_logits: bool,
    needs_prototypes: bool,
    label_share: float = 1.0,
) -> Teacher:
    """Load one frozen teacher with the heads that the terms need.

    Args:
        settings: of this teacher.
        where: its place in the settings, for messages, such as ``teacher``.
        needs_logits: whether some term reads its logits.
        needs_prototypes: likewise.
        label_share: part of the labels that the student may see: a linear head that has seen the
            same part is taken before one that has seen all.

    Raises:
        ConfigError: a size that its patch does not divide; logits are needed and there is no head.
        CheckpointError: a file that is damaged, absent, or does not belong to these weights.
    """
    backbone = load_backbone(settings.backbone, branch=settings.branch)
    size = as_size(settings.image_size) if settings.image_size else backbone.img_size
    check_input_size(backbone, size, where=f"{where}.image_size")
    head, names = None, None
    if needs_logits:
        head, names = _logit_head(settings, backbone, where, label_share)
    prototypes = _prototypes(settings, backbone, where) if needs_prototypes else None
    return Teacher(
        backbone, size, head=head, prototypes=prototypes, weight=settings.weight,
        name=settings.backbone, class_names=names,
    )  # fmt: skip


def match_classes(teacher: Teacher, class_names: Sequence[str], where: str) -> str | None:
    """Put the teacher's logits into the order of `class_names`, leaving out its other classes.

    Returns a sentence when classes were left out, or have no names to be found by. Raises
    ConfigError when it lacks a class.
    """
    known = teacher.class_names
    if teacher.head is None:
        return None
    if known is None:
        count = number_of_logits(teacher)
        if count != len(class_names):
            raise ConfigError(
                f"{where}: its logits are for {count} classes without names, the images have "
                f"{len(class_names)}. Train a head on these classes with 'dino-kd linear "
                f"backbone={teacher.name}', or distil without labels: terms.preset=label_free"
            )
        return (
            f"the classes of {teacher.name} have no names; its logits are taken in the order of "
            f"{', '.join(class_names[:3])}{', ...' if count > 3 else ''}"
        )
    absent = [name for name in class_names if name not in known]
    if absent:
        raise ConfigError(
            f"{where}: its logits are for {len(known)} classes, the images have "
            f"{len(class_names)}; it does not know {absent[0]!r}"
            f"{did_you_mean(absent[0], known)}. Train a head on these classes with 'dino-kd "
            f"linear backbone={teacher.name}', or distil without labels: terms.preset=label_free"
        )
    order = torch.tensor([known.index(name) for name in class_names])
    linear = teacher.head.linear if isinstance(teacher.head, LinearHead) else teacher.head
    for parameter in (linear.weight, linear.bias):  # type: ignore[union-attr]
        parameter.data = parameter.data[order]  # type: ignore[union-attr,index]
    teacher.class_names = list(class_names)
    left_out = len(known) - len(class_names)
    return (
        f"{left_out} of {len(known)} classes of {teacher.name} are left out" if left_out else None
    )


def number_of_logits(teacher: Teacher) -> int:
    """Classes of its head; 0 without one."""
    linear = teacher.head.linear if isinstance(teacher.head, LinearHead) else teacher.head
    return len(linear.weight) if isinstance(linear, nn.Linear) else 0


def randomise(teacher: Teacher, seed: int) -> None:
    """Make it a control: the same networks with random weights, in place.

    Matrices are redrawn with the standard deviation of their trained values, so that what it
    answers has the scale of answers and none of the knowledge; batch-norm statistics are reset.
    """
    generator = torch.Generator().manual_seed(seed)
    for module in teacher.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase):
            module.reset_running_stats()
    with torch.no_grad():
        for parameter in teacher.parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            if parameter.squeeze().ndim > 1:
                parameter.copy_(drawn * parameter.std())
    teacher.name = f"control of {teacher.name}"


def _logit_head(
    settings: DistillTeacherSettings, backbone: Backbone, where: str, label_share: float
) -> tuple[nn.Module, list[str] | None]:
    """The module that gives logits, and the names of their classes."""
    run_dir = Path(settings.backbone).expanduser()
    linear = run_dir / "eval" / head_file(settings.branch)
    of_part = run_dir / "eval" / head_file(settings.branch, label_share)
    if settings.head == "timm":
        return _timm_classifier(settings.backbone, backbone, where)
    if settings.head != "auto":
        return _linear_head(Path(settings.head).expanduser(), backbone)
    found = [file for file in (run_dir / CLASSIFIER_FILE, of_part, linear) if file.is_file()]
    if found:
        backbone.notes.append(f"{where}: its class scores come from {found[0]}")
        if found[0] == linear != of_part:
            backbone.notes.append(
                f"{linear} has seen the labels of all its images, and data.labels={label_share:g} "
                "hides most of them from the student; for a teacher that has seen no more: "
                f"dino-kd linear backbone={settings.backbone} fraction={label_share:g} ..."
            )
        is_tuned = found[0].name == CLASSIFIER_FILE
        return (_tuned_classifier if is_tuned else _linear_head)(found[0], backbone)
    raise ConfigError(
        f"{where}.head: a term of the loss needs logits, and {settings.backbone} has no classifier "
        f"(looked for {run_dir / CLASSIFIER_FILE} and {linear}). Train one with 'dino-kd linear "
        f"backbone={settings.backbone} train=... test=...', name its file with {where}.head=FILE, "
        f"use {where}.head=timm for the classifier of a timm model, or distil without labels: "
        "terms.preset=label_free"
    )


def _linear_head(path: Path, backbone: Backbone) -> tuple[LinearHead, list[str]]:
    head = load_linear_head(path)
    backbone.notes += check_head(head, backbone, backbone_hash(backbone))
    return head, head.class_names


def _tuned_classifier(path: Path, backbone: Backbone) -> tuple[nn.Linear, list[str]]:
    """What `dino-kd finetune` or `dino-kd distill` saved beside its backbone."""
    known, tensors = read_classifier(path)
    names = known or []
    weight, bias = tensors["weight"], tensors["bias"]
    if of_token(tensors):
        raise CheckpointError(
            f"{path} holds two classifiers, of class and distillation token, which cannot teach "
            "yet; train one on its features with 'dino-kd linear' and name its file as head"
        )
    if weight.shape != (len(names), backbone.embed_dim) or bias.shape != weight.shape[:1]:
        raise CheckpointError(
            f"{path} does not fit its backbone: weights {tuple(weight.shape)} for "
            f"{len(names)} classes and {backbone.embed_dim} features of {backbone.name}"
        )
    layer = nn.Linear(weight.shape[1], weight.shape[0])
    layer.load_state_dict({"weight": weight, "bias": bias})
    return layer, names


def _timm_classifier(
    source: str, backbone: Backbone, where: str
) -> tuple[nn.Linear, list[str] | None]:
    """The classifier of a timm model, with ImageNet's names where it has them."""
    import timm
    from timm.data import ImageNetInfo, infer_imagenet_subset

    kind, _, rest = source.partition(":")
    if kind not in ("timm", "local-dir"):
        raise ConfigError(
            f"{where}.head=timm is for 'timm:NAME' and 'local-dir:PATH', got {source!r}"
        )
    try:
        net: Any = timm.create_model(rest if kind == "timm" else source, pretrained=True)
    except (RuntimeError, OSError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{where}.head=timm: {source} cannot be loaded ({error})") from error
    layer: Any = net.get_classifier()
    if not isinstance(layer, nn.Linear) or layer.in_features != backbone.embed_dim:
        raise CheckpointError(
            f"{where}.head=timm: {source} has no linear classifier on its "
            f"{backbone.embed_dim} features"
        )
    names = net.pretrained_cfg.get("label_names")
    if not names and (subset := infer_imagenet_subset(net)):
        names = ImageNetInfo(subset).label_names()
    return layer, list(names) if names else None


def _prototypes(settings: DistillTeacherSettings, backbone: Backbone, where: str) -> DINOHead:
    """The projection head that a run of `dino-kd pretrain` keeps."""
    run_dir = Path(settings.backbone).expanduser()
    path = run_dir / "heads.safetensors"
    if not path.is_file() or settings.branch == "untrained":
        raise ConfigError(
            f"{where}.backbone: terms.prototype_kd needs the projection head of a run of 'dino-kd "
            f"pretrain' (heads.safetensors); {settings.backbone} has none"
        )
    config = load_settings(PretrainConfig, [str(run_dir / "config.yaml")], command="pretrain")
    head = head_from_settings(config.head, backbone.embed_dim)
    prefix = f"{settings.branch}."
    try:
        with safe_open(path, "pt") as file:
            state = {
                name.removeprefix(prefix): file.get_tensor(name)
                for name in file.keys()  # noqa: SIM118
                if name.startswith(prefix)
            }
        head.load_state_dict(state)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise CheckpointError(f"{path} does not fit {run_dir / 'config.yaml'} ({error})") from error
    return head
