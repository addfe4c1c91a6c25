"""Reading a test.csv that is not as it should be: a kernel must answer every id, whatever the other cells hold."""

from __future__ import annotations

import csv as csv_format
import io
import logging
import math
import re
import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path

from hubmap_kit.competition.organs import FACTS, ORGANS, SOURCES
from hubmap_kit.competition.tables import TEST_COLUMNS, Slide, read_test
from hubmap_kit.errors import TableError

log = logging.getLogger(__name__)
SOURCE = "Hubmap"  # of a slide whose row names neither: the hidden slides are all HuBMAP's
UNKNOWN = "unknown"  # the organ of a slide whose row names none of the five; it gets the default threshold
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_ODD = re.compile(r"[\W_]+")  # what two spellings of one name may differ in, beside the case
_NO_CELL = re.compile(r"[,\"\r\n]")  # an id with one of these would need quotes, which a submission does not have


def read_test_leniently(csv: str | Path, images_dir: str | Path | None = None) -> list[Slide]:
    """The slides of a test.csv as `read_test` gives them; where it refuses, one slide for every id that can be answered.

    Names of columns, organs and sources count whatever their case, blanks and dashes. What is missing or wrong is filled in: the
    source is SOURCE, the pixel size comes from the organ's facts, an unknown organ becomes UNKNOWN, sizes become 1 x 1 (inference
    takes them from the file). Repeated ids count once. Raises TableError when there is no column of ids or no id.
    """
    path = Path(csv)
    try:
        return read_test(path, images_dir, check_files=False)
    except TableError as error:
        log.warning("%s; going on with every id that can be read", error)
    folder = Path(images_dir) if images_dir is not None else path.parent / "test_images"
    slides: dict[str, Slide] = {}
    for row in _rows(path):
        slide_id = row["id"].strip()
        if slide_id and not _NO_CELL.search(slide_id):
            slides.setdefault(slide_id, _slide(slide_id, row, folder))
    if not slides:
        raise TableError(f"{path} holds no id, at least one slide was expected; download the file again")
    return list(slides.values())


def _rows(path: Path) -> list[dict[str, str]]:
    try:
        reader = csv_format.DictReader(io.StringIO(path.read_text(encoding="utf-8-sig", errors="replace"), newline=""), restkey="", restval="")
        rows = list(reader)
    except (OSError, csv_format.Error) as error:
        raise TableError(f"{path} cannot be read as a table ({error}); check the path or download the file again") from error
    names = _columns(reader.fieldnames or [])
    if "id" not in names:
        raise TableError(f"{path} has no column id; check that this is the right CSV file and that its first line is the header")
    return [{column: row[name] for column, name in names.items()} for row in rows]


def _columns(header: Iterable[str]) -> dict[str, str]:
    """The columns of a test table that a header has -> how it spells them; the right spelling before any other."""
    found: dict[str, str] = {}
    for name in header:
        column = _known(name, TEST_COLUMNS)
        if column is not None and (column not in found or name == column):
            found[column] = name
    return found


def _known(text: str | None, names: Iterable[str]) -> str | None:
    """The name that a text spells, whatever its case, blanks and dashes; None for another text."""
    plain = {_ODD.sub("", name).casefold(): name for name in names}
    return plain.get(_ODD.sub("", text or "").casefold())


def _slide(slide_id: str, row: Mapping[str, str], folder: Path) -> Slide:
    organ, source = _known(row.get("organ"), ORGANS) or UNKNOWN, _known(row.get("data_source"), SOURCES) or SOURCE
    facts = [FACTS[organ]] if organ != UNKNOWN else list(FACTS.values())  # the middle of all organs is as good a guess as any
    scale, thickness = statistics.median(fact.um_per_px[source] for fact in facts), statistics.median(fact.thickness_um[source] for fact in facts)
    name = slide_id if _FILE_NAME.fullmatch(slide_id) else "no-file-name"
    tiff = folder / f"{name}.tiff"
    return Slide(
        id=slide_id, organ=organ, source=source, height=int(_number(row.get("img_height"), 1)), width=int(_number(row.get("img_width"), 1)),
        um_per_px=_number(row.get("pixel_size"), scale), thickness_um=_number(row.get("tissue_thickness"), thickness),
        path=tiff if tiff.is_file() or not tiff.with_suffix(".tif").is_file() else tiff.with_suffix(".tif"), rle=None,
    )  # fmt: skip


def _number(text: str | None, fallback: float) -> float:
    try:
        value = float(text or "")
    except ValueError:
        return fallback
    return value if math.isfinite(value) and value > 0 else fallback
