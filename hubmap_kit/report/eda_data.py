"""The tables behind `hubmap eda`: one row a slide, one row a unit, and what they come to per organ and per source."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from hubmap_kit.competition import rle
from hubmap_kit.competition.csv_rows import read_rows
from hubmap_kit.competition.organs import ORGANS
from hubmap_kit.competition.tables import Slide, read_train
from hubmap_kit.processes import threads
from hubmap_kit.progress import track
from hubmap_kit.report.eda_units import MaskCounts, Unit, count

WORKERS = 8
FRAGMENT = 0.01  # of the organ's median unit: below, a component is a slip of the pen rather than a unit
SEXES = {"male": "male", "m": "male", "female": "female", "f": "female"}
UNKNOWN = "unknown"
UNIT_COLUMNS = (
    "id",
    "organ",
    "data_source",
    "unit",
    "area_px",
    "area_um2",
    "diameter_um",
    "length_um",
    "breadth_um",
    "eccentricity",
    "solidity",
    "parts",
    "top",
    "left",
    "height",
    "width",
    "at_border",
    "fragment",
)


@dataclass(frozen=True)
class People:
    """What a table says about the donor of a slide: `age` in years or NaN, `sex` male, female or unknown, and the cells
    as written.
    """

    age: float
    sex: str
    age_cell: str
    sex_cell: str


@dataclass(frozen=True)
class Tables:
    """`slides` one row a slide, in the table's order; `units` one row a component of 8 neighbours, largest first within
    a slide.
    """

    slides: pd.DataFrame
    units: pd.DataFrame

    @property
    def organs(self) -> list[str]:
        """Organs that occur, in the competition's order."""
        return [organ for organ in ORGANS if organ in set(self.slides["organ"])]


def read(csv: Path, images: Path | None = None) -> tuple[list[Slide], dict[str, People]]:
    """The slides of a train.csv (or .csv.gz), whose files may be absent, and the people of those that say so; raises as
    `read_train`.
    """
    slides = read_train(csv, images, check_files=False)
    rows = (row for _, row in read_rows(csv, ("id",)))
    return slides, {row["id"]: _people(row.get("age", ""), row.get("sex", "")) for row in rows}


def _people(age: str, sex: str) -> People:
    age, sex = age.strip(), sex.strip()
    try:
        years = float(age)
    except ValueError:
        years = math.nan
    return People(years if 0 <= years <= 120 else math.nan, SEXES.get(sex.lower(), UNKNOWN), age, sex)


def measure(slides: Sequence[Slide], people: dict[str, People]) -> Tables:
    """Count every mask; as many are in memory at a time as there are processors, at most WORKERS."""
    rows, units = [], []
    with threads(WORKERS) as pool:  # nearly all of the time is spent in OpenCV, outside Python's lock
        counted = pool.map(lambda slide: count(rle.decode(slide.rle or "", slide.height, slide.width)), slides)
        for slide, counts in zip(slides, track(counted, "masks", "slide", len(slides)), strict=True):
            rows.append(_slide_row(slide, people[slide.id], counts))
            units += [
                _unit_row(slide, number, unit)
                for number, unit in enumerate(sorted(counts.units, key=lambda unit: -unit.area), start=1)
            ]
    table = pd.DataFrame(units, columns=[name for name in UNIT_COLUMNS if name != "fragment"])
    # Sizes in um, so that slides of different scales share one median.
    table["fragment"] = table["area_um2"] < FRAGMENT * table.groupby("organ")["area_um2"].transform("median")
    return Tables(pd.DataFrame(rows), table)


def _slide_row(slide: Slide, people: People, counts: MaskCounts) -> dict[str, object]:
    return {
        "id": slide.id,
        "organ": slide.organ,
        "data_source": slide.source,
        "height": slide.height,
        "width": slide.width,
        "um_per_px": slide.um_per_px,
        "thickness_um": slide.thickness_um,
        "age": people.age,
        "sex": people.sex,
        "coverage": counts.area / (slide.height * slide.width),
        "units": len(counts.units),
        "units_cut": counts.total("parts"),
        "components4": counts.total("components4"),
        "specks": counts.total("specks"),
        "has_file": slide.path.is_file(),
    }


def _unit_row(slide: Slide, number: int, unit: Unit) -> dict[str, object]:
    um = slide.um_per_px
    return {
        "id": slide.id,
        "organ": slide.organ,
        "data_source": slide.source,
        "unit": number,
        "area_px": unit.area,
        "area_um2": unit.area * um**2,
        "diameter_um": 2 * math.sqrt(unit.area / math.pi) * um,
        "length_um": unit.length * um,
        "breadth_um": unit.breadth * um,
        "eccentricity": unit.eccentricity,
        "solidity": unit.solidity,
        "parts": unit.parts,
        "top": unit.top,
        "left": unit.left,
        "height": unit.height,
        "width": unit.width,
        "at_border": unit.at_border,
    }


def per_organ(tables: Tables) -> pd.DataFrame:
    """One row an organ: slides, share of all slides, coverage (share of pixels), units in three counts, and medians of
    their shape.
    """
    rows = []
    whole = tables.units[~tables.units["fragment"]]
    for organ in tables.organs:
        slides, units = (table[table["organ"] == organ] for table in (tables.slides, whole))
        covered = slides["coverage"]
        rows.append(
            {
                "organ": organ,
                "slides": len(slides),
                "share": len(slides) / len(tables.slides),
                "coverage_mean": covered.mean(),
                "coverage_min": covered.min(),
                "coverage_median": covered.median(),
                "coverage_max": covered.max(),
                "units": slides["units"].sum(),
                "units_cut": slides["units_cut"].sum(),
                "components4": slides["components4"].sum(),
                "specks": slides["specks"].sum(),
                "fragments": slides["units"].sum() - len(units),
                "units_per_slide": slides["units"].mean(),
                **{
                    f"{name}_median": units[name].median()
                    for name in ("area_um2", "diameter_um", "length_um", "breadth_um", "eccentricity", "solidity")
                },
            }
        )
    return pd.DataFrame(rows)
