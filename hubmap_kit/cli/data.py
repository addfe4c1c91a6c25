"""The verbs that make, show and convert slides: `sample`, `eda`, `tiles`, `augment`, `mosaic`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hubmap_kit.cli.options import Set
from hubmap_kit.errors import HubmapError


def sample(
    out: Annotated[Path, typer.Argument(help="Folder for the slides and tables.")],
    seed: Annotated[int, typer.Option(help="Another seed gives other slides.")] = 0,
    slides_per_organ: Annotated[int, typer.Option(min=1, help="Training slides of each organ.")] = 4,
    size: Annotated[int, typer.Option(min=256, help="Side of a training slide in pixels.")] = 1536,
) -> None:
    """Write synthetic slides in the competition's folder format."""
    from hubmap_kit.sample.generate import generate

    if out.is_file() or (out.exists() and any(out.iterdir())):
        raise HubmapError(f"{out} is not an empty folder; choose a new one, nothing is overwritten")
    generate(out, seed, slides_per_organ, size)
    typer.echo(f"{out}: train.csv, train_images/, test.csv, test_images/, sample_submission.csv, test_truth.csv")


def eda(
    source: Annotated[
        Path,
        typer.Argument(
            help="train.csv, train.csv.gz, or the folder with one; slides in train_images/ are used where present."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder for index.html and the CSV files.")] = Path("eda"),
    images: Annotated[
        Path | None, typer.Option(help="Folder of the slides, where it is not train_images/ beside the table.")
    ] = None,
) -> None:
    """Explore a train.csv: one self-contained page, and tables per organ, slide and unit."""
    from hubmap_kit.jobs.eda import eda as job

    done = job(source, out, images)
    typer.echo(done.summary)
    typer.echo(
        f"written: {done.page}, with the tables beside it; {done.files} of {done.slides} slide files read,"
        f" {done.oddities} oddities"
    )


def tiles(
    data: Annotated[Path, typer.Argument(help="Folder with train.csv and train_images/, or the table itself.")],
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for the tiles; a store goes into a folder of its own inside.", show_default=False),
    ] = None,
    config: Annotated[
        str, typer.Option(help="A set of the first team, e.g. 3000-512-r2, 2048-512-r2, resize-512, or a YAML file.")
    ] = "",
    set_: Set = [],
    jobs: Annotated[int, typer.Option(min=1, help="Processes; the files do not depend on their number.")] = 1,
    count: Annotated[
        bool, typer.Option("--count", help="Only count the tiles of every conversion; no slides are needed.")
    ] = False,
) -> None:
    """Convert slides into tiles, resized, cropped or padded, as a store, image folders or a Kaggle dataset.

    Goes on where it was killed.
    """
    from hubmap_kit.tiles import convert_config

    settings = convert_config.load(config, set_)
    if not count and out is None:
        raise HubmapError("--out is missing; name the folder for the tiles, or count them with --count")
    from hubmap_kit.jobs import tiles as job

    if out is None or count:
        typer.echo(job.count(data, settings if config or set_ else None))
        return
    typer.echo(job.summary(job.tiles(data, out, settings, jobs), settings))


def augment(
    preview: Annotated[
        str, typer.Option(metavar="NAME", help="A pipeline, a mixing or stain method; mixing, stain: all of them.")
    ],
    out: Annotated[Path, typer.Option(help="The contact sheet to write (PNG).")] = Path("augment.png"),
    data: Annotated[str, typer.Option(help="Folder with train.csv; without it an embedded slide is shown.")] = "",
    slide: Annotated[str, typer.Option(help="Id of the slide; default: the first.")] = "",
    references: Annotated[
        str, typer.Option(help="Folder of stain references; default: embedded slides in eosin and PAS.")
    ] = "",
    size: Annotated[int, typer.Option(help="Side of a picture in pixels.")] = 480,
    seed: Annotated[int, typer.Option(min=0, help="Another seed draws other changes.")] = 0,
    engine: Annotated[
        str, typer.Option(help="classic, or batched: pipelines and jitter as one pass over a batch.")
    ] = "classic",
) -> None:
    """Show one slide under each transform of a pipeline, mixing or stain method, masks outlined."""
    from hubmap_kit.jobs.augment import preview as job

    typer.echo(f"{out}: {job(preview, out, data, slide, references, size, seed, engine)} pictures")


def mosaic(
    data: Annotated[str, typer.Option(help="Folder with train.csv and train_images/.")],
    out: Annotated[Path, typer.Option(help="Folder for images/, masks/ and mosaics.csv.")],
    count: Annotated[int, typer.Option(min=1, help="Mosaics to make.")] = 1000,
    size: Annotated[int, typer.Option(min=16, help="Side in network pixels: 256, 512 or 768 as a rule.")] = 256,
    same_organ: Annotated[bool, typer.Option(help="All four tiles of one organ.")] = False,
    seed: Annotated[int, typer.Option(min=0, help="Another seed makes other mosaics.")] = 0,
    config: Annotated[str, typer.Option(help="A shipped experiment or a YAML file: its scale is used.")] = "baseline",
    set_: Set = [],
    stores: Annotated[Path | None, typer.Option(help="Folder of tile stores; default: 'stores' inside --out.")] = None,
) -> None:
    """Make mosaics of four tiles as PNG pairs with a table of their sources."""
    from hubmap_kit import experiment
    from hubmap_kit.jobs.augment import mosaics

    typer.echo(
        f"{mosaics(experiment.load(config, set_, data), out, count, size, seed, same_organ, stores)}: {count} mosaics"
        f" of {size} px"
    )
