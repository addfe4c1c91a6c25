"""train.csv and test.csv: one checked `Slide` a row."""

from __future__ import annotations

import difflib
import logging
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hubmap_kit.competition import rle as run_length
from hubmap_kit.competition.csv_rows import read_rows
from hubmap_kit.competition.organs import FACTS, ORGANS, SOURCES
from hubmap_kit.errors import RleError, SlideError, TableError

logger = logging.getLogger(__name__)

TEST_COLUMNS = ("id", "organ", "data_source", "img_height", "img_width", "pixel_size", "tissue_thickness")
TRAIN_COLUMNS = (*TEST_COLUMNS, "rle")
FILE_ID = re.compile(
    r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}"
)  # an id becomes a file name, so it may not walk through folders
_WHOLE = re.compile(r"[0-9]{1,9}(\.0+)?")  # pandas writes 3000.0 once a column held an empty cell
_MISSING = frozenset({"", "nan", "na", "n/a", "none", "null"})


@dataclass(frozen=True)
class Slide:
    """One row of train.csv or test.csv.

    `source` is "HPA" or "Hubmap"; `height` and `width` are pixels as the table states them (the file itself may differ
    by a few); `um_per_px` is the pixel size and `thickness_um` the section thickness, in um; `rle` is the run-length
    string of the truth, column-major and 0-based ("" for an empty mask), or None for a test slide. `weight` is how
    often a training slide is drawn, as a share of the others' (the kit's own column `weight`, 1 where there is none).
    `parent` is the id of the slide that a training slide descends from, such as the original of a restained copy
    (column `parent`); "" for an original.
    """

    id: str
    organ: str
    source: str
    height: int
    width: int
    um_per_px: float
    thickness_um: float
    path: Path
    rle: str | None
    weight: float = 1.0
    parent: str = ""


def read_train(csv: str | Path, images_dir: str | Path | None = None, check_files: bool = True) -> list[Slide]:
    """The slides of a train.csv (or train.csv.gz), in its order; of extra columns only `weight` and `parent` are read.

    Slides are `<id>.tiff` (or `.tif`) in `images_dir`, by default `train_images/` beside the table. An empty pixel size
    or thickness is filled from the organ's facts, with one logged warning. Raises TableError for a bad table, RleError
    for a bad mask, SlideError for missing slide files unless `check_files` is False.
    """
    return _read(Path(csv), images_dir, "train_images", TRAIN_COLUMNS, check_files)


def read_test(csv: str | Path, images_dir: str | Path | None = None, check_files: bool = True) -> list[Slide]:
    """The slides of a test.csv, with `rle` None; otherwise as `read_train`, with `test_images/` as the default
    folder.
    """
    return _read(Path(csv), images_dir, "test_images", TEST_COLUMNS, check_files)


def _read(
    csv: Path, images_dir: str | Path | None, default_dir: str, columns: Sequence[str], check_files: bool
) -> list[Slide]:
    rows = read_rows(csv, columns)
    if not rows:
        raise TableError(f"{csv} has a header but no rows, at least one slide was expected; download the file again")
    folder = Path(images_dir) if images_dir is not None else csv.parent / default_dir
    slides: list[Slide] = []
    lines: dict[str, int] = {}
    filled: list[str] = []
    for line, row in rows:
        slide = _Row(csv, line, row).slide(folder, "rle" in columns, filled)
        if slide.id in lines:
            first = lines[slide.id]
            raise TableError(
                f"{csv}, line {line} repeats the id {slide.id} of line {first}, but ids are unique; drop one"
            )
        lines[slide.id] = line
        slides.append(slide)
    if filled:
        logger.warning(
            "%s: %d values of pixel_size or tissue_thickness are empty and were filled from the organ's facts: %s%s",
            csv,
            len(filled),
            ", ".join(filled[:5]),
            ", ..." if len(filled) > 5 else "",
        )
    if check_files:
        _check_files(csv, folder, slides)
    return slides


@dataclass(frozen=True)
class _Row:
    """One row of text cells that knows its place for messages."""

    csv: Path
    line: int
    cells: dict[str, str]

    @property
    def place(self) -> str:
        return f"{self.csv}, line {self.line} (id {self.cells['id']})"

    def slide(self, folder: Path, with_mask: bool, filled: list[str]) -> Slide:
        """Check every cell; note in `filled` which physical sizes came from the organ's facts."""
        slide_id = self._id()
        organ, source = self._choice("organ", ORGANS), self._choice("data_source", SOURCES)
        height, width = self._pixels("img_height"), self._pixels("img_width")
        facts = FACTS[organ]
        return Slide(
            id=slide_id,
            organ=organ,
            source=source,
            height=height,
            width=width,
            um_per_px=self._positive("pixel_size", facts.um_per_px[source], filled),
            thickness_um=self._positive("tissue_thickness", facts.thickness_um[source], filled),
            path=_slide_path(folder, slide_id),
            rle=self._mask(height, width) if with_mask else None,
            weight=self._weight() if with_mask else 1.0,
            parent=self._parent(slide_id) if with_mask else "",
        )

    def _parent(self, slide_id: str) -> str:
        text = self.cells.get("parent", "").strip()
        return "" if text == slide_id or text.lower() in _MISSING else text

    def _weight(self) -> float:
        text = self.cells.get("weight", "").strip()
        try:
            value = 1.0 if text.lower() in _MISSING else float(text)
        except ValueError:
            value = math.nan
        if not 0 <= value <= 1:
            raise TableError(
                f"{self.place} has weight {text!r}, but a number from 0 to 1 was expected; mend the cell or leave it"
                " empty"
            )
        return value

    def _id(self) -> str:
        text = self.cells["id"]
        if not FILE_ID.fullmatch(text):
            shown = text if len(text) <= 60 else text[:57] + "..."
            raise TableError(
                f"{self.csv}, line {self.line} has the id {shown!r}, but an id names the slide's file and so holds only"
                " letters, digits, '_', '-' and '.', 200 at most; mend the cell"
            )
        return text

    def _choice(self, column: str, known: Sequence[str]) -> str:
        text = self.cells[column]
        if text in known:
            return text
        lowered = {name.lower(): name for name in known}
        near = difflib.get_close_matches(text.lower().replace(" ", ""), lowered, n=1, cutoff=0.5)
        hint = f"did you mean {lowered[near[0]]}" if near else "mend the cell or drop the row"
        raise TableError(f"{self.place} has {column} {text!r}, but it is one of {', '.join(known)}; {hint}")

    def _pixels(self, column: str) -> int:
        text = self.cells[column]
        if not _WHOLE.fullmatch(text) or float(text) < 1:
            raise TableError(
                f"{self.place} has {column} {text!r}, but whole pixels above 0 were expected; mend the cell"
            )
        return int(float(text))

    def _positive(self, column: str, fallback: float, filled: list[str]) -> float:
        text = self.cells[column].strip()
        if text.lower() in _MISSING:
            filled.append(f"{column} of {self.cells['id']} = {fallback:g}")
            return fallback
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and value > 0):
            raise TableError(
                f"{self.place} has {column} {text!r}, but a number of um above 0 was expected; mend the cell or leave"
                " it empty"
            )
        return value

    def _mask(self, height: int, width: int) -> str:
        text = self.cells["rle"].strip()
        if text.lower() in _MISSING:
            return ""
        try:
            run_length.check_inside(run_length.parse(text), height, width)
        except RleError as error:
            raise RleError(f"{self.place}, column rle: {error}") from error
        return text


def _slide_path(folder: Path, slide_id: str) -> Path:
    tif = folder / f"{slide_id}.tif"
    tiff = folder / f"{slide_id}.tiff"
    return tif if tif.is_file() and not tiff.is_file() else tiff


def _check_files(csv: Path, folder: Path, slides: Sequence[Slide]) -> None:
    missing = [slide for slide in slides if not slide.path.is_file()]
    if missing:
        raise SlideError(
            f"{folder} lacks the slide files of {len(missing)} of the {len(slides)} rows of {csv}, the first is "
            f"{missing[0].path.name}; download them or name the right folder"
        )
