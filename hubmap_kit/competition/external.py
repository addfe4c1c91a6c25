"""Slides from elsewhere as rows of a train.csv: the competition's columns, and where each slide comes from.

A table of external slides is a train.csv like the competition's, which every reader of the kit takes, with four more
columns: `licence`; `provenance`, which begins with one word that says what kind of label this is ("external:glas",
"pseudo:0123abcd") and may go on with a text or an address; `parent`, the id of the slide that this one descends from (a
copy, a crop, a restained version), empty for an original; and `file`, its name in the source. Tables made of others may
hold further columns, such as `fold` and `weight`.
"""

from __future__ import annotations

import csv
import hashlib
import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import numpy as np
from PIL import Image

from hubmap_kit.competition import rle
from hubmap_kit.competition.csv_rows import read_rows
from hubmap_kit.competition.tables import TEST_COLUMNS, TRAIN_COLUMNS
from hubmap_kit.errors import SlideError, TableError
from hubmap_kit.files import atomic_path

Row = dict[str, str]
TRAIN, TEST = "train.csv", "test.csv"
IMAGES = {TRAIN: "train_images", TEST: "test_images"}
ORIGIN_COLUMNS = ("licence", "provenance", "parent", "file")
COLUMNS = {TRAIN: (*TRAIN_COLUMNS, "age", "sex", *ORIGIN_COLUMNS), TEST: (*TEST_COLUMNS, *ORIGIN_COLUMNS)}
SAME_SLIDE = (*TEST_COLUMNS, "rle")  # columns in which two rows of one id may not differ
NEUTRAL = {"weight": "1"}  # what a missing cell means, where that is not nothing
LOSSY_INSIDE = 128  # of 255: JPEG blurs the border of a mask, so there the middle decides


def content_id(pixels: np.ndarray) -> str:
    """The id of a slide (H, W, 3) uint8 by its pixels: "x" and 15 hex digits; the same picture has it whatever its file
    is.
    """
    digest = hashlib.sha256(f"{pixels.shape}".encode())
    digest.update(np.ascontiguousarray(pixels).data)
    return "x" + digest.hexdigest()[:15]  # the letter keeps spreadsheets and pandas from reading a number


def mask_text(path: Path, height: int, width: int) -> str:
    """The 0-based run-length string of a mask picture for a slide of `height` x `width` pixels.

    PNG, TIFF (one page), or JPEG; one value a unit or one for all of them: whatever is not 0 is inside. Palettes count
    by index, colours by any channel, alpha does not count; in a JPEG, 128 and more is inside. Raises SlideError.
    """
    try:
        with Image.open(path) as picture:
            lossy = picture.format == "JPEG"
            if picture.mode in ("LA", "RGBA", "PA"):
                picture = picture.convert("RGB" if picture.mode == "RGBA" else "L")
            values = np.asarray(picture)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        reason = " ".join(str(error).split())[:120]
        raise SlideError(
            f"{path} cannot be read as a mask ({reason}); save it as PNG, one value a unit and 0 around them"
        ) from error
    if values.shape[:2] != (height, width):
        raise SlideError(
            f"{path} is a mask of {' x '.join(map(str, values.shape[:2]))} pixels, but its slide has {height} x {width}"
            " (height x width); give the mask that was drawn on it"
        )
    inside = values >= LOSSY_INSIDE if lossy else values != 0
    return rle.encode(inside.any(axis=2) if inside.ndim == 3 else inside)


def read_table(path: Path, required: Sequence[str] = TRAIN_COLUMNS) -> list[Row]:
    """All cells of a table as text, in its order, with every column that it has. Raises TableError."""
    rows = [row for _, row in read_rows(path, required)]
    seen: set[str] = set()
    for row in rows:
        if row["id"] in seen:
            raise TableError(f"{path} repeats the id {row['id']}, but ids are unique; drop one of its rows")
        seen.add(row["id"])
    return rows


def write_table(path: Path, rows: Sequence[Mapping[str, str]], columns: Sequence[str]) -> None:
    """Write rows atomically: `columns` first, then every other column that a row has; missing cells are empty (weight:
    1).
    """
    names = list(dict.fromkeys([*columns, *(name for row in rows for name in row)]))
    with atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(names)
        writer.writerows([row.get(name, "") or NEUTRAL.get(name, "") for name in names] for row in rows)


def difference(one: Mapping[str, str], other: Mapping[str, str]) -> str:
    """The first of the competition's columns in which two rows of one slide differ; "" where they are the same label of
    the same slide.
    """
    return next((name for name in SAME_SLIDE if one.get(name) != other.get(name)), "")


def joined(tables: Mapping[Path, Sequence[Row]], replace: bool = False) -> dict[str, tuple[Path, Row]]:
    """Id -> (table, row) of several tables, in their order.

    An id in two tables is one slide: where the rows say the same in the competition's columns, the first is kept. Where
    not, the later one is with `replace` (a pseudo-label instead of its slide's own label), and TableError is raised
    without.
    """
    found: dict[str, tuple[Path, Row]] = {}
    for path, rows in tables.items():
        for row in rows:
            earlier = found.get(row["id"])
            column = difference(earlier[1], row) if earlier else ""
            if earlier and column and not replace:
                raise TableError(
                    f"{path} has the slide {row['id']} with another {column} than {earlier[0]}; let the later table win"
                    " with --replace, or drop one"
                )
            if earlier is None or column:
                found[row["id"]] = (path, row)
    return found


# Lung slides whose masks cut the alveoli in another way than the rest, and what can be done about them.

# Left out of training, and labelled anew by their models, by the 3rd place (its write-up).
THIRD_PLACE = frozenset(
    (
        "12476",
        "127",
        "13189",
        "15124",
        "16564",
        "23252",
        "25516",
        "25945",
        "29610",
        "30084",
        "30500",
        "31139",
        "31571",
        "7359",
        "8151",
    )
)
# The "type 2" of the 26th place (its write-up), which trained its separate lung model on the others only.
TYPE_TWO = THIRD_PLACE - {"25516", "30084"}
LISTS = MappingProxyType({"third-place": THIRD_PLACE, "type-two": TYPE_TWO})
Rows = Sequence[Mapping[str, str]]


def odd(rows: Rows, ids: Collection[str] = THIRD_PLACE) -> list[str]:
    """The ids among `ids` of a train table's lung slides, in the table's order; descendants (column parent) count with
    their parents.
    """
    return [row["id"] for row in rows if row["organ"] == "lung" and (row["id"] in ids or row.get("parent", "") in ids)]


def dropped(rows: Rows, ids: Collection[str] = THIRD_PLACE) -> list[dict[str, str]]:
    """The rows of a train table without its odd lung slides."""
    gone = set(odd(rows, ids))
    return [dict(row) for row in rows if row["id"] not in gone]


def weighted(rows: Rows, weight: float, ids: Collection[str] = THIRD_PLACE) -> list[dict[str, str]]:
    """The rows of a train table with the column `weight` (0..1): odd lung slides have theirs multiplied by `weight`,
    others keep it.

    Slides without a weight had 1. Raises TableError for a weight, given or found, that is no number from 0 to 1.
    """
    changed = set(odd(rows, ids))
    factor = _share(weight, "the weight of odd lung slides")
    found = {row["id"]: _share(row.get("weight", "") or 1, f"the weight of slide {row['id']}") for row in rows}
    return [{**row, "weight": f"{found[row['id']] * (factor if row['id'] in changed else 1):g}"} for row in rows]


def _share(value: float | str, name: str) -> float:
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not 0 <= number <= 1:
        raise TableError(f"{name} is {value!r}, but a number from 0 to 1 was expected; mend it")
    return number
