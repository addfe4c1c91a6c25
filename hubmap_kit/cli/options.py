"""Options that several verbs share, each written down once, and the exit code of Ctrl-C."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hubmap_kit.errors import HubmapError

INTERRUPTED = 130  # what typer makes of Ctrl-C
Set = Annotated[
    list[str],
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Override a setting, e.g. --set training.lr=3e-4; may be repeated."
    ),
]
Device = Annotated[str, typer.Option(help="auto (a GPU if there is one), cpu, cuda, cuda:1.")]
Folds = Annotated[str, typer.Option(help="Fold numbers, e.g. 0,2; empty: all.")]
Stores = Annotated[Path | None, typer.Option(help="Folder of tile stores; default: 'stores' beside the run.")]
Config = Annotated[str, typer.Option(help="A shipped experiment or a YAML file.")]
Data = Annotated[str, typer.Option(help="Folder with train.csv and train_images/.")]


def fold_numbers(text: str) -> list[int] | None:
    """The numbers of `--folds`, such as "0,2"; None for an empty text, which means all.

    Raises HubmapError for anything else.
    """
    try:
        return [int(part) for part in text.split(",")] if text else None
    except ValueError as error:
        raise HubmapError(f"--folds is '{text}'; expected numbers such as 0,2") from error
