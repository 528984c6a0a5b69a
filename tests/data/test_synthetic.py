"""The generated textures: repeatable, balanced, honest masks, and no shortcut to the class."""

from __future__ import annotations

import pickle
from functools import cache

import numpy as np
import pytest

from dino_kd.data.specs import make_dataset
from dino_kd.data.synthetic import (
    DEFAULT_SIZES,
    SIDE,
    TEXTURES,
    SyntheticImages,
    draw,
    make_synthetic,
)
from dino_kd.errors import ConfigError


@cache
def arrays(split: str, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Images as float [N, 32, 32, 3] and their labels."""
    dataset = SyntheticImages("textures", split, count)
    assert dataset.labels is not None
    return np.stack([dataset.read(i) for i in range(count)]).astype(np.float64), dataset.labels


def nearest_neighbours(bank: np.ndarray, queries: np.ndarray, k: int = 20) -> float:
    """Top-1 in percent of a plain majority vote by Euclidean distance, in numpy."""
    bank_labels, query_labels = arrays("train", 1200)[1], arrays("test", 400)[1]
    squared = (queries**2).sum(1)[:, None] + (bank**2).sum(1)[None] - 2 * queries @ bank.T
    nearest = bank_labels[np.argsort(squared, axis=1)[:, :k]]
    votes = np.apply_along_axis(np.bincount, 1, nearest, minlength=len(TEXTURES))
    return 100 * float((votes.argmax(1) == query_labels).mean())


def features(of_images) -> tuple[np.ndarray, np.ndarray]:
    return of_images(arrays("train", 1200)[0]), of_images(arrays("test", 400)[0])


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_an_image_follows_from_its_index_alone() -> None:
    """Against a fresh data set read in the opposite order, and of another size."""
    first = SyntheticImages("textures", "train", 20)
    second = SyntheticImages("textures", "train", 300)
    expected = {i: (first.read(i), first.mask(i)) for i in range(20)}
    for i in reversed(range(20)):
        assert np.array_equal(second.read(i), expected[i][0])
        assert np.array_equal(second.mask(i), expected[i][1])


def test_a_longer_split_begins_with_the_shorter_one() -> None:
    short, long = (SyntheticImages("textures", "train", n).labels for n in (37, 500))
    assert short is not None
    assert long is not None
    assert np.array_equal(short, long[:37])


def test_reading_leaves_the_global_generators_alone() -> None:
    np.random.seed(0)  # noqa: NPY002 - the global state is what is tested
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    SyntheticImages("textures", "train", 5).read(3)
    assert np.array_equal(before, np.random.get_state()[1])  # noqa: NPY002


def test_no_image_appears_twice_within_or_across_splits() -> None:
    every = [
        SyntheticImages("textures", split, 150).read(i).tobytes()
        for split in ("train", "test")
        for i in range(150)
    ]
    assert len(set(every)) == len(every)


def test_images_and_masks_have_the_promised_form() -> None:
    dataset = make_synthetic("textures:test:40")
    assert isinstance(dataset, SyntheticImages)
    for i in range(len(dataset)):
        image, mask = dataset.read(i), dataset.mask(i)
        assert (image.shape, image.dtype) == ((SIDE, SIDE, 3), np.uint8)
        assert (mask.shape, mask.dtype) == ((SIDE, SIDE), np.bool_)
        assert 0.02 < mask.mean() < 0.9


def test_every_class_appears_equally_often_and_at_no_fixed_stride() -> None:
    """Evenly spaced subsets, as the k-NN monitor takes them, must hold every class."""
    labels = SyntheticImages("textures", "train", 8000).labels
    assert labels is not None
    assert labels.dtype == np.int64
    assert set(np.bincount(labels)) == {8000 // len(TEXTURES)}
    for stride in (2, len(TEXTURES), 2 * len(TEXTURES)):
        assert len(set(labels[::stride])) == len(TEXTURES)


def test_the_mask_is_where_the_texture_is() -> None:
    """The same draws with two textures differ inside the mask, and hardly outside it."""
    checks, stripes = TEXTURES["checks"], TEXTURES["stripes"]
    inside, outside = [], []
    for seed in range(40):
        one, mask = draw(checks, np.random.default_rng(seed))
        other, same_mask = draw(stripes, np.random.default_rng(seed))
        assert np.array_equal(mask, same_mask)
        differs = (one != other).any(axis=2)
        inside.append(differs[mask].mean())
        outside.append((differs & ~mask).sum() / mask.sum())  # the soft edge
    assert np.mean(inside) > 0.9
    assert np.mean(outside) < 0.2


def test_mean_colour_does_not_tell_the_class() -> None:
    """k-NN on the three channel means stays near chance, 12.5 % for 8 classes."""
    bank, queries = features(lambda images: images.mean(axis=(1, 2)))
    assert nearest_neighbours(bank, queries) < 100 / len(TEXTURES) + 8


def test_raw_pixels_do_not_separate_the_classes() -> None:
    """Cosine k-NN on pixels stays below half: place, rotation and phase do not repeat."""
    bank, queries = features(lambda images: unit(images.reshape(len(images), -1)))
    assert nearest_neighbours(bank, queries) < 50


def test_the_class_can_be_told() -> None:
    """A hand-made texture statistic, blind to place and brightness, beats pixels and chance."""

    def spectrum(images: np.ndarray) -> np.ndarray:
        grey = images.mean(axis=3)
        power = np.abs(np.fft.fft2(grey - grey.mean(axis=(1, 2), keepdims=True)))
        frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(SIDE), np.fft.fftfreq(SIDE)))
        rings = np.digitize(frequency, np.linspace(0, 0.5, 13))
        profile = np.stack([power[:, rings == r].mean(axis=1) for r in range(1, 13)], axis=1)
        return unit(np.log1p(profile))

    assert nearest_neighbours(*features(spectrum)) > 2.5 * 100 / len(TEXTURES)


def test_a_data_set_can_be_pickled_for_loader_processes() -> None:
    dataset = SyntheticImages("textures", "test", 10)
    copy = pickle.loads(pickle.dumps(dataset))
    assert np.array_equal(copy.read(7), dataset.read(7))
    assert np.array_equal(copy.labels, dataset.labels)


@pytest.mark.parametrize(
    ("spec", "count"),
    [
        ("synthetic:textures", DEFAULT_SIZES["train"]),
        ("synthetic:textures:test", DEFAULT_SIZES["test"]),
        ("synthetic:textures:train:4000", 4000),
    ],
)
def test_specs_name_split_and_size(spec: str, count: int) -> None:
    dataset = make_dataset(spec)
    assert len(dataset) == count
    assert dataset.class_names == list(TEXTURES)
    assert "textures" in dataset.path(3)
    assert "3" in dataset.path(3)


@pytest.mark.parametrize(
    ("rest", "message"),
    [
        ("texture", r"unknown synthetic data set 'texture'; did you mean 'textures'"),
        ("textures:trian", r"unknown split 'trian'; did you mean 'train'"),
        ("textures:train:many", r"whole number of images"),
        ("textures:train:0", r"whole number of images"),
        ("textures:train:-4", r"whole number of images"),
        ("textures:train:5:6", r"synthetic:NAME:SPLIT:SIZE"),
        ("textures:train:99999999999", r"at most"),
    ],
)
def test_mistaken_specs_say_what_is_accepted(rest: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_synthetic(rest)
