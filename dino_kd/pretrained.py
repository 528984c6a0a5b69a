"""The one door from a file, a folder or a name to a backbone, and back to a folder.

Weights are read without executing anything: safetensors, or `torch.load(weights_only=True)`.
A network is either loaded completely or not at all.
"""

from __future__ import annotations

import argparse
import json
import pickle
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.models import adapt_input_conv
from torch import Tensor, nn

from dino_kd.config import load_settings
from dino_kd.engine.checkpoint import load_checkpoint
from dino_kd.errors import CheckpointError, ConfigError, UserError, unknown_name
from dino_kd.files import write_json, write_tensors
from dino_kd.models.backbone import Backbone, as_size, create_backbone
from dino_kd.models.classifier_file import CLASSIFIER_FILE
from dino_kd.models.dino_weights import choose_branch, read_dino_weights
from dino_kd.models.fingerprint import weights_hash
from dino_kd.models.head import DINOHead
from dino_kd.models.torchvision_networks import (
    PREFIX,
    default_weights,
    read_torchvision_weights,
    torchvision_names,
    trained_size,
)
from dino_kd.schema import (
    CropSettings,
    DataSettings,
    HeadSettings,
    ModelSettings,
    PretrainConfig,
)

WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
_STUDENT_PREFIX = "student.backbone.net."
_CHECKPOINT_SUFFIXES = (".pth", ".pt", ".bin", ".safetensors")
_BRANCHES = ("teacher", "student", "untrained")
_ACCEPTED = (
    "a run directory, a folder with config.json and model.safetensors ('local-dir:PATH'), "
    "'timm:NAME', 'torchvision:NAME', 'torchvision:NAME:FILE', 'random:NAME', "
    "'random:torchvision/NAME', or a DINO / DINOv2 checkpoint file (.pth, .pt, .safetensors)"
)


def load_backbone(
    source: str | Path,
    *,
    branch: str = "teacher",
    img_size: int | Sequence[int] | None = None,
    device: str | torch.device = "cpu",
) -> Backbone:
    """Load a backbone in eval mode.

    Args:
        source: a run directory; a folder in timm's format, also as ``local-dir:PATH``;
            ``timm:NAME`` (timm's weights, may download); ``torchvision:NAME`` (torchvision's
            network and default weights, may download); ``torchvision:NAME:FILE`` (weights from
            torchvision's state dict); ``random:NAME`` and ``random:torchvision/NAME`` (random
            weights, seed 0); a checkpoint file of DINO or DINOv2.
        branch: "teacher" or "student" of a run or a full training checkpoint; "untrained" is the
            network a run started from.
        img_size: pixels, one side or (height, width); position embeddings are resampled, those of
            DINO and DINOv2 files by their authors' rule. None: as it was trained.
        device: where to put it.

    Raises:
        CheckpointError: nothing there, damaged, or it does not fit its architecture.
        ConfigError: unknown name or branch, or an image size that the patch does not divide.
    """
    if branch not in _BRANCHES:
        raise unknown_name("branch", branch, _BRANCHES)
    text = str(source)
    kind, _, rest = text.partition(":")
    path = Path(rest if kind == "local-dir" else text).expanduser()
    named = {"timm": _load_timm, "torchvision": _load_torchvision, "random": _random}
    if kind in named:
        _only_one_network(text, branch)
        backbone = named[kind](rest, img_size)
    elif path.is_dir() and kind != "local-dir" and (path / "config.yaml").is_file():
        backbone = _load_run(path, branch)
    elif path.is_dir():
        _only_one_network(text, branch)
        backbone = _load_folder(path)
    elif path.is_file():
        backbone = _load_file(path, branch, img_size)
    else:
        known = {"timm": timm.is_model(text), "torchvision": text in torchvision_names()}
        near = [repr(f"{kind}:{text}") for kind, has in known.items() if has]
        hint = f"; did you mean {' or '.join(near)}?" if near else "."
        raise CheckpointError(f"no backbone at {text!r}{hint} Accepted: {_ACCEPTED}.")
    if img_size is not None:
        backbone.resize(img_size)
    return backbone.to(device).eval()


def backbone_from_settings(
    model: ModelSettings,
    crops: CropSettings,
    data: DataSettings,
    seed: int,
    *,
    drop_path: float | None = None,
) -> Backbone:
    """Build the network that a run starts from; seeds torch's global generator with `seed`.

    With `init_from` all weights come from there, and so does the normalisation where the settings
    give none.

    Args:
        model: architecture and `init_from`.
        crops: `global_size` is the network's input size.
        data: `mean` and `std`.
        seed: the run's seed.
        drop_path: replaces the settings' rate, such as 0 for a teacher.

    Raises:
        ConfigError: see `create_backbone`.
        CheckpointError: `init_from` cannot be read or holds another architecture.
    """
    torch.manual_seed(seed)
    source = load_backbone(model.init_from, img_size=crops.global_size) if model.init_from else None
    keep_statistics = source is not None and source.in_chans == model.in_chans
    mean = source.mean if source is not None and keep_statistics else None
    std = source.std if source is not None and keep_statistics else None
    torch.manual_seed(seed)
    backbone = create_backbone(
        model.backbone,
        in_chans=model.in_chans,
        img_size=crops.global_size,
        patch_size=model.patch_size,
        drop_path=model.drop_path if drop_path is None else drop_path,
        mean=data.mean if data.mean is not None else mean,
        std=data.std if data.std is not None else std,
        args=model.args,
    )
    if source is not None:
        state = _adapt_channels(source, backbone)
        where = f"model.init_from: {model.init_from} ({_describe(source)})"
        _load_strictly(backbone.net, state, where, _describe(backbone))
        backbone.notes = source.notes
    return backbone


def head_from_settings(head: HeadSettings, width: int) -> DINOHead:
    """The projection head of a run on features of `width`; its `auto` is resolved."""
    return DINOHead(
        width,
        int(head.num_prototypes),
        hidden_dim=head.hidden_dim,
        bottleneck_dim=head.bottleneck_dim,
        num_layers=head.num_layers,
        batch_norm=head.batch_norm,
        unit_prototypes=head.unit_prototypes,
    )


def build_untrained(config: PretrainConfig) -> Backbone:
    """The network that a run of `config` starts from; leaves torch's generator as it was."""
    with torch.random.fork_rng(devices=[]):
        return backbone_from_settings(config.model, config.crops, config.data, config.seed)


def save_backbone(
    backbone: Backbone, folder: str | Path, weights: dict[str, Tensor] | None = None
) -> None:
    """Write ``config.json`` and ``model.safetensors`` for ``timm.create_model("local-dir:...")``.

    Each file is replaced atomically: a reader sees the old or the new one. Raises UserError when
    the disk is full or not writable.

    Args:
        backbone: what is saved.
        folder: created if need be.
        weights: state dict of its network, where the network itself is sharded.
    """
    folder = Path(folder)
    write_json(folder / CONFIG_FILE, _timm_config(backbone))
    weights = backbone.net.state_dict() if weights is None else weights
    write_tensors(folder / WEIGHTS_FILE, weights)


def backbone_hash(backbone: Backbone) -> str:
    """`weights_hash` of its network: the same for a folder, a run and a file of these weights."""
    return weights_hash(backbone.net)


def _timm_config(backbone: Backbone) -> dict[str, Any]:
    return {
        "architecture": backbone.name,
        "num_classes": 0,
        "num_features": backbone.embed_dim,
        "model_args": backbone.model_args,
        "pretrained_cfg": {
            "input_size": [backbone.in_chans, *backbone.img_size],
            "fixed_input_size": False,
            "mean": list(backbone.mean),
            "std": list(backbone.std),
            "interpolation": "bicubic",
            "crop_pct": 1.0 if max(backbone.img_size) <= 64 else 0.875,
            "num_classes": 0,
        },
    }


def _load_run(run_dir: Path, branch: str) -> Backbone:
    folder = run_dir / "backbone"
    if (run_dir / CLASSIFIER_FILE).is_file():
        _only_one_network(str(run_dir), branch)
    if branch == "untrained":
        return build_untrained(_run_config(run_dir))
    if branch == "student" and (run_dir / "backbone_student").is_dir():
        return _load_folder(run_dir / "backbone_student")
    if branch == "teacher":
        if not folder.is_dir():
            inside = sorted(path.parent.name for path in run_dir.glob("*/backbone"))
            if inside:
                raise CheckpointError(
                    f"{run_dir} holds several runs; name one of them: {', '.join(inside)}"
                )
            raise CheckpointError(
                f"{run_dir} is a run that has not saved a backbone yet (no folder 'backbone' in it)"
            )
        return _load_folder(folder)
    state, checkpoint, warnings = load_checkpoint(run_dir / "checkpoints")
    task = state.get("task", {})
    student = {
        key.removeprefix(_STUDENT_PREFIX): value
        for key, value in task.items()
        if key.startswith(_STUDENT_PREFIX)
    }
    # The saved teacher has the same architecture and normalisation, whatever the run started from.
    backbone = _load_folder(folder) if folder.is_dir() else build_untrained(_run_config(run_dir))
    _load_strictly(backbone.net, student, f"the student in {checkpoint}", _describe(backbone))
    backbone.notes = [*warnings, f"student of checkpoint {checkpoint.name}"]
    return backbone


def _run_config(run_dir: Path) -> PretrainConfig:
    config = load_settings(PretrainConfig, [str(run_dir / "config.yaml")], command="pretrain")
    assert isinstance(config, PretrainConfig)
    return config


def _load_folder(folder: Path) -> Backbone:
    config = _read_folder_config(folder)
    pretrained = config.get("pretrained_cfg", config)
    args = dict(config.get("model_args") or {})
    input_size = pretrained.get("input_size") or (3, 224, 224)
    args.pop("num_classes", None)
    for decided_again in ("dynamic_img_size", "strict_img_size"):
        args.pop(decided_again, None)
    try:
        backbone = create_backbone(
            config["architecture"],
            in_chans=args.pop("in_chans", input_size[0]),
            img_size=args.pop("img_size", None) or input_size[1:],
            mean=pretrained.get("mean"),
            std=pretrained.get("std"),
            args=args,
        )
    except ConfigError as error:
        raise CheckpointError(
            f"{folder / CONFIG_FILE} describes no usable network: {error}"
        ) from error
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        path = folder / "pytorch_model.bin"
    if not path.is_file():
        raise CheckpointError(f"{folder} holds no {WEIGHTS_FILE}")
    state = _read_weights(path)
    if not isinstance(state, Mapping):
        raise CheckpointError(f"{path} holds no weights (found {type(state).__name__})")
    state = _without_classifier(dict(state), pretrained, backbone)
    _load_strictly(backbone.net, state, str(path), _describe(backbone))
    return backbone


def _read_folder_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_FILE
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{folder} is no backbone: it holds neither {CONFIG_FILE} nor a run's config.yaml. "
            f"Accepted: {_ACCEPTED}."
        ) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({error})") from error
    if not isinstance(config, dict) or "architecture" not in config:
        raise CheckpointError(f"{path} names no 'architecture'; expected timm's folder format")
    return config


def _without_classifier(
    state: dict[str, Tensor], pretrained: Mapping[str, Any], backbone: Backbone
) -> dict[str, Tensor]:
    """Leave out the classifier that timm's own folders may hold, by the name they state."""
    names = pretrained.get("classifier") or ()
    prefixes = tuple(f"{name}." for name in ([names] if isinstance(names, str) else names))
    ours = backbone.net.state_dict().keys()
    left_out = [k for k in state if prefixes and k.startswith(prefixes) and k not in ours]
    if left_out:
        backbone.notes.append(f"left out, not part of the backbone: {', '.join(sorted(left_out))}")
    return {key: value for key, value in state.items() if key not in left_out}


def _load_file(path: Path, branch: str, img_size: int | Sequence[int] | None) -> Backbone:
    if path.suffix not in _CHECKPOINT_SUFFIXES:
        raise CheckpointError(
            f"{path} is no checkpoint file (one of {', '.join(_CHECKPOINT_SUFFIXES)}). "
            f"Accepted: {_ACCEPTED}."
        )
    if branch == "untrained":
        _only_one_network(str(path), branch)
    state, has_branches = choose_branch(_read_weights(path), branch, str(path))
    if not has_branches:
        _only_one_network(str(path), branch)
    size = None if img_size is None else as_size(img_size)
    weights = read_dino_weights(state, str(path), size)
    backbone = create_backbone(
        weights.name,
        in_chans=weights.in_chans,
        img_size=weights.img_size,
        patch_size=weights.patch_size,
        args=weights.args,
    )
    _load_strictly(backbone.net, weights.state, str(path), _describe(backbone))
    backbone.notes = weights.notes + (
        [f"{branch} of a training checkpoint"] if has_branches else []
    )
    return backbone


def _read_weights(path: Path) -> Any:
    """The content of a weights file; Python code in it is never run."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        # Official DINO training checkpoints hold their command line as an argparse.Namespace.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "Unsupported" in str(error) or "global" in str(error):
            raise CheckpointError(
                f"{path} holds Python objects besides tensors, which are not loaded because they "
                "could run code; save a plain state dict instead"
            ) from error
        raise CheckpointError(f"{path} is damaged or incomplete ({_short(error)})") from error
    except (SafetensorError, RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
        raise CheckpointError(f"{path} is damaged or incomplete ({_short(error)})") from error
    except zipfile.BadZipFile as error:
        raise CheckpointError(f"{path} is damaged or incomplete ({_short(error)})") from error


def _load_timm(name: str, img_size: int | Sequence[int] | None) -> Backbone:
    _check_timm_name(name)
    config = timm.get_pretrained_cfg(name)
    if config is None or not config.has_weights:
        raise CheckpointError(
            f"timm has no weights for {name!r}; 'random:{name}' builds it untrained"
        )
    try:
        backbone = create_backbone(
            name,
            in_chans=config.input_size[0],
            img_size=img_size or config.input_size[1:],
            pretrained=True,
        )
    except UserError:
        raise
    except Exception as error:  # downloads fail in many ways; each ends here, none continues
        raise CheckpointError(
            f"the weights of 'timm:{name}' could not be loaded ({type(error).__name__}: "
            f"{_short(error)}). Without a network connection, download them once elsewhere and "
            "give the file or folder instead."
        ) from error
    return backbone


def _load_torchvision(rest: str, img_size: int | Sequence[int] | None) -> Backbone:
    """The network of ``NAME`` with torchvision's default weights, or of ``NAME:FILE``."""
    name, separator, file = rest.partition(":")
    source = f"torchvision:{rest}"
    if not name or (separator and not file):
        raise ConfigError(
            f"backbone: {source!r} lacks {'a file' if name else 'a name'}; accepted are "
            "torchvision:NAME and torchvision:NAME:FILE, such as torchvision:resnet18"
        )
    _check_torchvision_name(name)
    if file:
        state = _read_torchvision_file(Path(file).expanduser(), source)
    else:
        state = _download_torchvision(name)
    config = timm.get_pretrained_cfg(PREFIX + name)
    assert config is not None  # registered with one
    size = config.input_size[1:]
    is_vit = name.startswith("vit_")
    backbone = create_backbone(
        PREFIX + name,
        # the positions of a ViT are resampled afterwards, from the size they are for
        img_size=size if is_vit or img_size is None else img_size,
        mean=config.mean,
        std=config.std,
    )
    trained = trained_size(state, backbone.patch_size)
    if is_vit and trained and (trained, trained) != backbone.img_size:
        backbone.resize(trained)
    weights, backbone.notes = read_torchvision_weights(state, backbone.net)
    _load_strictly(backbone.net, weights, source, _describe(backbone))
    return backbone


def _read_torchvision_file(path: Path, source: str) -> Mapping[str, Tensor]:
    if not path.is_file():
        raise CheckpointError(f"{source}: there is no file {str(path)!r}")
    if path.suffix not in _CHECKPOINT_SUFFIXES:
        raise CheckpointError(
            f"{path} is no checkpoint file (one of {', '.join(_CHECKPOINT_SUFFIXES)})"
        )
    state = _read_weights(path)
    if not isinstance(state, Mapping) or not all(isinstance(t, Tensor) for t in state.values()):
        found = (
            f"a mapping of {_some(list(map(str, state)))}"
            if isinstance(state, Mapping)
            else (type(state).__name__)
        )
        raise CheckpointError(
            f"{path} is no state dict, which maps names to tensors (found {found}); save "
            "network.state_dict()"
        )
    return state


def _download_torchvision(name: str) -> Mapping[str, Tensor]:
    """torchvision's default weights, from torch's hub cache or the network."""
    weights = default_weights(name)
    if weights is None:
        raise CheckpointError(
            f"torchvision has no weights for {name!r}; 'random:torchvision/{name}' builds it "
            "untrained"
        )
    try:
        return torch.hub.load_state_dict_from_url(
            weights.url, map_location="cpu", progress=False, check_hash=True, weights_only=True
        )
    except Exception as error:  # downloads fail in many ways; each ends here, none continues
        raise CheckpointError(
            f"the weights of 'torchvision:{name}' could not be loaded ({type(error).__name__}: "
            f"{_short(error)}). Without a network connection, download {weights.url} elsewhere "
            f"and give 'torchvision:{name}:FILE.pth'."
        ) from error


def _random(name: str, img_size: int | Sequence[int] | None) -> Backbone:
    if name.startswith("torchvision/"):
        _check_torchvision_name(name.removeprefix("torchvision/"))
        name = PREFIX + name.removeprefix("torchvision/")
    _check_timm_name(name)
    config = timm.get_pretrained_cfg(name)
    size = img_size or (config.input_size[1:] if config is not None else 224)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return create_backbone(name, img_size=size)


def _check_timm_name(name: str) -> None:
    if not timm.is_model(name):
        raise unknown_name("timm model", name, timm.list_models(), where="backbone")


def _check_torchvision_name(name: str) -> None:
    if name not in torchvision_names():
        raise unknown_name("torchvision network", name, torchvision_names(), where="backbone")


def _only_one_network(source: str, branch: str) -> None:
    if branch != "teacher":
        raise ConfigError(
            f"branch: {source} holds one network only, got branch={branch}; leave it out "
            "(student and untrained exist for run directories and training checkpoints)"
        )


def _adapt_channels(source: Backbone, target: Backbone) -> dict[str, Tensor]:
    """The source's weights, its first convolution repeated or summed to the target's channels."""
    state = dict(source.net.state_dict())
    if source.in_chans == target.in_chans:
        return state
    first = (getattr(source.net, "pretrained_cfg", None) or {}).get("first_conv")
    if source.in_chans != 3 or not isinstance(first, str):
        raise CheckpointError(
            f"model.init_from: it has {source.in_chans} input channels, model.in_chans is "
            f"{target.in_chans}; only weights for 3 channels can be adapted"
        )
    key = f"{first}.weight"
    state[key] = adapt_input_conv(target.in_chans, state[key])
    return state


def _load_strictly(
    net: nn.Module, state: Mapping[str, Tensor], where: str, architecture: str
) -> None:
    """Load every tensor of `net` from `state`, which holds nothing else.

    Raises CheckpointError that names what is missing, left over or of another shape.
    """
    own = net.state_dict()
    problems = {
        "missing": [key for key in own if key not in state],
        "unexpected": [key for key in state if key not in own],
        "of another shape": [
            f"{key} {tuple(state[key].shape)} instead of {tuple(own[key].shape)}"
            for key in own
            if key in state and state[key].shape != own[key].shape
        ],
    }
    found = [f"{len(keys)} {what} ({_some(keys)})" for what, keys in problems.items() if keys]
    if found:
        raise CheckpointError(f"{where} does not fit {architecture}: {'; '.join(found)}")
    net.load_state_dict(dict(state), strict=True)


def _describe(backbone: Backbone) -> str:
    height, width = backbone.img_size
    patch = f", patch {backbone.patch_size}" if backbone.patch_size else ""
    return f"{backbone.name} at {height} x {width} px{patch}"


def _some(items: list[str], count: int = 4) -> str:
    more = f", and {len(items) - count} more" if len(items) > count else ""
    return ", ".join(items[:count]) + more


def _short(error: BaseException) -> str:
    line = (str(error).splitlines() or [""])[0].strip()
    return line[:200] or type(error).__name__
