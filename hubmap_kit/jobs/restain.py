"""`hubmap external restain`: copies of training slides in other stains, as a data folder of their own that is joined
with the originals'.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import tifffile

from hubmap_kit.augment.changes import references_or_drawn
from hubmap_kit.augment.shift import LOOKS, Looks
from hubmap_kit.augment.stain import SUFFIXES, TRANSFERS, Reference
from hubmap_kit.competition import external, rle
from hubmap_kit.competition import slides as slide_files
from hubmap_kit.competition.external import IMAGES, TEST, TRAIN, Row
from hubmap_kit.competition.organs import ORGANS
from hubmap_kit.competition.tables import Slide, read_train
from hubmap_kit.errors import ConfigError, HubmapError, SlideError, TableError, did_you_mean
from hubmap_kit.files import atomic_path, sweep
from hubmap_kit.processes import threads
from hubmap_kit.progress import track
from hubmap_kit.report.overlays import CELL, Item, contact_sheet
from hubmap_kit.tiles.scaling import reduced_shape, resize_image, resize_mask
from hubmap_kit.tiles.store import decode_for

# Restained copies of one slide: which look, reference and method each has, and its file, which says what it is made of.

FORMAT = 1  # of the copies' pixels: copies of another number are made again
KIND = "restained"  # how the provenance of a copy begins
FALLBACK = "reinhard"  # needs one stain only, where Macenko's method needs two
STRIP_ROWS = 256
DESCRIPTION = 270  # TIFF tag ImageDescription


@dataclass(frozen=True)
class Recipe:
    """What all copies share: the references of every look by its name, and how many times coarser than their slides
    they are.
    """

    looks: Mapping[str, Sequence[Reference]]
    reduce: int
    folder: Path

    def copies(self, slide_id: str, count: int) -> dict[str, str]:
        """Id -> look of `count` copies of a slide: the looks in turn, from one that its id decides, so that few copies
        are even as well.
        """
        names = list(self.looks)
        first = int(_random(slide_id).integers(len(names)))
        turns = [((first + number) % len(names), number // len(names) + 1) for number in range(count)]
        return {f"{slide_id}_{names[look]}{number}": names[look] for look, number in sorted(turns)}

    def draw(self, copy_id: str, look: str) -> tuple[Reference, str]:
        """The reference and the method of a copy, all equally often."""
        random, references = _random(copy_id), self.looks[look]
        reference = references[int(random.integers(len(references)))]
        return reference, list(TRANSFERS)[int(random.integers(len(TRANSFERS)))]

    def path(self, copy_id: str) -> Path:
        """The file of a copy."""
        return self.folder / f"{copy_id}.tiff"

    def kept(self, slide: Slide, copy_id: str, look: str) -> str | None:
        """The provenance of a copy that is there, whole and made as it would be now; None where it must be made."""
        path = self.path(copy_id)
        if not path.is_file():
            return None
        try:
            slide_files.size(path)
            with tifffile.TiffFile(path, is_ome=False) as tif:
                provenance, _, mark = str(tif.pages.first.tags.valueof(DESCRIPTION, "")).rpartition(" ")
        except (SlideError, OSError, ValueError, tifffile.TiffFileError):
            return None
        return provenance if provenance and mark == self._mark(slide, copy_id, look) else None

    def make(self, slide: Slide, pixels: np.ndarray, copy_id: str, look: str) -> str | None:
        """Write a copy of a slide's `pixels` (H, W, 3) and return its provenance; None where there is too little tissue
        to go by.
        """
        reference, method = self.draw(copy_id, look)
        image = resize_image(pixels, reduced_shape(pixels.shape[:2], self.reduce))
        made = TRANSFERS[method](image, reference)
        if made is image:
            method, made = FALLBACK, TRANSFERS[FALLBACK](image, reference)
        if made is image:
            return None
        provenance = f"{KIND}:{look}:{plain_name(reference.name)}:{method}"
        self._write(
            self.path(copy_id), made, slide.um_per_px * self.reduce, f"{provenance} {self._mark(slide, copy_id, look)}"
        )
        return provenance

    def _mark(self, slide: Slide, copy_id: str, look: str) -> str:
        reference, method = self.draw(copy_id, look)
        size = slide.path.stat().st_size if slide.path.is_file() else -1
        parts = [FORMAT, copy_id, slide.path.name, size, slide.um_per_px, self.reduce, method, _digest(reference)]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]

    def _write(self, path: Path, image: np.ndarray, um_per_px: float, description: str) -> None:
        with atomic_path(path) as temporary:
            tifffile.imwrite(
                temporary,
                image,
                photometric="rgb",
                compression="zlib",
                predictor=True,
                rowsperstrip=STRIP_ROWS,
                metadata=None,
                software=False,
                description=description,
                resolution=(10_000 / um_per_px,) * 2,
                resolutionunit="CENTIMETER",
            )


def plain_name(name: str) -> str:
    """A reference's name without its folder and suffix, in letters that a TIFF's description and a one-word provenance
    may hold.
    """
    return re.sub(r"[^A-Za-z0-9._+-]+", "-", Path(name).stem).strip("-") or "reference"


def _digest(reference: Reference) -> str:
    return hashlib.sha256(plain_name(reference.name).encode() + reference.packed).hexdigest()


def _random(words: str) -> np.random.Generator:
    return np.random.default_rng(int.from_bytes(hashlib.sha256(f"restained/{words}".encode()).digest()[:8], "big"))


log = logging.getLogger(__name__)
TEST_LOOK = "test"
LOOK_NAMES = (*LOOKS, TEST_LOOK)
REDUCES = (1, 2, 4)
LEFT_OUT, SHEET = "left_out.csv", "copies.png"
SHEET_ROWS, SHEET_COPIES = 5, 6
NOTEBOOK_BYTES = 20e9  # what a Kaggle notebook may write
MEASURED = 3  # slides that tell how well slides compress
SPARE = 1.25  # copies have more contrast than many a slide, and so compress less


@dataclass(frozen=True)
class Plan:
    """What will be made: of each slide its copies (id -> look), the rows of the slides by id, and the bytes of all and
    of missing copies.
    """

    recipe: Recipe
    slides: Sequence[Slide]
    rows: dict[str, Row]
    copies: dict[str, dict[str, str]]
    out: Path
    size: float
    missing: int
    missing_size: float

    @property
    def told(self) -> str:
        """One line on what will be made and how large it is."""
        count = sum(map(len, self.copies.values()))
        text = (
            f"{count} copies of {len(self.slides)} slides ({', '.join(self.recipe.looks)}), about {_bytes(self.size)}"
            " in all"
        )
        if self.missing < count:
            text += f"; {count - self.missing} are there, {self.missing} to make"
        if self.size > NOTEBOOK_BYTES / 2 and self.recipe.reduce < REDUCES[-1]:
            text += (
                f"; a Kaggle notebook may write {_bytes(NOTEBOOK_BYTES)}, and --reduce {2 * self.recipe.reduce} makes"
                f" it about {_bytes(self.size / 4)}"
            )
        return text


@dataclass
class Restained:
    """The rows of the copies, how many were there already, and the slides that were left out, with the reason."""

    rows: list[Row] = field(default_factory=list)
    kept: int = 0
    left_out: dict[str, str] = field(default_factory=dict)


def prepare(
    data: Path,
    out: Path,
    copies: int | None = None,
    looks: str = "",
    references: Path | None = None,
    reduce: int = 1,
    test: Sequence[Path] = (),
) -> Plan:
    """Plan `copies` (None: one a look) of every slide of `data` (a data folder or train table) in the colours of the
    `looks`.

    `looks` are some of pas, he and test ("pas,he"; empty: all). The first two are the `references` (a folder; None:
    drawn slides) whose names tell them; test are the pictures `test`, or those of test_images/ beside the table.
    `reduce` makes copies 1, 2 or 4 times coarser. Copies are not copied again. Raises ConfigError, TableError,
    SlideError, and HubmapError where the disk is too small.
    """
    table = data / TRAIN if data.is_dir() else data
    if reduce not in REDUCES:
        raise ConfigError(
            f"--reduce is {reduce}, but copies are {', '.join(map(str, REDUCES))} times coarser than their slides;"
            " choose one of them"
        )
    _check_out(table, out)
    rows = {
        row["id"]: row for row in external.read_table(table) if not row.get("provenance", "").startswith(f"{KIND}:")
    }
    slides = [slide for slide in read_train(table) if slide.id in rows]
    if not slides:
        raise TableError(f"{table} holds nothing but restained copies; name the table of their originals")
    recipe = Recipe(_references(_names(looks), references, table.parent, test), reduce, out / IMAGES[TRAIN])
    count = len(recipe.looks) if copies is None else copies
    if count < 1:
        raise ConfigError(
            f"--copies is {count}, but at least one copy of each slide was expected; pass a larger number"
        )
    return _sized(recipe, slides, rows, {slide.id: recipe.copies(slide.id, count) for slide in slides}, out)


def restain(plan: Plan, jobs: int = 1) -> Restained:
    """Make the copies of a plan with `jobs` threads, and write train.csv, left_out.csv and copies.png beside them.

    A copy that is there is not made again; a slide that cannot be read, or with too little tissue, is left out with its
    reason. Each thread takes about 0.6 GB for a slide of 3000 x 3000 pixels. Raises SlideError where nothing could be
    made.
    """
    sweep(plan.recipe.folder, ".*.tmp*")
    done = Restained()
    with threads(jobs) as pool:
        all_found = pool.map(lambda slide: _one(plan, slide), plan.slides)
        for slide, found in zip(plan.slides, track(all_found, "restain", "slide", len(plan.slides)), strict=True):
            if isinstance(found, str):
                done.left_out[slide.id] = found
                log.warning("slide %s is left out: %s", slide.id, found)
                continue
            rows, kept = found
            done.rows += rows
            done.kept += kept
    if not done.rows:
        raise SlideError(
            f"{plan.out}: none of {len(plan.slides)} slides could be restained, the first because:"
            f" {next(iter(done.left_out.values()))}"
        )
    left_out = [{"id": slide_id, "reason": reason} for slide_id, reason in done.left_out.items()]
    external.write_table(plan.out / LEFT_OUT, left_out, ("id", "reason"))
    external.write_table(plan.out / TRAIN, done.rows, external.COLUMNS[TRAIN])
    _sheet(plan, done)
    _tell_strangers(plan, done)
    return done


def _check_out(table: Path, out: Path) -> None:
    if out.resolve() == table.parent.resolve():
        raise TableError(f"{out} is the folder of the slides themselves; choose another one for the copies with --out")
    own = external.read_table(out / TRAIN) if (out / TRAIN).is_file() else []
    if any(not row.get("provenance", "").startswith(f"{KIND}:") for row in own):
        raise TableError(
            f"{out / TRAIN} holds other slides than restained copies, and would be overwritten; choose a new folder"
            " with --out"
        )


def _names(text: str) -> list[str]:
    names = list(dict.fromkeys(word.strip() for word in text.split(",") if word.strip())) or list(LOOK_NAMES)
    for name in names:
        if name not in LOOK_NAMES:
            raise ConfigError(
                f"there is no look '{name}'; known are {', '.join(LOOK_NAMES)}{did_you_mean(name, LOOK_NAMES)}"
            )
    return names


def _references(
    names: Sequence[str], folder: Path | None, data: Path, test: Sequence[Path]
) -> dict[str, tuple[Reference, ...]]:
    sorted_ = Looks(pas=(), he=())
    if set(names) & set(LOOKS):
        sorted_ = Looks.of(references_or_drawn(folder or ""))
    found: dict[str, tuple[Reference, ...]] = {}
    for name in names:
        found[name] = _test_references(data / IMAGES[TEST], test) if name == TEST_LOOK else getattr(sorted_, name)
        if not found[name]:
            words = " or ".join(LOOKS[name])
            raise ConfigError(
                f"no picture in {folder} has {words} as a word of its name, but the look {name} needs one; rename one"
                " so, or give other --looks"
            )
    return found


def _test_references(folder: Path, named: Sequence[Path]) -> tuple[Reference, ...]:
    """The pictures that were named, or those of a folder as far as they show enough tissue."""
    if named:
        return tuple(Reference.of(slide_files.read(path), str(path)) for path in named)
    found = []
    for path in sorted(
        path for path in folder.glob("*") if path.suffix.lower() in SUFFIXES and not path.name.startswith(".")
    ):
        try:
            found.append(Reference.of(slide_files.read(path), str(path)))
        except HubmapError as error:
            log.warning("%s is no example of the look %s: %s", path, TEST_LOOK, error)
    if not found:
        raise ConfigError(
            f"{folder} holds no slide that could show the look {TEST_LOOK}; name one with --test, or leave it out with"
            " --looks pas,he"
        )
    return tuple(found)


def _sized(
    recipe: Recipe, slides: Sequence[Slide], rows: dict[str, Row], copies: dict[str, dict[str, str]], out: Path
) -> Plan:
    """The plan with its size. Raises HubmapError where the disk has not that much left."""
    share = _bytes_per_pixel(slides, recipe.reduce)
    size, missing, missing_size = 0.0, 0, 0.0
    for slide in slides:
        each = slide.height * slide.width / recipe.reduce**2 * share
        open_ = sum(recipe.kept(slide, copy_id, look) is None for copy_id, look in copies[slide.id].items())
        size, missing, missing_size = size + each * len(copies[slide.id]), missing + open_, missing_size + each * open_
    plan = Plan(recipe, slides, rows, copies, out, size, missing, missing_size)
    here = next(parent for parent in (out.absolute(), *out.absolute().parents) if parent.is_dir())
    free = shutil.disk_usage(here).free
    if SPARE * missing_size > free:
        raise HubmapError(
            f"{here} has {_bytes(free)} free, but {missing} copies need about {_bytes(missing_size)}; make room, choose"
            f" another --out, or make fewer or smaller ones with --copies and --reduce (now {recipe.reduce})"
        )
    return plan


def _bytes_per_pixel(slides: Sequence[Slide], reduce: int) -> float:
    """How well a few slides compress, by a strip from the middle of each; copies compress about as their slides do."""
    shares = []
    for place in np.linspace(0, len(slides) - 1, min(MEASURED, len(slides))).round().astype(int):
        try:
            pixels = slide_files.read(slides[place].path)
        except SlideError:
            continue  # it will be left out when its turn comes
        strip = resize_image(pixels, reduced_shape(pixels.shape[:2], reduce))
        strip = strip[len(strip) // 3 :][:256]
        shares.append(
            len(zlib.compress(np.diff(strip, axis=1, prepend=np.uint8(0)).tobytes(), 6))
            / (strip.shape[0] * strip.shape[1])
        )
    return float(np.mean(shares)) if shares else 3.0


def _one(plan: Plan, slide: Slide) -> tuple[list[Row], int] | str:
    """What became of a slide: the rows of its copies and how many were there, or why it is left out."""
    recipe, copies = plan.recipe, plan.copies[slide.id]
    try:
        found = {copy_id: recipe.kept(slide, copy_id, look) for copy_id, look in copies.items()}
        kept, pixels = sum(provenance is not None for provenance in found.values()), None
        for copy_id, look in copies.items():
            if found[copy_id] is None:
                pixels = slide_files.read(slide.path) if pixels is None else pixels
                found[copy_id] = recipe.make(slide, pixels, copy_id, look)
        height, width = slide_files.size(slide.path) if pixels is None else pixels.shape[:2]
        if not all(found.values()):
            return "it shows too little tissue to be restained"
        return _rows(
            plan, slide, height, width, {copy_id: provenance or "" for copy_id, provenance in found.items()}
        ), kept
    except SlideError as error:
        return str(error)


def _rows(plan: Plan, slide: Slide, height: int, width: int, copies: dict[str, str]) -> list[Row]:
    """The rows of a slide's copies: the slide's own, but for what the copy changes."""
    row, reduce = plan.rows[slide.id], plan.recipe.reduce
    shape, text = reduced_shape((height, width), reduce), row["rle"]
    if (height, width) != (slide.height, slide.width) or reduce > 1:
        text = rle.encode(resize_mask(decode_for(slide, height, width), shape))
    changed = {
        "img_height": str(shape[0]),
        "img_width": str(shape[1]),
        "pixel_size": f"{slide.um_per_px * reduce:.10g}",
        "rle": text,
        "parent": slide.id,
    }
    return [{**row, **changed, "id": copy_id, "provenance": provenance} for copy_id, provenance in copies.items()]


def _sheet(plan: Plan, done: Restained) -> None:
    """Slides of as many organs as there are, each beside its copies, with the outlines of their masks."""
    rows = {row["id"]: row for row in done.rows}
    first = {slide.organ: slide for slide in reversed(plan.slides) if slide.id not in done.left_out}
    items: list[Item] = []
    for organ in [organ for organ in ORGANS if organ in first][:SHEET_ROWS]:
        slide, copies = first[organ], list(plan.copies[first[organ].id])[:SHEET_COPIES]
        items.append(
            _item(slide.path, slide.rle or "", slide.height, slide.width, f"{organ} {slide.id} ({slide.source})")
        )
        for copy_id in copies:
            row = rows[copy_id]
            title = row["provenance"].removeprefix(f"{KIND}:")
            items.append(
                _item(plan.recipe.path(copy_id), row["rle"], int(row["img_height"]), int(row["img_width"]), title)
            )
    contact_sheet(plan.out / SHEET, items, 1 + min(SHEET_COPIES, len(next(iter(plan.copies.values())))))


def _item(path: Path, text: str, height: int, width: int, title: str) -> Item:
    pixels = slide_files.read(path)
    mask = rle.decode(text, height, width) if pixels.shape[:2] == (height, width) else None
    zoom = min(1.0, CELL / max(pixels.shape[:2]))
    shape = tuple(max(1, round(length * zoom)) for length in pixels.shape[:2])
    return resize_image(pixels, shape), None if mask is None else resize_mask(mask, shape), None, title


def _tell_strangers(plan: Plan, done: Restained) -> None:
    known = {row["id"] for row in done.rows}
    others = [path for path in plan.recipe.folder.glob("*.tif*") if path.stem not in known]
    if others:
        log.warning(
            "%s holds %d slides of an earlier time, such as %s, that its table does not list; delete them to save room",
            plan.recipe.folder,
            len(others),
            others[0].name,
        )


def _bytes(size: float) -> str:
    for unit, factor in (("GB", 1e9), ("MB", 1e6)):
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size / 1e3:.0f} kB"
