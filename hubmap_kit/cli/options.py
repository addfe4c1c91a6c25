"""Options that several verbs of the command line have, each written down once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Set = Annotated[
    list[str],
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Override a setting, e.g. --set training.lr=3e-4; may be repeated."
    ),
]
Device = Annotated[str, typer.Option(help="auto (a GPU if there is one), cpu, cuda, cuda:1.")]
Folds = Annotated[str, typer.Option(help="Fold numbers, e.g. 0,2; empty: all.")]
Stores = Annotated[Path | None, typer.Option(help="Folder of tile stores; default: 'stores' beside the run.")]
