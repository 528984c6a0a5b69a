"""The contract of `Backbone`, over networks that differ in everything timm lets them differ in."""

from __future__ import annotations

import copy

import pytest
import timm
import torch

from dino_kd.errors import ConfigError, UserError
from dino_kd.models.backbone import create_backbone

TINY = {"embed_dim": 32, "depth": 2, "num_heads": 2}

NETWORKS = [
    ("vit_tiny_patch16_224", {"args": TINY}),
    ("vit_tiny_patch16_224", {"args": TINY, "patch_size": 8}),
    ("deit_tiny_distilled_patch16_224", {"args": TINY}),  # two prefix tokens
    ("vit_small_patch14_reg4_dinov2", {"args": TINY, "patch_size": 16}),  # class + 4 registers
    ("vit_tiny_patch16_224", {"args": {**TINY, "class_token": False, "global_pool": "avg"}}),
    ("resnet18", {}),
    ("resnet18_cifar", {}),
    ("mobilenetv3_small_100", {}),  # reports 576 features and gives 1024
    ("efficientnet_lite0", {}),
    ("convnext_atto", {}),
    ("mobilenetv4_conv_small", {}),
    ("swin_tiny_patch4_window7_224", {"args": {"embed_dim": 24, "depths": [1, 1, 1, 1]}}),
]


@pytest.mark.parametrize(("name", "options"), NETWORKS)
@pytest.mark.parametrize("in_chans", [1, 3, 5])
def test_every_network_keeps_the_contract(name, options, in_chans):
    size = (64, 32)
    backbone = create_backbone(name, in_chans=in_chans, img_size=size, **options).eval()
    images = torch.randint(0, 256, (2, in_chans, *size), dtype=torch.uint8)
    with torch.no_grad():
        x = backbone.preprocess(images)
        cls, tokens = backbone(x), backbone.tokens(x)

    assert cls.shape == (2, backbone.embed_dim)
    torch.testing.assert_close(tokens.cls, cls)
    rows, columns = tokens.grid
    assert tokens.patches.shape == (2, rows * columns, backbone.patch_dim)
    assert rows == 2 * columns  # the grid has the aspect ratio of the image
    if backbone.is_vit:
        assert tokens.grid == (64 // backbone.patch_size, 32 // backbone.patch_size)
    else:
        assert backbone.patch_size is None
    assert len(backbone.mean) == len(backbone.std) == in_chans


# Networks whose blocks or patches are not those of a plain ViT or CNN.
UNUSUAL = [
    ("vit_tiny_r_s16_p8_224", {"args": TINY}),  # a CNN stem; 8 px of its map are 32 px
    ("cait_xxs24_224", {"args": TINY}),  # the class token enters after the last block
    ("xcit_nano_12_p8_224", {"args": TINY}),
    ("convit_tiny", {"args": {**TINY, "local_up_to_layer": 1}}),
    pytest.param("mixer_s16_224", {}, marks=pytest.mark.slow),
    ("beit_base_patch16_224", {"args": TINY}),
    # widens after pooling, from 512 to 4096
    pytest.param("vgg11_bn", {}, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("name", "options"), NETWORKS + UNUSUAL)
def test_parts_are_vectors_of_one_pass_that_depend_on_their_image_alone(name, options):
    size = (224, 224) if "_224" in name or name == "convit_tiny" else (64, 32)
    torch.manual_seed(0)
    backbone = create_backbone(name, img_size=size, **options).eval()
    x = torch.randn(3, 3, *size)
    names = ["output", "mean", "block-1", "block-2", "block-99"]
    with torch.no_grad():
        parts, alone = backbone.parts(x, names), backbone.parts(x[1:2], names)
        torch.testing.assert_close(parts["output"], backbone(x), rtol=1e-5, atol=1e-5)
        again, tokens = backbone.parts(x, names), backbone.tokens(x)
    torch.testing.assert_close(parts["mean"], tokens.patches.mean(1))
    assert parts["output"].shape == (3, backbone.embed_dim)
    assert parts["mean"].shape == (3, backbone.patch_dim)
    for key, values in parts.items():
        assert len(values) == 3
        assert values.ndim == 2
        assert values.isfinite().all()
        assert torch.equal(values, again[key])
        torch.testing.assert_close(values[1:2], alone[key], atol=1e-4, rtol=1e-3)


def test_patches_of_a_hybrid_are_measured_in_image_pixels():
    backbone = create_backbone("vit_tiny_r_s16_p8_224", img_size=(64, 96), args=TINY).eval()
    with torch.no_grad():
        assert backbone.tokens(torch.randn(1, 3, 64, 96)).grid == (2, 3)
    assert (backbone.patch_size, backbone.is_vit) == (32, True)
    with pytest.raises(ConfigError, match="does not divide into patches of 32 px"):
        backbone.resize(80)
    with pytest.raises(ConfigError, match=r"model\.patch_size.*CNN before its patches"):
        create_backbone("vit_tiny_r_s16_p8_224", img_size=64, patch_size=4, args=TINY)


def test_a_network_without_final_patches_says_so():
    backbone = create_backbone("pit_ti_224", img_size=224).eval()
    with torch.no_grad(), pytest.raises(UserError, match="gives no patches"):
        backbone.parts(torch.randn(1, 3, 224, 224), ["mean"])


@pytest.mark.parametrize("lacking", ["blocks", "forward_intermediates"])
def test_a_network_that_hides_its_blocks_says_so(lacking):
    backbone = create_backbone("vit_tiny_patch16_224", img_size=32, args=TINY).eval()
    whole = backbone.net

    class Hidden:
        def __getattr__(self, name):
            if name == lacking:
                raise AttributeError(name)
            return getattr(whole, name)

    del backbone.net
    object.__setattr__(backbone, "net", Hidden())
    with pytest.raises(UserError, match="does not show its blocks"):
        backbone.parts(torch.randn(1, 3, 32, 32), ["block-1"])


@pytest.mark.parametrize(("name", "options"), NETWORKS)
def test_crops_of_another_size_work(name, options):
    backbone = create_backbone(name, img_size=64, **options).eval()
    with torch.no_grad():
        assert backbone(torch.randn(1, 3, 96, 64)).shape == (1, backbone.embed_dim)


def test_width_is_measured_where_the_network_reports_another():
    backbone = create_backbone("mobilenetv3_small_100", img_size=32)
    assert backbone.net.num_features == 576
    assert (backbone.embed_dim, backbone.patch_dim) == (1024, 576)


def test_patches_are_in_row_major_order():
    """A bright patch changes its own token most, in a ViT whose blocks are identities."""
    backbone = create_backbone("vit_tiny_patch16_224", img_size=(48, 32), args=TINY).eval()
    for block in backbone.net.blocks:
        for linear in (block.attn.proj, block.mlp.fc2):
            torch.nn.init.zeros_(linear.weight)
    x = torch.zeros(1, 3, 48, 32)
    x[:, :, 32:48, 0:16] = 9.0  # row 2, column 0
    with torch.no_grad():
        change = backbone.tokens(x).patches - backbone.tokens(torch.zeros_like(x)).patches
    assert change[0].norm(dim=-1).argmax() == 2 * 2 + 0


def test_measuring_leaves_the_generator_and_the_statistics_alone():
    """Compared with timm's own construction from the same seed."""
    torch.manual_seed(3)
    expected = timm.create_model("resnet18", num_classes=0, drop_path_rate=0.2)
    after = torch.rand(1)
    torch.manual_seed(3)
    backbone = create_backbone("resnet18", img_size=32, drop_path=0.2)
    assert torch.equal(torch.rand(1), after)
    for name, tensor in expected.state_dict().items():
        assert torch.equal(backbone.net.state_dict()[name], tensor), name
    assert all(module.training for module in backbone.modules())


def test_vit_feature_is_the_final_norm_class_token():
    backbone = create_backbone("vit_tiny_patch16_224", img_size=32, args=TINY).eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(backbone(x), backbone.net.forward_features(x)[:, 0])


def test_preprocess_matches_the_formula():
    backbone = create_backbone(
        "resnet18_cifar", in_chans=2, img_size=32, mean=[0.2, 0.4], std=[0.5, 0.1]
    )
    images = torch.tensor([0, 51, 255, 102], dtype=torch.uint8).reshape(1, 2, 1, 2)
    expected = [(0 - 0.2) / 0.5, (0.2 - 0.2) / 0.5, (1 - 0.4) / 0.1, (0.4 - 0.4) / 0.1]
    found = backbone.preprocess(images)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.flatten(), torch.tensor(expected), atol=1e-6, rtol=1e-5)


def test_resampled_positions_equal_a_network_built_for_that_size():
    """resize() against the dynamic resampling in timm's forward."""
    backbone = create_backbone("vit_tiny_patch16_224", img_size=64, args=TINY).eval()
    x = torch.randn(1, 3, 96, 32)
    with torch.no_grad():
        expected = backbone(x)
        found = copy.deepcopy(backbone).resize((96, 32))
        torch.testing.assert_close(found(x), expected)
    assert found.img_size == (96, 32)
    assert found.net.pos_embed.shape[1] == 1 + 6 * 2
    assert found.model_args["img_size"] == [96, 32]


def test_cifar_resnet_keeps_the_resolution_of_its_stem():
    backbone = create_backbone("resnet18_cifar", img_size=32)
    stem = backbone.net.conv1
    assert (stem.kernel_size, stem.stride) == ((3, 3), (1, 1))
    with torch.no_grad():
        assert backbone.eval().tokens(torch.randn(1, 3, 32, 32)).grid == (4, 4)
    assert sum(p.numel() for p in backbone.parameters()) == 11_168_832  # He et al. + 3x3 stem
    assert timm.create_model("resnet18_cifar", num_classes=10).fc.out_features == 10


def test_drop_path_is_refused_where_it_would_be_ignored():
    create_backbone("densenet121", img_size=32, drop_path=0.1, args={"growth_rate": 4})
    with pytest.raises(
        ConfigError, match=r"model.drop_path: densenet121 has no stochastic depth.*0.3"
    ):
        create_backbone("densenet121", img_size=32, drop_path=0.3, args={"growth_rate": 4})


def test_drop_path_reaches_the_network_and_not_the_saved_architecture():
    backbone = create_backbone("vit_tiny_patch16_224", img_size=32, drop_path=0.2, args=TINY)
    assert backbone.net.blocks[-1].drop_path1.drop_prob == pytest.approx(0.2)
    assert "drop_path_rate" not in backbone.model_args


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("vit_smal_patch16_224", {}, "unknown backbone.*did you mean 'vit_small_patch16_224'"),
        ("resnet18_cifr", {}, "did you mean 'resnet18_cifar'"),
        ("vit_tiny_patch16_224", {"img_size": 100}, "100 x 100 px.*patches of 16 px.*96 x 96"),
        ("vit_tiny_patch16_224", {"args": {"depht": 2}}, "does not accept 'depht'"),
        ("crossvit_tiny_240", {"img_size": 240}, "does not give one vector per image"),
        ("resnet18", {"patch_size": 8}, "model.patch_size: resnet18 is no ViT"),
        ("resnet18", {"mean": [0.5]}, "data.mean: expected 3 numbers"),
        ("resnet18", {"in_chans": 2, "std": [1.0] * 3}, "data.std: expected 2 numbers"),
    ],
)
def test_mistakes_are_named(name, options, words):
    with pytest.raises(ConfigError, match=words):
        create_backbone(name, **{"img_size": 32, **options})


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_medium_patch16_gap_256"])
def test_parts_of_a_vit_are_normed_tokens_of_its_blocks(name):
    """Against hooks on the blocks and the network's own final norm."""
    backbone = create_backbone(
        name, img_size=32, patch_size=8, args={"embed_dim": 32, "depth": 3, "num_heads": 2}
    ).eval()
    seen = []
    for block in backbone.net.blocks:
        block.register_forward_hook(lambda module, given, made: seen.append(made))
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        parts = backbone.parts(x, ["block-3", "mean", "block-1", "output", "block-9"])
        normed = [backbone.net.norm(tokens) for tokens in seen[:3]]
        torch.testing.assert_close(parts["output"], backbone(x), rtol=1e-5, atol=1e-5)
    has_cls = backbone.net.cls_token is not None
    of = [t[:, 0] if has_cls else t.mean(1) for t in normed]
    torch.testing.assert_close(parts["block-3"], of[0])
    torch.testing.assert_close(parts["block-1"], of[2])
    torch.testing.assert_close(parts["block-9"], of[0])  # it has no more blocks
    torch.testing.assert_close(parts["mean"], normed[2][:, backbone.num_prefix_tokens :].mean(1))
    assert list(parts) == ["block-3", "mean", "block-1", "output", "block-9"]


@pytest.mark.parametrize("name", ["resnet18_cifar", "mobilenetv3_small_100", "convnext_atto"])
def test_parts_of_a_cnn_are_pooled_stages(name):
    """Against timm's own intermediate maps."""
    backbone = create_backbone(name, img_size=64).eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        parts = backbone.parts(x, ["output", "mean", "block-1", "block-2"])
        final, maps = backbone.net.forward_intermediates(x)
        torch.testing.assert_close(parts["output"], backbone(x))
    torch.testing.assert_close(parts["block-1"], maps[-1].mean((2, 3)))
    torch.testing.assert_close(parts["block-2"], maps[-2].mean((2, 3)))
    torch.testing.assert_close(parts["mean"], final.mean((2, 3)))
