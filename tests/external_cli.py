"""The verbs `hubmap external ...` and `hubmap pseudo` in this process."""

from __future__ import annotations

from pathlib import Path

import typer
from typer.testing import CliRunner

from hubmap_kit.cli import external


def hubmap(*words: str | Path) -> str:
    """Run a verb; its output. What it raises goes on."""
    app = typer.Typer()
    external.add_all(app)
    done = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=True)
    if done.exception is not None:
        raise done.exception
    return done.output
