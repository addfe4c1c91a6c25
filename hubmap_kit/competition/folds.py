"""Cross-validation folds: balanced by organ, with pieces of one tissue, and slides and what was made of them, always in
one fold.
"""

from __future__ import annotations

import csv
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from hubmap_kit.competition.csv_rows import read_rows
from hubmap_kit.competition.lineage import Families, judged
from hubmap_kit.competition.tables import Slide
from hubmap_kit.errors import ConfigError, TableError
from hubmap_kit.files import atomic_path

_COLUMNS = ("id", "organ", "data_source", "fold")


def assign_folds(slides: Sequence[Slide], n_folds: int, seed: int = 0) -> dict[str, int]:
    """Slide id -> fold 0..n_folds-1, in the order of `slides`.

    Organs are spread evenly (scikit-learn's StratifiedGroupKFold, groups in an order drawn from `seed`); known
    duplicate tissue stays together, and so do slides and their descendants (`Slide.parent`). A slide whose parent is in
    the table too follows it and counts for nothing else, so originals lie where they lie without their copies. The
    result depends on the ids and organs, not on the order of the rows. With so few slides that no organ has `n_folds`
    of them, only the number of slides is balanced. Raises TableError when `n_folds` is below 2 or above the number of
    separate tissues, or when the slides are too few and too clustered to fill every fold.
    """
    parents = {
        slide.id: slide.parent for slide in sorted(slides, key=lambda slide: slide.id)
    }  # the names of families follow the order
    families, originals = Families(parents), judged(parents)
    chosen = _chosen([slide for slide in slides if slide.id in originals], families, n_folds, seed)
    fold_of = {families.of(slide_id): fold for slide_id, fold in chosen.items()}
    return {slide.id: fold_of[families.of(slide.id)] for slide in slides}


def _chosen(slides: Sequence[Slide], families: Families, n_folds: int, seed: int) -> dict[str, int]:
    groups = [families.of(slide.id) for slide in slides]
    tissues = len(set(groups))
    if not 2 <= n_folds <= tissues:
        raise TableError(
            f"n_folds is {n_folds}, but it must lie between 2 and the number of separate tissues, which is {tissues} "
            f"for these {len(slides)} slides; choose another number of folds"
        )
    organs = [slide.organ for slide in slides]
    if max(organs.count(organ) for organ in set(organs)) < n_folds:
        organs = ["any"] * len(slides)  # scikit-learn refuses strata that are all smaller than the number of folds
    folds = _split(organs, groups, n_folds, seed)
    empty = sorted(set(range(n_folds)) - set(folds))
    if empty:
        raise TableError(
            f"n_folds is {n_folds}, but with {len(slides)} slides fold {empty[0]} stays empty; choose fewer folds"
        )
    return {slide.id: fold for slide, fold in zip(slides, folds, strict=True)}


def write_folds(path: str | Path, folds: Mapping[str, int], slides: Sequence[Slide]) -> None:
    """Write the fold table (CSV: id, organ, data_source, fold), one row a slide.

    Raises TableError when a slide has no fold.
    """
    missing = [slide.id for slide in slides if slide.id not in folds]
    if missing:
        raise TableError(f"{path} cannot be written, {_some(missing)} have no fold; assign folds to all slides first")
    with atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(_COLUMNS)
        writer.writerows((slide.id, slide.organ, slide.source, folds[slide.id]) for slide in slides)


def read_folds(path: str | Path, slides: Sequence[Slide]) -> dict[str, int]:
    """Slide id -> fold from a fold table, in the order of `slides`; only the columns id and fold are read.

    Rows of other slides are allowed. Raises TableError when a slide has no row, an id comes twice, fold numbers are not
    0, 1, 2, ... without a gap (at least two), or slides of one tissue, or a slide and its descendants, lie in different
    folds.
    """
    fold_of: dict[str, int] = {}
    for line, row in read_rows(path, ("id", "fold")):
        if row["id"] in fold_of:
            raise TableError(
                f"{path}, line {line} repeats the id {row['id']}, but every slide has one fold; drop one of them"
            )
        if not re.fullmatch(r"[0-9]{1,4}", row["fold"]):
            raise TableError(
                f"{path}, line {line} (id {row['id']}) has fold {row['fold']!r}, but folds are 0, 1, 2, ...; mend the"
                " cell"
            )
        fold_of[row["id"]] = int(row["fold"])
    missing = [slide.id for slide in slides if slide.id not in fold_of]
    if missing:
        raise TableError(f"{path} has no fold for {_some(missing)}; assign the folds again for this train.csv")
    _check_numbers(path, fold_of)
    _check_families(path, fold_of, Families({slide.id: slide.parent for slide in slides}))
    return {slide.id: fold_of[slide.id] for slide in slides}


def _split(strata: Sequence[str], groups: Sequence[str], n_folds: int, seed: int) -> list[int]:
    from sklearn.model_selection import (
        StratifiedGroupKFold,
    )  # slow to import, and reading a fold table needs none of it

    # The splitter's own shuffle=True assigns groups at random in the scikit-learn of Kaggle's image (1.6): lung has
    # landed 14, 3, 12, 13, 6 on five folds. It takes groups in the order of their names, so random names shuffle and
    # keep the balance.
    labels = sorted(set(groups))
    names = dict(zip(labels, np.random.default_rng(seed).permutation(len(labels)).tolist(), strict=True))
    splitter = StratifiedGroupKFold(n_splits=n_folds)
    folds = [0] * len(strata)
    with warnings.catch_warnings():
        # An organ with fewer slides than folds is spread over as many as it can; the caller checks that no fold is
        # empty.
        warnings.filterwarnings("ignore", message="The least populated class", category=UserWarning)
        for fold, (_, held_out) in enumerate(splitter.split(strata, strata, [names[group] for group in groups])):
            for index in held_out:
                folds[index] = fold
    return folds


def _check_numbers(path: str | Path, fold_of: Mapping[str, int]) -> None:
    found = sorted(set(fold_of.values()))
    if found != list(range(max(len(found), 2))):
        raise TableError(
            f"{path} holds the folds {', '.join(map(str, found)) or '(none)'}, but they must be 0, 1, 2, ... without a"
            " gap and at least two; assign the folds again"
        )


def _check_families(path: str | Path, fold_of: Mapping[str, int], families: Families) -> None:
    found: dict[str, dict[int, str]] = {}  # family -> fold -> its first slide there
    for slide_id, fold in fold_of.items():
        found.setdefault(families.of(slide_id), {}).setdefault(fold, slide_id)
    for places in found.values():
        if len(places) > 1:
            told = ", ".join(f"{slide_id} in fold {fold}" for fold, slide_id in places.items())
            raise TableError(
                f"{path} splits slides of one tissue ({told}), which leaks into validation; put them in one fold"
            )


def _some(ids: Sequence[str]) -> str:
    return f"{len(ids)} slides ({', '.join(ids[:3])}{', ...' if len(ids) > 3 else ''})"


def check_folds(chosen: Sequence[int] | None, known: Iterable[int], *, source: str = "the split has") -> list[int]:
    """The chosen fold numbers in order, all known ones where none is chosen.

    Raises ConfigError for a number that is not known; `source` says in its sentence where the known ones come from.
    """
    folds = sorted(set(known))
    numbers = sorted(set(chosen)) if chosen else folds
    if wrong := [number for number in numbers if number not in folds]:
        raise ConfigError(
            f"fold {wrong[0]} was asked for, but {source} the folds {folds}; choose among them with --folds"
        )
    return numbers
