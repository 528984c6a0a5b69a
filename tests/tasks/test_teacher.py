"""A frozen teacher: what it answers, at which size, and that nothing changes it."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dino_kd.models.backbone import create_backbone
from dino_kd.models.head import DINOHead
from dino_kd.models.linear_head import HeadOrigin, LinearHead
from dino_kd.tasks.teacher import Teacher

MEAN, STD = (0.1, 0.4, 0.7), (0.5, 0.3, 0.2)


def make_backbone(name="vit_tiny_patch16_224", size=16, **more):
    torch.manual_seed(0)
    is_vit = name.startswith("vit")
    args = {"embed_dim": 24, "depth": 3, "num_heads": 2} if is_vit else None
    return create_backbone(name, img_size=size, patch_size=8 if is_vit else None, args=args, **more)


def images(size=16, count=3):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (count, 3, size, size), generator=generator).float()


def normalised(pixels, mean=MEAN, std=STD):
    shape = (1, 3, 1, 1)
    return (pixels / 255 - torch.tensor(mean).view(shape)) / torch.tensor(std).view(shape)


@torch.no_grad()
def test_it_normalises_with_its_own_statistics_and_leaves_the_images_alone():
    """The student sees the same tensor afterwards."""
    backbone = make_backbone(mean=MEAN, std=STD)
    teacher = Teacher(backbone, (16, 16))
    pixels = images()
    before = pixels.clone()
    made = teacher.answers(pixels, ["output", "map"])
    assert torch.equal(pixels, before)
    torch.testing.assert_close(made["output"], backbone.net(normalised(pixels)))
    assert list(made) == ["output", "map"]


@torch.no_grad()
def test_it_sees_images_at_its_own_size():
    backbone = make_backbone(size=24, mean=MEAN, std=STD)
    teacher = Teacher(backbone, (24, 32))
    pixels = images(48)
    smaller = F.interpolate(pixels, (24, 32), mode="bicubic", antialias=True).clamp(0, 255)
    made = teacher.answers(pixels, ["output", "map"])
    assert made["map"].shape == (3, 24, 3, 4)
    torch.testing.assert_close(made["output"], backbone.net(normalised(smaller)))
    assert teacher.shapes(["map", "logits", "energy"]) == {"map": (24, 3, 4), "energy": (3, 4)}


@torch.no_grad()
def test_the_mean_brightness_survives_the_resize():
    """Overshoots of the bicubic filter are cut at 0 and 255."""
    seen = []
    teacher = Teacher(make_backbone(), (16, 16))
    teacher.backbone.preprocess = lambda x: seen.append(x) or x
    teacher.answers(255 * (images(40) > 127).float(), ["output"])
    assert seen[0].min() >= 0
    assert seen[0].max() <= 255


@torch.no_grad()
def test_logits_of_a_linear_head_come_from_its_parts():
    backbone = make_backbone().eval()
    torch.manual_seed(2)
    origin = HeadOrigin("x", "", (16, 16))
    head = LinearHead(("block-2", "output", "mean"), [24, 24, 24], ["a", "b"], origin)
    teacher = Teacher(backbone, (16, 16), head=head, class_names=["a", "b"])
    made = teacher.answers(images(), ["map", "logits"])
    x = backbone.preprocess(images())
    blocks = backbone.net.forward_intermediates(
        x,
        indices=2,
        norm=True,
        return_prefix_tokens=True,
        output_fmt="NLC",
        intermediates_only=True,
    )
    tokens = backbone.net.forward_features(x)
    parts = torch.cat([blocks[0][1][:, 0], tokens[:, 0], tokens[:, 1:].mean(1)], 1)
    expected = parts @ head.linear.weight.T + head.linear.bias
    torch.testing.assert_close(made["logits"], expected)
    torch.testing.assert_close(made["map"].flatten(2).transpose(1, 2), tokens[:, 1:])


@torch.no_grad()
def test_logits_of_a_classifier_and_prototypes_come_from_the_output():
    backbone = make_backbone().eval()
    torch.manual_seed(2)
    head, prototypes = nn.Linear(24, 5), DINOHead(24, 16, hidden_dim=8, bottleneck_dim=4)
    teacher = Teacher(backbone, (16, 16), head=head, prototypes=prototypes)
    output = backbone(backbone.preprocess(images()))
    for names in (["logits", "prototypes"], ["prototypes"], ["prototypes", "output", "logits"]):
        made = teacher.answers(images(), names)
        assert list(made) == names
        torch.testing.assert_close(made["prototypes"], prototypes(output))
        if "logits" in names:
            torch.testing.assert_close(made["logits"], output @ head.weight.T + head.bias)


def test_it_stays_frozen_and_in_eval_mode_whatever_is_done_to_it():
    teacher = Teacher(make_backbone("resnet18", 32), (32, 32), head=nn.Linear(512, 3))
    parent = nn.ModuleList([teacher])
    before = teacher.fingerprint()
    parent.train()
    teacher.train()
    assert not any(module.training for module in teacher.modules())
    assert not any(p.requires_grad for p in teacher.parameters())
    made = teacher.answers(images(32), ["logits", "map-8"])
    assert not any(value.requires_grad for value in made.values())
    assert teacher.fingerprint() == before


@pytest.mark.parametrize("kind", ["weight", "statistic", "head"])
def test_the_fingerprint_notices_one_number(kind):
    teacher = Teacher(make_backbone("resnet18", 32), (32, 32), head=nn.Linear(512, 3))
    tensor = {
        "weight": teacher.backbone.net.conv1.weight,
        "statistic": teacher.backbone.net.bn1.running_mean,
        "head": teacher.head.bias,
    }[kind]
    before = teacher.fingerprint()
    with torch.no_grad():
        tensor.view(-1)[-1] += 1e-6 + tensor.view(-1)[-1].abs()
    assert teacher.fingerprint() != before


@torch.no_grad()
@pytest.mark.parametrize(
    ("parts", "passes"), [(("output",), 1), (("output", "mean"), 1), (("block-1", "output"), 2)]
)
def test_logits_and_maps_come_from_one_pass_where_the_head_allows(parts, passes):
    """The forward pass is what a teacher costs; only blocks need one of their own."""
    backbone = make_backbone().eval()
    head = LinearHead(parts, [24] * len(parts), ["a", "b"], HeadOrigin("x", "", (16, 16)))
    teacher = Teacher(backbone, (16, 16), head=head)
    calls = []
    backbone.net.patch_embed.register_forward_hook(lambda *_: calls.append(1))
    names = ["logits", "output", "map", "energy"]
    made = teacher.answers(images(), names)
    assert len(calls) == passes
    assert list(made) == names
    x = backbone.preprocess(images())
    torch.testing.assert_close(made["logits"], head(backbone.parts(x, parts)))
