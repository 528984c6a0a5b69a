"""The pictures of `dino-kd visualize`: for every kind, a few panels for each shown image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from dino_kd.data.dataset import ImageDataset
from dino_kd.data.images import BrokenImage
from dino_kd.data.loader import EvalTransform
from dino_kd.data.pictures import Cell, Column, shown_bands
from dino_kd.models.attention import threshold_mass
from dino_kd.pca import PatchColours
from dino_kd.visualize import (
    colour_picture,
    heat_over_image,
    heat_pictures,
    mask_over_image,
    patch_at,
    patch_marked,
    patch_similarity,
)

from .gallery import Neighbour
from .shown import plain


@dataclass
class Seen:
    """One shown image and what the network made of it.

    Attributes:
        name: of the file.
        class_name: empty when there is none.
        view: uint8 ``[C, h, w]``, as the network was shown it.
        attention: ``[heads, rows, columns]`` or None.
        patches: ``[rows, columns, D]``.
    """

    name: str
    class_name: str
    view: np.ndarray
    attention: Tensor | None
    patches: Tensor

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the view."""
        return self.view.shape[1], self.view.shape[2]


@dataclass
class Panel:
    """One picture uint8 ``[3, h, w]``; panels of one title stand below each other by `line`."""

    title: str
    pixels: np.ndarray
    caption: str = ""
    line: int = 0
    agrees: bool | None = None  # a neighbour of the same class; None where there are no classes


@dataclass
class Sheet:
    """The pictures of one kind: a list of panels for each shown image."""

    kind: str
    title: str
    explanation: str
    rows: list[list[Panel]]
    line_names: tuple[str, ...] = ("",)

    def columns(self, names: Sequence[str]) -> tuple[list[Column], list[str]]:
        """Columns and row names for `save_contact_sheet`."""
        titles = list(dict.fromkeys(panel.title for row in self.rows for panel in row))
        places = [(row, line) for row in self.rows for line in range(len(self.line_names))]

        def cell(row: list[Panel], line: int, title: str) -> Cell | None:
            found = [p for p in row if (p.title, p.line) == (title, line)]
            return Cell(found[0].pixels, found[0].caption) if found else None

        columns: list[Column] = [
            (title, [cell(row, line, title) for row, line in places]) for title in titles
        ]
        rows = [
            name if line == 0 else self.line_names[line]
            for name in names
            for line in range(len(self.line_names))
        ]
        return columns, rows


def attention_sheet(seen: Sequence[Seen], keep: float, overlay: bool) -> Sheet:
    """The class token's attention, mean and head by head, and the patches that hold most of it."""
    rows = []
    for one in seen:
        assert one.attention is not None  # the kind was chosen
        maps = [("mean", one.attention.mean(0))]
        maps += [(f"head {h + 1}", head) for h, head in enumerate(one.attention)]
        row = [Panel("image", shown_bands(one.view))]
        for title, heat in maps:
            mask = threshold_mass(heat.flatten(), keep).unflatten(0, heat.shape)
            picture = (
                heat_over_image(one.view, heat)
                if overlay
                else heat_pictures(heat[None], one.size)[0]
            )
            row.append(Panel(title, picture))
            area = f"{100 * mask.float().mean().item():.0f} % of area"
            row.append(Panel(title, mask_over_image(one.view, mask), area, line=1))
        rows.append(row)
    share = f"{100 * keep:g} %"
    return Sheet(
        "attention",
        "Attention of the class token",
        "Bright is where the class token looks, each map scaled to its own range. Below each map "
        f"the fewest patches that hold {share} of it; the smaller their area, the more "
        "selective the head.",
        rows,
        ("", f"{share} of the attention"),
    )


def pca_sheet(seen: Sequence[Seen], colours: PatchColours) -> Sheet:
    """The first three principal components of all patches as red, green and blue."""
    rows = [
        [
            Panel("image", shown_bands(one.view)),
            Panel("components", colour_picture(colours(one.patches), one.size)),
        ]
        for one in seen
    ]
    shares = [f"{100 * share:.0f} %" for share in colours.pca.variance_share.tolist()]
    text = (
        "Red, green and blue are the first three principal components of the patches of all images "
        f"together ({', '.join(shares)} of their variance): equal colours are equal features, in "
        "every image."
    )
    if colours.separation is not None:
        text += " Black: patches on the other side of a first fit, taken for background."
    return Sheet("pca", "Principal components of patches", text, rows)


def similarity_sheet(seen: Sequence[Seen], point: tuple[float, float]) -> Sheet:
    """How similar all patches are to a chosen one."""
    rows = []
    for one in seen:
        grid = (one.patches.shape[0], one.patches.shape[1])
        chosen = patch_at(point, grid)
        cosine = patch_similarity(one.patches, chosen)
        picture = heat_pictures(cosine[None], one.size)[0]
        span = f"{cosine.min().item():.2f} to {cosine.max().item():.2f}"
        rows.append([
            Panel("image", patch_marked(one.view, chosen, grid)),
            Panel("similarity", picture, span),
        ])  # fmt: skip
    return Sheet(
        "similarity",
        "Similarity to one patch",
        "Bright patches resemble the outlined one, by cosine of their features; each map is scaled "
        "to its own range, which stands below it.",
        rows,
    )


def neighbours_sheet(
    seen: Sequence[Seen],
    near: Mapping[int, Sequence[Neighbour]],
    gallery: ImageDataset,
    k: int,
) -> Sheet:
    """The images of the gallery that are nearest to each shown one."""
    rows = []
    for index, one in enumerate(seen):
        row = [Panel("image", shown_bands(one.view), one.class_name)]
        for rank, neighbour in enumerate(near.get(index, ()), 1):
            name = _class_of(gallery, neighbour.position)
            agrees = name == one.class_name if name and one.class_name else None
            caption = f"{neighbour.similarity:.2f}" + (f"  {name}" if name else "")
            picture = _gallery_picture(gallery, neighbour.position, one.size[0])
            row.append(Panel(_place(rank), picture, caption, agrees=agrees))
        rows.append(row)
    return Sheet(
        "neighbours",
        "Nearest neighbours",
        f"The {k} images of {plain(gallery.spec)} whose features are nearest, with their cosine; "
        "an image is never its own neighbour.",
        rows,
    )


def _class_of(gallery: ImageDataset, position: int) -> str:
    if gallery.labels is None or gallery.class_names is None:
        return ""
    return plain(gallery.class_names[int(gallery.labels[position])])


def _place(rank: int) -> str:
    ending = (
        "th" if rank % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(rank % 10, "th")
    )
    return f"{rank}{ending}"


def _gallery_picture(gallery: ImageDataset, position: int, height: int) -> np.ndarray:
    try:
        image = gallery.read(position)
    except BrokenImage:  # it was readable when its features were taken
        return np.full((3, height, height), 128, dtype=np.uint8)
    width = round(height * min(2.0, max(0.5, image.shape[1] / image.shape[0])))
    return shown_bands(EvalTransform((height, width))(image))
