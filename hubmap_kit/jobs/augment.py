"""`hubmap augment`: contact sheets of the augmentations, and mosaics made before training."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from hubmap_kit.augment import preview as previews
from hubmap_kit.augment.changes import drawn, embedded_references
from hubmap_kit.augment.mosaic import mosaic_tiles
from hubmap_kit.augment.stain import Reference, read_references
from hubmap_kit.competition import slides as slide_files
from hubmap_kit.competition.organs import ORGANS
from hubmap_kit.competition.tables import Slide, read_train
from hubmap_kit.config import Experiment
from hubmap_kit.errors import HubmapError, TableError, did_you_mean
from hubmap_kit.report.overlays import contact_sheet
from hubmap_kit.tiles.scaling import resize_image, resize_mask
from hubmap_kit.tiles.store import decode_for, open_or_build

Tile = tuple[np.ndarray, np.ndarray]
PARTNERS = 4  # slides that a slide is mixed with
COLUMNS = 4


def preview(
    name: str,
    out: Path,
    data: str = "",
    slide: str = "",
    references: str = "",
    size: int = 480,
    seed: int = 0,
    engine: str = "classic",
) -> int:
    """Draw one slide under each transform that `name` stands for, masks outlined, into the PNG `out`; returns the
    number of pictures.

    `name`: a pipeline, a mixing or stain method, or "mixing" or "stain" for all of them. The slide is `slide` of the
    train.csv in the folder `data` (its first one when empty), or an embedded one without data; it is seen whole, as a
    square of `size` pixels cut from its middle. `engine`: that of `augment.engine`. `references`: folder of reference
    pictures; without one, embedded slides in eosin and PAS stand in. Raises HubmapError.
    """
    previews.check(name, engine)
    if slide and not data:
        raise HubmapError(f"--slide {slide} needs the folder of its train.csv; name it with --data")
    if out.is_dir():
        raise HubmapError(f"{out} is a folder, but one picture is written; name a PNG file with --out")
    if size < 64:
        raise HubmapError(f"--size is {size}, but a picture needs 64 pixels or more; pass a larger number")
    tiles = _tiles_of(Path(data), slide, size) if data else _embedded_tiles(size, seed)
    targets: list[Reference] = []
    if previews.needs_references(name):
        targets = read_references(references) if references else embedded_references(size, seed)
    short = [replace(target, name=Path(target.name).stem) for target in targets]
    items = previews.preview(name, tiles[0], tiles[1:], short, seed, engine)
    contact_sheet(out, [(image, mask, None, title) for image, mask, title in items], COLUMNS)
    return len(items)


def mosaics(
    settings: Experiment,
    out: Path,
    count: int,
    size: int,
    seed: int = 0,
    same_organ: bool = False,
    stores: Path | None = None,
) -> Path:
    """Make `count` mosaics of `size` pixels from the slides of an experiment at its scale; returns their table.

    The tile store is taken from or made in `stores`, by default `out`/stores. Raises HubmapError.
    """
    if not settings.data.folder:
        raise HubmapError("mosaics are made of slides; name the folder of their train.csv with --data")
    if out.is_file():
        raise HubmapError(f"{out} is a file, but a folder for the mosaics was expected; choose another with --out")
    slides = read_train(Path(settings.data.folder) / "train.csv")
    store = open_or_build(stores or out / "stores", slides, settings.scale, settings.tiles)
    return mosaic_tiles(store, count, size, seed, same_organ, out)


def _tiles_of(folder: Path, wanted: str, size: int) -> list[Tile]:
    """The wanted slide first, then its partners: of its own organ as far as there are, then others."""
    slides = read_train(folder / "train.csv", check_files=False)
    ids = [slide.id for slide in slides]
    if wanted and wanted not in ids:
        raise TableError(
            f"{folder / 'train.csv'} has no slide {wanted}{did_you_mean(wanted, ids)}; name one of its ids with --slide"
        )
    first = slides[ids.index(wanted)] if wanted else slides[0]
    rest = [slide for slide in slides if slide is not first]
    # Half from the same organ, half from others, so that both ways of mixing are seen.
    own = [slide for slide in rest if slide.organ == first.organ][: PARTNERS // 2]
    others = [slide for slide in rest if slide.organ != first.organ][: PARTNERS - len(own)]
    return [_read(slide, size) for slide in (first, *own, *others)] if len(slides) > 1 else [_read(first, size)] * 2


def _read(slide: Slide, size: int) -> Tile:
    pixels = slide_files.read(slide.path)
    return square(pixels, decode_for(slide, *pixels.shape[:2]), size)


def square(image: np.ndarray, mask: np.ndarray, size: int) -> Tile:
    """The middle square of a slide and its mask, brought to `size` pixels."""
    side = min(mask.shape)
    top, left = ((length - side) // 2 for length in mask.shape)
    here = slice(top, top + side), slice(left, left + side)
    return np.ascontiguousarray(resize_image(image[here], (size, size))), np.ascontiguousarray(
        resize_mask(mask[here], (size, size))
    )


def _embedded_tiles(size: int, seed: int) -> list[Tile]:
    """A kidney, and as its partners another kidney and the other organs."""
    return [drawn(organ, "HPA", size, (seed, number)) for number, organ in enumerate((ORGANS[0], *ORGANS))]
