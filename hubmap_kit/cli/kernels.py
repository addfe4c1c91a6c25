"""`hubmap kernels`: render kernels, push one, follow it to its end."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hubmap_kit.cli.options import INTERRUPTED, fold_numbers
from hubmap_kit.errors import PublishError

if TYPE_CHECKING:
    from hubmap_kit.publish.client import Kaggle
    from hubmap_kit.publish.records import Pushed

NEXT = {
    ("train", "complete"): "hubmap kernels --run infer --attach-only kernel:train --follow",
    ("train", "stopped"): "hubmap kernels --run train --resume --follow (with the same --config, --folds and --set)",
    ("infer", "complete"): 'hubmap submit --version {version} -m "what is new"',
    ("infer", "degraded"): 'hubmap submit --version {version} --force -m "what is new"',
    ("tiles", "complete"): "hubmap kernels --run train --attach kernel:tiles --follow",
}


def kernels(
    names: Annotated[
        list[str] | None,
        typer.Argument(help="train, infer, tiles; none: all, or the one of --run.", show_default=False),
    ] = None,
    run: Annotated[str, typer.Option(metavar="NAME", help="Push this kernel, so that it runs on Kaggle.")] = "",
    follow: Annotated[
        bool, typer.Option("--follow", help="Wait for the kernel's end and check it; without --run: of the last push.")
    ] = False,
    config: Annotated[str, typer.Option(help="A shipped experiment.")] = "",
    folds: Annotated[str, typer.Option(help="Fold numbers, e.g. 0,2; empty: all.")] = "",
    set_: Annotated[
        list[str], typer.Option("--set", metavar="KEY=VALUE", help="Override a setting; infer takes inference.* only.")
    ] = [],
    hours: Annotated[
        float | None,
        typer.Option(help="The kernel stops itself after these hours, with everything saved.", show_default=False),
    ] = None,
    accelerator: Annotated[str, typer.Option(help="t4x2, cpu or p100 (retired: it can be rendered, not pushed).")] = "",
    attach: Annotated[
        list[str],
        typer.Option(
            metavar="INPUT",
            help="One more input: weights, tiles, pretrained, kernel:train, owner/slug; may be repeated.",
        ),
    ] = [],
    attach_only: Annotated[
        list[str],
        typer.Option(
            metavar="INPUT",
            help="The same, without the usual inputs (infer: weights; train: its encoder weights, if any).",
        ),
    ] = [],
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the train kernel's own last output.")] = False,
    image: Annotated[str, typer.Option(help="Pin Kaggle's image: sha256:...")] = "",
    owner: Annotated[str, typer.Option(help="The Kaggle account to render for; default: that of your token.")] = "",
    out: Annotated[
        Path | None, typer.Option(help="Folder for rendered kernels; default: build/kernels.", show_default=False)
    ] = None,
    staged: Annotated[
        Path | None,
        typer.Option(
            help="The staged code bundle, staged weights beside it; default: build/datasets/code.", show_default=False
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(help="After a good end, download the kernel's output to this folder.", show_default=False),
    ] = None,
    force: Annotated[
        bool,
        typer.Option(
            "--force",
            help="Whatever a check says: code of another commit, Kaggle's weights, too little quota, a degraded end.",
        ),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Render and say what would be pushed; push nothing.")
    ] = False,
    every: Annotated[float, typer.Option(min=0.01, help="Seconds between two looks while following.")] = 30.0,
    timeout: Annotated[float, typer.Option(min=0, help="Stop following after these hours.")] = 14.0,
) -> None:
    """Render the kernels into build/kernels; with --run push one, with --follow wait for its end.

    An end is good only when Kaggle calls the kernel complete and its log ends with the marker of the very build that
    was pushed.
    """
    from contextlib import ExitStack

    from hubmap_kit.publish.client import Kaggle
    from hubmap_kit.publish.kernels import render
    from hubmap_kit.publish.metadata import KERNELS
    from hubmap_kit.publish.push import staged_builds
    from hubmap_kit.publish.root import build_folder

    chosen = _names(names or [], run, list(KERNELS))
    folder = out or build_folder() / "kernels"
    if attach and attach_only:
        raise PublishError(
            "--attach adds to the usual inputs and --attach-only replaces them; give one of the two, each as often as"
            " needed"
        )
    if follow and not run:
        with Kaggle(pause_s=min(2.0, every)) as client:
            _follow_last(client, folder, chosen, every, timeout, output, force)
        return
    with ExitStack() as stack:
        kaggle: Any = None if owner and (dry_run or not run) else stack.enter_context(Kaggle(pause_s=min(2.0, every)))
        folders = render(
            chosen,
            owner or kaggle.owner,
            staged_builds(staged, kaggle, force),
            folder,
            config or None,
            fold_numbers(folds),
            set_,
            hours,
            accelerator or None,
            attach_only or None,
            resume,
            image or None,
            attach,
        )
        for rendered in folders:
            typer.echo(_described(rendered, f"would push {rendered}" if dry_run and run else f"{rendered}"))
        if run and not dry_run:
            _push(kaggle, folder / run, force, follow, every, timeout, output)


def _push(
    client: Kaggle, folder: Path, force: bool, follow: bool, every: float, timeout: float, output: Path | None
) -> None:
    from hubmap_kit.publish.launch import launch

    try:
        pushed = launch(client, folder, force, every, timeout if follow else 0.0)
    except KeyboardInterrupt as stop:
        typer.echo(f"error: {stop or 'stopped; nothing was pushed'}", err=True)
        sys.exit(INTERRUPTED)
    version = f"version {pushed.version}" if pushed.version else "in a version without a number"
    typer.echo(f"pushed {pushed.ref} {version}, build {pushed.build_id}: {pushed.url}")
    if follow:
        _follow(client, pushed, every, timeout, output, force)
    else:
        typer.echo(f"next: hubmap kernels {pushed.kernel} --follow")


def _follow_last(
    client: Kaggle, folder: Path, names: list[str], every: float, timeout: float, output: Path | None, force: bool
) -> None:
    from hubmap_kit.publish.metadata import KERNELS
    from hubmap_kit.publish.records import Intent, Pushed, as_pushed, last_push, recover
    from hubmap_kit.publish.session import kernel_page

    if len(names) != 1 or names[0] not in KERNELS:
        raise PublishError(
            f"--follow looks at one kernel ({', '.join(KERNELS)}); name it, such as 'hubmap kernels train --follow'"
        )
    unknown = recover(client, folder / names[0])
    ref, pushed = f"{client.owner}/{KERNELS[names[0]]}", last_push(folder / names[0])
    if isinstance(unknown, Intent):
        typer.echo(
            f"warning: whether the push of {ref} at {unknown.time_utc} was taken is not known yet; its end is"
            " waited for",
            err=True,
        )
        pushed = as_pushed(unknown, kernel_page(ref), 0)
    # The last push may have been for another account.
    known = pushed if pushed is not None and pushed.ref == ref else Pushed(names[0], ref, "", 0, "", "")
    _follow(client, known, every, timeout, output, force)


def _follow(client: Kaggle, pushed: Pushed, every: float, timeout: float, output: Path | None, force: bool) -> None:
    from hubmap_kit.publish.follow import Watch, follow, still_there

    watch = Watch(
        client,
        pushed.ref,
        pushed.kernel,
        pushed.build_id or None,
        typer.echo,
        pushed.earlier_log,
        every,
        timeout,
        pushed.version or None,
        bool(pushed.time_utc),
        force,
    )
    try:
        end = follow(watch)
    except KeyboardInterrupt:
        typer.echo(
            f"error: stopped following {pushed.ref}; {still_there(pushed.kernel)}, or end it on its page", err=True
        )
        sys.exit(INTERRUPTED)
    typer.echo(f"{pushed.ref}: {end.status}, build {end.build_id}")
    if output is not None:
        paths = client.kernel_output(pushed.ref, output, version=pushed.version or None)
        typer.echo(f"{output}: {len(paths)} files of the kernel's output")
    version = pushed.version or "N"
    typer.echo(
        f"next: {NEXT.get((pushed.kernel, end.status), f'look at the output of {pushed.ref}').format(version=version)}"
    )


def _described(folder: Path, verb: str) -> str:
    """One line about a rendered kernel."""
    from hubmap_kit.publish.kernels import rendered_constants
    from hubmap_kit.publish.metadata import read_metadata

    values, constants = read_metadata(folder), rendered_constants(folder)
    sources = [*values["dataset_sources"], *values["kernel_sources"], *values.get("competition_sources", [])]
    machine = values.get("machine_shape", "no accelerator")
    settings = ", ".join(
        f"{key}={value!r}" for key, value in constants.items() if key not in ("INPUT", "WORKING", "WAIT_S")
    )
    return (
        f"{verb}: {values['id']} on {machine}, internet {'on' if values['enable_internet'] else 'off'}, from"
        f" {', '.join(sources)}; {settings}"
    )


def _names(names: list[str], run: str, known: list[str]) -> list[str]:
    if run and names and run not in names:
        raise PublishError(
            f"--run is '{run}', but {', '.join(names)} are to be rendered; name the same kernel, or leave the names out"
        )
    if run:
        return [run]
    return list(dict.fromkeys(names)) or known
