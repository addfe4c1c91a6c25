"""Reading a test.csv that is not as it should be: a kernel must answer every id, whatever the other cells hold.

Bytes become lines of text, lines become rows of cells, rows become slides; each step takes what it finds, and refuses
nothing.
"""

from __future__ import annotations

import codecs
import csv as csv_format
import io
import logging
import math
import os
import re
import statistics
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path

from hubmap_kit.competition import slides as slide_files
from hubmap_kit.competition.csv_rows import wide_fields
from hubmap_kit.competition.organs import FACTS, ORGANS, SOURCES
from hubmap_kit.competition.pixel_sizes import believable_um
from hubmap_kit.competition.tables import FILE_ID, TEST_COLUMNS, Slide, read_test
from hubmap_kit.errors import SlideError, TableError

log = logging.getLogger(__name__)
SOURCE = "Hubmap"  # of a slide whose row names neither: the hidden slides are all HuBMAP's
UNKNOWN = "unknown"  # the organ of a slide whose row names none of the five; it gets the default threshold
SAMPLE = "sample_submission.csv"  # beside test.csv; it lists the same ids
SUFFIXES = (".tiff", ".tif", ".png", ".jpg", ".jpeg")  # of slides, the first that is there counts
DELIMITERS = ",\t;|"
# A mark of UTF-32 begins with the one of UTF-16, so it is looked for first.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_TOP = 10  # lines among which a header is looked for, and lines that a quoted cell may go on for
_MOST_EXTRA = 20  # cells beyond the header's of which an id may be made
_ODD = re.compile(r"[\W_]+")  # what two spellings of one name may differ in, beside the case
_ID_NAME = re.compile(
    r"(?i:(?:.*[\W_]|image|slide|sample|file)?id)|.*[a-z]I[dD]"
)  # image_id, Slide ID, imageId; not "thyroid"
_CONTROL = re.compile(r"[\x01-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
NUMBERS = TEST_COLUMNS[3:]


def read_test_leniently(csv: str | Path, images_dir: str | Path | None = None) -> list[Slide]:
    """One slide for every id of a test.csv, in its order, with the id as the table writes it; none where it has no row.

    Encoding, delimiter, quotes and the names and order of the columns are found out. What is missing or wrong in a row
    is filled in: the source is SOURCE, the pixel size comes from the organ's facts, an unknown organ becomes UNKNOWN.
    Sizes are those of the slide's file, 1 x 1 where it cannot be read; the file may also be called as an id is that
    lost or won zeros ("7", "007", "7.0"). Repeated ids count once. What was odd is logged.

    A file that is missing or no table is replaced by sample_submission.csv beside it, or else by the names of the slide
    files. Raises TableError where there is none of the three.
    """
    path = Path(csv)
    folder = Path(images_dir) if images_dir is not None else path.parent / "test_images"
    try:
        read_test(path, folder, check_files=False)
    except (TableError, OSError) as error:
        log.warning("%s; going on with every id that can be read", error)
    files = _Files(folder)
    slides: dict[str, Slide] = {}
    odd, replaced = Counter[str](), list[str]()
    for row in _first_rows(path, files):
        slide_id = row["id"]
        if not slide_id.strip():
            odd["rows without an id are left out"] += 1
        elif slide_id in slides:
            odd["repeated ids count once"] += 1
        else:
            slides[slide_id] = slide = _slide(slide_id, row, files, replaced)
            odd["slides name no organ that is known"] += slide.organ == UNKNOWN
    if replaced:
        shown = ", ".join(replaced[:3]) + ", ..." * (len(replaced) > 3)
        odd[f"pixel sizes are missing or none that tissue can have: {shown}"] = len(replaced)
    for what, count in odd.items():
        if count:
            log.warning("%s: %d %s", path, count, what)
    return list(slides.values())


def _first_rows(path: Path, files: _Files) -> list[dict[str, str]]:
    """The rows of the table; where it is none, those of sample_submission.csv, or one for each slide file."""
    for table in (path, path.with_name(SAMPLE)):
        rows = _rows(table, files)
        if rows is not None:
            if table != path:
                log.warning("%s is missing or no table; its ids are taken from %s", path, table)
            return rows
    if not files.stems:
        raise TableError(
            f"{path} is missing or no table, and neither {SAMPLE} nor slides lie beside it; check the path or download"
            " the file again"
        )
    log.warning(
        "%s is missing or no table; the names of the %d files in %s are its ids", path, len(files.stems), files.folder
    )
    return [{"id": stem} for stem in files.stems]


# ---------------------------------------------------------------- bytes -> rows of cells


def _rows(path: Path, files: _Files) -> list[dict[str, str]] | None:
    """The rows by the names of a test table's columns; None for a file that is missing or in which nothing looks like
    such a table.
    """
    try:
        text = _text(path.read_bytes())
    except OSError:
        return None
    lines = [line for line in io.StringIO(text, newline="") if line.strip()]
    if not lines:
        return []
    with wide_fields():
        delimiter = max([*DELIMITERS, *_other_delimiters(lines[0])], key=lambda each: _fit(lines[:_TOP], each))
        records = _records(lines, delimiter)
    if not records:
        return []
    names, rows = _header(records, files)
    if not names and len(_CONTROL.findall(text)) > len(text) / 20:
        return None  # a picture or an archive
    width = len(names) or Counter(map(len, rows or records)).most_common(1)[0][0]
    columns = _columns(names, rows, width, files)
    if not columns:
        return None
    at = columns["id"]
    if all(len(row) == width + 1 for row in rows) and _hits(rows, at + 1, files.find) > _hits(rows, at, files.find):
        rows = [row[1:] for row in rows]  # the first column, which counts the rows, has no name
    rows = [_aligned(row, width, columns, files, delimiter) for row in rows]
    return [{column: row[place] for column, place in columns.items()} for row in rows]


def _text(data: bytes) -> str:
    for mark, encoding in _MARKS:
        if data.startswith(mark):
            return _clean(data[len(mark) :].decode(encoding, "ignore"))
    # Text in UTF-16 is every second byte a NUL; a file that was padded with NULs has as many in the other places.
    uneven = data[1::2].count(0) - data[::2].count(0)
    if abs(uneven) > len(data) / 5:
        return _clean(data.decode("utf-16-le" if uneven > 0 else "utf-16-be", "ignore"))
    return _clean("".join(_line(line) for line in data.splitlines(keepends=True)))


def _line(line: bytes) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError:
        return line.decode("latin-1")


def _clean(text: str) -> str:
    return text.replace("\0", "").replace("\ufeff", "")


def _other_delimiters(line: str) -> list[str]:
    return [each for each in dict.fromkeys(line) if not (each.isalnum() or each in DELIMITERS or each in "_-.\"'\r\n")]


def _fit(lines: Sequence[str], delimiter: str) -> tuple[int, int, int]:
    """How well a delimiter explains some lines: lines with known names as cells, these cells, and cells a line where
    all have as many.
    """
    rows = [_parsed(line, delimiter) or _split(line, delimiter) for line in lines]
    known = [sum(bool(_column(cell) or _is_category(cell)) for cell in row) for row in rows]
    even = len({len(row) for row in rows}) == 1 and delimiter in DELIMITERS
    return len(known) - known.count(0), sum(known), len(rows[0]) if even else 1


def _records(lines: Sequence[str], delimiter: str) -> list[list[str]]:
    """The cells of each row. A quoted cell may hold line ends; a quote that nothing closes costs its own row only."""
    rows: list[list[str]] = []
    place = 0
    counts = Counter(line.count(delimiter) for line in lines)
    usual = max(lines[0].count(delimiter), max(counts, key=lambda count: (counts[count], count)))
    while place < len(lines):
        taken, cells = 1, _parsed(lines[place], delimiter)
        while cells is None and taken < min(_TOP, len(lines) - place):
            taken += 1
            cells = _parsed("".join(lines[place : place + taken]), delimiter)
        if cells is None:
            taken, cells = 1, _split(lines[place], delimiter)
        joined = [line.count(delimiter) for line in lines[place : place + taken]]
        quoted = sum(joined) - (len(cells) - 1)  # delimiters within quotes
        if taken > 1 and min(quoted, *joined) >= usual > 0:
            rows += [
                _split(line, delimiter) for line in lines[place : place + taken]
            ]  # whole rows, so the quotes are there by mistake
        else:
            rows.append(cells)
        place += taken
    return [row for row in rows if any(cell.strip() for cell in row)]


def _parsed(text: str, delimiter: str) -> list[str] | None:
    """The cells of one row; None where its quotes do not match."""
    try:
        (cells,) = csv_format.reader([text], delimiter=delimiter, strict=True)
    except (csv_format.Error, ValueError):
        return None
    return [cell for cell in cells if cell] if delimiter == " " else cells  # blanks may be there to line cells up


def _split(line: str, delimiter: str) -> list[str]:
    return [cell.strip('"') for cell in line.rstrip("\r\n").split(delimiter)]


# ---------------------------------------------------------------- rows of cells -> rows by column


def _header(records: list[list[str]], files: _Files) -> tuple[list[str], list[list[str]]]:
    """The names of the columns, and the rows without them.

    No names where the header says none that is known, or is missing.
    """
    for place, cells in enumerate(records[:_TOP]):
        if any(_column(cell) for cell in cells) and not any(_is_category(cell) for cell in cells):
            above = [row for row in records[:place] if len(row) == len(cells) > 1]  # shorter ones are a title
            return cells, [*above, *(row for row in records[place + 1 :] if row != cells)]
    first = records[0]
    numbered = len(first) > 1 and first == [
        str(number) for number in range(len(first))
    ]  # what pandas writes without names
    holds_data = any(_is_category(cell) or not math.isnan(_number(cell)) or files.find(cell) for cell in first)
    return [], records if holds_data and not numbered else records[1:]


def _column(name: str) -> str | None:
    """The column of a test table that a name stands for, whatever its case, blanks and dashes."""
    return _known(name, TEST_COLUMNS) or ("id" if _ID_NAME.fullmatch(name.strip()) else None)


def _columns(names: Sequence[str], rows: Sequence[Sequence[str]], width: int, files: _Files) -> dict[str, int]:
    """Where each column of a test table is; empty where nothing shows that this is one.

    The right spelling goes before any other. What no name tells is found by what the cells hold; without any names, the
    columns are taken to be in a test table's order beside that.
    """
    found: dict[str, int] = {}
    for place in sorted(range(len(names)), key=lambda place: names[place] not in TEST_COLUMNS):
        if (column := _known(names[place], TEST_COLUMNS)) is not None:
            found.setdefault(column, place)
    shown, free = bool(found), [place for place in range(width) if place not in found.values()]
    found = found if names else dict(zip(TEST_COLUMNS, range(width), strict=False))
    for column, known in (("organ", ORGANS), ("data_source", SOURCES)):
        counts = {place: _hits(rows, place, partial(_known, names=known)) for place in free}
        if not (names and column in found) and any(counts.values()):
            found[column] = max(free, key=counts.__getitem__)
            free.remove(found[column])
            shown = True
    if not (names and "id" in found):
        called = {place for place, name in enumerate(names) if _ID_NAME.fullmatch(name.strip())}
        counts = {place: _hits(rows, place, files.find) for place in free}
        if not free:
            return {}
        found["id"] = max(free, key=lambda place: (counts[place], place in called))
        shown = shown or bool(counts[found["id"]] or called)
    return found if shown else {}


def _hits(rows: Sequence[Sequence[str]], place: int, is_hit: Callable[[str], object]) -> int:
    """How many cells of a column are hits."""
    return sum(bool(is_hit(row[place])) for row in rows if place < len(row))


def _aligned(cells: list[str], width: int, columns: Mapping[str, int], files: _Files, delimiter: str) -> list[str]:
    """A row with as many cells as there are columns.

    Too many come from delimiters in the id, or are more than there should be at the end: whichever puts most cells
    where they belong.
    """
    last = max((place for place, cell in enumerate(cells) if cell.strip()), default=0)
    cells = cells[: max(width, last + 1)]
    extra, place = len(cells) - width, columns["id"]
    if extra <= 0:
        return [*cells, *[""] * -extra]
    ends = range(place + 1, place + 2 + min(extra, _MOST_EXTRA))
    joined = [[*cells[:place], delimiter.join(cells[place:end]), *cells[end:]] for end in ends]

    def fit(row: Sequence[str]) -> int:
        cell = {column: row[place] for column, place in columns.items()}
        words = [_known(cell.get("organ", ""), ORGANS), _known(cell.get("data_source", ""), SOURCES)]
        numbers = [not math.isnan(_number(cell.get(column, ""))) for column in NUMBERS]
        return 10 * bool(files.find(cell["id"])) + sum(map(bool, words)) + sum(numbers)

    # Where there is no other column, all of the line is the id.
    return max(joined[::-1] if width == 1 else joined, key=fit)


# ---------------------------------------------------------------- rows by column -> slides


class _Files:
    """The slide files of a folder, by the ids that may mean them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            paths = [folder / name for name in os.listdir(folder) if Path(name).suffix.lower() in SUFFIXES]
        except OSError:
            paths = []
        paths.sort(key=lambda path: -SUFFIXES.index(path.suffix.lower()))  # the first suffix comes last, and stays
        self._exact = {_line(os.fsencode(path.stem)): path for path in paths}
        stems = Counter(map(_key, self._exact))
        # Where two files could be meant, such as 7.tiff and 007.tiff by 07, none is.
        self._near = {_key(stem): path for stem, path in self._exact.items() if stems[_key(stem)] == 1}
        self.stems = sorted(self._exact)

    def find(self, slide_id: str) -> Path | None:
        """The slide's file, if it is there."""
        return self._exact.get(slide_id) or self._near.get(_key(slide_id))


def _key(slide_id: str) -> str:
    """What ids and file names may agree in: without folder, suffix and case; whole numbers without zeros that say
    nothing.
    """
    name = unicodedata.normalize("NFKC", re.split(r"[\\/]", slide_id.strip())[-1]).casefold()
    stem = next((name.removesuffix(suffix) for suffix in SUFFIXES if name.endswith(suffix)), name)
    value = _number(stem)
    return str(int(value)) if value.is_integer() and abs(value) < 2**53 else stem


def _slide(slide_id: str, row: Mapping[str, str], files: _Files, replaced: list[str]) -> Slide:
    organ, source = (
        _known(row.get("organ", ""), ORGANS) or UNKNOWN,
        _known(row.get("data_source", ""), SOURCES) or SOURCE,
    )
    facts = (
        [FACTS[organ]] if organ != UNKNOWN else list(FACTS.values())
    )  # the middle of all organs is as good a guess as any
    usual = statistics.median(fact.um_per_px[source] for fact in facts)
    thickness = statistics.median(fact.thickness_um[source] for fact in facts)
    path = files.find(slide_id)
    height, width = _size(path)
    written, stated = row.get("pixel_size", ""), _number(row.get("tissue_thickness", ""))
    um_per_px = believable_um(_number(written), usual, max(height, width))
    if um_per_px != _number(written):
        replaced.append(f"{written[:20]!r} of {slide_id[:40]!r} becomes {um_per_px:g} um")
    return Slide(
        id=slide_id,
        organ=organ,
        source=source,
        height=height,
        width=width,
        um_per_px=um_per_px,
        thickness_um=stated if 0 < stated < math.inf else thickness,
        rle=None,
        # A path that does not exist says in the log which slide is missed.
        path=path or files.folder / (f"{slide_id}.tiff" if FILE_ID.fullmatch(slide_id) else "no-file-name.tiff"),
    )


def _size(path: Path | None) -> tuple[int, int]:
    """Of the file, never of the table: one wrong cell would make the slide look so dear that a deadline takes all other
    slides' effort.
    """
    try:
        return slide_files.size(path) if path is not None else (1, 1)
    except (SlideError, OSError):
        return 1, 1


@lru_cache(1 << 16)
def _known(text: str, names: tuple[str, ...]) -> str | None:
    """The name that a text spells, whatever its case, blanks and dashes; None for another text."""
    plain = _ODD.sub("", text).casefold()
    return next((name for name in names if plain == _ODD.sub("", name).casefold()), None)


def _is_category(text: str) -> bool:
    return _known(text, (*ORGANS, *SOURCES)) is not None


def _number(text: str) -> float:
    """The number that a text spells, with a decimal point or comma; else not a number."""
    try:
        return float(text.replace(",", "."))
    except ValueError:
        return math.nan
