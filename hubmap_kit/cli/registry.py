"""The one list of verbs, in the groups and the order of `hubmap --help`. Heavy imports happen inside the verbs."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from typing import Annotated

import click
import typer
from typer.core import TyperGroup

import hubmap_kit
from hubmap_kit.cli import data, external, kernels, plan, predict, push, rehearse, study, submit, train

Verb = Callable[..., None] | typer.Typer

GROUPS: dict[str, tuple[Verb, ...]] = {
    "data": (
        data.sample,
        data.eda,
        data.tiles,
        data.augment,
        data.mosaic,
        external.external,
        external.pseudo,
    ),
    "train": (
        train.demo,
        train.config,
        train.models,
        train.pretrained,
        train.lr_find,
        train.train,
        train.notebook,
    ),
    "predict": (
        predict.evaluate,
        predict.tune_thresholds,
        predict.blend,
        predict.predict,
        predict.check_submission,
    ),
    "study": (
        study.tune,
        study.ledger,
        study.compare,
    ),
    "kaggle": (
        push.bundle,
        push.push,
        kernels.kernels,
        plan.plan,
        submit.submit,
        rehearse.rehearse,
    ),
}


class GroupedHelp(TyperGroup):
    """The verbs under the headings that their registry gives them as `rich_help_panel`."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Verbs by group; within a group in the order of the registry, sub-apps last."""
        order = list(GROUPS)
        return sorted(self.commands, key=lambda name: order.index(_group(self.commands[name])))

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write one section a group."""
        names = self.list_commands(ctx)
        room = formatter.width - 6 - max(map(len, names))
        for group in GROUPS:
            rows = [
                (name, self.commands[name].get_short_help_str(room))
                for name in names
                if _group(self.commands[name]) == group
            ]
            with formatter.section(group):
                formatter.write_dl(rows, col_max=max(map(len, names)))


def _group(command: click.Command) -> str:
    return str(getattr(command, "rich_help_panel", ""))


def build(groups: dict[str, tuple[Verb, ...]]) -> typer.Typer:
    """The program `hubmap` with these verbs; a function is named after itself, a sub-app after its `info.name`."""
    program = typer.Typer(
        name="hubmap",
        cls=GroupedHelp,
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        help="Segment tissue slides: train folds, predict with views and ensembles, write a valid submission.csv.",
    )
    program.callback()(_set_up)
    for group, verbs in groups.items():
        for verb in verbs:
            if isinstance(verb, typer.Typer):
                program.add_typer(verb, rich_help_panel=group)
            else:
                program.command(rich_help_panel=group)(verb)
    return program


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"hubmap {hubmap_kit.__version__}")
        raise typer.Exit


def _set_up(
    verbose: Annotated[
        int, typer.Option("--verbose", "-v", count=True, help="-v: more log lines and the traceback of an error.")
    ] = 0,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr, force=True)
    logging.getLogger("hubmap_kit").setLevel(logging.DEBUG if verbose else logging.INFO)


app = build(GROUPS)
