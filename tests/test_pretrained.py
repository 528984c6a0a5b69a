"""The door to backbones: round trips through timm and torch.hub, official weights against
networks written out from their definition, and every way a file can be wrong.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torchvision
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from dino_kd import pretrained
from dino_kd.config import dump_settings
from dino_kd.engine.checkpoint import save_checkpoint
from dino_kd.errors import CheckpointError, ConfigError
from dino_kd.models.backbone import create_backbone
from dino_kd.models.dino_weights import read_dino_weights
from dino_kd.pretrained import backbone_hash, build_untrained, load_backbone, save_backbone
from dino_kd.schema import PretrainConfig

TINY = {"embed_dim": 64, "depth": 2, "num_heads": 1}
REPOSITORY = Path(__file__).resolve().parents[1]


# --- official layouts, built and run without timm -------------------------------------------------


def official_vit(
    *, dinov2=False, registers=0, swiglu=False, dim=64, depth=3, patch=8, grid=4, spread=0.2
):
    """A random state dict with the names and shapes of the official code."""
    g = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=g) * spread

    state = {
        "cls_token": random(1, 1, dim),
        "pos_embed": random(1, 1 + grid * grid, dim),
        "patch_embed.proj.weight": random(dim, 3, patch, patch),
        "patch_embed.proj.bias": random(dim),
        "norm.weight": 1 + random(dim),
        "norm.bias": random(dim),
    }
    if dinov2:
        state["mask_token"] = random(1, dim)
    if registers:
        state["register_tokens"] = random(1, registers, dim)
    hidden = 4 * dim
    for i in range(depth):
        layers = {"attn.qkv": (3 * dim, dim), "attn.proj": (dim, dim)}
        if swiglu:
            half = int(dim * 2.66667 * 2) // 2
            layers |= {"mlp.w12": (2 * half, dim), "mlp.w3": (dim, half)}
        else:
            layers |= {"mlp.fc1": (hidden, dim), "mlp.fc2": (dim, hidden)}
        for name, shape in layers.items():
            state[f"blocks.{i}.{name}.weight"] = random(*shape)
            state[f"blocks.{i}.{name}.bias"] = random(shape[0])
        for name in ("norm1", "norm2"):
            state[f"blocks.{i}.{name}.weight"] = 1 + random(dim)
            state[f"blocks.{i}.{name}.bias"] = random(dim)
        if dinov2:
            state[f"blocks.{i}.ls1.gamma"] = random(dim)
            state[f"blocks.{i}.ls2.gamma"] = random(dim)
    return state


def run_official_vit(state, x):
    """The forward pass of the papers, from the tensors alone."""
    dim = state["cls_token"].shape[-1]
    patch = state["patch_embed.proj.weight"].shape[-1]
    x = F.conv2d(x, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=patch)
    x = x.flatten(2).transpose(1, 2)
    x = torch.cat([state["cls_token"].expand(len(x), -1, -1), x], 1) + state["pos_embed"]
    if "register_tokens" in state:
        x = torch.cat([x[:, :1], state["register_tokens"].expand(len(x), -1, -1), x[:, 1:]], 1)
    i = 0
    while f"blocks.{i}.norm1.weight" in state:
        block = {
            k.removeprefix(f"blocks.{i}."): v
            for k, v in state.items()
            if k.startswith(f"blocks.{i}.")
        }

        def linear(name, value, block=block):
            return F.linear(value, block[f"{name}.weight"], block[f"{name}.bias"])

        def norm(name, value, block=block):
            weight, bias = block[f"{name}.weight"], block[f"{name}.bias"]
            return F.layer_norm(value, (dim,), weight, bias, eps=1e-6)

        q, k, v = (
            linear("attn.qkv", norm("norm1", x))
            .reshape(len(x), -1, 3, dim // 64, 64)
            .permute(2, 0, 3, 1, 4)
        )
        attended = ((q @ k.transpose(-1, -2)) / 8).softmax(-1) @ v
        attended = linear("attn.proj", attended.transpose(1, 2).flatten(2))
        x = x + attended * block.get("ls1.gamma", 1)
        y = norm("norm2", x)
        if "mlp.w12.weight" in block:
            a, b = linear("mlp.w12", y).chunk(2, -1)
            y = linear("mlp.w3", F.silu(a) * b)
        else:
            y = linear("mlp.fc2", F.gelu(linear("mlp.fc1", y)))
        x = x + y * block.get("ls2.gamma", 1)
        i += 1
    return F.layer_norm(x, (dim,), state["norm.weight"], state["norm.bias"], eps=1e-6)[:, 0]


def chunked(state, chunk=2):
    """Block chunks as in DINOv2 training checkpoints: the block number counts on through chunks."""
    out = {}
    for key, value in state.items():
        if key.startswith("blocks."):
            number, rest = key.removeprefix("blocks.").split(".", 1)
            key = f"blocks.{int(number) // chunk}.{number}.{rest}"
        out[key] = value
    return out


def cubic(x, a):
    """Keys' cubic convolution kernel."""
    x = np.abs(x)
    near = (a + 2) * x**3 - (a + 3) * x**2 + 1
    far = a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))


def resampling_matrix(source, target, *, antialias):
    """[target, source] weights of one axis, from the definition, in float64.

    Without antialiasing: four taps (a = -0.75), borders repeated, and the scale that the official
    code passes, (target + 0.1) / source. With it: a = -0.5, the kernel as wide as the target's
    pixels, weights normalised over the pixels inside.
    """
    matrix = np.zeros((target, source))
    scale = source / target if antialias else source / (target + 0.1)
    for i in range(target):
        center = (i + 0.5) * scale - 0.5
        if antialias:
            width = max(scale, 1.0)
            weights = cubic((np.arange(source) - center) / width, -0.5)
            matrix[i] = weights / weights.sum()
        else:
            for tap in range(int(np.floor(center)) - 1, int(np.floor(center)) + 3):
                place = min(max(tap, 0), source - 1)
                matrix[i, place] += cubic(np.array(tap - center), -0.75)
    return matrix


def official_positions(state, grid):
    """The position embeddings of another grid, by two matrix products."""
    cls, patches = state["pos_embed"][:, :1], state["pos_embed"][0, 1:]
    side = int(len(patches) ** 0.5)
    if grid == (side, side):
        return state["pos_embed"]
    antialias = "register_tokens" in state
    rows, columns = (resampling_matrix(side, n, antialias=antialias) for n in grid)
    square = patches.double().numpy().reshape(side, side, -1)
    made = np.einsum("ij,jkd,lk->ild", rows, square, columns)
    made = torch.from_numpy(made.reshape(1, grid[0] * grid[1], -1)).float()
    return torch.cat([cls, made], dim=1)


OFFICIAL = [
    {},
    {"patch": 16, "grid": 2, "dim": 128},
    {"dinov2": True},
    {"dinov2": True, "registers": 4},
    {"dinov2": True, "registers": 2, "depth": 1},
    {"dinov2": True, "swiglu": True},
    {"dinov2": True, "swiglu": True, "registers": 4},
]


@pytest.mark.parametrize("options", OFFICIAL)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_official_vit_gives_the_features_of_its_definition(tmp_path, options, suffix):
    state = official_vit(**options)
    path = tmp_path / f"weights{suffix}"
    (torch.save if suffix == ".pth" else save_file)(state, path)
    backbone = load_backbone(path)
    x = torch.randn(2, 3, *backbone.img_size)
    with torch.no_grad():
        torch.testing.assert_close(backbone(x), run_official_vit(state, x), atol=2e-5, rtol=1e-4)
    assert not backbone.training
    if options.get("dinov2"):
        assert "mask_token" in backbone.notes[0]


@pytest.mark.parametrize("grid", [(3, 3), (4, 6), (7, 2)])
@pytest.mark.parametrize("options", [{}, {"dinov2": True}, {"dinov2": True, "registers": 4}])
def test_other_sizes_follow_the_official_interpolation(tmp_path, options, grid):
    """Smaller, larger and not square, against the kernels' definition in float64."""
    state = official_vit(**options)
    torch.save(state, tmp_path / "weights.pth")
    size = (grid[0] * 8, grid[1] * 8)
    backbone = load_backbone(tmp_path / "weights.pth", img_size=size)
    assert backbone.img_size == size
    assert any("by the authors' rule" in note for note in backbone.notes)
    x = torch.randn(2, 3, *size)
    with torch.no_grad():
        expected = run_official_vit(state | {"pos_embed": official_positions(state, grid)}, x)
        torch.testing.assert_close(backbone(x), expected, atol=2e-5, rtol=1e-4)


VIT_S16 = {"dim": 384, "depth": 12, "patch": 16, "grid": 14}
VIT_S14 = {"dim": 384, "depth": 12, "patch": 14, "grid": 37, "dinov2": True}


@pytest.mark.parametrize(
    ("options", "size"),
    [
        (VIT_S16, (224, 224)),
        (VIT_S16, (160, 240)),
        (VIT_S14, (224, 224)),
        pytest.param(VIT_S14, (518, 518), marks=pytest.mark.slow),
        (VIT_S14 | {"registers": 4}, (224, 224)),
        pytest.param(VIT_S14 | {"registers": 4}, (518, 518), marks=pytest.mark.slow),
    ],
)
def test_published_small_networks_match_their_formulas_to_1e5(tmp_path, options, size):
    """DINO ViT-S/16 and DINOv2 ViT-S/14 in full size, native and other sizes, absolute 1e-5."""
    state = official_vit(**options, spread=0.02)
    if options.get("dinov2"):
        state = chunked(state, 3)
    torch.save({"teacher": {f"backbone.{k}": v for k, v in state.items()}}, tmp_path / "full.pth")
    backbone = load_backbone(tmp_path / "full.pth", img_size=size)
    plain = official_vit(**options, spread=0.02)
    grid = (size[0] // options["patch"], size[1] // options["patch"])
    plain["pos_embed"] = official_positions(plain, grid)
    x = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = run_official_vit(plain, x)
        torch.testing.assert_close(backbone(x), expected, atol=1e-5, rtol=0)
    assert expected.std() > 0.1  # not a comparison of zeros
    assert backbone.name.startswith("vit_small_patch")
    assert backbone.model_args.get("embed_dim", 384) == 384


def test_an_image_size_that_the_patch_does_not_divide_is_refused(tmp_path):
    torch.save(official_vit(), tmp_path / "weights.pth")
    with pytest.raises(ConfigError, match=r"image size: 30 x 30 px does not divide.*32 x 32"):
        load_backbone(tmp_path / "weights.pth", img_size=30)


def test_chunked_blocks_are_the_same_network(tmp_path):
    state = official_vit(dinov2=True)
    torch.save(state, tmp_path / "plain.pth")
    torch.save(chunked(state), tmp_path / "chunked.pth")
    plain, chunks = load_backbone(tmp_path / "plain.pth"), load_backbone(tmp_path / "chunked.pth")
    assert backbone_hash(plain) == backbone_hash(chunks)


def training_checkpoint(path):
    student, teacher = official_vit(), official_vit()
    teacher["norm.bias"] = teacher["norm.bias"] + 1
    head = {"head.mlp.0.weight": torch.zeros(2, 2), "head.last_layer.weight_g": torch.ones(2, 1)}
    checkpoint = {
        "student": {f"module.backbone.{k}": v for k, v in student.items()}
        | {f"module.{k}": v for k, v in head.items()},
        "teacher": {f"backbone.{k}": v for k, v in teacher.items()} | head,
        "optimizer": {"state": {}, "param_groups": [{"lr": 1e-3}]},
        "epoch": 7,
        "args": argparse.Namespace(arch="vit_small", lr=5e-4, local_crops_scale=(0.05, 0.4)),
        "dino_loss": {"center": torch.zeros(1, 4)},
    }
    torch.save(checkpoint, path)
    return student, teacher


def test_branch_chooses_inside_a_full_training_checkpoint(tmp_path):
    path = tmp_path / "checkpoint.pth"
    student, teacher = training_checkpoint(path)
    for branch, state in (("student", student), ("teacher", teacher)):
        backbone = load_backbone(path, branch=branch)
        assert torch.equal(backbone.net.norm.bias, state["norm.bias"])
        assert any("head" in note for note in backbone.notes)
    with pytest.raises(ConfigError, match=r"holds one network only, got branch=untrained"):
        load_backbone(path, branch="untrained")


def test_dinov2_teacher_checkpoint_loads_without_its_heads(tmp_path):
    state = {f"backbone.{k}": v for k, v in chunked(official_vit(dinov2=True)).items()}
    state |= {"dino_head.mlp.0.weight": torch.ones(2), "ibot_head.mlp.0.weight": torch.ones(2)}
    torch.save({"teacher": state}, tmp_path / "teacher.pth")
    backbone = load_backbone(tmp_path / "teacher.pth")
    assert "dino_head, ibot_head, mask_token" in backbone.notes[0]
    with pytest.raises(CheckpointError, match=r"holds no student network, only: teacher"):
        load_backbone(tmp_path / "teacher.pth", branch="student")


@pytest.mark.parametrize("with_counters", [True, False])
def test_official_resnet50_gives_the_features_of_torchvision(tmp_path, with_counters):
    torch.manual_seed(0)
    reference = torchvision.models.resnet50().eval()
    reference.fc = torch.nn.Identity()
    state = {
        k: v for k, v in reference.state_dict().items() if with_counters or "num_batches" not in k
    }
    torch.save(state, tmp_path / "dino_resnet50.pth")
    backbone = load_backbone(tmp_path / "dino_resnet50.pth", img_size=64)
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(backbone(x), reference(x))
    assert (backbone.name, backbone.embed_dim) == ("resnet50", 2048)


def published(name, **options):
    """An architecture's tensors without memory, under official names."""
    with torch.device("meta"):
        net = timm.create_model(name, num_classes=0, **options)
    state = {}
    registers = "reg_token" in net.state_dict()
    for key, value in net.state_dict().items():
        if "giant" in name:
            key = key.replace("mlp.fc1", "mlp.w12").replace("mlp.fc2", "mlp.w3")
        if registers and key == "pos_embed":
            value = torch.empty(1, value.shape[1] + 1, value.shape[2], device="meta")
        state["register_tokens" if key == "reg_token" else key] = value
    return state


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("vit_tiny_patch16_224", 224),
        ("vit_small_patch16_224", 224),
        ("vit_small_patch8_224", 224),
        ("vit_base_patch16_224", 224),
        ("vit_base_patch8_224", 224),
        ("vit_large_patch16_224", 224),
        *(
            (f"vit_{size}_patch14_{registers}dinov2", 518)
            for size in ("small", "base", "large", "giant")
            for registers in ("", "reg4_")
        ),
    ],
)
def test_published_architectures_are_recognised_by_shape(name, size):
    weights = read_dino_weights(published(name), "weights.pth")
    assert (weights.name, weights.args, weights.img_size) == (name, {}, (size, size))
    with torch.device("meta"):
        net = timm.create_model(
            weights.name, num_classes=0, img_size=weights.img_size, patch_size=weights.patch_size
        )
    expected = {k: v.shape for k, v in net.state_dict().items()}
    assert {k: v.shape for k, v in weights.state.items()} == expected


# --- what must not load ---------------------------------------------------------------------------


def without(state, *keys):
    return {k: v for k, v in state.items() if k not in keys}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (without(official_vit(), "blocks.1.mlp.fc1.bias"), "1 missing.*blocks.1.mlp.fc1.bias"),
        (official_vit() | {"extra.weight": torch.ones(1)}, "1 unexpected.*extra.weight"),
        (
            official_vit() | {"norm.bias": torch.ones(3)},
            r"1 of another shape.*norm.bias \(3,\) instead of \(64,\)",
        ),
        (without(official_vit(), "norm.weight", "norm.bias"), "2 missing"),
        ({"layers.0.weight": torch.ones(2)}, "no DINO or DINOv2 network.*layers.0.weight"),
        ({"epoch": 3}, "holds no weights; its entries are epoch"),
        ([1, 2], "holds no weights"),
        (without(official_vit(), "pos_embed") | {"pos_embed": torch.ones(1, 13, 64)}, "no square"),
        (
            official_vit() | {"patch_embed.proj.weight": torch.ones(65, 3, 8, 8)},
            "multiple of 64",
        ),
    ],
)
def test_weights_load_completely_or_not_at_all(tmp_path, content, words):
    path = tmp_path / "weights.pth"
    torch.save(content, path)
    with pytest.raises(CheckpointError, match=words) as caught:
        load_backbone(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("size", [0, 7, 5000])
def test_truncated_files_are_called_damaged(tmp_path, suffix, size):
    path = tmp_path / f"weights{suffix}"
    (torch.save if suffix == ".pth" else save_file)(official_vit(depth=1), path)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(CheckpointError, match=r"is damaged or incomplete"):
        load_backbone(path)


class Payload:
    def __reduce__(self):
        return (Path.touch, (Path("executed"),))


def test_nothing_in_a_checkpoint_is_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"teacher": official_vit(depth=1), "evil": Payload()}, tmp_path / "weights.pth")
    with pytest.raises(CheckpointError, match=r"Python objects besides tensors"):
        load_backbone(tmp_path / "weights.pth")
    assert not Path("executed").exists()


@pytest.mark.parametrize(
    ("source", "error", "words"),
    [
        ("nowhere", CheckpointError, "no backbone at 'nowhere'. Accepted: a run directory"),
        ("vit_small_patch16_224", CheckpointError, "did you mean 'timm:vit_small_patch16_224'"),
        ("local-dir:nowhere", CheckpointError, "no backbone at 'local-dir:nowhere'"),
        ("timm:vit_smal_patch16_224", ConfigError, "did you mean 'vit_small_patch16_224'"),
        ("timm:resnet18_cifar", CheckpointError, "timm has no weights.*random:resnet18_cifar"),
        ("random:resnet18_cifr", ConfigError, "did you mean 'resnet18_cifar'"),
    ],
)
def test_wrong_sources_are_explained(tmp_path, monkeypatch, source, error, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=words):
        load_backbone(source)


def test_folders_and_files_that_hold_no_backbone_are_explained(tmp_path):
    with pytest.raises(CheckpointError, match=r"holds neither config.json nor a run's config.yaml"):
        load_backbone(tmp_path)
    (tmp_path / "config.yaml").write_text("run_dir: x\n")
    with pytest.raises(CheckpointError, match=r"has not saved a backbone yet"):
        load_backbone(tmp_path)
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(CheckpointError, match=r"notes.txt is no checkpoint file"):
        load_backbone(tmp_path / "notes.txt")
    with pytest.raises(ConfigError, match=r"unknown branch 'techer'.*teacher"):
        load_backbone(tmp_path, branch="techer")


def test_failed_download_is_one_sentence(monkeypatch):
    def offline(*args, **kwargs):
        raise ConnectionError("name resolution failed")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(CheckpointError, match=r"could not be loaded.*name resolution failed"):
        load_backbone("timm:resnet18")


# --- folders --------------------------------------------------------------------------------------

SAVED = [
    ("vit_tiny_patch16_224", {"img_size": (32, 64), "patch_size": 8, "args": TINY, "in_chans": 3}),
    ("vit_tiny_patch16_224", {"img_size": 32, "args": TINY, "in_chans": 5, "drop_path": 0.3}),
    ("vit_small_patch14_reg4_dinov2", {"img_size": 28, "args": TINY}),
    ("mobilenetv3_small_100", {"img_size": 32}),
    ("resnet18_cifar", {"img_size": 32, "in_chans": 1}),
    (
        "swin_tiny_patch4_window7_224",
        {"img_size": 64, "args": {"embed_dim": 24, "depths": [1, 1, 1, 1]}},
    ),
]


@pytest.mark.parametrize(("name", "options"), SAVED)
def test_saved_folder_loads_strictly_in_timm_and_here(tmp_path, name, options):
    backbone = create_backbone(name, **options).eval()
    save_backbone(backbone, tmp_path / "backbone")
    x = torch.randn(2, backbone.in_chans, *backbone.img_size)
    net = timm.create_model(f"local-dir:{tmp_path / 'backbone'}", pretrained=True).eval()
    again = load_backbone(f"local-dir:{tmp_path / 'backbone'}")
    with torch.no_grad():
        expected = backbone(x)
        # up to rounding: of a plain ViT's last block ours computes the class token alone
        torch.testing.assert_close(net(x), expected, rtol=1e-4, atol=1e-5)
        assert torch.equal(again(x), expected)
    assert net.num_classes == 0
    assert backbone_hash(again) == backbone_hash(backbone)
    for attribute in ("name", "in_chans", "img_size", "patch_size", "embed_dim", "mean", "std"):
        assert getattr(again, attribute) == getattr(backbone, attribute), attribute


def test_timm_refuses_a_saved_folder_with_a_missing_weight(tmp_path):
    """Proof that timm's own loading of our folders is strict."""
    save_backbone(create_backbone("vit_tiny_patch16_224", img_size=32, args=TINY), tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    save_file(without(state, "norm.bias"), tmp_path / "model.safetensors")
    with pytest.raises(RuntimeError, match=r"norm\.bias"):
        timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    with pytest.raises(CheckpointError, match=r"1 missing \(norm.bias\)"):
        load_backbone(tmp_path)


def test_saving_again_replaces_and_leaves_nothing_else(tmp_path):
    backbone = create_backbone("vit_tiny_patch16_224", img_size=32, args=TINY)
    save_backbone(backbone, tmp_path)
    torch.nn.init.ones_(backbone.net.norm.bias)
    save_backbone(backbone, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    assert load_backbone(tmp_path).net.norm.bias.sum() == 64


def test_a_timm_folder_with_a_classifier_loads_without_it(tmp_path):
    net = timm.create_model("resnet18_cifar", num_classes=10)
    save_file(net.state_dict(), tmp_path / "model.safetensors")
    config = {
        "architecture": "resnet18_cifar",
        "num_classes": 10,
        "pretrained_cfg": {"input_size": [3, 32, 32], "classifier": "fc"},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    backbone = load_backbone(tmp_path)
    assert backbone.notes == ["left out, not part of the backbone: fc.bias, fc.weight"]
    assert backbone.img_size == (32, 32)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "cannot be read"),
        ("[]", "names no 'architecture'"),
        ('{"architecture": "vit_smal_patch16_224"}', "did you mean 'vit_small_patch16_224'"),
        ('{"architecture": "resnet18", "model_args": {"depht": 1}}', "does not accept 'depht'"),
        ('{"architecture": "resnet18_cifar"}', "holds no model.safetensors"),
    ],
)
def test_broken_folders_are_explained(tmp_path, text, words):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=words):
        load_backbone(tmp_path)


def test_another_image_size_resamples_the_true_grid(tmp_path):
    """A grid that is not square, against timm's dynamic resampling of the network as it was."""
    backbone = create_backbone("vit_tiny_patch16_224", img_size=(32, 64), args=TINY).eval()
    save_backbone(backbone, tmp_path)
    resized = load_backbone(tmp_path, img_size=(64, 48))
    x = torch.randn(1, 3, 64, 48)
    with torch.no_grad():
        torch.testing.assert_close(resized(x), backbone(x))
    with pytest.raises(ConfigError, match=r"does not divide into patches of 16"):
        load_backbone(tmp_path, img_size=40)


def test_random_backbone_repeats_and_leaves_the_generator_alone():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first = load_backbone("random:resnet18_cifar")
    assert torch.equal(torch.rand(1), expected)
    assert backbone_hash(first) == backbone_hash(load_backbone("random:resnet18_cifar"))
    with pytest.raises(ConfigError, match=r"one network only, got branch=student"):
        load_backbone("random:resnet18_cifar", branch="student")


def test_hash_sees_every_weight_and_name():
    backbone = create_backbone("resnet18_cifar", img_size=32)
    before = backbone_hash(backbone)
    assert len(before) == 64
    backbone.net.bn1.num_batches_tracked += 1
    assert backbone_hash(backbone) != before


# --- run directories ------------------------------------------------------------------------------


def run_config(**model):
    return PretrainConfig(
        run_dir="runs/test",
        seed=11,
        data={"train": "folder:/nowhere"},
        crops={"preset": "small"},
        model={
            "backbone": "vit_tiny_patch16_224",
            "patch_size": 8,
            "args": TINY,
            "drop_path": 0.1,
            **model,
        },
    )


@pytest.fixture
def run_dir(tmp_path):
    """A run directory as pretraining leaves it: teacher, student and start all differ."""
    config = run_config()
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text(dump_settings(config))
    teacher, student = build_untrained(config), build_untrained(config)
    torch.nn.init.constant_(teacher.net.norm.bias, 1.0)
    torch.nn.init.constant_(student.net.norm.bias, 2.0)
    save_backbone(teacher, folder / "backbone")
    task = {f"student.backbone.net.{k}": v for k, v in student.net.state_dict().items()}
    task |= {f"teacher.backbone.net.{k}": v for k, v in teacher.net.state_dict().items()}
    task |= {"student.head.last_layer": torch.ones(2, 2)}
    save_checkpoint(folder / "checkpoints", 10, {"task": task}, keep=2)
    return folder


def test_branches_of_a_run_are_three_networks(run_dir):
    means = {
        branch: load_backbone(run_dir, branch=branch).net.norm.bias.mean().item()
        for branch in ("teacher", "student", "untrained")
    }
    assert means == {"teacher": 1.0, "student": 2.0, "untrained": 0.0}


def test_student_folder_wins_over_the_checkpoint(run_dir):
    student = load_backbone(run_dir, branch="student")
    torch.nn.init.constant_(student.net.norm.bias, 3.0)
    save_backbone(student, run_dir / "backbone_student")
    assert load_backbone(run_dir, branch="student").net.norm.bias[0] == 3.0


def test_student_falls_back_to_the_undamaged_checkpoint(run_dir):
    newer = run_dir / "checkpoints" / "step_00000020"
    shutil.copytree(run_dir / "checkpoints" / "step_00000010", newer)
    with (newer / "state.pt").open("r+b") as file:
        file.truncate(1000)
    backbone = load_backbone(run_dir, branch="student")
    assert backbone.net.norm.bias[0] == 2.0
    assert any("damaged" in note for note in backbone.notes)


def test_untrained_is_the_start_of_the_run_bit_for_bit(run_dir):
    config = run_config()
    start = pretrained.backbone_from_settings(config.model, config.crops, config.data, config.seed)
    assert backbone_hash(load_backbone(run_dir, branch="untrained")) == backbone_hash(start)
    assert start.net.blocks[-1].drop_path1.drop_prob == pytest.approx(0.1)


def test_another_seed_starts_elsewhere():
    config = run_config()
    a, b = (
        pretrained.backbone_from_settings(config.model, config.crops, config.data, seed)
        for seed in (11, 12)
    )
    assert backbone_hash(a) != backbone_hash(b)


def test_init_from_brings_weights_and_normalisation(tmp_path):
    source = create_backbone(
        "vit_tiny_patch16_224", img_size=64, patch_size=8, args=TINY, mean=[0.1] * 3, std=[0.2] * 3
    ).eval()
    save_backbone(source, tmp_path / "source")
    start = build_untrained(run_config(init_from=f"local-dir:{tmp_path / 'source'}")).eval()
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(start(x), source(x))  # positions resampled from 64 to 32 px
    assert (start.mean, start.std) == ((0.1,) * 3, (0.2,) * 3)


def test_init_from_adapts_three_channels_to_one(tmp_path):
    """Grey images give what their RGB copies gave."""
    source = create_backbone("vit_tiny_patch16_224", img_size=32, patch_size=8, args=TINY).eval()
    save_backbone(source, tmp_path)
    start = build_untrained(run_config(init_from=str(tmp_path), in_chans=1)).eval()
    x = torch.randn(1, 1, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(start(x), source(x.expand(-1, 3, -1, -1)), atol=1e-5, rtol=1e-4)
    assert start.mean == (0.5,)


def test_init_from_another_architecture_is_refused(tmp_path):
    save_backbone(create_backbone("resnet18_cifar", img_size=32), tmp_path)
    with pytest.raises(CheckpointError, match=r"model.init_from.*resnet18_cifar.*does not fit vit"):
        build_untrained(run_config(init_from=str(tmp_path)))


def test_torch_hub_loads_a_run(run_dir):
    backbone = torch.hub.load(str(REPOSITORY), "backbone", str(run_dir), source="local")
    assert backbone.net.norm.bias[0] == 1.0
    assert not backbone.training
