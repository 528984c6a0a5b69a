"""Linear heads on disk: the same logits after a round trip, and what is refused."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from dino_kd.errors import CheckpointError
from dino_kd.models.backbone import create_backbone
from dino_kd.models.linear_head import (
    HeadOrigin,
    LinearHead,
    check_head,
    load_linear_head,
    save_linear_head,
)

PARTS = ("block-2", "output")


def tiny(width=32, img_size=16):
    torch.manual_seed(0)
    args = {"embed_dim": width, "depth": 2, "num_heads": 2}
    return create_backbone("vit_tiny_patch16_224", img_size=img_size, patch_size=4, args=args)


@pytest.fixture
def backbone():
    return tiny().eval()


@pytest.fixture
def head(backbone):
    origin = HeadOrigin("runs/x", "abc", (16, 16), backbone.mean, backbone.std)
    return LinearHead(PARTS, [32, 32], ["ant", "bee", "cat"], origin).eval()


def test_a_round_trip_keeps_logits_and_description(head, backbone, tmp_path):
    save_linear_head(head, tmp_path / "deep" / "head.safetensors")
    found = load_linear_head(tmp_path / "deep" / "head.safetensors")
    with torch.no_grad():
        parts = backbone.parts(torch.randn(5, 3, 16, 16), PARTS)
        expected = torch.cat([parts["block-2"], parts["output"]], 1) @ head.linear.weight.T
        assert torch.equal(found(parts), head(parts))
        torch.testing.assert_close(found(parts), expected + head.linear.bias)
    assert found.class_names == ["ant", "bee", "cat"]
    assert found.parts == PARTS
    assert found.origin == head.origin
    assert not found.training


def test_the_right_backbone_fits_without_notes(head, backbone):
    backbone.train()
    assert check_head(head, backbone, "abc") == []
    assert check_head(head, backbone, None) == []
    assert all(module.training for module in backbone.modules())


def test_another_width_is_refused(head):
    with pytest.raises(CheckpointError, match=r"block-2 32 \+ output 32 columns.*output 64"):
        check_head(head, tiny(width=64), None, other_weights=True)


def test_other_weights_are_refused_or_noted(head, backbone):
    with pytest.raises(
        CheckpointError, match=r"other weights: runs/x, SHA-256 abc.*dino-kd linear"
    ):
        check_head(head, backbone, "def")
    (note,) = check_head(head, backbone, "def", other_weights=True)
    assert "other weights" in note


def test_another_size_or_normalisation_is_noted(head):
    notes = check_head(head, tiny(img_size=32), "abc")
    assert notes == ["the linear head was trained at 16 x 16 px, the backbone runs at 32 x 32 px"]
    grey = tiny()
    grey.mean = (0.5, 0.5, 0.5)
    (note,) = check_head(head, grey, "abc")
    assert "mean [0.485, 0.456, 0.406]" in note


def test_missing_damaged_and_foreign_files_are_sentences(head, tmp_path):
    path = tmp_path / "head.safetensors"
    with pytest.raises(CheckpointError, match="no linear head at"):
        load_linear_head(path)
    save_linear_head(head, path)
    whole = path.read_bytes()
    for length in (4, 100, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match="damaged or incomplete"):
            load_linear_head(path)
    save_file({"weight": torch.zeros(3, 64), "bias": torch.zeros(3)}, path)
    with pytest.raises(CheckpointError, match="is no linear head"):
        load_linear_head(path)


def described(head, **changes):
    about = {
        "format": 1,
        "parts": list(head.parts),
        "widths": list(head.widths),
        "class_names": head.class_names,
        "origin": {
            "backbone": "x", "sha256": "", "image_size": [16, 16], "mean": [], "std": []
        },
    }  # fmt: skip
    return {"linear_head": json.dumps({**about, **changes})}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"format": 9}, "has format 9; this version reads format 1"),
        ({"widths": [32, 16]}, "contradicts itself"),
        ({"class_names": ["ant"]}, "contradicts itself"),
        ({"origin": {}}, "description in .* is damaged"),
        ({"widths": "many"}, "description in .* is damaged"),
    ],
)
def test_contradictions_are_refused(head, tmp_path, changes, words):
    path = tmp_path / "head.safetensors"
    tensors = {"weight": head.linear.weight.detach(), "bias": head.linear.bias.detach()}
    save_file(tensors, path, described(head))
    load_linear_head(path)  # the description itself is right
    save_file(tensors, path, described(head, **changes))
    with pytest.raises(CheckpointError, match=words):
        load_linear_head(path)


def test_values_that_are_not_finite_are_refused(head, tmp_path):
    torch.nn.init.constant_(head.linear.bias, float("nan"))
    save_linear_head(head, tmp_path / "head.safetensors")
    with pytest.raises(CheckpointError, match="not finite"):
        load_linear_head(tmp_path / "head.safetensors")
