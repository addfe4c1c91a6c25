"""`hubmap bundle`: build the code dataset and show what it holds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def add(app: typer.Typer) -> None:
    """Add the verb."""
    app.command()(bundle)


def bundle(
    out: Annotated[
        Path | None,
        typer.Option(help="The dataset's folder; default: build/datasets/code in the checkout.", show_default=False),
    ] = None,
    allow_dirty: Annotated[
        bool, typer.Option("--allow-dirty", help="Also where files differ from the commit; the build id says so.")
    ] = False,
) -> None:
    """Build the wheels that kernels install offline, with BUILD_ID.json, from the checkout's commit."""
    from hubmap_kit.publish.bundle import build_bundle
    from hubmap_kit.publish.root import build_folder

    folder = out or build_folder() / "datasets" / "code"
    build = build_bundle(folder, allow_dirty)
    width = max(map(len, build.files))
    for name, facts in build.files.items():
        typer.echo(f"{name:<{width}}  {facts['bytes'] / 1024:>8.1f} KiB  sha256 {facts['sha256'][:12]}")
    typer.echo(f"build id: {build.build_id}")
    # A push of the default folder builds it again, which costs seconds and gives the same bytes.
    further = f" --staged {out}" if out else " --allow-dirty" if build.dirty else ""
    typer.echo(f"staged in {folder}; next: hubmap push code{further}")
