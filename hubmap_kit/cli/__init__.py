"""The verbs of publishing: each module adds its own to the verb table."""

from __future__ import annotations

from importlib import import_module

import typer

VERBS = ("bundle", "push", "kernels", "plan", "submit", "rehearse")


def add_all(app: typer.Typer) -> None:
    """Add every publishing verb, in the order in which they are used."""
    for name in VERBS:
        import_module(f"{__name__}.{name}").add(app)
