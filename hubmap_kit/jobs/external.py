"""`hubmap external add`: any folder of slides, with or without masks, into the competition's folder format."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from hubmap_kit.competition import external, lineage, rle
from hubmap_kit.competition import slides as slide_files
from hubmap_kit.competition.csv_rows import read_rows
from hubmap_kit.competition.external import IMAGES, TEST, TRAIN, Row
from hubmap_kit.competition.folds import write_folds
from hubmap_kit.competition.organs import FACTS, ORGANS, SOURCES
from hubmap_kit.competition.tables import TEST_COLUMNS, TRAIN_COLUMNS, read_train
from hubmap_kit.errors import HubmapError, SlideError, TableError, did_you_mean
from hubmap_kit.progress import track
from hubmap_kit.sample.generate import write_tiff

log = logging.getLogger(__name__)
# Pictures: those that the reader does not take are refused by name, not passed over.
SUFFIXES = (".tif", ".tiff", ".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".jp2", ".svs", ".ndpi")
MASK_ENDS = ("", "_anno", "_mask")  # after a slide's name, in the name of its mask
REFUSED = "refused.csv"
FULL = 0.98  # share of a slide from which a mask is likelier to mark the background than the units


@dataclass(frozen=True)
class Source:
    """What the files do not say: organ, width of a pixel in um, the source's short name, which source of the
    competition it stands for (`like`: HPA or Hubmap, the column data_source), section thickness in um (None: usual for
    organ and source), licence, and where the slides come from (a text or an address).
    """

    organ: str
    um_per_px: float
    name: str
    like: str = "HPA"
    thickness_um: float | None = None
    licence: str = ""
    provenance: str = ""

    def check(self) -> None:
        """Raise TableError for what a table cannot hold."""
        for option, value, known in (("--organ", self.organ, ORGANS), ("--like", self.like, SOURCES)):
            if value not in known:
                raise TableError(
                    f"{option} is '{value}', but it is one of {', '.join(known)}{did_you_mean(value, known)}"
                )
        sizes = (("--um-per-px", self.um_per_px), ("--thickness", self.thickness_um))
        for option, size in sizes:
            if size is not None and not 0 < size < 1000:
                raise TableError(
                    f"{option} is {size:g}, but a size in micrometres above 0 was expected; give that of a pixel of the"
                    " files"
                )
        if not self.name or any(blank.isspace() for blank in self.name):
            raise TableError(
                f"--source-name is '{self.name}', but one word was expected, such as glas; it goes into the column"
                " provenance"
            )


@dataclass
class Added:
    """The files that were new, those that were there already, and the reason for each one that was refused, by file
    name.
    """

    new: list[str] = field(default_factory=list)
    known: list[str] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)


def add(
    folder: Path,
    out: Path,
    source: Source,
    masks: Path | None = None,
    parents: Path | None = None,
    against: Path | None = None,
) -> Added:
    """Bring the pictures of `folder` (with its sub-folders) into `out`, in the competition's format; several adds share
    one `out`.

    With `masks` (a folder of pictures named like the slides, also NAME_anno or NAME_mask; it may be `folder` itself),
    slides go to train.csv and train_images/<id>.tiff; without, nobody knows their units, and an empty mask would teach
    that there are none, so they go to test.csv and test_images/, which `hubmap pseudo` and `hubmap predict` read. Ids
    are made of the pixels, so what was added once is not added again. Tables take their place when all is done; a
    killed add is simply repeated.

    `parents` is a CSV (file,parent) of slides that descend from others; `against` is a data folder whose slides are
    compared, so that a copy of one becomes its descendant. A file that is no RGB slide, or whose mask is missing or
    does not fit, is refused with its reason, in refused.csv too; the others are taken. Raises HubmapError where nothing
    can be taken.
    """
    source.check()
    table = TEST if masks is None else TRAIN
    rows = _own(out, table)
    descent = _descent(parents)
    files = _pictures(folder, masks)
    ours = _against(against, files) if against else {}
    done, new = Added(), []
    known = {row["id"]: row for row in rows}
    names: dict[str, str] = {}
    for name, path in track(files.items(), "add", "slide", len(files)):
        try:
            pixels = _colours(path)
            row = _row(name, pixels, source, _mask_of(name, path, masks, pixels), descent, ours)
            if (first := names.setdefault(row["id"], name)) != name:
                raise SlideError(f"{path} holds the same pixels as {first}; one of them is enough")
            if column := external.difference(known.get(row["id"], row), row):
                raise SlideError(
                    f"{path} is in {out / table} as {row['id']} with another {column}; take that row away first, if"
                    " this one is right"
                )
        except HubmapError as error:
            done.refused[name] = str(error)
            log.warning("refused: %s", error)
            continue
        image = out / IMAGES[table] / f"{row['id']}.tiff"
        if not image.is_file():
            write_tiff(image, pixels)
        if row["id"] not in known:
            new.append(row)
        (done.known if row["id"] in known else done.new).append(name)
    _note_refused(out, source.name, done)
    if not (done.new or done.known):
        raise SlideError(
            f"{folder}: none of its {len(files)} pictures could be taken; {out / REFUSED} says why for each"
        )
    if new:
        external.write_table(out / table, [*rows, *new], external.COLUMNS[table])
    return done


def _own(out: Path, table: str) -> list[Row]:
    """The rows that earlier adds have left; another table is not touched."""
    if not (out / table).is_file():
        return []
    rows = external.read_table(out / table, TEST_COLUMNS)
    if rows and "provenance" not in rows[0]:
        raise TableError(
            f"{out / table} was not made by 'hubmap external' and is left as it is; add into a folder of its own, then"
            " merge both"
        )
    return rows


def _pictures(folder: Path, masks: Path | None) -> dict[str, Path]:
    """Every picture below a folder, by its name within it; masks that lie between them are not slides."""
    if not folder.is_dir():
        raise SlideError(f"{folder} is not a folder, but a folder of slides was expected there; check the path")
    found = {
        path.relative_to(folder).as_posix(): path
        for path in sorted(folder.rglob("*"))
        if path.suffix.lower() in SUFFIXES and path.is_file()
    }
    found = {name: path for name, path in found.items() if not any(part.startswith(".") for part in name.split("/"))}
    if masks is not None:
        if not masks.is_dir():
            raise SlideError(f"{masks} is not a folder, but the folder of the masks was expected there; check the path")
        inside = masks.resolve()
        for name, path in list(found.items()):
            named = any(path.stem.endswith(end) for end in MASK_ENDS[1:])
            if named or (inside != folder.resolve() and path.resolve().is_relative_to(inside)):
                del found[name]
    if not found:
        raise SlideError(f"{folder} holds no pictures ({', '.join(SUFFIXES[:5])}); name the folder of the slides")
    return found


def _colours(path: Path) -> np.ndarray:
    pixels = slide_files.read(path)
    if (pixels[..., 0] == pixels[..., 1]).all() and (pixels[..., 0] == pixels[..., 2]).all():
        raise SlideError(
            f"{path} is grey in every pixel, but a stained slide in RGB was expected; leave it out, or export it in"
            " colour"
        )
    return pixels


def _mask_of(name: str, path: Path, masks: Path | None, pixels: np.ndarray) -> str | None:
    if masks is None:
        return None
    for place in dict.fromkeys(((masks / name).parent, masks)):
        for end in MASK_ENDS[1:] if place.resolve() == path.parent.resolve() else MASK_ENDS:
            for suffix in SUFFIXES:
                mask = place / f"{path.stem}{end}{suffix}"
                if mask.is_file():
                    return _checked(mask, external.mask_text(mask, *pixels.shape[:2]), pixels)
    raise SlideError(
        f"{path} has no mask in {masks}, but {path.stem}.png or the like was expected; add slides without masks by"
        " themselves"
    )


def _checked(mask: Path, text: str, pixels: np.ndarray) -> str:
    share = rle.area(text) / (pixels.shape[0] * pixels.shape[1])
    if share >= FULL:
        log.warning("%s covers %.1f %% of its slide; check that 0 is what lies around the units", mask, 100 * share)
    return text


def _row(
    name: str, pixels: np.ndarray, source: Source, mask: str | None, descent: Mapping[str, str], ours: Mapping[str, str]
) -> Row:
    height, width = pixels.shape[:2]
    slide_id = external.content_id(pixels)
    thickness = source.thickness_um or FACTS[source.organ].thickness_um[source.like]
    row = {
        "id": slide_id,
        "organ": source.organ,
        "data_source": source.like,
        "img_height": str(height),
        "img_width": str(width),
        "pixel_size": f"{source.um_per_px:g}",
        "tissue_thickness": f"{thickness:g}",
        "licence": source.licence,
        "provenance": " ".join(f"external:{source.name} {source.provenance}".split()),
        "parent": descent.get(name, "") or ours.get(slide_id, ""),
        "file": name,
    }
    return row if mask is None else {**row, "rle": mask}


def _descent(table: Path | None) -> dict[str, str]:
    return {} if table is None else {row["file"]: row["parent"] for _, row in read_rows(table, ("file", "parent"))}


def _against(folder: Path, files: Mapping[str, Path]) -> dict[str, str]:
    """Content id -> id of those slides of a data folder that have the size of one of the files."""
    sizes = set(_sizes(list(files.values())))
    slides = [
        slide
        for slide in read_train(folder / TRAIN if folder.is_dir() else folder)
        if slide_files.size(slide.path) in sizes
    ]
    return {external.content_id(slide_files.read(slide.path)): slide.id for slide in track(slides, "compare", "slide")}


def _sizes(files: Sequence[Path] | Iterator[Path]) -> Iterator[tuple[int, int]]:
    for path in files:
        try:
            yield slide_files.size(path)
        except SlideError:
            continue  # it will be refused when its turn comes


def _note_refused(out: Path, source: str, done: Added) -> None:
    """Keep refused.csv of all adds: what this source refuses now stands for what it refused before."""
    path = out / REFUSED
    old = [row for _, row in read_rows(path, ("source", "file", "reason"))] if path.is_file() else []
    rows = [row for row in old if row["source"] != source] + [
        {"source": source, "file": name, "reason": why} for name, why in done.refused.items()
    ]
    if rows or old:
        external.write_table(path, rows, ("source", "file", "reason"))


# Train tables joined by links, with folds that keep families together; and the odd lung slides of one taken out or
# down.

FOLDS, DEFAULT_FOLDS = "folds.csv", 5


@dataclass(frozen=True)
class Merged:
    """The slides and folds of a joined table, and how many slides each of its tables gave."""

    slides: int
    n_folds: int
    by_table: dict[str, int]


def merge(
    tables: Sequence[Path], out: Path, replace: bool = False, folds_csv: Path | None = None, n_folds: int | None = None
) -> Merged:
    """Join data folders (or train tables) into `out`: train.csv with the columns of all, links to their slides, and
    folds.csv.

    Nothing is copied. folds.csv keeps descendants with their parents, which training on the joined table needs
    (`data.folds_csv`); known numbers come from `folds_csv` and from the tables' own column `fold`. With `replace` later
    rows win over earlier ones of the same id. `n_folds`: as many as are known, or 5. Raises TableError, and SlideError
    for slides that are missing.
    """
    paths = [table / TRAIN if table.is_dir() else table for table in tables]
    if len(paths) != len(set(paths)) or not paths:
        raise TableError("a merge joins several tables, each named once; name their folders")
    if out.resolve() in {path.parent.resolve() for path in paths}:
        raise TableError(f"{out} is one of the folders to join, and would be overwritten; choose a new one with --out")
    files = {path: {slide.id: slide.path for slide in read_train(path)} for path in paths}
    rows = external.joined({path: external.read_table(path) for path in paths}, replace)
    for slide_id, (path, _) in rows.items():
        link(files[path][slide_id], out / IMAGES[TRAIN])
    kept = [row for _, row in rows.values()]
    folds = _folds(kept, folds_csv, n_folds)
    external.write_table(out / TRAIN, kept, TRAIN_COLUMNS)
    write_folds(out / FOLDS, folds, read_train(out / TRAIN))
    return Merged(
        len(kept),
        max(folds.values()) + 1,
        {str(path): sum(origin == path for origin, _ in rows.values()) for path in paths},
    )


def lungs(table: Path, out: Path, style: str = "third-place", weight: float | None = None) -> int:
    """Write `table` (a data folder or train.csv) to `out` without its odd lung slides, or, with `weight`, with less
    weight on them.

    `style` names a list of `lung_styles.LISTS`. Slides become links. Returns the number of odd slides. Raises
    TableError.
    """
    if style not in external.LISTS:
        known = external.LISTS
        raise TableError(
            f"there is no list '{style}' of lung slides; known are {', '.join(known)}{did_you_mean(style, known)}"
        )
    path = table / TRAIN if table.is_dir() else table
    if out.resolve() == path.parent.resolve():
        raise TableError(
            f"{out} is the folder of the table itself, which would be overwritten; choose a new one with --out"
        )
    ids, rows = external.LISTS[style], external.read_table(path)
    kept = external.dropped(rows, ids) if weight is None else external.weighted(rows, weight, ids)
    files = {slide.id: slide.path for slide in read_train(path)}
    for row in kept:
        link(files[row["id"]], out / IMAGES[TRAIN])
    external.write_table(out / TRAIN, kept, TRAIN_COLUMNS)
    return len(external.odd(rows, ids))


def link(slide: Path, folder: Path) -> None:
    """Put a relative symbolic link to a slide file into a folder, in the place of an earlier one."""
    folder.mkdir(parents=True, exist_ok=True)
    place = folder / slide.name
    if place.exists() and not place.is_symlink():
        raise SlideError(
            f"{place} is a slide file of its own, but a link to {slide} should take its place; choose a new --out"
        )
    growing = folder / f".{slide.name}.{os.getpid()}.tmp"
    growing.symlink_to(os.path.relpath(slide.resolve(), folder.resolve()))
    os.replace(growing, place)


def parents_of(rows: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """Slide id -> parent of the rows that have one."""
    return {row["id"]: row["parent"] for row in rows if row.get("parent")}


def _folds(rows: Sequence[Row], folds_csv: Path | None, n_folds: int | None) -> dict[str, int]:
    known = fold_numbers_of(folds_csv) if folds_csv is not None else {}
    for row in rows:
        if row.get("fold"):
            known.setdefault(row["id"], _whole(row["fold"], row["id"]))
    if n_folds is None:
        n_folds = max(2, max(known.values()) + 1) if known else DEFAULT_FOLDS
    return lineage.spread({row["id"]: row["organ"] for row in rows}, parents_of(rows), known, n_folds)


def fold_numbers_of(path: Path) -> dict[str, int]:
    """Slide id -> fold of a fold table, whatever slides it lists. Raises TableError."""
    return {row["id"]: _whole(row["fold"], row["id"]) for _, row in read_rows(path, ("id", "fold"))}


def _whole(text: str, slide_id: str) -> int:
    if not text.isascii() or not text.isdecimal():
        raise TableError(f"slide {slide_id} has fold '{text}', but folds are 0, 1, 2, ...; mend the cell")
    return int(text)
