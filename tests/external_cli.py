"""The verbs `hubmap external ...` and `hubmap pseudo` in this process."""

from __future__ import annotations

from pathlib import Path

from typer.testing import CliRunner

from hubmap_kit.cli.registry import app


def hubmap(*words: str | Path) -> str:
    """Run a verb; its output. What it raises goes on."""
    done = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=True)
    if done.exception is not None:
        raise done.exception
    return done.output
