"""Do two pictures show the same? Altered copies of structured pictures against distinct ones."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance

from dino_kd.data.specs import make_dataset
from dino_kd.data.thumbnails import make_thumbnails, thumbnail
from dino_kd.duplicates import appearance, groups_of, same_rows


def picture(seed, side=128):
    """Shapes at several scales, as in photos."""
    rng = np.random.default_rng(seed)
    total = np.zeros((side, side, 3))
    for cells, weight in ((4, 1.0), (9, 0.6), (20, 0.4)):
        small = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        total += weight * np.asarray(small.resize((side, side), Image.Resampling.BICUBIC))
    return Image.fromarray((total / 2).astype(np.uint8))


def jpeg(image):
    file = io.BytesIO()
    image.save(file, "JPEG", quality=60)
    return Image.open(io.BytesIO(file.getvalue())).convert("RGB")


def cut(image, left, top, share=0.9):
    """A part with `share` of each side."""
    width, height = (round(share * side) for side in image.size)
    x, y = round(left * (image.width - width)), round(top * (image.height - height))
    return image.crop((x, y, x + width, y + height))


CHANGES = {
    "nothing": lambda image: image,
    "jpeg": jpeg,
    "half": lambda image: image.resize((64, 64), Image.Resampling.BICUBIC),
    "centre": lambda image: cut(image, 0.5, 0.5),
    "corner": lambda image: cut(image, 1, 0, 0.95),
    "border": lambda image: cut(image, 0, 0.5),
    "mirror": lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
    "bright": lambda image: ImageEnhance.Brightness(image).enhance(1.2),
    "pale": lambda image: ImageEnhance.Contrast(image).enhance(0.7),
    "mirrored part": lambda image: cut(image, 1, 1).transpose(Image.Transpose.FLIP_LEFT_RIGHT),
}


def grey(images):
    return torch.from_numpy(np.stack([thumbnail(np.asarray(image)) for image in images]))


@pytest.mark.parametrize("change", CHANGES)
def test_altered_copies_are_recognised_from_either_side(change):
    originals = [picture(seed) for seed in range(10)]
    copies = [CHANGES[change](image) for image in originals]
    assert appearance(grey(originals), grey(copies)).min() > 0.85
    assert appearance(grey(copies), grey(originals)).min() > 0.85


def test_distinct_pictures_are_not():
    images = grey([picture(seed) for seed in range(30)])
    one, other = torch.triu_indices(30, 30, offset=1)
    assert appearance(images[one], images[other]).max() < 0.6


def test_appearance_of_equal_pictures_is_the_correlation_of_their_edges():
    """One pair against numpy, both directions in one vector; the whole pictures match best."""
    image = np.asarray(grey([picture(0)])[0], dtype=float)
    noisy = (image + np.random.default_rng(0).normal(0, 4, image.shape)).clip(0, 255)
    noisy = noisy.astype(np.uint8)

    def edges(x):
        x = x.astype(float)
        across = [x[r, c + 1] - x[r, c - 1] for r in range(32) for c in range(1, 31)]
        down = [x[r + 1, c] - x[r - 1, c] for r in range(1, 31) for c in range(32)]
        v = np.array(across + down)
        limit = 2 * np.sqrt((v**2).mean())
        v = v.clip(-limit, limit)
        return v / np.linalg.norm(v)

    found = appearance(torch.from_numpy(image)[None].byte(), torch.from_numpy(noisy)[None])
    assert found.item() == pytest.approx(edges(image) @ edges(noisy), abs=1e-5)


def test_a_frame_does_not_outweigh_what_is_in_it():
    """The limit on strong edges lowers the median here from 0.50 to 0.43."""
    framed = []
    for seed in range(8):
        pixels = np.full((128, 128, 3), 255, dtype=np.uint8)
        inside = picture(seed, 100).point(lambda v: min(255, max(0, 3 * (v - 128) + 128)))
        pixels[14:-14, 14:-14] = np.asarray(inside)
        framed.append(Image.fromarray(pixels))
    images = grey(framed)
    one, other = torch.triu_indices(8, 8, offset=1)
    found = appearance(images[one], images[other])
    assert found.max() < 0.7
    assert found.median() < 0.47
    assert appearance(images, grey([jpeg(image) for image in framed])).min() > 0.9


def test_flat_pictures_prove_nothing():
    flat = torch.full((1, 32, 32), 255, dtype=torch.uint8)
    assert appearance(flat, flat).item() == 0
    noise = flat - torch.randint(0, 2, flat.shape, dtype=torch.uint8)
    assert appearance(noise, flat).item() < 0.5


def test_chunks_change_nothing():
    images = grey([picture(seed) for seed in range(12)])
    whole = appearance(images[:-1], images[1:])
    torch.testing.assert_close(appearance(images[:-1], images[1:], chunk=5), whole)
    assert len(appearance(images[:0], images[:0])) == 0


def test_groups_are_connected_components():
    """Against scipy on random graphs, and by hand."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    assert groups_of(torch.tensor([[4, 1], [1, 3], [0, 5]]), 6).tolist() == [0, 1, 2, 1, 1, 0]
    rng = np.random.default_rng(0)
    for count in (1, 30, 200):
        pairs = rng.integers(0, count, (count // 2, 2))
        graph = coo_matrix((np.ones(len(pairs)), pairs.T), shape=(count, count))
        _, labels = connected_components(graph, directed=False)
        lowest = [np.flatnonzero(labels == label)[0] for label in labels]
        assert groups_of(torch.from_numpy(pairs), count).tolist() == lowest


def test_same_rows_names_the_first_of_equal_ones():
    rows = torch.tensor([[3, 1], [0, 0], [3, 1], [2, 2], [0, 0], [3, 1]], dtype=torch.uint8)
    assert same_rows(rows).tolist() == [0, 1, 0, 3, 1, 0]
    assert same_rows(rows[:0]).tolist() == []


def test_thumbnails_know_pixels_sizes_and_broken_images(tmp_path):
    picture(0).save(tmp_path / "a.png")
    picture(0).save(tmp_path / "b.bmp")
    picture(0).resize((20, 40)).save(tmp_path / "c.png")
    (tmp_path / "d.png").write_bytes(b"broken")
    found = make_thumbnails(make_dataset(str(tmp_path)), batch_size=2)
    assert found.indices.tolist() == [0, 1, 2]
    assert same_rows(found.hashes).tolist() == [0, 0, 2]
    assert found.areas.tolist() == [128 * 128, 128 * 128, 800]
    assert found.grey.shape == (3, 32, 32)
    assert [broken.path for broken in found.broken] == [str(tmp_path / "d.png")]


def test_pictures_of_other_bands_have_a_thumbnail_too():
    bands = np.stack([np.full((40, 50), level, dtype=np.uint8) for level in (10, 20, 60, 30)], 2)
    assert (thumbnail(bands) == 30).all()
