"""The verbs for slides from elsewhere and made from others: `hubmap external add`, `restain`, `merge`, `lung`, and
`hubmap pseudo`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hubmap_kit.cli.options import fold_numbers

external = typer.Typer(
    name="external",
    no_args_is_help=True,
    help="Slides from elsewhere in the competition's format, and tables joined.",
    rich_markup_mode=None,
)


@external.command()
def add(
    source: Annotated[Path, typer.Argument(help="Folder of slides: tif, png, jpg.")],
    organ: Annotated[str, typer.Option(help="kidney, prostate, largeintestine, spleen or lung.")],
    um_per_px: Annotated[float, typer.Option(help="Width of a pixel in micrometres.")],
    source_name: Annotated[str, typer.Option(help="One word for the source, e.g. glas.")],
    out: Annotated[Path, typer.Option(help="The data folder to write or to add to.")],
    masks: Annotated[
        Path | None,
        typer.Option(help="Folder of masks named like the slides; without: to test.csv.", show_default=False),
    ] = None,
    like: Annotated[
        str, typer.Option(metavar="HPA|Hubmap", help="The source of the competition that they stand for.")
    ] = "HPA",
    thickness: Annotated[
        float | None, typer.Option(help="Thickness in um; default: usual for organ and --like.", show_default=False)
    ] = None,
    licence: Annotated[str, typer.Option(help="Licence of the slides.")] = "",
    provenance: Annotated[str, typer.Option(help="Where they come from: a text or an address.")] = "",
    parents: Annotated[
        Path | None,
        typer.Option(help="CSV (file,parent): slides made from others, by the others' ids.", show_default=False),
    ] = None,
    against: Annotated[
        Path | None,
        typer.Option(help="Data folder; a copy of one of its slides becomes its descendant.", show_default=False),
    ] = None,
) -> None:
    """Bring a folder of slides, with or without masks, into the competition's folder format."""
    from hubmap_kit.jobs.external import REFUSED, Source
    from hubmap_kit.jobs.external import add as job

    done = job(
        source,
        out,
        Source(organ, um_per_px, source_name, like, thickness, licence, provenance),
        masks,
        parents,
        against,
    )
    table = "test.csv (no masks)" if masks is None else "train.csv"
    typer.echo(
        f"{out}/{table}: {len(done.new)} slides added, {len(done.known)} were there, {len(done.refused)} refused"
    )
    if done.refused:
        typer.echo(f"reasons: {out / REFUSED}")


@external.command()
def restain(
    data: Annotated[Path, typer.Argument(help="Data folder or train table of the slides.")],
    out: Annotated[Path, typer.Option(help="The data folder to write: the copies alone.")],
    copies: Annotated[
        int | None, typer.Option(min=1, help="Copies of each slide; default: one a look.", show_default=False)
    ] = None,
    looks: Annotated[str, typer.Option(metavar="LOOK,LOOK", help="Of pas, he, test, in turn.")] = "pas,he,test",
    references: Annotated[
        Path | None, typer.Option(help="Folder of pictures named by stain; default: drawn ones.", show_default=False)
    ] = None,
    reduce: Annotated[int, typer.Option(metavar="1|2|4", help="How many times coarser copies are.")] = 1,
    test: Annotated[
        list[Path],
        typer.Option(help="Picture of the look test; may be repeated; default: test_images/.", show_default=False),
    ] = [],
    jobs: Annotated[int, typer.Option(min=1, help="Slides at a time, about 0.6 GB of memory each.")] = 1,
) -> None:
    """Copy training slides in the stains of others; join the copies with 'external merge'."""
    from hubmap_kit.jobs.restain import LEFT_OUT, SHEET, prepare
    from hubmap_kit.jobs.restain import restain as job

    plan = prepare(data, out, copies, looks, references, reduce, test)
    typer.echo(plan.told)
    done = job(plan, jobs)
    typer.echo(f"{out}/train.csv: {len(done.rows)} copies, {done.kept} of them were there; look at {out / SHEET}")
    if done.left_out:
        typer.echo(f"{len(done.left_out)} slides are left out; reasons: {out / LEFT_OUT}")
    typer.echo(f"next: hubmap external merge {data} {out} --out ALL")


@external.command()
def merge(
    tables: Annotated[list[Path], typer.Argument(help="Data folders, or train tables with their slides beside them.")],
    out: Annotated[Path, typer.Option(help="The data folder to write; slides become links.")],
    replace: Annotated[
        bool, typer.Option("--replace", help="A later row wins over an earlier one of the same slide.")
    ] = False,
    folds: Annotated[
        Path | None, typer.Option(help="A run's folds.csv, whose numbers are kept.", show_default=False)
    ] = None,
    n_folds: Annotated[
        int | None, typer.Option(min=2, help="Number of folds; default: as in --folds, else 5.", show_default=False)
    ] = None,
) -> None:
    """Join train tables by links, with folds that keep descendants with their parents."""
    from hubmap_kit.jobs.external import FOLDS
    from hubmap_kit.jobs.external import merge as job

    done = job(tables, out, replace, folds, n_folds)
    typer.echo("\n".join(f"{path}: {count} slides" for path, count in done.by_table.items()))
    typer.echo(
        f"{out}: {done.slides} slides; next: hubmap train --data {out} --set data.folds_csv={out / FOLDS} --set"
        f" data.n_folds={done.n_folds}"
    )


@external.command()
def lung(
    table: Annotated[Path, typer.Argument(help="Data folder or train table.")],
    out: Annotated[Path, typer.Option(help="The data folder to write; slides become links.")],
    style: Annotated[
        str, typer.Option(metavar="third-place|type-two", help="The list of oddly labelled lungs.")
    ] = "third-place",
    weight: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Keep them, with this weight; default: leave out.", show_default=False),
    ] = None,
) -> None:
    """Leave out, or weigh down, the lung slides that are labelled in another way."""
    from hubmap_kit.jobs.external import lungs

    count = lungs(table, out, style, weight)
    typer.echo(f"{out}/train.csv: {count} lung slides " + ("left out" if weight is None else f"with weight {weight:g}"))


def pseudo(
    runs: Annotated[list[Path], typer.Argument(help="Run folders; their folds label the slides together.")],
    data: Annotated[Path, typer.Option(help="Folder with test.csv (else train.csv), or the table itself.")],
    out: Annotated[Path, typer.Option(help="Folder for train.csv, pseudo.csv and contact sheets.")],
    confidence: Annotated[float, typer.Option(help="Least mean |p - 0.5| within the tissue, 0 to 0.5.")] = 0.35,
    inside: Annotated[float, typer.Option(help="Least mean probability within the mask.")] = 0.5,
    agreement: Annotated[float, typer.Option(help="Least mean Dice between folds, where several speak.")] = 0.8,
    coverage: Annotated[
        list[str],
        typer.Option(metavar="ORGAN=LEAST:MOST", help="Share of the slide that a mask may cover; may be repeated."),
    ] = [],
    only: Annotated[str, typer.Option(metavar="ID,ID", help="Only these slides.")] = "",
    weight: Annotated[float, typer.Option(help="The weight of these labels, in the column weight.")] = 1.0,
    folds: Annotated[str, typer.Option(help="Fold numbers, e.g. 0,2; empty: all.")] = "",
    set_: Annotated[
        list[str], typer.Option("--set", metavar="KEY=VALUE", help="Override a setting of inference; may be repeated.")
    ] = [],
    device: Annotated[str, typer.Option(help="auto (a GPU if there is one), cpu, cuda, cuda:1.")] = "auto",
) -> None:
    """Label slides with an ensemble, and keep the labels that it is sure of as a train table."""
    from hubmap_kit.jobs.pseudo import pseudo as job
    from hubmap_kit.jobs.pseudo import rules_from

    rules, numbers = rules_from(confidence, inside, agreement, coverage), fold_numbers(folds)
    done = job(runs, data, out, rules, numbers, set_, device, [one for one in only.split(",") if one], weight)
    typer.echo(f"{out}/train.csv: {len(done.kept)} slides kept, {len(done.refused)} refused, version {done.version}")
    typer.echo(f"why: {out}/pseudo.csv; look at kept.png and refused.png beside it")
