"""Named outputs inside a network against what timm gives by other means."""

from __future__ import annotations

import pytest
import timm
import torch
from torch.nn import functional as F

from dino_kd.errors import ConfigError, UserError
from dino_kd.models.backbone import create_backbone
from dino_kd.models.taps import check_taps, map_strides, tap_shapes, taps

VIT = {"embed_dim": 24, "depth": 2, "num_heads": 3}
CNNS = ["resnet18", "mobilenetv3_small_100", "efficientnet_lite0", "mobilenetv4_conv_small"]


def make(name, size, **more):
    torch.manual_seed(0)
    return create_backbone(name, img_size=size, **more).eval()


def tiny_vit(size=(32, 48), *, patch_size=8, **args):
    return make("vit_tiny_patch16_224", size, patch_size=patch_size, args={**VIT, **args})


def images(backbone, count=2):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 3, *backbone.img_size, generator=generator)


def seen_by(module, run):
    """What enters and leaves `module` while `run` runs."""
    kept = []
    handle = module.register_forward_hook(lambda _, given, made: kept.append((given[0], made)))
    try:
        run()
    finally:
        handle.remove()
    return kept[-1]


def cosine_to(vector, maps):
    """Cosine of ``[N, D]`` with every place of ``[N, D, h, w]``, by loops."""
    rows, columns = maps.shape[2:]
    return torch.stack([
        torch.stack([
            F.cosine_similarity(vector, maps[:, :, r, c], dim=1) for c in range(columns)
        ], 1)
        for r in range(rows)
    ], 1)  # fmt: skip


@pytest.mark.parametrize("kind", ["plain", "registers", "distilled"])
@torch.no_grad()
def test_a_vit_on_an_image_that_is_no_square(kind):
    """Prefix tokens are cut by their number: 1, 1 + 4 registers, class and distillation token."""
    backbone = {
        "plain": lambda: tiny_vit(),
        "registers": lambda: tiny_vit(reg_tokens=4),
        "distilled": lambda: make(
            "deit_tiny_distilled_patch16_224", (32, 48), patch_size=8, args=VIT
        ),
    }[kind]()
    prefix = {"plain": 1, "registers": 5, "distilled": 2}[kind]
    x, net = images(backbone), backbone.net
    names = ["output", "map", "map-8", "energy", "attention", "similarity", "prefix"]
    made = taps(backbone, x, names)
    assert list(made) == names

    before, after = seen_by(net.norm, lambda: net(x))
    (maps, tokens), = net.forward_intermediates(
        x, indices=1, norm=True, output_fmt="NCHW", return_prefix_tokens=True,
        intermediates_only=True,
    )  # fmt: skip
    assert maps.shape == (2, 24, 4, 6)
    assert tokens.shape == (2, prefix, 24)
    close = torch.testing.assert_close
    close(made["output"], backbone(x))
    close(made["map"], maps)
    close(made["map-8"], maps)
    close(made["prefix"], tokens)
    close(made["prefix"], after[:, :prefix])
    close(made["energy"], before[:, prefix:].square().mean(2).view(2, 4, 6))
    close(made["similarity"], cosine_to(after[:, 0], maps))
    # after the norm every token has nearly the same energy: nothing to see there
    assert made["energy"].std() > 0

    attention = net.blocks[-1].attn
    given, _ = seen_by(attention, lambda: net(x))
    q, k, _ = attention.qkv(given).view(2, -1, 3, 3, 8).permute(2, 0, 3, 1, 4)  # [N, heads, T, 8]
    looks = (q @ k.transpose(2, 3) / 8**0.5).softmax(3)[:, :, 0].mean(1)
    close(made["attention"], looks[:, prefix:].view(2, 4, 6))
    assert (made["attention"].sum((1, 2)) < 1).all()


@torch.no_grad()
def test_a_vit_without_class_token_compares_with_the_mean():
    backbone = tiny_vit(class_token=False, global_pool="avg")
    x = images(backbone)
    made = taps(backbone, x, ["similarity", "map", "energy", "output"])
    features = backbone.net.forward_features(x)
    expected = features.transpose(1, 2).reshape(2, 24, 4, 6)
    torch.testing.assert_close(made["map"], expected)
    torch.testing.assert_close(made["similarity"], cosine_to(features.mean(1), expected))
    torch.testing.assert_close(made["output"], backbone(x))
    with pytest.raises(UserError, match="no class token"):
        check_taps(backbone, ["attention"])
    with pytest.raises(ConfigError, match="no class token"):
        check_taps(backbone, ["prefix"])


@pytest.mark.parametrize("name", CNNS)
@torch.no_grad()
def test_a_cnn_gives_the_maps_of_timms_feature_extractor(name):
    backbone = make(name, (64, 96))
    x = images(backbone)
    extractor = timm.create_model(name, features_only=True).eval()
    missing, unexpected = extractor.load_state_dict(backbone.net.state_dict(), strict=False)
    assert not missing
    expected = dict(zip(extractor.feature_info.reduction(), extractor(x), strict=True))
    assert map_strides(backbone) == sorted(expected)
    names = [f"map-{stride}" for stride in expected]
    # not in their order, beside the others, from one forward pass
    made = taps(backbone, x, [*names[::-1], "output", "map", "energy", "similarity"])
    for stride, maps in expected.items():
        torch.testing.assert_close(made[f"map-{stride}"], maps)
        assert maps.shape[2:] == (64 // stride, 96 // stride)
    final = backbone.net.forward_features(x)
    torch.testing.assert_close(made["map"], final)
    torch.testing.assert_close(made["energy"], final.square().mean(1))
    torch.testing.assert_close(made["similarity"], cosine_to(final.mean((2, 3)), final))
    torch.testing.assert_close(made["output"], backbone(x))
    assert made["output"].shape[1] == backbone.embed_dim
    assert unexpected == [] or name != "resnet18"


def test_the_width_of_the_output_is_not_what_timm_calls_num_features():
    backbone = make("mobilenetv3_small_100", 64)
    assert backbone.net.num_features == 576
    assert tap_shapes(backbone, ["map", "output", "map-16"]) == {
        "map": (576, 2, 2), "output": (1024,), "map-16": (48, 4, 4),
    }  # fmt: skip


def test_grids_of_teachers_and_students_that_fit_each_other():
    """/16 at 224 px and /14 at 196 px give the grid of stride 16 at 224 px."""
    student = tap_shapes(make("resnet18", 224), ["map-16", "map-32"])
    assert student == {"map-16": (256, 14, 14), "map-32": (512, 7, 7)}
    sixteen = tiny_vit(224, patch_size=16)
    fourteen = tiny_vit(224, patch_size=14)
    assert tap_shapes(sixteen, ["map"])["map"] == (24, 14, 14)
    assert tap_shapes(fourteen, ["map"])["map"] == (24, 16, 16)
    assert tap_shapes(fourteen, ["map", "energy"], (196, 196)) == {
        "map": (24, 14, 14), "energy": (14, 14),
    }  # fmt: skip


@pytest.mark.parametrize("training", [False, True])
def test_shapes_leave_statistics_modes_and_gradients_alone(training):
    backbone = make("resnet18", 32).train(training)
    backbone.net.layer1.train(not training)  # a mixture is restored as it was
    modes = [module.training for module in backbone.modules()]
    before = {name: value.clone() for name, value in backbone.net.state_dict().items()}
    tap_shapes(backbone, ["output", "map-8"])
    assert [module.training for module in backbone.modules()] == modes
    assert all(torch.equal(before[n], v) for n, v in backbone.net.state_dict().items())


def test_gradients_pass_through_every_tap_of_a_vit():
    backbone = tiny_vit().train()
    for name in ("output", "map", "map-8", "energy", "attention", "similarity", "prefix"):
        backbone.zero_grad()
        taps(backbone, images(backbone), [name])[name].square().sum().backward()
        # the class token's cosine and attention come from the last block too
        assert backbone.net.patch_embed.proj.weight.grad.abs().sum() > 0, name


def test_nothing_is_run_for_no_names():
    assert taps(tiny_vit(), torch.empty(0), []) == {}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("atention", "unknown tap 'atention'; did you mean 'attention'"),
        ("map-64", "resnet18 has no 'map-64'; it has map-2, map-4, map-8, map-16, map-32, map"),
        ("prefix", "resnet18 has no class token"),
        ("attention", "resnet18"),
    ],
)
def test_what_a_cnn_does_not_have_is_refused(name, message):
    backbone = make("resnet18", 32)
    for refused in (check_taps, tap_shapes):
        with pytest.raises(UserError) as error:
            refused(backbone, ["output", name])
        assert message in str(error.value)


def test_a_vit_has_one_stride():
    with pytest.raises(ConfigError, match="has no 'map-16'; it has map-8, map"):
        tap_shapes(tiny_vit(), ["map-16"])
