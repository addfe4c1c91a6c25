"""Train tables joined by links, with folds that keep families together; and the odd lung slides of one taken out or
down.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hubmap_kit.competition import external, lineage, lung_styles
from hubmap_kit.competition.csv_rows import read_rows
from hubmap_kit.competition.external import IMAGES, TRAIN, Row
from hubmap_kit.competition.folds import write_folds
from hubmap_kit.competition.tables import TRAIN_COLUMNS, read_train
from hubmap_kit.errors import SlideError, TableError, did_you_mean

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
    if style not in lung_styles.LISTS:
        known = lung_styles.LISTS
        raise TableError(
            f"there is no list '{style}' of lung slides; known are {', '.join(known)}{did_you_mean(style, known)}"
        )
    path = table / TRAIN if table.is_dir() else table
    if out.resolve() == path.parent.resolve():
        raise TableError(
            f"{out} is the folder of the table itself, which would be overwritten; choose a new one with --out"
        )
    ids, rows = lung_styles.LISTS[style], external.read_table(path)
    kept = lung_styles.dropped(rows, ids) if weight is None else lung_styles.weighted(rows, weight, ids)
    files = {slide.id: slide.path for slide in read_train(path)}
    for row in kept:
        link(files[row["id"]], out / IMAGES[TRAIN])
    external.write_table(out / TRAIN, kept, TRAIN_COLUMNS)
    return len(lung_styles.odd(rows, ids))


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
