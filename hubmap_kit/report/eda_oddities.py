"""What is odd about a table: rows that say one thing twice, and labels that stand out.

Each oddity is a row, none is an error.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations

import pandas as pd

from hubmap_kit.competition import rle
from hubmap_kit.competition.external import THIRD_PLACE
from hubmap_kit.competition.lineage import DUPLICATE_TISSUE
from hubmap_kit.competition.organs import FACTS
from hubmap_kit.competition.pixel_sizes import odd_extent, odd_file
from hubmap_kit.competition.tables import Slide
from hubmap_kit.report.eda_tables import Donor, Tables

ALIKE = 0.9  # Dice of two masks from which they are one drawing
FULL = 0.8  # share of the slide from which a mask leaves hardly any background
COLUMNS = ("kind", "ids", "detail")
Oddity = tuple[str, str, str]


def find_oddities(slides: Sequence[Slide], donors: Mapping[str, Donor], tables: Tables) -> pd.DataFrame:
    """The oddities of a table, with the columns kind, ids (separated by blanks) and detail, gathered by kind."""
    found = [
        *_same_masks(slides),
        *_known(slides),
        *_masks(slides, tables),
        *_frames(slides),
        *_scales(slides),
        *_extents(slides),
        *_donors(slides, donors),
    ]
    return pd.DataFrame(found, columns=list(COLUMNS)).sort_values("kind", kind="stable", ignore_index=True)


def _same_masks(slides: Sequence[Slide]) -> Iterator[Oddity]:
    """Pairs of slides of one organ and size whose masks are equal or nearly so."""
    groups: dict[tuple[object, ...], list[tuple[Slide, int, rle.Runs]]] = {}
    for slide in slides:
        if slide.rle:
            runs = rle.parse(slide.rle)
            groups.setdefault((slide.organ, slide.height, slide.width), []).append((slide, rle.area(runs), runs))
    for members in groups.values():
        for (one, area, runs), (other, other_area, other_runs) in combinations(members, 2):
            # Dice cannot exceed this even if the smaller mask lies within the larger, so most pairs need no look.
            if 2 * min(area, other_area) < ALIKE * (area + other_area):
                continue
            dice = rle.dice(runs, other_runs)
            if dice >= ALIKE:
                yield "same mask twice", f"{one.id} {other.id}", "equal" if dice == 1 else f"Dice {dice:.3f}"


def _known(slides: Sequence[Slide]) -> Iterator[Oddity]:
    organ_of = {slide.id: slide.organ for slide in slides}
    for group in DUPLICATE_TISSUE:
        present = [slide_id for slide_id in group if slide_id in organ_of]
        if len(present) > 1:
            yield "known duplicate tissue", " ".join(present), f"{organ_of[present[0]]}; folds keep them together"
    other = [slide.id for slide in slides if slide.organ == "lung" and slide.id in THIRD_PLACE]
    if other:
        yield (
            "lung labelled in another way",
            " ".join(other),
            "alveoli are cut in another way than in other slides; some winners left them out",
        )


def _masks(slides: Sequence[Slide], tables: Tables) -> Iterator[Oddity]:
    fragments = tables.units[tables.units["fragment"]].groupby("id")["area_px"]
    small = {slide_id: areas.tolist() for slide_id, areas in fragments}
    for slide, row in zip(slides, tables.slides.to_dict("records"), strict=True):
        if not row["units"]:
            yield "empty mask", slide.id, "no pixel of it is labelled"
        if row["coverage"] >= FULL:
            yield "mask nearly everywhere", slide.id, f"{row['coverage']:.1%} of the slide"
        if slide.rle and int(rle.parse(slide.rle).starts[0]) == 0:
            yield "run starts at 0", slide.id, "the first pixel is labelled; a submission may not say so"
        if slide.id in small:
            areas = small[slide.id]
            listed = ", ".join(f"{area}" for area in areas[:6]) + (", ..." if len(areas) > 6 else "")
            yield "fragments", slide.id, f"{len(areas)} below 1 % of the organ's median unit: {listed} px"


def _frames(slides: Sequence[Slide]) -> Iterator[Oddity]:
    sizes: dict[tuple[int, int], list[str]] = {}
    for slide in slides:
        if slide.height != slide.width:
            sizes.setdefault((slide.height, slide.width), []).append(slide.id)
    for (height, width), ids in sizes.items():
        yield "not square", " ".join(ids), f"{height} x {width} (height x width)"


def _scales(slides: Sequence[Slide]) -> Iterator[Oddity]:
    """Physical sizes that are not those of the slide's source on the competition's data page, gathered by value."""
    other: dict[tuple[str, str, str, float, float], list[str]] = {}
    for slide in slides:
        facts = FACTS[slide.organ]
        for name, value, usual in (
            ("pixel size", slide.um_per_px, facts.um_per_px[slide.source]),
            ("thickness", slide.thickness_um, facts.thickness_um[slide.source]),
        ):
            if abs(value - usual) > 1e-3 * usual:
                other.setdefault((name, slide.organ, slide.source, value, usual), []).append(slide.id)
    for (name, organ, source, value, usual), ids in other.items():
        yield f"unusual {name}", " ".join(ids), f"{value:g} um, where {organ} of {source} has {usual:g} um"


def _extents(slides: Sequence[Slide]) -> Iterator[Oddity]:
    """Pixel sizes that cannot be true: by what the slide's file states (its header is read), and by the tissue that
    they add up to.
    """
    for slide in slides:
        if found := odd_file(slide):
            yield "pixel size of table and file", slide.id, found
        if found := odd_extent(slide, slide.height, slide.width):
            yield "extent of tissue", slide.id, found


def _donors(slides: Sequence[Slide], donors: Mapping[str, Donor]) -> Iterator[Oddity]:
    for slide in slides:
        donor = donors[slide.id]
        if donor.age_cell and donor.age != donor.age:
            yield "unreadable age", slide.id, f"'{donor.age_cell}' was left out"
        if donor.sex_cell and donor.sex == "unknown":
            yield "unreadable sex", slide.id, f"'{donor.sex_cell}' was left out"
        if slide.organ == "prostate" and donor.sex == "female":
            yield "prostate of a woman", slide.id, "organ or sex is wrong"
