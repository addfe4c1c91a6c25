"""`hubmap bundle` and `hubmap push`: build a dataset of the kit, and put it on Kaggle."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from hubmap_kit.cli.options import INTERRUPTED
from hubmap_kit.errors import PublishError, did_you_mean

KINDS = ("code", "weights", "tiles", "pretrained")
Paths = list[Path] | None


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


def push(
    what: Annotated[
        str,
        typer.Argument(metavar="|".join(KINDS), help="The kit's wheels, trained runs, tile stores or encoder weights."),
    ],
    paths: Annotated[
        Paths,
        typer.Argument(
            metavar="[PATH]...",
            help="Runs, tile stores or encoder weights; the same as --run, --store or --weights.",
            show_default=False,
        ),
    ] = None,
    run: Annotated[Paths, typer.Option(help="weights: a run folder; may be repeated, inference averages them.")] = None,
    blend: Annotated[
        Path | None,
        typer.Option(
            help="weights: weigh the runs as this blend says; name its runs only where they have moved.",
            show_default=False,
        ),
    ] = None,
    store: Annotated[Paths, typer.Option(help="tiles: a tile store; may be repeated.")] = None,
    weights: Annotated[
        Paths, typer.Option(help="pretrained: a file of encoder weights, or a packed folder; may be repeated.")
    ] = None,
    staged: Annotated[
        Path | None,
        typer.Option(help="Push this staged folder as it is, such as build/datasets/code.", show_default=False),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Stage in this folder; default: build/datasets/WHAT in the checkout.", show_default=False),
    ] = None,
    allow_dirty: Annotated[
        bool,
        typer.Option("--allow-dirty", help="code: also with changes that are not committed; the build id says so."),
    ] = False,
    allow_unfinished: Annotated[
        bool, typer.Option("--allow-unfinished", help="weights: also folds whose training has not ended.")
    ] = False,
    force: Annotated[
        bool,
        typer.Option(
            "--force", help="Upload even what Kaggle holds already or may hold, and do not wait for an earlier push."
        ),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Stage, look at Kaggle, say what would happen; upload nothing.")
    ] = False,
    timeout: Annotated[
        float, typer.Option(metavar="MIN", min=0, help="How long to wait for Kaggle after an upload.")
    ] = 30.0,
    poll: Annotated[
        float, typer.Option(metavar="SECONDS", min=0.01, hidden=True, help="Time between two looks.")
    ] = 10.0,
) -> None:
    """Put a dataset on Kaggle, private: code, weights, tiles or pretrained.

    Uploads nothing that is there already; waits until it is there.
    """
    if what not in KINDS:
        raise PublishError(f"'{what}' is no dataset of the kit; expected {', '.join(KINDS)}{did_you_mean(what, KINDS)}")
    if paths and (what == "code" or staged):
        raise PublishError(
            f"{paths[0]} was named, but {'--staged names the folder' if staged else 'code is that of the checkout'};"
            " leave it out"
        )
    given = {"weights": run, "tiles": store, "pretrained": weights}
    if what in given:
        given[what] = [*(paths or ()), *(given[what] or ())]
    of_weights = ("--blend", [blend]) if blend else ("--run", given["weights"])
    _check_inputs(
        what,
        {"weights": of_weights, "tiles": ("--store", given["tiles"]), "pretrained": ("--weights", given["pretrained"])},
        staged,
    )
    try:
        if staged is None and blend is not None:
            staged = _stage_blend(blend, out, allow_unfinished, given["weights"] or ())
        folder = staged or _stage(what, given.get(what) or [], out, allow_dirty, allow_unfinished)
        _push(what, folder, force, dry_run, timeout * 60, poll)
    except KeyboardInterrupt:
        typer.echo("error: stopped; the same command again goes on from what Kaggle holds by then", err=True)
        sys.exit(INTERRUPTED)


def _check_inputs(what: str, options: dict[str, tuple[str, Paths]], staged: Path | None) -> None:
    for kind, (option, given) in options.items():
        if given and (kind != what or staged):
            raise PublishError(
                f"{option} goes with 'hubmap push {kind}' without --staged, not with '{what}'; leave it out"
            )
        if not given and kind == what and not staged:
            raise PublishError(f"'hubmap push {what}' needs {option}, at least once")


def _stage(what: str, inputs: list[Path], out: Path | None, allow_dirty: bool, allow_unfinished: bool) -> Path:
    from hubmap_kit.publish import staging
    from hubmap_kit.publish.root import repository

    if what == "code":
        return staging.stage_code(repository(), out, allow_dirty)
    if what == "weights":
        return staging.stage_weights(inputs, out, allow_unfinished=allow_unfinished)
    return staging.stage_tiles(inputs, out) if what == "tiles" else staging.stage_pretrained(inputs, out)


def _stage_blend(blend: Path, out: Path | None, allow_unfinished: bool, runs: Sequence[Path] = ()) -> Path:
    """Stage the runs of a blend: those that it names, or those among `runs` that hold its weights, wherever they lie by
    now.
    """
    from hubmap_kit.inference.blend import read_blend, runs_among, runs_at, weights_id
    from hubmap_kit.publish import staging

    content = read_blend(blend)
    if runs:
        known = {run.weights_id for run in content.runs}
        if strange := [run for run in runs if weights_id(run) not in known]:
            raise PublishError(
                f"{strange[0]} holds weights that {blend} does not weigh; leave it out, or fit the blend again with"
                " 'hubmap blend'"
            )
    found = runs_among(blend, runs) if runs else runs_at(blend)
    return staging.stage_weights(found, out, [run.name for run in content.runs], allow_unfinished, blend)


def _push(what: str, folder: Path, force: bool, dry_run: bool, timeout_s: float, poll_s: float) -> None:
    from hubmap_kit.publish.client import Kaggle
    from hubmap_kit.publish.metadata import dataset_slug
    from hubmap_kit.publish.push import check_staged, described, look, push_dataset, uploaded
    from hubmap_kit.publish.ready import version_words
    from hubmap_kit.publish.session import dataset_page

    build = check_staged(folder, what)
    with Kaggle(pause_s=min(2.0, poll_s)) as client:
        ref = f"{client.owner}/{dataset_slug(what)}"
        if dry_run:
            plan = look(client, build, what, force)
            typer.echo("\n".join(f"{path.stat().st_size:>14,} bytes  {path.name}" for path in uploaded(folder)))
            typer.echo(f"{folder}: {described(folder)}, build {build.build_id}")
            typer.echo(f"dry run, nothing was uploaded; it would be: {plan.action} ({plan.why})")
            return
        done = push_dataset(client, folder, what, force=force, timeout_s=timeout_s, poll_s=poll_s, build=build)
    typer.echo(f"{ref}: {done.action}, {version_words(done.version)}, build {build.build_id}; {dataset_page(ref)}")
