"""Contact sheets, so that a person can judge crops and attention maps by eye."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from dino_kd.data.multicrop import Crops
from dino_kd.files import write_atomic

_SHOWN_SIDE = 112  # crops smaller than this are enlarged by a whole number, pixel by pixel
_LARGEST_SHORT_SIDE = 224  # larger pictures are reduced to it
_GAP = 8
_TEXT_HEIGHT = 22
_LINE_HEIGHT = 17
_LABEL_WIDTH = 132  # of a row's name in the margin, which is broken into lines
_BACKGROUND, _INK = (255, 255, 255), (40, 40, 40)


def save_crop_picture(crops: Crops, path: str | Path, max_images: int = 8) -> None:
    """Write a PNG: one row per image, its global crops and then its local ones, labelled.

    Global and local crops are enlarged alike. Three channels are shown as RGB, one or two as
    grey (the first band), more by their first three bands. Raises UserError when the disk is full.
    """
    groups = [("global", crops.global_crops), ("local", crops.local_crops)]
    columns = [
        (f"{name} {number + 1}", list(group[number, :max_images].cpu().numpy()))
        for name, group in groups
        for number in range(len(group))
    ]
    save_contact_sheet(columns, path)


@dataclass(frozen=True)
class Cell:
    """One place of a contact sheet: a picture uint8 ``[C, h, w]`` and a line of text below it."""

    pixels: np.ndarray
    caption: str = ""


Column = tuple[str, Sequence["np.ndarray | Cell | None"]]


def save_contact_sheet(
    columns: Sequence[Column], path: str | Path, *, row_names: Sequence[str] | None = None
) -> None:
    """Write a PNG of labelled columns, one row per image.

    Args:
        columns: a title and one picture uint8 ``[C, h, w]``, a `Cell` or nothing for every row.
            All are enlarged by the same whole number when they are small, and reduced when large.
        path: where to.
        row_names: the text left of each row; None: "image 1" and so on.

    Raises:
        UserError: the disk is full.
    """
    titles = [title for title, _ in columns]
    font = _font()
    ruler = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    rows = _drawn_rows(columns)
    names = row_names or [f"image {number + 1}" for number in range(len(rows))]
    labels = [_broken(name, _LABEL_WIDTH, font, ruler) for name in names]
    margin = max(int(ruler.textlength(line, font)) for label in labels for line in label)
    widths = [
        max([int(ruler.textlength(title, font)), *(c[0].width for c in column if c)])
        for title, column in zip(titles, zip(*rows, strict=True), strict=True)
    ]
    heights = [_row_height(row, label) for row, label in zip(rows, labels, strict=True)]
    left_edges = np.cumsum([margin + 2 * _GAP, *(width + _GAP for width in widths)]).tolist()
    size = (left_edges[-1], _TEXT_HEIGHT + _GAP + sum(heights) + _GAP * len(heights))
    sheet = Image.new("RGB", size, _BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    for left, title in zip(left_edges, titles, strict=False):
        draw.text((left, _GAP // 2), title, _INK, font)
    top = _TEXT_HEIGHT + _GAP // 2
    for row, label, height in zip(rows, labels, heights, strict=True):
        for number, line in enumerate(label):
            draw.text((_GAP, top + number * _LINE_HEIGHT), line, _INK, font)
        for cell, left, width in zip(row, left_edges, widths, strict=False):
            if cell:
                picture, caption = cell
                sheet.paste(picture, (left, top))
                text = _shortened(caption, width, font, ruler)
                draw.text((left, top + picture.height + 1), text, _INK, font)
        top += height + _GAP
    write_atomic(path, lambda temporary: sheet.save(temporary, format="PNG"))


def save_picture(pixels: np.ndarray, path: str | Path) -> None:
    """Write one picture uint8 ``[C, h, w]`` as PNG, as it is. Raises UserError when that fails."""
    picture = Image.fromarray(np.ascontiguousarray(shown_bands(pixels).transpose(1, 2, 0)))
    write_atomic(path, lambda temporary: picture.save(temporary, format="PNG"))


def shown_bands(pixels: np.ndarray) -> np.ndarray:
    """Any uint8 ``[C, h, w]`` as three bands: RGB, the first one as grey, or the first three."""
    return pixels[:3] if len(pixels) >= 3 else np.repeat(pixels[:1], 3, axis=0)


def tile(image: np.ndarray | None, side: int) -> np.ndarray:
    """An image uint8 ``[H, W, C]`` inside a white square: uint8 ``[3, side, side]``.

    Larger images are shrunk, smaller ones enlarged by a whole number, pixel by pixel; None gives
    the empty square.
    """
    square = Image.new("RGB", (side, side), _BACKGROUND)
    if image is not None:
        bands = shown_bands(image.transpose(2, 0, 1)).transpose(1, 2, 0)
        picture = Image.fromarray(np.ascontiguousarray(bands))
        picture = _enlarged(picture, max(1, side // max(picture.size)))
        picture.thumbnail((side, side), Image.Resampling.LANCZOS)
        square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return np.asarray(square).transpose(2, 0, 1)


Drawn = tuple[Image.Image, str]


def _drawn_rows(columns: Sequence[Column]) -> list[list[Drawn | None]]:
    """The pictures in their final size, with their captions, row by row."""
    cells = [
        [Cell(cell) if isinstance(cell, np.ndarray) else cell for cell in pictures]
        for _, pictures in columns
    ]
    shapes = [cell.pixels.shape[-2:] for column in cells for cell in column if cell]
    factor = max(1, round(_SHOWN_SIDE / max(max(shape) for shape in shapes)))
    return [
        [(_picture(cell.pixels, factor), cell.caption) if cell else None for cell in row]
        for row in zip(*cells, strict=True)
    ]


def _row_height(row: Sequence[Drawn | None], label: Sequence[str]) -> int:
    pictures = [picture.height + _LINE_HEIGHT * bool(text) for picture, text in filter(None, row)]
    return max([_LINE_HEIGHT * len(label), *pictures])


def _picture(pixels: np.ndarray, factor: int) -> Image.Image:
    """One crop uint8 [C, h, w] as an RGB picture, each pixel `factor` wide, or reduced."""
    picture = Image.fromarray(np.ascontiguousarray(shown_bands(pixels).transpose(1, 2, 0)))
    scale = min(factor, _LARGEST_SHORT_SIDE / min(picture.size))
    if scale >= factor:
        return _enlarged(picture, factor)
    size = (round(picture.width * scale), round(picture.height * scale))
    return picture.resize(size, Image.Resampling.LANCZOS)


def _enlarged(picture: Image.Image, factor: int) -> Image.Image:
    size = (picture.width * factor, picture.height * factor)
    return picture.resize(size, Image.Resampling.NEAREST)


Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def _broken(text: str, width: int, font: Font, ruler: ImageDraw.ImageDraw) -> list[str]:
    """Text as at most five lines of `width` pixels.

    Broken at spaces and behind the signs that join a file name's words; long words anywhere.
    """
    lines = [""]
    for part in re.findall(r"[^\s/_-]*[\s/_-]+|[^\s/_-]+", " ".join(text.split())):
        if lines[-1] and ruler.textlength(lines[-1] + part.rstrip(), font) > width:
            lines.append("")
        for letter in part:
            if ruler.textlength((lines[-1] + letter).rstrip(), font) > width:
                lines.append("")
            lines[-1] += letter
    lines = [line.strip() for line in lines]
    return lines if len(lines) <= 5 else [*lines[:2], "...", *lines[-2:]]


def _shortened(text: str, width: int, font: Font, ruler: ImageDraw.ImageDraw) -> str:
    if ruler.textlength(text, font) <= width:
        return text
    while text and ruler.textlength(text + "...", font) > width:
        text = text[:-1]
    return text + "..."


def _font() -> Font:
    """matplotlib's own: it has the letters of file names, which Pillow's lacks."""
    import matplotlib

    file = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
    try:
        return ImageFont.truetype(str(file), 13)
    except (ImportError, OSError):  # PIL without FreeType: its fixed small font
        return ImageFont.load_default()
