"""A distilled CNN under a detector: the code of docs/detection.md runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from dino_kd import load_backbone
from dino_kd.config import load_settings
from dino_kd.distill.story import distill
from dino_kd.models.backbone import create_backbone
from dino_kd.pretrained import save_backbone
from dino_kd.schema import DistillConfig
from tests.tiny import write_images

PAGE = Path(__file__).resolve().parents[1] / "docs" / "detection.md"


def example():
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    return code


@pytest.fixture(scope="module")
def distilled(tmp_path_factory):
    """A small CNN after two steps of distillation from a random ViT."""
    root = tmp_path_factory.mktemp("root")
    torch.manual_seed(0)
    args = {"depth": 1, "embed_dim": 24, "num_heads": 2}
    save_backbone(
        create_backbone("vit_tiny_patch16_224", img_size=32, patch_size=8, args=args),
        root / "teacher",
    )
    words = [
        f"data.train={write_images(root / 'images', 12)}", f"run_dir={root}/run", "device=cpu",
        f"teacher.backbone={root}/teacher", "terms.preset=label_free", "data.num_workers=0",
        "student.backbone=mobilenetv3_small_050", "student.image_size=32", "optim.length=2",
        "optim.batch_size=6", "optim.precision=fp32", "log.tensorboard=false",
    ]  # fmt: skip
    return distill(load_settings(DistillConfig, words, command="distill"))


def test_one_training_step_of_a_detector_on_the_saved_student(distilled):
    code = example()
    assert '"runs/small/backbone"' in code
    torch.manual_seed(0)
    names = {}
    exec(code.replace("runs/small", str(distilled)), names)
    assert set(names["losses"]) == {"classification", "bbox_regression"}
    assert names["loss"].isfinite()
    body = names["model"].backbone.body
    assert all(p.grad is not None for p in body.parameters())
    assert torch.stack([p.grad.abs().sum() for p in body.parameters()]).sum() > 0


def test_the_pyramid_starts_from_the_distilled_weights(distilled):
    definitions = example().partition('\nmodel = detector("runs')[0]
    names = {}
    exec(definitions, names)
    model = names["detector"](distilled / "backbone", num_classes=4).eval()
    expected = load_backbone(distilled)
    own = model.backbone.body.state_dict()
    shared = [name for name in own if name in expected.net.state_dict()]
    assert len(shared) == len(own)
    assert all(torch.equal(own[n], expected.net.state_dict()[n]) for n in shared)
    assert model.transform.image_mean == list(expected.mean)
    maps = model.backbone(torch.rand(1, 3, 64, 96))
    assert [tuple(m.shape[2:]) for m in maps.values()] == [(8, 12), (4, 6), (2, 3)]
