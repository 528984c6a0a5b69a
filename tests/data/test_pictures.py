"""Contact sheets: what stands where, and how large."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from dino_kd.data import pictures
from dino_kd.data.pictures import Cell, save_contact_sheet, save_picture


def solid(colour, height, width):
    return np.tile(np.array(colour, np.uint8)[:, None, None], (1, height, width))


def pixels(path):
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def box(picture, colour, tolerance=0):
    """(top, left, height, width) of the pixels of one colour."""
    rows, columns = np.nonzero((abs(picture - np.array(colour)) <= tolerance).all(-1))
    top, left = rows.min(), columns.min()
    return top, left, rows.max() - top + 1, columns.max() - left + 1


def test_rows_have_the_height_of_their_tallest_picture(tmp_path):
    """A wide row and a tall one; a place may stay empty."""
    sheet = tmp_path / "sheet.png"
    first = [solid((200, 0, 0), 120, 200), solid((0, 200, 0), 200, 120)]
    second = [None, solid((0, 0, 200), 200, 160)]
    save_contact_sheet([("a", first), ("b", second)], sheet)
    found = pixels(sheet)
    red, green, blue = (box(found, c) for c in ((200, 0, 0), (0, 200, 0), (0, 0, 200)))
    assert red[2:] == (120, 200)
    assert green[2:] == (200, 120)
    assert blue[2:] == (200, 160)
    assert green[0] == blue[0] >= red[0] + 120
    assert red[1] == green[1]
    assert blue[1] >= red[1] + 200


def test_small_pictures_grow_by_a_whole_number_and_large_ones_shrink(tmp_path):
    save_contact_sheet([("a", [solid((200, 0, 0), 16, 32)])], tmp_path / "small.png")
    assert box(pixels(tmp_path / "small.png"), (200, 0, 0))[2:] == (64, 128)
    save_contact_sheet([("a", [solid((200, 0, 0), 480, 720)])], tmp_path / "large.png")
    assert box(pixels(tmp_path / "large.png"), (200, 0, 0))[2:] == (224, 336)


def test_captions_and_names_are_drawn_and_never_overlap_the_next_column(tmp_path):
    """A caption of 200 letters is cut at the picture's width."""
    plain, long = tmp_path / "plain.png", tmp_path / "long.png"
    picture = solid((200, 0, 0), 120, 120)
    save_contact_sheet([("a", [picture])], plain, row_names=["n"])
    save_contact_sheet([("a", [Cell(picture, "x" * 200)])], long, row_names=["n"])
    assert pixels(long).shape[1] == pixels(plain).shape[1]
    assert pixels(long).shape[0] > pixels(plain).shape[0]
    _, left, _, width = box(pixels(long), (200, 0, 0))
    below = pixels(long)[-16:]
    assert (below < 100).any()
    assert (below[:, left + width :] > 250).all()


def test_long_names_are_broken_into_lines(tmp_path):
    picture = solid((200, 0, 0), 20, 120)
    save_contact_sheet([("a", [picture])], tmp_path / "a.png", row_names=["name" * 200])
    assert pixels(tmp_path / "a.png").shape[1] < 120 + 200


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        ("n02017213_European_gallinule.JPEG", ["n02017213_", "European_", "gallinule.JPEG"]),
        ("two words", ["two words"]),
        ("hen-of-the-woods.JPEG", ["hen-of-the-", "woods.JPEG"]),
        ("a" * 20, ["a" * 14, "a" * 6]),
        ("one two three four", ["one two three", "four"]),
        ("", [""]),
    ],
)
def test_names_are_broken_between_their_words(name, lines):
    class Ruler:
        """Every letter is a pixel wide."""

        def textlength(self, text, font):
            return len(text)

    assert pictures._broken(name, 14, None, Ruler()) == lines


def test_one_picture_is_written_as_it_is(tmp_path):
    picture = np.random.default_rng(0).integers(0, 256, (3, 5, 7), np.uint8)
    save_picture(picture, tmp_path / "deep" / "a.png")
    assert np.array_equal(pixels(tmp_path / "deep" / "a.png"), picture.transpose(1, 2, 0))
    save_picture(picture[:1], tmp_path / "grey.png")
    assert (pixels(tmp_path / "grey.png") == picture[0][..., None]).all()
