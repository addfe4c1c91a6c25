"""The page of `hubmap eda`: what the tables hold, in words, tables and drawings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from hubmap_kit.competition.organs import FACTS, ORGANS
from hubmap_kit.competition.tables import Slide
from hubmap_kit.report import eda_drawings as drawings
from hubmap_kit.report.eda_pixels import COLOURS, Example, Pixels, example_galleries
from hubmap_kit.report.eda_tables import NECK, PUBLISHED_OUTLINES, PUBLISHED_SLIDES, Tables
from hubmap_kit.report.html import Block, Cell, Note, Section, Swatch, Table

MOST_ODDITIES = 12  # rows of one kind on the page; the CSV has all
LONGEST = 160  # characters of a cell
WAYS = ("units", "units_cut", "components4")
COUNTS = (*WAYS, "specks", "fragments")
SHAPE_DIGITS = {"area_um2": 0, "diameter_um": 0, "length_um": 0, "breadth_um": 0, "eccentricity": 2, "solidity": 2}


@dataclass(frozen=True)
class Findings:
    """Everything that the page is made of."""

    slides: Sequence[Slide]
    tables: Tables
    organs: pd.DataFrame
    sources: pd.DataFrame
    oddities: pd.DataFrame
    pixels: Pixels
    examples: dict[str, list[Example]]


def eda_sections(found: Findings) -> list[Section]:
    """The sections of the page, in order."""
    return [
        Section("Organs", _organs(found)),
        Section("Donors", _donors(found.tables)),
        Section("Sizes and scales", _sizes(found.tables)),
        Section("Coverage and units", _coverage(found)),
        Section("Shape of units", _shapes(found)),
        Section("Smallest and largest", _extremes(found)),
        Section("Duplicates and oddities", _oddities(found.oddities)),
        Section("Colours and stains", _colours(found)),
    ]


def eda_lead(found: Findings, name: str) -> str:
    """What the page is about, in a sentence or two."""
    slides, units = len(found.slides), int(found.organs["units"].sum())
    sources = ", ".join(
        f"{count} {source}" for source, count in found.tables.slides["data_source"].value_counts().items()
    )
    files = len(found.pixels.slides)
    return (
        f"{name}: {slides} slides ({sources}) of {len(found.organs)} organs with {units:,} units. {files} of {slides}"
        " slide files were read."
    )


def _organs(found: Findings) -> list[Block]:
    rows = [
        [row["organ"], FACTS[row["organ"]].ftu, f"{row['slides']}", f"{row['share']:.1%}"]
        for row in _records(found.organs)
    ]
    total = ["all", "", f"{len(found.slides)}", "100.0%"]
    return [
        drawings.organs_drawing(found.tables),
        Table(["organ", "unit", "slides", "share"], [*rows, total], text_columns=2),
    ]


def _donors(tables: Tables) -> list[Block]:
    slides = tables.slides
    known = int((slides["sex"] != "unknown").sum())
    if not known and slides["age"].isna().all():
        nothing = "The table says nothing of age or sex: it lacks those columns, or their cells are empty."
        return [Note(nothing, warn=True)]
    rows = []
    for organ in [*tables.organs, "all"]:
        group = slides if organ == "all" else slides[slides["organ"] == organ]
        sexes = [f"{int((group['sex'] == sex).sum())}" for sex in ("male", "female", "unknown")]
        ages = group["age"].dropna()
        years = [f"{ages.mean():.1f}", f"{ages.min():g} to {ages.max():g}"] if len(ages) else ["", ""]
        rows.append([organ, *sexes, f"{len(ages)}", *years])
    header = ["organ", "male", "female", "unknown", "with age", "mean age", "range"]
    blocks: list[Block] = [drawings.people_drawing(tables), Table(header, rows)]
    if known < len(slides):
        ages = int(slides["age"].notna().sum())
        blocks.insert(0, Note(f"Sex is known of {known} and age of {ages} of the {len(slides)} slides."))
    return blocks


def _sizes(tables: Tables) -> list[Block]:
    slides = tables.slides
    sizes = slides.groupby(["height", "width"]).size().sort_values(ascending=False)
    shown = [
        [f"{height} x {width}", f"{count}", f"{count / len(slides):.1%}"]
        for (height, width), count in sizes.head(10).items()
    ]
    rest = int(sizes.iloc[10:].sum())
    if rest:
        shown.append(
            [f"{len(sizes) - 10} other size{'s' if len(sizes) > 11 else ''}", f"{rest}", f"{rest / len(slides):.1%}"]
        )
    scales = slides.groupby(["data_source", "organ", "um_per_px", "thickness_um"], sort=True).size()
    usual = []
    for (source, organ, um, thick), count in scales.items():
        facts = FACTS[organ]
        values = (um, facts.um_per_px[source], thick, facts.thickness_um[source])
        usual.append([source, organ, f"{count}", *(f"{value:g}" for value in values)])
    header = ["source", "organ", "slides", "pixel size, µm", "usual", "thickness, µm", "usual"]
    return [
        drawings.sizes_drawing(tables),
        Table(["height x width, px", "slides", "share"], shown),
        Table(header, usual, "Usual: what the competition's data page says of that source and organ.", text_columns=2),
    ]


def _coverage(found: Findings) -> list[Block]:
    rows = []
    for row in _records(found.organs):
        covered = [f"{100 * row[f'coverage_{name}']:.2f}" for name in ("mean", "min", "median", "max")]
        rows.append([row["organ"], *covered, *(f"{row[name]:,}" for name in COUNTS), f"{row['units_per_slide']:.1f}"])
    totals = [f"{found.organs[name].sum():,}" for name in COUNTS]
    covered = found.tables.slides["coverage"] * 100
    every = [f"{value:.2f}" for value in (covered.mean(), covered.min(), covered.median(), covered.max())]
    rows.append(["all", *every, *totals, f"{found.tables.slides['units'].mean():.1f}"])
    header = [
        *("organ", "coverage, %", "min", "median", "max", "units"),
        *("cut", "4 neighbours", "1 pixel", "fragments", "per slide"),
    ]
    return [drawings.coverage_drawing(found.tables), Table(header, rows), *_counting(found)]


def _counting(found: Findings) -> list[Block]:
    text = (
        "Units are connected components of the mask, pixels joined by their sides and corners (8 neighbours). Outlines"
        " that touch or cross were filled into one component; 'cut' cuts components at their necks, where one is"
        f" narrower than {NECK:g} times the narrower of the bulges beside it. Under 4 neighbours, pixels that hang on"
        " an outline by a corner count by themselves. A fragment is a component below 1 % of its organ's median unit;"
        " fragments are left out of the shapes below."
    )
    if {row["organ"]: row["slides"] for row in _records(found.organs)} != dict(PUBLISHED_SLIDES):
        return [Note(text)]
    rows = []
    for row in _records(found.organs):
        drawn = PUBLISHED_OUTLINES[row["organ"]]
        rows.append([row["organ"], f"{drawn:,}", *(_beside(row[name], drawn) for name in WAYS)])
    drawn = sum(PUBLISHED_OUTLINES.values())
    rows.append(["all", f"{drawn:,}", *(_beside(found.organs[name].sum(), drawn) for name in WAYS)])
    why = (
        "This table has as many slides of each organ as the competition's, whose outlines are known. Most of the"
        " difference lies in prostate and large intestine, whose glands and crypts stand wall to wall. The cut was"
        " chosen to meet the total; organs are off in both directions, lung most of all, because an alveolus has necks"
        " of its own."
    )
    return [
        Note(text),
        Note(why),
        Table(["organ", "outlines drawn", "8 neighbours", "cut at necks", "4 neighbours"], rows),
    ]


def _beside(value: float, truth: int) -> str:
    return f"{value:,} ({value / truth - 1:+.1%})"


def _shapes(found: Findings) -> list[Block]:
    whole = found.tables.units[~found.tables.units["fragment"]]
    if whole.empty:
        return [Note("No mask holds a unit.", warn=True)]
    rows = []
    for organ in [organ for organ in ORGANS if organ in set(whole["organ"])]:
        units = whole[whole["organ"] == organ]
        cells = [_spread(units[name], digits) for name, digits in SHAPE_DIGITS.items()]
        rows.append([organ, f"{len(units):,}", *cells, f"{units['at_border'].mean():.1%}"])
    header = [
        *("organ", "units", "area, µm²", "diameter, µm", "length, µm"),
        *("breadth, µm", "eccentricity", "solidity", "at the edge"),
    ]
    note = (
        "Median (10th to 90th percentile). Diameter: of the disc of equal area. Length and breadth: axes of the ellipse"
        " with equal second moments."
    )
    return [drawings.shapes_drawing(found.tables), Table(header, rows, note)]


def _spread(values: pd.Series, digits: int) -> str:
    low, middle, high = values.quantile([0.1, 0.5, 0.9])
    return f"{middle:,.{digits}f} ({low:,.{digits}f}\u2013{high:,.{digits}f})"


def _extremes(found: Findings) -> list[Block]:
    rows = []
    for organ in found.tables.organs:
        slides = found.tables.slides[found.tables.slides["organ"] == organ].sort_values("coverage", kind="stable")
        cells = [
            f"{row['id']} ({row['coverage']:.2%}, units: {row['units']})" for row in (slides.iloc[0], slides.iloc[-1])
        ]
        rows.append([organ, *cells])
    shown = "cut out of the slides" if found.pixels.cuts else "masks only, for want of slide files"
    blocks: list[Block] = [Table(["organ", "slide with least coverage", "slide with most"], rows, text_columns=3)]
    if found.examples:
        blocks.append(Note(f"Units ({shown}), each drawn to fill its frame; fragments are left out."))
    return [*blocks, *example_galleries(found.slides, found.examples, found.pixels.cuts)]


def _oddities(oddities: pd.DataFrame) -> list[Block]:
    if oddities.empty:
        return [Note("Nothing odd was found.")]
    rows: list[list[Cell]] = []
    for kind, group in oddities.groupby("kind", sort=False):
        rows += [[kind, _short(row["ids"]), _short(row["detail"])] for row in _records(group.head(MOST_ODDITIES))]
        if len(group) > MOST_ODDITIES:
            rows.append([kind, f"and {len(group) - MOST_ODDITIES} more", "see oddities.csv"])
    counts = ", ".join(f"{kind}: {count}" for kind, count in oddities["kind"].value_counts(sort=False).items())
    return [Note(f"{counts}."), Table(["kind", "slides", "what"], rows, text_columns=3)]


def _short(text: str) -> str:
    return text if len(text) <= LONGEST else text[: LONGEST - 3] + "..."


def _colours(found: Findings) -> list[Block]:
    if found.sources.empty:
        folder = found.slides[0].path.parent.name
        nothing = "This section needs the slides' pixels, and no slide file was found (or could be read) in the folder"
        return [Note(f"{nothing} {folder} beside the table.", warn=True)]
    rows: list[list[Cell]] = []
    for row in _records(found.sources):
        stained = row["slides_with_stains"]
        stains = [
            _stain([row[f"stain{number}_{colour}"] for colour in COLOURS]) if stained else "" for number in (1, 2)
        ]
        mean = [row[colour] for colour in COLOURS]
        said: Cell = Swatch(_rgb(mean), " ".join(f"{value:.0f}" for value in mean)) if not pd.isna(mean[0]) else ""
        names = [row["data_source"], row["organ"], f"{row['slides']}", f"{row['tissue_share']:.0%}"]
        rows.append([*names, said, *stains, f"{stained}"])
    blocks: list[Block] = []
    if len(found.pixels.slides) < len(found.slides):
        some = f"Of {len(found.pixels.slides)} of the {len(found.slides)} slides"
        blocks.append(Note(f"{some}: the other files are absent or damaged.", warn=True))
    header = [
        *("source", "organ", "slides", "tissue"),
        *("mean colour of tissue", "first stain", "second stain", "slides with stains"),
    ]
    note = (
        "Stain vectors: optical density in red, green, blue at length 1, by the method of Macenko et al. (2009), mean"
        " over slides; the patch shows a layer of density 1. Slides with too little tissue have none."
    )
    return [*blocks, Table(header, rows, note, text_columns=2)]


def _stain(vector: Sequence[float]) -> Swatch:
    return Swatch(_rgb([255 * 10**-part for part in vector]), " ".join(f"{part:.2f}" for part in vector))


def _rgb(values: Sequence[float]) -> tuple[int, int, int]:
    red, green, blue = (min(255, max(0, round(float(value)))) for value in values)
    return red, green, blue


def _records(table: pd.DataFrame) -> list[dict[str, Any]]:
    return table.to_dict("records")
