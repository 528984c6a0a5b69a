"""The feature cache against extraction itself: hits, misses, damage, limits."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from PIL import Image

from dino_kd.data.specs import make_dataset
from dino_kd.feature_cache import FeatureCache
from dino_kd.features import FeatureBank, extract_features
from dino_kd.models.backbone import create_backbone


@pytest.fixture
def images(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("ant", "bee"):
        (tmp_path / "set" / name).mkdir(parents=True)
        for i in range(3):
            picture = Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8))
            picture.save(tmp_path / "set" / name / f"{i}.png")
    (tmp_path / "set" / "bee" / "1.png").write_bytes(b"broken")
    return tmp_path / "set"


@pytest.fixture
def backbone():
    torch.manual_seed(0)
    args = {"embed_dim": 32, "depth": 2, "num_heads": 2}
    return create_backbone("vit_tiny_patch16_224", img_size=16, patch_size=4, args=args)


class Extractor:
    """Counts how often features are really computed."""

    def __init__(self, backbone, dataset):
        self.backbone, self.dataset, self.calls = backbone, dataset, []

    def __call__(self, parts):
        self.calls.append(list(parts))
        return extract_features(self.backbone, self.dataset, size=16, parts=parts)


def assert_equal(found: FeatureBank, expected: FeatureBank):
    assert torch.equal(found.features, expected.features)
    assert torch.equal(found.indices, expected.indices)
    assert torch.equal(found.labels, expected.labels)
    assert [str(b) for b in found.broken] == [str(b) for b in expected.broken]
    assert found.parts.keys() == expected.parts.keys()
    for name, values in expected.parts.items():
        assert torch.equal(found.parts[name], values)


def test_what_comes_back_is_what_was_extracted(images, backbone, tmp_path):
    dataset = make_dataset(str(images))
    extract = Extractor(backbone, dataset)
    cache = FeatureCache(tmp_path / "cache")
    first = cache.fetch(dataset, {"weights": "a"}, ["block-2", "mean"], extract)
    again = cache.fetch(dataset, {"weights": "a"}, ["mean"], extract)
    only_output = cache.fetch(dataset, {"weights": "a"}, [], extract)
    assert extract.calls == [["output", "block-2", "mean"]]
    assert (first.cached, again.cached) == (False, True)
    assert list(again.parts) == ["mean"]
    assert only_output.parts == {}
    assert len(again.broken) == 1
    reference = extract_features(backbone, dataset, size=16, parts=["mean"])
    assert_equal(again, reference)


def test_parts_that_are_missing_are_extracted(images, backbone, tmp_path):
    dataset = make_dataset(str(images))
    extract, cache = Extractor(backbone, dataset), FeatureCache(tmp_path)
    cache.fetch(dataset, {}, [], extract)
    bank = cache.fetch(dataset, {}, ["mean"], extract)
    assert extract.calls == [["output"], ["output", "mean"]]
    assert not bank.cached
    assert bank.part("mean").shape == (5, 32)
    assert bank.part("output") is bank.features


@pytest.mark.parametrize("change", ["weights", "image", "added", "channels"])
def test_another_network_or_another_image_is_another_entry(images, backbone, tmp_path, change):
    dataset = make_dataset(str(images))
    extract, cache = Extractor(backbone, dataset), FeatureCache(tmp_path / "cache")
    cache.fetch(dataset, {"weights": "a"}, [], extract)
    identity = {"weights": "b" if change == "weights" else "a"}
    if change == "image":
        os.utime(images / "ant" / "0.png", (1, 1))
    if change == "added":
        (images / "ant" / "new.png").write_bytes((images / "ant" / "0.png").read_bytes())
    dataset = make_dataset(str(images), channels=1 if change == "channels" else 3)
    cache.fetch(dataset, identity, [], extract)
    assert len(extract.calls) == 2


def test_damaged_files_are_extracted_again(images, backbone, tmp_path):
    dataset = make_dataset(str(images))
    extract, cache = Extractor(backbone, dataset), FeatureCache(tmp_path / "cache")
    cache.fetch(dataset, {}, ["mean"], extract)
    (file,) = (tmp_path / "cache").glob("*/mean.safetensors")
    file.write_bytes(file.read_bytes()[:50])
    bank = cache.fetch(dataset, {}, ["mean"], extract)
    assert len(extract.calls) == 2
    assert cache.fetch(dataset, {}, ["mean"], extract).cached
    assert_equal(bank, extract_features(backbone, dataset, size=16, parts=["mean"]))


def test_the_entry_used_longest_ago_makes_room(images, backbone, tmp_path):
    dataset = make_dataset(str(images))
    extract = Extractor(backbone, dataset)
    roomy = FeatureCache(tmp_path / "cache")
    for number, name in enumerate("abc"):
        roomy.fetch(dataset, {"weights": name}, [], extract)
        for entry in (tmp_path / "cache").iterdir():
            if (entry / "identity.json").stat().st_mtime > 1000:
                os.utime(entry / "identity.json", (number, number))
    one = sum(f.stat().st_size for f in next((tmp_path / "cache").iterdir()).iterdir())
    roomy.fetch(dataset, {"weights": "a"}, [], extract)  # used now: b is the oldest
    tight = FeatureCache(tmp_path / "cache", limit_gb=3.5 * one / 1e9)
    tight.fetch(dataset, {"weights": "d"}, [], extract)
    calls = len(extract.calls)
    for name in "acd":
        assert tight.fetch(dataset, {"weights": name}, [], extract).cached
    assert len(extract.calls) == calls
    assert not roomy.fetch(dataset, {"weights": "b"}, [], extract).cached


def test_what_is_larger_than_the_limit_is_not_kept(images, backbone, tmp_path):
    dataset = make_dataset(str(images))
    extract, cache = Extractor(backbone, dataset), FeatureCache(tmp_path / "c", limit_gb=1e-9)
    cache.fetch(dataset, {}, [], extract)
    assert not cache.fetch(dataset, {}, [], extract).cached
