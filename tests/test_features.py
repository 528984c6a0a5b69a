"""Feature banks against one image at a time, and what they leave untouched."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from dino_kd import features
from dino_kd.data.specs import make_dataset
from dino_kd.errors import ConfigError, DataError
from dino_kd.features import default_resize, extract_features, pixel_features
from dino_kd.models.backbone import create_backbone

TINY = {"embed_dim": 32, "depth": 2, "num_heads": 2}


@pytest.fixture
def folder(tmp_path):
    """Seven images of two classes and several sizes; number 3 is broken."""
    rng = np.random.default_rng(0)
    for i in range(7):
        path = tmp_path / "images" / ("cat" if i < 4 else "dog") / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (20 + 3 * i, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    broken = tmp_path / "images" / "cat" / "3.png"
    broken.write_bytes(broken.read_bytes()[:60])
    return tmp_path / "images"


@pytest.fixture
def backbone():
    torch.manual_seed(0)
    return create_backbone("vit_tiny_patch16_224", img_size=16, patch_size=4, args=TINY)


def by_hand(folder, i, size):
    """Shorter side to `size`, centre crop, with PIL alone: uint8 [3, size, size]."""
    image = Image.open(folder / ("cat" if i < 4 else "dog") / f"{i}.png")
    width, height = image.size
    short = min(width, height)
    scaled = (width * size // short, height * size // short)
    image = image.resize(scaled, Image.Resampling.BICUBIC)
    left, top = round((scaled[0] - size) / 2), round((scaled[1] - size) / 2)
    return np.asarray(image)[top : top + size, left : left + size].transpose(2, 0, 1)


def test_a_cpu_takes_a_few_images_at_a_time(folder, backbone, monkeypatch):
    """Four of 16 px here; the features of all come out, in order."""
    whole = extract_features(backbone, make_dataset(str(folder)), size=16, batch_size=100)
    monkeypatch.setattr(features, "_PIXELS", 4 * 16 * 16)
    seen = []
    backbone.net.patch_embed.register_forward_hook(lambda _, args, out: seen.append(len(args[0])))
    parted = extract_features(backbone, make_dataset(str(folder)), size=16, batch_size=100)
    assert seen == [4, 2]
    torch.testing.assert_close(parted.features, whole.features)
    assert [
        len(p) for p in features._pieces(torch.zeros(6, 3, 16, 16), torch.device("cuda"), 5)
    ] == [5, 1]


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_bank_equals_one_image_at_a_time(folder, backbone, batch_size):
    dataset = make_dataset(str(folder))
    bank = extract_features(backbone, dataset, size=16, batch_size=batch_size)
    assert bank.indices.tolist() == [0, 1, 2, 4, 5, 6]  # without the broken one
    assert bank.labels.tolist() == [0, 0, 0, 1, 1, 1]
    backbone.eval()
    for row, i in zip(bank.features, bank.indices.tolist(), strict=True):
        image = torch.from_numpy(by_hand(folder, i, 16).copy())[None]
        with torch.no_grad():
            expected = backbone(backbone.preprocess(image))[0]
        torch.testing.assert_close(row, expected, atol=1e-5, rtol=1e-4)


def test_broken_images_are_left_out_and_named(folder, backbone):
    bank = extract_features(backbone, make_dataset(str(folder)), size=16)
    assert [b.path.rsplit("/", 1)[-1] for b in bank.broken] == ["3.png"]


def test_indices_choose_and_order(folder, backbone):
    dataset = make_dataset(str(folder))
    whole = extract_features(backbone, dataset, size=16)
    part = extract_features(backbone, dataset, size=16, indices=[6, 3, 0])
    assert part.indices.tolist() == [6, 0]
    torch.testing.assert_close(part.features, whole.features[[5, 0]])
    assert part.labels.tolist() == [1, 0]


def test_training_state_comes_back(folder):
    """Batch-norm statistics, training modes and the random generator are as before."""
    backbone = create_backbone("resnet18_cifar", img_size=32)
    backbone.net.layer1.eval()
    modes = [m.training for m in backbone.modules()]
    state = {k: v.clone() for k, v in backbone.state_dict().items()}
    generator = torch.get_rng_state()
    bank = extract_features(backbone, make_dataset(str(folder)), size=32)
    assert [m.training for m in backbone.modules()] == modes
    assert all(torch.equal(v, state[k]) for k, v in backbone.state_dict().items())
    assert torch.equal(torch.get_rng_state(), generator)
    assert not bank.features.requires_grad


def test_bf16_is_close_and_its_attention_is_temporary(folder, backbone):
    dataset = make_dataset(str(folder))
    exact = extract_features(backbone, dataset, size=16)
    low = extract_features(backbone, dataset, size=16, precision="bf16")
    assert low.features.dtype == torch.float32
    assert (low.features - exact.features).abs().max() < 0.1
    assert all(block.attn.fused_attn for block in backbone.net.blocks)


def test_pixels_are_the_resized_image(folder):
    bank = pixel_features(make_dataset(str(folder)), size=8)
    assert bank.features.shape == (6, 3 * 8 * 8)
    expected = by_hand(folder, 5, 8).reshape(-1) / 255
    np.testing.assert_allclose(bank.features[4], expected, atol=1e-6)


@pytest.mark.parametrize(
    ("size", "resize"), [(32, 32), (64, 64), (96, 110), (224, 256), (518, 592), ((32, 224), 256)]
)
def test_resize_rule(size, resize):
    assert default_resize(size) == resize


def test_sizes_that_do_not_fit_are_refused(folder, backbone):
    with pytest.raises(ConfigError, match=r"image_size: 18 x 18 px does not divide"):
        extract_features(backbone, make_dataset(str(folder)), size=18)


def test_a_set_of_broken_images_is_refused(folder, backbone):
    with pytest.raises(DataError, match=r"none of its 1 images could be read"):
        extract_features(backbone, make_dataset(str(folder)), size=16, indices=[3])
