"""Contact sheets and one HTML page that holds its pictures itself: no network, no JavaScript."""

from __future__ import annotations

import base64
import io
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dino_kd.data.pictures import save_contact_sheet, save_picture
from dino_kd.files import write_text

from .panels import Panel, Seen, Sheet
from .shown import plain

RESULT = "visualize.json"
_SMALL, _LARGE = 192, 480  # shorter side in pixels of a picture on the page


@dataclass
class Album:
    """Everything that is written: sheets, what was seen, the film if there is one, the result."""

    sheets: list[Sheet]
    seen: list[Seen]
    film: Path | None
    result: dict[str, Any]


def write_album(album: Album, output: Path, *, separate: bool) -> list[str]:
    """Write ``KIND.png`` for each sheet and ``index.html``, and the single pictures if wanted.

    Returns the names of all files, relative to `output`, the page first. Raises UserError when
    the disk is full.
    """
    files = [] if album.film is None else [album.film.name]
    row_names = [one.name for one in album.seen]
    for sheet in album.sheets:
        columns, names = sheet.columns(row_names)
        save_contact_sheet(columns, output / f"{sheet.kind}.png", row_names=names)
        files.append(f"{sheet.kind}.png")
    if separate:
        files += _write_pictures(album, output)
    write_text(output / "index.html", page(album, separate=separate))
    return ["index.html", *files]


def clear_earlier(output: Path) -> None:
    """Delete what an earlier call wrote here, by the list it left; nothing else."""
    try:
        earlier = json.loads((output / RESULT).read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return
    for name in earlier:
        if re.fullmatch(r"(pictures/)?\w[\w.-]*", str(name)):
            (output / name).unlink(missing_ok=True)


def page(album: Album, *, separate: bool = False) -> str:
    """The HTML text; pictures are inside it, sheets and film are links to files beside it."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    result = album.result
    return environment.get_template("visualize.html").render(
        backbone=result["backbone"],
        title=f"What {plain(result['backbone']['source'])} sees",
        sections=[_section(sheet, album, separate) for sheet in album.sheets],
        film=None if album.film is None else album.film.name,
        film_columns="image, attention, components"
        if any(sheet.kind == "attention" for sheet in album.sheets)
        else "image, components",
        notes=[plain(note) for note in result["notes"] + result["backbone"].get("notes", [])],
        facts=_facts(result),
        result_file=RESULT,
    )


def _section(sheet: Sheet, album: Album, separate: bool) -> dict[str, Any]:
    cards = []
    for number, (one, row) in enumerate(zip(album.seen, sheet.rows, strict=True), 1):
        stacks: dict[str, list[dict[str, Any]]] = {}
        for panel in row:
            height, width = panel.pixels.shape[1:]
            stacks.setdefault(panel.title, []).append({
                "uri": picture_uri(panel.pixels),
                "height": height,
                "width": width,
                "alt": _alt(sheet, one, panel),
                "caption": panel.caption,
                "agrees": panel.agrees,
                "file": _picture_name(number, one, sheet, panel) if separate else "",
            })  # fmt: skip
        cards.append({"name": one.name, "class_name": one.class_name, "stacks": stacks})
    return {
        "kind": sheet.kind,
        "title": sheet.title,
        "explanation": sheet.explanation,
        "sheet": f"{sheet.kind}.png",
        "cards": cards,
    }


def _alt(sheet: Sheet, one: Seen, panel: Panel) -> str:
    if panel.title == "image":
        return f"{one.name}, as the network was shown it"
    line = f", {sheet.line_names[panel.line]}" if panel.line else ""
    text = f" ({panel.caption})" if panel.caption else ""
    return f"{sheet.title}, {panel.title}{line}: {one.name}{text}"


def _facts(result: dict[str, Any]) -> list[tuple[str, str]]:
    """Name and value of everything needed to make the pictures again."""
    backbone, protocol, data = result["backbone"], result["protocol"], result["data"]
    shown = data["input"]
    facts = [
        ("backbone", backbone["source"]),
        ("branch", backbone["branch"]),
        ("architecture", backbone["architecture"]),
        ("weights (SHA-256)", backbone["sha256"]),
        ("input", f"{shown['spec']}, {shown['images']} of {shown['available']:,} shown"),
        ("view, height x width", _sizes(protocol["view_sizes"], " px")),
        ("patches, rows x columns", _sizes(protocol["grids"], "")),
    ]
    if "gallery" in data:
        facts.append(
            ("gallery", f"{data['gallery']['spec']}, {data['gallery']['images']:,} images")
        )
    for name in ("block", "keep", "pca_foreground", "point", "k", "precision"):
        if name in protocol:
            facts.append((name, str(protocol[name])))
    facts += [(name.replace("_", " "), f"{value:.4g}") for name, value in result["metrics"].items()]
    facts.append(("versions", ", ".join(f"{n} {v}" for n, v in result["versions"].items())))
    facts += [("device", result["device"]), ("date", result["date"])]
    return [(name, plain(str(value))) for name, value in facts]


def _sizes(sizes: list[list[int]], unit: str) -> str:
    return ", ".join(dict.fromkeys(f"{height} x {width}{unit}" for height, width in sizes))


def picture_uri(pixels: np.ndarray) -> str:
    """A picture uint8 ``[3, h, w]`` as a data URI: PNG or JPEG, whichever is smaller."""
    picture = Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))
    short = min(picture.size)
    if short < _SMALL:
        factor = max(1, _SMALL // short)
        size = (picture.width * factor, picture.height * factor)
        picture = picture.resize(size, Image.Resampling.NEAREST)
    elif short > _LARGE:
        size = (
            round(picture.width * _LARGE / short),
            round(picture.height * _LARGE / short),
        )
        picture = picture.resize(size, Image.Resampling.LANCZOS)
    made = {}
    for form, how in (("png", {}), ("jpeg", {"quality": 88, "subsampling": 0})):
        buffer = io.BytesIO()
        picture.save(buffer, format=form, **how)
        made[form] = buffer.getvalue()
    form, data = min(made.items(), key=lambda item: len(item[1]))
    return f"data:image/{form};base64,{base64.b64encode(data).decode()}"


def _write_pictures(album: Album, output: Path) -> list[str]:
    files = []
    for sheet in album.sheets:
        for number, (one, row) in enumerate(zip(album.seen, sheet.rows, strict=True), 1):
            for panel in row:
                name = _picture_name(number, one, sheet, panel)
                save_picture(panel.pixels, output / name)
                files.append(name)
    return files


def _picture_name(number: int, one: Seen, sheet: Sheet, panel: Panel) -> str:
    stem = re.sub(r"[^A-Za-z0-9-]+", "_", Path(one.name).stem).strip("_")[:60]
    line = "mask" if panel.line else ""
    parts = [f"{number:03d}", stem, sheet.kind, panel.title.replace(" ", "_"), line]
    return f"pictures/{'_'.join(part for part in parts if part)}.png"
