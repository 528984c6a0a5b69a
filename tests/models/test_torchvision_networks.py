"""torchvision's networks behind `Backbone`, against torchvision's own without its last layer."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
import torchvision
from timm.models import generate_default_cfgs
from torch import nn
from torchvision.models._api import register_model
from torchvision.models.vision_transformer import VisionTransformer, interpolate_embeddings

from dino_kd.engine.optim import parameter_groups
from dino_kd.errors import CheckpointError, ConfigError, UserError
from dino_kd.models.attention import check_cls_attention
from dino_kd.models.backbone import create_backbone
from dino_kd.models.layers import layer_scales, with_drop_path
from dino_kd.models.torchvision_networks import default_cfgs, register, torchvision_names
from dino_kd.pretrained import backbone_hash, load_backbone, save_backbone

LAST = {  # torchvision's classifiers, written down from its source
    "resnet18": "fc",
    "mobilenet_v3_small": "classifier.3",
    "efficientnet_b0": "classifier.1",
    "regnet_y_400mf": "fc",
    "shufflenet_v2_x1_0": "fc",
    "mnasnet0_5": "classifier.1",
    "squeezenet1_1": "classifier.1",
    "densenet121": "classifier",
    "vit_test": "heads.head",
}
HEAVY = {
    "resnet50": "fc",
    "mobilenet_v3_large": "classifier.3",
    "convnext_tiny": "classifier.2",
    "swin_t": "head",
    "vgg11_bn": "classifier.6",
    "googlenet": "fc",
    "maxvit_t": "classifier.5",
    "vit_b_16": "heads.head",
}


@register_model()
def vit_test(*, weights=None, image_size=32, **kwargs):
    """torchvision's ViT, small."""
    del weights
    return VisionTransformer(image_size, 8, 3, 2, 32, 64, **kwargs)


_CONFIG = {"input_size": (3, 32, 32), "num_classes": 0, "mean": (0.5,) * 3, "std": (0.5,) * 3}
default_cfgs |= generate_default_cfgs({"torchvision_vit_test": _CONFIG})
register("vit_test")


@pytest.fixture(autouse=True)
def known_vit(monkeypatch):
    """The small ViT is no network of torchvision's, so the door does not know it."""
    names = [*torchvision_names(), "vit_test"]
    monkeypatch.setattr("dino_kd.pretrained.torchvision_names", lambda: names)


def own_network(name, size=224):
    """torchvision's network with statistics as of a trained one, and the same as an oracle."""
    torch.manual_seed(1)
    more = {"init_weights": False, "aux_logits": False} if name == "googlenet" else {}
    if name.startswith("vit"):
        more = {"image_size": size}
    net = torchvision.models.get_model(name, weights=None, **more).eval()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.8, 1.2)
    oracle = copy.deepcopy(net)
    oracle.set_submodule((LAST | HEAVY)[name], nn.Identity())
    return net, oracle


def check_features(name, size, tmp_path):
    net, oracle = own_network(name, size)
    file = tmp_path / "weights.pth"
    torch.save(net.state_dict(), file)
    backbone = load_backbone(f"torchvision:{name}:{file}")
    for side in [size] if name.startswith("maxvit") else [size, 3 * size // 2]:
        x = torch.randn(2, 3, side, side)
        if name.startswith("vit") and side != size:
            state = interpolate_embeddings(side, oracle.patch_size, oracle.state_dict())
            make = torchvision.models.get_model(name, weights=None, image_size=side)
            make.heads = nn.Identity()
            make.load_state_dict(state)
            oracle = make.eval()
        with torch.no_grad():
            expected = oracle(x).flatten(1)
            assert expected.std() > 1e-4  # a constant would say nothing
            torch.testing.assert_close(backbone(x), expected, atol=1e-5, rtol=1e-4)
    removed = LAST | HEAVY
    assert any(f"{removed[name]}.weight" in note for note in backbone.notes)


@pytest.mark.parametrize("name", LAST)
def test_features_are_those_of_torchvisions_network_without_its_last_layer(name, tmp_path):
    check_features(name, 32 if name.startswith("vit") else 64, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", HEAVY)
def test_features_of_heavy_networks_too(name, tmp_path):
    check_features(name, 224, tmp_path)


@pytest.mark.parametrize("name", [*LAST, pytest.param("swin_t", marks=pytest.mark.slow)])
def test_every_network_keeps_the_contract_and_survives_a_folder(name, tmp_path):
    size = (32, 64)
    backbone = load_backbone(f"random:torchvision/{name}", img_size=size)
    x = torch.randn(3, 3, *size)
    names = ["output", "mean", "block-1", "block-2", "block-99"]
    with torch.no_grad():
        parts, tokens = backbone.parts(x, names), backbone.tokens(x)
        assert torch.equal(parts["output"], backbone(x))
        assert torch.equal(parts["output"], tokens.cls)
        again, alone = backbone.parts(x, names), backbone.parts(x[1:2], names)
    assert parts["output"].shape == (3, backbone.embed_dim)
    assert parts["mean"].shape == (3, backbone.patch_dim)
    assert tokens.patches.shape == (3, tokens.grid[0] * tokens.grid[1], backbone.patch_dim)
    for key, values in parts.items():
        assert values.ndim == 2
        assert values.isfinite().all()
        assert torch.equal(values, again[key])
        torch.testing.assert_close(values[1:2], alone[key], atol=1e-5, rtol=1e-3)
    if not backbone.is_vit:
        torch.testing.assert_close(parts["block-1"], parts["mean"])
    else:
        torch.testing.assert_close(parts["block-1"], parts["output"])

    save_backbone(backbone, tmp_path / "saved")
    found = load_backbone(tmp_path / "saved")
    with torch.no_grad():
        assert torch.equal(found(x), backbone(x))
    assert backbone_hash(found) == backbone_hash(backbone)
    assert (found.mean, found.img_size) == (backbone.mean, size)
    net = timm.create_model(f"local-dir:{tmp_path / 'saved'}", pretrained=True).eval()
    with torch.no_grad():
        assert torch.equal(net(x), backbone(x))


def test_random_is_torchvisions_initialisation_from_seed_0():
    torch.manual_seed(0)
    expected = torchvision.models.resnet18().state_dict()
    found = load_backbone("random:torchvision/resnet18").net.state_dict()
    assert {f"network.{k}" for k in expected} - set(found) == {
        "network.fc.weight",
        "network.fc.bias",
    }
    for key, tensor in found.items():
        assert torch.equal(tensor, expected[key.removeprefix("network.")]), key


def test_stages_are_the_outputs_of_torchvisions_layers():
    """Against hooks on torchvision's own ResNet."""
    net, _ = own_network("resnet18")
    backbone = create_backbone("torchvision_resnet18", img_size=64).eval()
    backbone.net.load_state_dict(
        {f"network.{k}": v for k, v in net.state_dict().items() if not k.startswith("fc.")}
    )
    seen = {}
    for k, layer in enumerate([net.layer4, net.layer3, net.layer2, net.layer1], 1):
        layer.register_forward_hook(lambda _, __, out, k=k: seen.update({k: out.mean((2, 3))}))
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        net(x)
        parts = backbone.parts(x, [f"block-{k}" for k in range(1, 5)])
    for k in range(1, 5):
        torch.testing.assert_close(parts[f"block-{k}"], seen[k])
    assert [info["reduction"] for info in backbone.net.feature_info] == [2, 4, 8, 16, 32]


def test_blocks_of_a_vit_are_class_tokens_after_the_final_norm():
    net, _ = own_network("vit_test", 32)
    seen = []
    for block in net.encoder.layers:
        block.register_forward_hook(lambda _, __, out: seen.append(net.encoder.ln(out)[:, 0]))
    backbone = create_backbone("torchvision_vit_test", img_size=32).eval()
    backbone.net.network.load_state_dict(net.state_dict(), strict=False)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        net(x)
        parts = backbone.parts(x, ["block-1", "block-2", "block-3"])
    for k in (1, 2, 3):
        torch.testing.assert_close(parts[f"block-{k}"], seen[-k])


def test_resized_positions_are_kept_and_equal_the_dynamic_ones(tmp_path):
    backbone = load_backbone("random:torchvision/vit_test", img_size=32)
    x = torch.randn(1, 3, 48, 24)
    with torch.no_grad():
        expected = backbone(x)
        backbone.resize((48, 24))
        torch.testing.assert_close(backbone(x), expected)
    save_backbone(backbone, tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(load_backbone(tmp_path)(x), expected)


def test_a_vit_file_of_another_size_keeps_its_positions(tmp_path):
    net, oracle = own_network("vit_test", 48)
    torch.save(net.state_dict(), tmp_path / "v.pth")
    backbone = load_backbone(f"torchvision:vit_test:{tmp_path / 'v.pth'}")
    assert backbone.img_size == (48, 48)
    x = torch.randn(1, 3, 48, 48)
    with torch.no_grad():
        torch.testing.assert_close(backbone(x), oracle(x))


def test_old_files_without_counters_and_with_dots_in_names_load(tmp_path):
    """The layouts of torchvision's published DenseNets and of files before PyTorch 0.4.1."""
    net, oracle = own_network("densenet121")
    state = {}
    for key, tensor in net.state_dict().items():
        if not key.endswith("num_batches_tracked"):
            for kind in ("norm", "conv"):
                for number in "12":
                    if "denselayer" in key:
                        key = key.replace(f".{kind}{number}.", f".{kind}.{number}.")
            state[key] = tensor
    assert any(".norm.1.weight" in key for key in state)
    torch.save(state, tmp_path / "d.pth")
    backbone = load_backbone(f"torchvision:densenet121:{tmp_path / 'd.pth'}")
    assert any("counters start at 0" in note for note in backbone.notes)
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(backbone(x), oracle(x), atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_googlenet_is_what_torchvision_computes_from_pixels(tmp_path):
    """With auxiliary heads, and ImageNet's statistics converted inside, as published."""
    torch.manual_seed(0)
    net = torchvision.models.googlenet(init_weights=False, transform_input=True).eval()
    torch.save(net.state_dict(), tmp_path / "g.pth")
    backbone = load_backbone(f"torchvision:googlenet:{tmp_path / 'g.pth'}")
    assert any("aux1." in note for note in backbone.notes)
    net.fc = nn.Identity()
    images = torch.randint(0, 256, (2, 3, 96, 96), dtype=torch.uint8)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    x = (images / 255 - mean[:, None, None]) / std[:, None, None]
    with torch.no_grad():
        expected = net(x)
        found = backbone(backbone.preprocess(images))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("name", ["resnet18", "vit_test"])
def test_other_channels_and_layer_decay(name):
    backbone = create_backbone(f"torchvision_{name}", in_chans=5, img_size=32)
    assert backbone(torch.randn(2, 5, 32, 32)).shape == (2, backbone.embed_dim)
    scales = layer_scales(backbone, 0.5)
    assert set(scales) == {n for n, _ in backbone.net.named_parameters()}
    if name == "vit_test":  # stem, three blocks, the classifier behind
        assert scales["network.class_token"] == scales["network.encoder.pos_embedding"] == 0.5**4
        assert scales["network.encoder.ln.weight"] == 0.5
    else:  # five stages
        assert scales["network.conv1.weight"] == 0.5**5
        assert scales["network.layer4.1.conv2.weight"] == 0.5


def test_tokens_and_positions_are_not_decayed():
    backbone = create_backbone("torchvision_vit_test", img_size=32)
    decayed = max(parameter_groups(backbone), key=lambda g: sum(p.numel() for p in g["params"]))
    kept = {id(p) for p in decayed["params"]}
    assert id(backbone.net.network.conv_proj.weight) in kept
    assert id(backbone.net.network.encoder.pos_embedding) not in kept


def test_stochastic_depth_grows_to_the_rate_and_is_off_otherwise():
    backbone = create_backbone("torchvision_efficientnet_b0", img_size=32)

    def rates(b):
        return [m.p for m in b.modules() if isinstance(m, torchvision.ops.StochasticDepth)]

    assert set(rates(backbone)) == {0.0}
    found = rates(with_drop_path(backbone, 0.3))
    assert found == sorted(found)
    assert max(found) == pytest.approx(0.3)
    with pytest.raises(ConfigError, match=r"drop_path.*no stochastic depth"):
        create_backbone("torchvision_resnet18", img_size=32, drop_path=0.3)


# --- everything that can be wrong ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("torchvision:", "lacks a name.*torchvision:resnet18"),
        ("torchvision:resnet18:", "lacks a file"),
        ("torchvision:resnet81", "unknown torchvision network 'resnet81'; did you mean"),
        ("random:torchvision/resnet81", "unknown torchvision network 'resnet81'; did you mean"),
        ("torchvision:resnet18:/no/file.pth", "no file '/no/file.pth'"),
        ("vit_b_16", "did you mean 'torchvision:vit_b_16'"),
        ("resnet18", "did you mean 'timm:resnet18' or 'torchvision:resnet18'"),
    ],
)
def test_a_wrong_source_is_one_sentence(source, message):
    with pytest.raises(UserError, match=message):
        load_backbone(source)


@pytest.mark.parametrize("size", [30, (32, 20)])
def test_an_image_size_that_patches_do_not_tile_is_refused(size):
    with pytest.raises(ConfigError, match="does not divide into patches of 8 px"):
        load_backbone("random:torchvision/vit_test", img_size=size)


def test_maxvit_refuses_sizes_that_its_windows_do_not_tile():
    with pytest.raises(ConfigError, match=r"torchvision_maxvit_t cannot be built.*100"):
        create_backbone("torchvision_maxvit_t", img_size=100)


def test_one_network_has_no_branches():
    with pytest.raises(ConfigError, match="holds one network only"):
        load_backbone("torchvision:resnet18", branch="student")


def test_damaged_and_foreign_files_are_refused(tmp_path):
    state = own_network("shufflenet_v2_x1_0")[0].state_dict()
    file = tmp_path / "w.pth"

    def loading(content, name="shufflenet_v2_x1_0"):
        torch.save(content, file)
        return load_backbone(f"torchvision:{name}:{file}")

    with pytest.raises(CheckpointError, match=r"does not fit torchvision_mobilenet_v3_small.*miss"):
        loading(state, "mobilenet_v3_small")
    with pytest.raises(CheckpointError, match=r"1 missing \(network\.conv5\.0\.weight\)"):
        loading({k: v for k, v in state.items() if k != "conv5.0.weight"})
    with pytest.raises(CheckpointError, match=r"1 unexpected \(network\.more\)"):
        loading(state | {"more": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=r"of another shape.*conv5"):
        loading(state | {"conv5.0.weight": torch.zeros(2, 2, 1, 1)})
    with pytest.raises(CheckpointError, match=r"no state dict.*found a mapping of model, epoch"):
        loading({"model": state, "epoch": 3})
    with pytest.raises(CheckpointError, match=r"no state dict.*found list"):
        loading([1, 2])
    torch.save(state, file)
    file.write_bytes(file.read_bytes()[:20_000])
    with pytest.raises(CheckpointError, match="damaged or incomplete"):
        load_backbone(f"torchvision:shufflenet_v2_x1_0:{file}")
    (tmp_path / "w.txt").write_text("x")
    with pytest.raises(CheckpointError, match="no checkpoint file"):
        load_backbone(f"torchvision:resnet18:{tmp_path / 'w.txt'}")


def test_default_weights_come_from_the_hub_cache(tmp_path, monkeypatch):
    """A file that lies there under the published name is loaded without a connection."""
    net, oracle = own_network("squeezenet1_1")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    url = torchvision.models.SqueezeNet1_1_Weights.DEFAULT.url
    file = tmp_path / "checkpoints" / url.rpartition("/")[2]
    file.parent.mkdir()
    torch.save(net.state_dict(), file)
    backbone = load_backbone("torchvision:squeezenet1_1")
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(backbone(x), oracle(x))


def test_a_failed_download_names_the_file_form(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))

    def refuse(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    with pytest.raises(
        CheckpointError, match=r"no route to host.*\.pth.*torchvision:resnet18:FILE"
    ):
        load_backbone("torchvision:resnet18")


def test_attention_pictures_are_refused_in_words():
    backbone = create_backbone("torchvision_vit_test", img_size=32)
    with pytest.raises(UserError, match=r"in its own way \(EncoderBlock\)"):
        check_cls_attention(backbone)


def test_there_is_no_classifier_to_ask_for():
    with pytest.raises(ValueError, match="num_classes must be 0"):
        timm.create_model("torchvision_resnet18", num_classes=10)
