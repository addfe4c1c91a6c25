"""Which slides show the same tissue, and what follows for folds: descendants of a slide stay where the slide is.

A family is everything that hangs together by `parent` columns and by the known duplicate tissue of the competition. A
model that has seen one member knows the others, so a family lies in one fold, and only a fold that held it out may
speak about any of its members. A descendant whose parent is in the same table is learnt from but never judged: copies
of one tissue would count several times.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from hubmap_kit.competition.tables import Slide
from hubmap_kit.errors import TableError

# Pairs and triples of training slides that show the same tissue: a model that has seen one knows the other.
# Source: README of the 8th place solution of hubmap-organ-segmentation ("Gleb & Alex").
DUPLICATE_TISSUE: tuple[tuple[str, ...], ...] = (
    ("6730", "32741"),  # prostate
    ("30294", "1229"),
    ("26982", "30414"),
    ("10666", "16659"),
    ("24097", "9470"),  # kidney
    ("351", "26780"),  # large intestine
    ("10488", "20563", "14388"),  # lung
    ("1878", "11629"),
)


class Families:
    """The families of slides, by `parents` (slide id -> id of the slide that it descends from; "" or its own id for an
    original).

    Of several tables all links count, also where they name different parents for one slide.
    """

    def __init__(self, *parents: Mapping[str, str]) -> None:
        self._above: dict[str, str] = {}
        for group in DUPLICATE_TISSUE:
            for slide_id in group[1:]:
                self._join(slide_id, group[0])
        for table in parents:
            for slide_id, parent in table.items():
                if parent:
                    self._join(slide_id, parent)

    def of(self, slide_id: str) -> str:
        """The name of a slide's family: the id of one of its members."""
        while (above := self._above.get(slide_id, slide_id)) != slide_id:
            slide_id = above
        return slide_id

    def folds(self, folds: Mapping[str, int]) -> dict[str, set[int]]:
        """Name of a family -> the folds in which its members lie, of a table slide id -> fold."""
        found: dict[str, set[int]] = {}
        for slide_id, fold in folds.items():
            found.setdefault(self.of(slide_id), set()).add(fold)
        return found

    def _join(self, one: str, other: str) -> None:
        one, other = self.of(one), self.of(other)
        if one != other:
            self._above[one] = other


def judged(parents: Mapping[str, str]) -> set[str]:
    """The ids that are judged when they are held out, of a table slide id -> parent ("" or its own id for an original).

    A slide is judged unless its parent is in the table as well. Where slides name each other in a circle, the first of
    them is judged.
    """
    return {_top(slide_id, parents) for slide_id in parents}


def judged_slides(slides: Iterable[Slide]) -> set[str]:
    """The ids of a table's slides that are judged when they are held out, see `judged`."""
    return judged({slide.id: slide.parent for slide in slides})


def _top(slide_id: str, parents: Mapping[str, str]) -> str:
    """The first of a slide's line within the table; of a circle, the member whose id comes first."""
    line = [slide_id]
    while (parent := parents[line[-1]]) in parents and parent != line[-1]:
        if parent in line:
            return min(line[line.index(parent) :])
        line.append(parent)
    return line[-1]


def held_out_by(slide_id: str, families: Families, folds: Mapping[str, set[int]]) -> int | None:
    """The only fold of a run that may label a slide, or None where all may, because the run has learnt from none of its
    family.

    `folds` is `families.folds` of the run's table. Raises TableError where the family lies in several folds: then each
    of them has learnt from it.
    """
    found = folds.get(families.of(slide_id), set())
    if len(found) > 1:
        raise TableError(
            f"the slides of the family of {slide_id} lie in the folds {', '.join(map(str, sorted(found)))}, so every"
            " fold has learnt from some of them; train with a split that keeps parents and their descendants together"
        )
    return next(iter(found), None)


def spread(
    organs: Mapping[str, str], parents: Mapping[str, str], known: Mapping[str, int], n_folds: int
) -> dict[str, int]:
    """Slide id -> fold for all slides of `organs` (slide id -> organ): families together, those with a known fold in
    it.

    Other families go, one after the other in an order that depends on their names only, where their organ has fewest
    slides. Raises TableError where known folds tear a family apart or reach beyond `n_folds`, or a fold stays empty.
    """
    families = Families(parents)
    members: dict[str, list[str]] = {}
    for slide_id in sorted(organs):  # whatever the order of the rows is
        members.setdefault(families.of(slide_id), []).append(slide_id)
    fold_of = {}
    known_folds = families.folds(known)
    for family in sorted(set(known_folds) & set(members)):
        fold = held_out_by(family, families, known_folds)
        assert fold is not None
        if fold >= n_folds:
            raise TableError(
                f"slide {members[family][0]} belongs to fold {fold}, but there are {n_folds} folds from 0; ask for more"
                " folds"
            )
        fold_of[family] = fold
    load: Counter[tuple[str, int]] = Counter()
    for family, fold in fold_of.items():
        _count(load, members[family], organs, fold)
    for family in _in_order(set(members) - set(fold_of), members):
        organ = organs[members[family][0]]
        fold_of[family] = min(range(n_folds), key=lambda fold: (load[organ, fold], load["", fold], fold))
        _count(load, members[family], organs, fold_of[family])
    folds = {slide_id: fold_of[families.of(slide_id)] for slide_id in organs}
    if empty := sorted(set(range(n_folds)) - set(folds.values())):
        raise TableError(
            f"fold {empty[0]} of {n_folds} stays empty with {len(organs)} slides of {len(members)} tissues; ask for"
            " fewer folds"
        )
    return folds


def _in_order(families: Iterable[str], members: Mapping[str, Sequence[str]]) -> list[str]:
    """Large families first, because small ones can still even out; then by hash, so that names that follow each other
    are spread.
    """
    return sorted(
        families, key=lambda family: (-len(members[family]), hashlib.sha256(members[family][0].encode()).digest())
    )


def _count(load: Counter[tuple[str, int]], members: Iterable[str], organs: Mapping[str, str], fold: int) -> None:
    for slide_id in members:
        load[organs[slide_id], fold] += 1
        load["", fold] += 1
