"""Layer-wise decay against tables written by hand; stochastic depth keeps the network."""

from __future__ import annotations

import pytest
import torch

from dino_kd.errors import ConfigError
from dino_kd.models.backbone import create_backbone
from dino_kd.models.layers import layer_scales, with_drop_path

TINY = {"embed_dim": 24, "num_heads": 2}


def make_vit(depth=3, **more):
    return create_backbone(
        "vit_tiny_patch16_224", img_size=16, patch_size=8, args={**TINY, "depth": depth, **more}
    )


def test_a_vit_of_three_blocks_by_hand():
    """Classifier 1, so with decay 0.5: last block 1/2, then 1/4 and 1/8, the stem 1/16."""
    scales = layer_scales(make_vit(), 0.5)
    by_prefix = {
        "cls_token": 1 / 16,
        "pos_embed": 1 / 16,
        "patch_embed.": 1 / 16,
        "blocks.0.": 1 / 8,
        "blocks.1.": 1 / 4,
        "blocks.2.": 1 / 2,
        "norm.": 1 / 2,  # with the last block, as timm has it
    }
    assert scales.keys() == dict(make_vit().net.named_parameters()).keys()
    for name, scale in scales.items():
        (expected,) = [s for prefix, s in by_prefix.items() if name.startswith(prefix)]
        assert scale == expected, name


def test_registers_belong_to_the_stem_and_a_norm_after_pooling_to_the_classifier():
    scales = layer_scales(make_vit(reg_tokens=2, global_pool="avg"), 0.5)
    assert scales["reg_token"] == 1 / 16
    assert scales["fc_norm.weight"] == 1
    assert scales["blocks.2.mlp.fc1.weight"] == 1 / 2


def test_a_resnet_goes_by_stage():
    scales = layer_scales(create_backbone("resnet18_cifar", img_size=32), 0.5)
    by_prefix = {
        "conv1.": 1 / 32, "bn1.": 1 / 32,
        "layer1.": 1 / 16, "layer2.": 1 / 8, "layer3.": 1 / 4, "layer4.": 1 / 2,
    }  # fmt: skip
    for name, scale in scales.items():
        (expected,) = [s for prefix, s in by_prefix.items() if name.startswith(prefix)]
        assert scale == expected, name


@pytest.mark.parametrize(
    "name", ["convnext_atto", "mobilenetv3_small_050", "dla46_c", "mixer_s32_224"]
)
def test_scales_of_other_families_never_fall_towards_the_classifier(name):
    """Parameters are registered in the order of the network."""
    scales = layer_scales(create_backbone(name, img_size=64), 0.5)
    values = list(scales.values())
    assert values[0] == min(values) < max(values) <= 1
    assert len(set(values)) > 4


def test_no_decay_scales_nothing():
    assert set(layer_scales(make_vit(), 1.0).values()) == {1.0}


def test_a_network_that_does_not_name_its_layers_is_refused():
    backbone = make_vit()
    backbone.net = torch.nn.Linear(2, 2)
    with pytest.raises(ConfigError, match=r"optim.layer_decay: vit_tiny.* set it to 1, got 0.75"):
        layer_scales(backbone, 0.75)
    assert layer_scales(backbone, 1.0) == {"weight": 1.0, "bias": 1.0}


@pytest.mark.parametrize("name", ["vit", "resnet18_cifar"])
def test_drop_path_keeps_weights_outputs_and_the_generator(name):
    backbone = make_vit() if name == "vit" else create_backbone(name, img_size=32)
    backbone.resize(24 if name == "vit" else 32)
    backbone.notes = ["from somewhere"]
    for module in backbone.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.ones_(module.weight)  # timm starts residual branches at 0
    state = torch.get_rng_state()
    dropping = with_drop_path(backbone.eval(), 0.5)
    assert torch.equal(torch.get_rng_state(), state)
    for key, value in backbone.net.state_dict().items():
        assert torch.equal(dropping.net.state_dict()[key], value)
    assert (dropping.img_size, dropping.mean, dropping.std, dropping.notes) == (
        backbone.img_size, backbone.mean, backbone.std, backbone.notes,
    )  # fmt: skip
    assert dropping.model_args == backbone.model_args
    x = torch.randn(4, 3, *backbone.img_size)
    with torch.no_grad():
        assert torch.equal(dropping.eval()(x), backbone(x))
        dropping.train()
        for module in dropping.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.eval()
        assert not torch.allclose(dropping(x), backbone(x))


def test_no_drop_path_is_the_network_itself():
    backbone = make_vit()
    assert with_drop_path(backbone, 0.0) is backbone


def test_a_rate_for_a_network_without_stochastic_depth_is_refused():
    backbone = create_backbone("dla46_c", img_size=32)
    assert with_drop_path(backbone, 0.1).name == "dla46_c"  # the default, which nobody asked for
    with pytest.raises(ConfigError, match=r"^drop_path: dla46_c has no stochastic depth"):
        with_drop_path(backbone, 0.2)
