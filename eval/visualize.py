"""Show what a backbone sees: attention, patch components, similarity, nearest neighbours.

    dino-kd visualize backbone=runs/x input=/path/to/pictures
    dino-kd visualize backbone=runs/x input=photo.jpg kinds=attention image_size=480
    python -m eval.visualize backbone=runs/x input=film.mp4
    python -m eval.visualize backbone=runs/x input=cifar10:/data:test gallery=cifar10:/data:train

Writes one PNG contact sheet per kind and one HTML page. docs/visualize.md describes the pictures.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from dino_kd.config import load_settings
from dino_kd.data.dataset import ImageDataset
from dino_kd.distributed import is_main_process, on_main, process_group
from dino_kd.errors import CheckpointError, ConfigError, UserError
from dino_kd.features import FeatureBank
from dino_kd.models.attention import check_cls_attention, threshold_mass
from dino_kd.models.backbone import Backbone
from dino_kd.pca import PatchColours, fit_patch_colours
from dino_kd.schema import VisualizeConfig
from dino_kd.visualize import attention_and_patches

from .film import annotate
from .gallery import Neighbour, nearest
from .page import RESULT, Album, clear_earlier, write_album
from .panels import (
    Seen,
    Sheet,
    attention_sheet,
    neighbours_sheet,
    pca_sheet,
    similarity_sheet,
)
from .results import Stopwatch, closing_lines, describe_images, make_result, save_result, title
from .shown import Shown, open_shown, takes_any_size, view_of
from .subject import PIXELS, Subject, open_images, open_subject

ALL_KINDS = ("attention", "pca", "similarity", "neighbours")
_COARSE = 4  # rows or columns of a map


def main(argv: list[str]) -> int:
    """`dino-kd visualize a.b=c ...`; returns the exit code."""
    settings = load_settings(VisualizeConfig, argv, command="visualize")
    with process_group(settings.device) as device:
        score(settings, device)
    return 0


@dataclass
class Job:
    """Everything that has been opened and checked, and what was found so far."""

    settings: VisualizeConfig
    device: torch.device
    output: Path
    subject: Subject
    backbone: Backbone
    kinds: list[str]
    notes: list[str]
    shown: Shown
    gallery: ImageDataset | None
    watch: Stopwatch
    data: dict[str, Any]
    near: dict[int, list[Neighbour]]


def score(settings: VisualizeConfig, device: torch.device) -> dict[str, Any]:
    """Draw everything; every process of a torchrun job calls this, the main one draws.

    Returns the result as it is written to visualize.json (empty on other processes).

    Raises:
        UserError: no such backbone, nothing that can be read, a kind that the network lacks.
    """
    job = open_job(settings, device)
    job.watch.lap("reading")
    if job.gallery is not None:
        bank = job.subject.features(job.gallery, "gallery")
        queries = job.subject.features(job.shown.dataset, "input")
        job.near = nearest(queries, job.shown.dataset, bank, job.gallery, settings.k)
        job.data["gallery"] = describe_images(job.gallery, bank)
        job.notes += gallery_notes(settings, bank, job.near)
        job.watch.lap("neighbours")
    result = on_main(lambda: draw(job))
    return result if is_main_process() else {}


def open_job(settings: VisualizeConfig, device: torch.device) -> Job:
    """Open and check everything, before anything expensive. Raises UserError."""
    watch = Stopwatch()
    output = output_folder(settings)
    subject = open_network(settings, device)
    assert subject.backbone is not None  # pixels were refused
    kinds, notes = choose_kinds(settings, subject.backbone)
    gallery = None
    if "neighbours" in kinds:
        gallery = open_images(settings, "gallery", subject.channels)
    shown = open_shown(settings, subject.channels)
    return Job(
        settings=settings,
        device=device,
        output=output,
        subject=subject,
        backbone=subject.backbone,
        kinds=kinds,
        notes=notes + shown_notes(shown),
        shown=shown,
        gallery=gallery,
        watch=watch,
        data={"input": describe_shown(shown)},
        near={},
    )


def draw(job: Job) -> dict[str, Any]:
    """Run the network, write every file, print the table; returns the result."""
    settings = job.settings
    with_attention = "attention" in job.kinds
    seen = look(job, with_attention)
    colours = None
    if "pca" in job.kinds or job.shown.video is not None:
        patches = torch.cat([one.patches.flatten(0, 1) for one in seen])
        colours = fit_patch_colours(patches, settings.pca_foreground)
        job.notes += foreground_note(settings, colours)
    job.notes += coarse_note(seen)
    job.watch.lap("network")
    sheets = make_sheets(job, seen, colours)
    clear_earlier(job.output)
    film = None
    if job.shown.video is not None:
        assert colours is not None
        film = annotate(
            job.shown.video, job.backbone, job.output, settings, colours,
            with_attention=with_attention, precision=job.subject.precision,
        )  # fmt: skip
        job.watch.lap("film")
    result = make_result(
        "visualize",
        settings,
        metrics=dict(evaluate(seen, sheets, colours if "pca" in job.kinds else None, job)),
        protocol=picture_protocol(job, seen),
        backbone=job.subject.description,
        data=job.data,
        device=job.device,
        seconds=job.watch.seconds,
        notes=job.notes,
    )
    album = Album(sheets, seen, film, result)
    result["files"] = write_album(album, job.output, separate=settings.separate)
    print(table(result, settings, job.output))
    save_result(result, job.output / RESULT)
    return result


def open_network(settings: VisualizeConfig, device: torch.device) -> Subject:
    """The backbone at the size it was trained at; networks of one fixed size at `image_size`."""
    if settings.backbone == PIXELS:
        raise ConfigError("backbone: pixels are no network, and this command needs one")
    subject = open_subject(settings.model_copy(update={"image_size": None}), device)
    assert subject.backbone is not None
    if settings.image_size is not None and not takes_any_size(subject.backbone):
        return open_subject(settings, device)
    return subject


def choose_kinds(settings: VisualizeConfig, backbone: Backbone) -> tuple[list[str], list[str]]:
    """The kinds to draw, in their order, and notes about those that are left out.

    Raises ConfigError for a kind that was asked for by name and is not possible.
    """
    asked = ALL_KINDS if settings.kinds == "auto" else settings.kinds
    kinds, notes = [kind for kind in ALL_KINDS if kind in asked], []
    if "attention" in kinds:
        try:
            check_cls_attention(backbone, settings.block)
        except ConfigError:  # no such block: `block` is wrong, whatever was asked for
            raise
        except UserError as error:
            if settings.kinds != "auto":
                raise ConfigError(
                    f"kinds: {error}; leave attention out, and the rest is drawn"
                ) from None
            kinds.remove("attention")
            notes.append(f"no attention: {error}")
    if settings.gallery is None and "neighbours" in kinds:
        if settings.kinds != "auto":
            raise ConfigError(
                "gallery: neighbours need images to be searched in; give gallery=SPEC"
            )
        kinds.remove("neighbours")
    if settings.gallery is not None and "neighbours" not in kinds:
        raise ConfigError(
            f"gallery: {settings.gallery} is not looked at, because kinds has no neighbours; "
            "add it to kinds, or leave gallery out"
        )
    return kinds, notes


def look(job: Job, with_attention: bool) -> list[Seen]:
    """One forward pass for each shown image, as sizes differ."""
    seen = []
    bar = tqdm(job.shown.images, "network", unit="image", disable=None, leave=False)
    for index, image in enumerate(bar):
        view = view_of(job.backbone, image, job.settings.image_size)
        attention, patches = attention_and_patches(
            job.backbone,
            torch.from_numpy(view)[None],
            block=job.settings.block,
            with_attention=with_attention,
            precision=job.subject.precision,
        )
        if not torch.isfinite(patches).all():
            raise CheckpointError(
                f"backbone: {job.settings.backbone} gives features that are not finite; its "
                "weights are damaged or its training diverged"
            )
        maps = None if attention is None else attention[0]
        name, class_name = job.shown.names[index], job.shown.class_name(index)
        seen.append(Seen(name, class_name, view, maps, patches[0]))
    return seen


def make_sheets(job: Job, seen: list[Seen], colours: PatchColours | None) -> list[Sheet]:
    """One sheet for each kind."""
    settings, sheets = job.settings, []
    for kind in job.kinds:
        if kind == "attention":
            sheets.append(attention_sheet(seen, settings.keep, settings.overlay))
        elif kind == "pca":
            assert colours is not None
            sheets.append(pca_sheet(seen, colours))
        elif kind == "similarity":
            sheets.append(similarity_sheet(seen, settings.point))
        else:
            assert job.gallery is not None
            sheets.append(neighbours_sheet(seen, job.near, job.gallery, settings.k))
    return sheets


def evaluate(
    seen: Sequence[Seen], sheets: Sequence[Sheet], colours: PatchColours | None, job: Job
) -> Iterator[tuple[str, float]]:
    """Yield what the pictures show as numbers.

    ``attention_area``: percent of the patches that hold `keep` of a head's attention, mean over
    heads and images. ``pca_variance``: percent of the variance that the three colours hold.
    ``neighbour_similarity``: mean cosine. ``neighbour_agreement``: percent of neighbours of the
    image's own class, where images and gallery have classes.
    """
    keep = job.settings.keep
    heads = [one.attention.flatten(1) for one in seen if one.attention is not None]
    if heads:
        areas = [threshold_mass(maps, keep).float().mean().item() for maps in heads]
        yield "attention_area", 100 * sum(areas) / len(areas)
    if colours is not None:
        yield "pca_variance", 100 * float(colours.pca.variance_share.sum())
    cosines = [neighbour.similarity for row in job.near.values() for neighbour in row]
    if cosines:
        yield "neighbour_similarity", sum(cosines) / len(cosines)
    panels = [panel for sheet in sheets for row in sheet.rows for panel in row]
    agree = [panel.agrees for panel in panels if panel.agrees is not None]
    if agree:
        yield "neighbour_agreement", 100 * sum(agree) / len(agree)


def picture_protocol(job: Job, seen: Sequence[Seen]) -> dict[str, Any]:
    """How the pictures were made."""
    settings = job.settings
    made: dict[str, Any] = {
        "kinds": job.kinds,
        "view_sizes": [list(one.size) for one in seen],
        "grids": [list(one.patches.shape[:2]) for one in seen],
        "precision": job.subject.precision,
    }
    if "attention" in job.kinds:
        made |= {"block": settings.block, "keep": settings.keep}
    if "pca" in job.kinds:
        made |= {"pca_foreground": settings.pca_foreground}
    if "similarity" in job.kinds:
        made |= {"point": list(settings.point)}
    if "neighbours" in job.kinds:
        made |= {"k": settings.k, "distance": "cosine", "features": job.subject.protocol}
    return made


def describe_shown(shown: Shown) -> dict[str, Any]:
    """What was asked for, what is shown, and what was broken."""
    described = {
        "spec": shown.dataset.spec if shown.video is None else shown.video.path,
        "images": len(shown.images),
        "available": shown.available,
        "names": shown.names,
        "broken": len(shown.broken),
        "broken_paths": [str(broken) for broken in shown.broken],
    }
    if shown.video is not None:
        described["seconds"] = round(shown.video.seconds, 3)
    return described


def gallery_notes(
    settings: VisualizeConfig, bank: FeatureBank, near: Mapping[int, Sequence[Neighbour]]
) -> list[str]:
    """The sentence about a gallery that is smaller than k."""
    fewest = min((len(row) for row in near.values()), default=0)
    if fewest >= settings.k:
        return []
    return [
        f"the gallery has {len(bank.features)} images, too few for k = {settings.k} neighbours "
        f"of each: {fewest} are shown"
    ]


def shown_notes(shown: Shown) -> list[str]:
    """The sentence about a film of fewer frames than its header states."""
    video = shown.video
    if video is None or len(video) >= video.promised:
        return []
    return [f"{video.path} states {video.promised:,} frames, and {len(video):,} can be read"]


def foreground_note(settings: VisualizeConfig, colours: PatchColours) -> list[str]:
    """The sentence about a foreground that no patch belongs to."""
    if colours.foreground == settings.pca_foreground:
        return []
    return [
        f"fewer than two patches have a {settings.pca_foreground} first component: all are coloured"
    ]


def coarse_note(seen: Sequence[Seen]) -> list[str]:
    """The sentence about maps of so few places that little can be seen in them."""
    coarse = [one for one in seen if min(one.patches.shape[:2]) < _COARSE]
    if not coarse:
        return []
    rows, columns = coarse[0].patches.shape[:2]
    side = min(coarse[0].size)
    return [
        f"maps of {rows} x {columns} places at {side} px; a larger image_size, such as "
        f"{4 * side}, gives finer ones"
    ]


def output_folder(settings: VisualizeConfig) -> Path:
    """Where the pictures go. Raises ConfigError when that is a file, or the shown folder itself."""
    run_dir = Path(settings.backbone).expanduser()
    if settings.output is not None:
        output = Path(settings.output).expanduser()
    elif (run_dir / "config.yaml").is_file():
        other = "" if settings.branch == "teacher" else f"_{settings.branch}"
        output = run_dir / f"visualize{other}"
    else:
        output = Path("visualize")
    if output.exists() and not output.is_dir():
        raise ConfigError(f"output: {output} is a file; give a folder")
    for name in ("input", "gallery"):
        spec = (getattr(settings, name) or "").removeprefix("folder:")
        if spec and output.is_dir() and Path(spec).expanduser().resolve() == output.resolve():
            raise ConfigError(
                f"output: {output} is the folder that {name} reads; give another, or the pictures "
                "would be among the images next time"
            )
    return output


def table(result: dict[str, Any], settings: VisualizeConfig, output: Path) -> str:
    """What was drawn, for the console."""
    data, seconds, metrics = result["data"]["input"], result["seconds"], result["metrics"]
    words = {
        "attention_area": f"% of the patches hold {100 * settings.keep:g} % of a head's attention",
        "pca_variance": "% of the patches' variance is in the three colours",
        "neighbour_similarity": "mean cosine of the neighbours",
        "neighbour_agreement": "% of the neighbours have the image's class",
    }
    unit = "frames" if "seconds" in data else "images"
    lines = [title("Pictures", settings, result["backbone"])]
    lines += [f"{value:8.2f}  {words[name]}" for name, value in metrics.items()]
    lines.append(
        f"{data['images']} of {data['available']:,} {unit}; "
        + ", ".join(f"{name} {value:.1f} s" for name, value in seconds.items())
    )
    lines += closing_lines(result)
    lines += [f"  {output / name}" for name in result["files"] if "/" not in name]
    apart = sum("/" in name for name in result["files"])
    if apart:
        lines.append(f"  {output}/pictures: {apart} pictures")
    return "\n".join(lines)


if __name__ == "__main__":
    from dino_kd import cli

    sys.exit(cli.run(main, sys.argv[1:]))
