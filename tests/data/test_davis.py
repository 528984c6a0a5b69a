"""DAVIS's folders and palette PNGs: round trip, checks before the work, sentences."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from dino_kd.data.davis import default_palette, read_davis, read_mask, write_mask
from dino_kd.errors import ConfigError, DataError


def write_video(root, name, frames=4, size=(20, 30), objects=2):
    pictures, masks = (root / k / "480p" / name for k in ("JPEGImages", "Annotations"))
    pictures.mkdir(parents=True)
    masks.mkdir(parents=True)
    for t in range(frames):
        mask = np.zeros(size, dtype=np.uint8)
        for n in range(objects):
            mask[5:10, 2 + t + 8 * n : 8 + t + 8 * n] = n + 1
        Image.fromarray(np.repeat(mask[..., None] * 80, 3, axis=2)).save(pictures / f"{t:05d}.jpg")
        write_mask(masks / f"{t:05d}.png", mask)


def write_list(root, *names, split="val"):
    (root / "ImageSets" / "2017").mkdir(parents=True, exist_ok=True)
    (root / "ImageSets" / "2017" / f"{split}.txt").write_text("\n".join(names) + "\n\n")


@pytest.fixture
def root(tmp_path):
    write_video(tmp_path, "bike-packing")
    write_video(tmp_path, "blackswan", frames=3, size=(16, 16), objects=1)
    write_list(tmp_path, "bike-packing", "blackswan")
    return tmp_path


def test_videos_are_read(root):
    first, second = read_davis(root, "root")
    assert (first.name, first.size, first.objects, len(first.frames)) == (
        "bike-packing", (20, 30), 2, 4,
    )  # fmt: skip
    assert (second.name, second.objects) == ("blackswan", 1)
    assert first.masks[3].name == "00003.png"
    (only,) = read_davis(root, "root", names=["blackswan"])
    assert only.name == "blackswan"


def test_masks_survive_writing(tmp_path):
    mask = np.array([[0, 1, 2], [255, 7, 0]], dtype=np.uint8)
    write_mask(tmp_path / "deep" / "a.png", mask)
    found, palette = read_mask(tmp_path / "deep" / "a.png")
    assert np.array_equal(found, mask)
    assert palette == default_palette()
    grey = tmp_path / "grey.png"
    Image.fromarray(mask).save(grey)
    found, palette = read_mask(grey)
    assert np.array_equal(found, mask)
    assert palette is None
    write_mask(tmp_path / "b.png", mask, [9] * 768)
    assert read_mask(tmp_path / "b.png")[1] == [9] * 768


def test_palette_is_that_of_pascal_voc():
    """Its first colours: black, dark red, dark green, olive, dark blue; 255 is a light grey."""
    colours = np.array(default_palette()).reshape(256, 3).tolist()
    assert colours[:5] == [[0, 0, 0], [128, 0, 0], [0, 128, 0], [128, 128, 0], [0, 0, 128]]
    assert colours[8] == [64, 0, 0]
    assert colours[255] == [224, 224, 192]


def test_colours_in_place_of_numbers_are_refused(root):
    path = root / "Annotations" / "480p" / "blackswan" / "00000.png"
    Image.new("RGB", (16, 16), "red").save(path)
    with pytest.raises(DataError, match=r"holds colours \(RGB\).*numbers of objects"):
        read_davis(root, "root")
    path.write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"00000.png cannot be read"):
        read_davis(root, "root")


def test_other_folders_are_told_apart(root, tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    Image.new("RGB", (8, 8)).save(images / "cat.jpg")
    with pytest.raises(
        DataError, match=r"there is no .*2017 \(.*images: found cat.jpg\). Expected: ROOT/ImageSets"
    ):
        read_davis(images, "root")
    with pytest.raises(DataError, match=r"nowhere is no folder"):
        read_davis(tmp_path / "nowhere", "root")
    with pytest.raises(DataError, match=r"no .*1080p \(.*JPEGImages: found 480p/\)"):
        read_davis(root, "root", resolution="1080p")
    with pytest.raises(ConfigError, match=r"split: unknown split 'vall'; did you mean 'val'"):
        read_davis(root, "root", split="vall")
    with pytest.raises(ConfigError, match=r"sequences: unknown sequence .*mean 'blackswan'"):
        read_davis(root, "root", names=["blackswam"])
    write_list(root, split="none")
    with pytest.raises(DataError, match=r"none.txt should hold the name of one sequence"):
        read_davis(root, "root", split="none")
    write_list(root, "../secret", split="up")
    with pytest.raises(DataError, match=r"found '../secret'"):
        read_davis(root, "root", split="up")
    write_list(root, "camel")
    with pytest.raises(DataError, match=r"the frames of camel are missing: there is no"):
        read_davis(root, "root")


@pytest.mark.parametrize("frames", [0, 1, 2])
def test_too_few_frames_are_refused(tmp_path, frames):
    write_video(tmp_path, "short", frames=frames)
    write_list(tmp_path, "short")
    with pytest.raises(DataError, match=rf"short holds {frames} frames .* 3 are the least"):
        read_davis(tmp_path, "root")


def test_annotations_must_fit_the_frames(root):
    folder = root / "Annotations" / "480p" / "bike-packing"
    (folder / "00002.png").unlink()
    with pytest.raises(DataError, match=r"1 of 4 frames of bike-packing have no annotation.*00002"):
        read_davis(root, "root")
    write_mask(folder / "00002.png", np.zeros((30, 20), dtype=np.uint8))
    with pytest.raises(DataError, match=r"00002.png is 20 x 30 px, and 00000.jpg .* is 30 x 20 px"):
        read_davis(root, "root")


def test_a_first_frame_without_objects_is_refused(root):
    path = root / "Annotations" / "480p" / "blackswan" / "00000.png"
    write_mask(path, np.full((16, 16), 255, dtype=np.uint8))
    with pytest.raises(DataError, match=r"00000.png holds no object"):
        read_davis(root, "root")
