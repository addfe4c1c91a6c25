"""Counts every network of the catalog into hubmap_kit/models/catalog.csv, and writes the table of docs/models.md from
it.

python scripts/models_table.py [NAME...]: names count these networks only; --table-only counts none. Minutes on a CPU.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from benchmarks.document import replace

from hubmap_kit.jobs.models import LEGEND
from hubmap_kit.models import catalog
from hubmap_kit.models.catalog import HEADER, NETWORKS
from hubmap_kit.progress import track

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "models.md"


def main(
    names: Annotated[list[str] | None, typer.Argument(help="Networks to count; default: all.")] = None,
    table_only: Annotated[
        bool, typer.Option("--table-only", help="Write docs/models.md from the file as it is.")
    ] = False,
) -> None:
    """Count networks and write the table."""
    path = ROOT / "hubmap_kit" / "models" / catalog.FILE
    found = dict(catalog.costs()) if path.is_file() else {}
    chosen = [] if table_only else [catalog.find(name) for name in names] if names else list(NETWORKS)
    for network in track(chosen, "count", "network"):
        found[network.name] = catalog.cost(network.settings().model)
        catalog.write_costs(found, path)
    catalog.costs.cache_clear()
    text = catalog.markdown(
        HEADER, (catalog.table_row(network, found.get(network.name)) for network in NETWORKS), text_columns=3
    )
    replace(PAGE, "catalog", f"{text}\n\n{LEGEND}\n")
    typer.echo(f"{path.relative_to(ROOT)} and {PAGE.relative_to(ROOT)} are written")


if __name__ == "__main__":
    typer.run(main)
