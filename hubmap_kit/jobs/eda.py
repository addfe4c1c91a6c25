"""Exploring a train.csv: one HTML page and the tables behind it."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from hubmap_kit.errors import SlideError, TableError
from hubmap_kit.files import atomic_path
from hubmap_kit.report.eda_oddities import COLUMNS, find_oddities
from hubmap_kit.report.eda_page import Findings, eda_lead, eda_sections
from hubmap_kit.report.eda_pixels import choose_examples, colours_by_source, read_pixels, unit_frame
from hubmap_kit.report.eda_tables import measure_masks, organ_summary, read_slides_and_donors
from hubmap_kit.report.html import write_page
from hubmap_kit.report.tables import text_table

log = logging.getLogger(__name__)
TABLES = ("train.csv", "train.csv.gz")
PAGE = "index.html"


@dataclass(frozen=True)
class Eda:
    """What was written, and the table per organ."""

    page: Path
    organs: pd.DataFrame
    slides: int
    files: int
    oddities: int

    @property
    def summary(self) -> str:
        """The table per organ for the terminal."""
        rows = [
            [
                row["organ"],
                f"{row['slides']}",
                f"{row['share']:.1%}",
                f"{row['coverage_mean']:.2%}",
                f"{row['units']}",
                f"{row['units_cut']}",
            ]
            for row in self.organs.to_dict("records")
        ]
        total = [
            "all",
            f"{self.slides}",
            "100.0%",
            "",
            f"{self.organs['units'].sum()}",
            f"{self.organs['units_cut'].sum()}",
        ]
        return text_table(["organ", "slides", "share", "coverage", "units", "cut at necks"], [*rows, total])


def eda(source: Path, out: Path, images: Path | None = None) -> Eda:
    """Write `out`/index.html, organs.csv, slides.csv, units.csv, sources.csv (where slides are present) and
    oddities.csv.

    `source` is a train.csv, a train.csv.gz, or a folder with one. Slide files are looked for in `images`, by default
    train_images/ beside the table; without them, the parts of the page that need pixels say so. Raises TableError,
    RleError, and SlideError for a folder that was named and is not there.
    """
    csv = _table(source)
    if images is not None and not images.is_dir():
        raise SlideError(
            f"{images} is not a folder, but the folder of the slides was expected there; check the path or leave it out"
        )
    if out.is_file():
        raise TableError(
            f"{out} is a file, but a folder for the page and its tables was expected; choose another with --out"
        )
    slides, donors = read_slides_and_donors(csv, images)
    tables = measure_masks(slides, donors)
    examples = choose_examples(tables)
    by_id = {slide.id: slide for slide in slides}
    pixels = read_pixels(slides, [unit_frame(by_id[row["id"]], row) for rows in examples.values() for row in rows])
    oddities = find_oddities(slides, donors, tables)
    oddities = pd.concat([oddities, pd.DataFrame(pixels.oddities, columns=list(COLUMNS))], ignore_index=True)
    sources, organs = colours_by_source(pixels), organ_summary(tables)
    found = Findings(slides, tables, organs, sources, oddities, pixels, examples)
    _write(out, found)
    write_page(out / PAGE, f"Exploring {csv.name}", eda_lead(found, csv.name), eda_sections(found))
    return Eda(out / PAGE, organs, len(slides), len(pixels.slides), len(oddities))


def _table(source: Path) -> Path:
    if not source.is_dir():
        return source
    for name in TABLES:
        if (source / name).is_file():
            return source / name
    raise TableError(
        f"{source} holds neither {' nor '.join(TABLES)}; name the table itself or the folder that it lies in"
    )


def _write(out: Path, found: Findings) -> None:
    slides = found.tables.slides
    if not found.pixels.slides.empty:
        slides = slides.merge(found.pixels.slides.drop(columns=["organ", "data_source"]), on="id", how="left")
    tables = {
        "organs": found.organs,
        "slides": slides,
        "units": found.tables.units,
        "sources": found.sources,
        "oddities": found.oddities,
    }
    for name, table in tables.items():
        path = out / f"{name}.csv"
        if table.columns.empty:
            path.unlink(missing_ok=True)  # of an earlier run that had slides
            continue
        with atomic_path(path) as temporary:
            table.to_csv(temporary, index=False, float_format="%.6g")
