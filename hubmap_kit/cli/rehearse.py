"""`hubmap rehearse`: kernels run on this machine as Kaggle would run them, before a submission is spent."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from hubmap_kit.cli.options import INTERRUPTED
from hubmap_kit.errors import RehearsalError


def rehearse(
    what: Annotated[
        str,
        typer.Argument(
            metavar="[journey|train|infer|tiles|faults]",
            help="All kernels in turn; one as it is rendered; or what must fail.",
        ),
    ] = "journey",
    layout: Annotated[str, typer.Option(help="Kaggle's layout of /kaggle/input: new, flat or both.")] = "both",
    slides: Annotated[int, typer.Option(help="Slides of the hidden test set; 529 is its real size.")] = 12,
    faults: Annotated[bool, typer.Option(help="Broken, missing and odd files among the hidden slides.")] = True,
    largest: Annotated[int, typer.Option(min=160, help="Longest side of a hidden slide in pixels.")] = 4500,
    data: Annotated[
        Path | None, typer.Option(help="Real slides with train.csv; default: embedded ones.", show_default=False)
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Another seed gives other slides.")] = 0,
    set_: Annotated[
        list[str],
        typer.Option("--set", metavar="KEY=VALUE", help="journey, faults: override a setting of the demo experiment."),
    ] = [],
    stop_after: Annotated[
        float,
        typer.Option(
            metavar="MIN",
            help="journey: when the first training session ends itself; 0: its clock leaps there after one epoch.",
        ),
    ] = 0.0,
    sample_size: Annotated[int, typer.Option(min=256, help="Side of an embedded training slide in pixels.")] = 1536,
    minutes: Annotated[
        float, typer.Option(help="Wall clock of a session; 0: Kaggle's own, 9 hours for infer and 12 for the others.")
    ] = 0.0,
    memory_gib: Annotated[float, typer.Option(help="Memory of all processes of a session together.")] = 29.0,
    disk_gib: Annotated[float, typer.Option(help="Room in /kaggle/working.")] = 20.0,
    keep: Annotated[
        bool, typer.Option("--keep", help="Keep the slides and datasets that the rehearsal makes.")
    ] = False,
    python: Annotated[
        str, typer.Option(help="Interpreter of the environment of Kaggle's versions; default: the one that runs this.")
    ] = "",
    kernels: Annotated[
        Path | None, typer.Option(help="Rendered kernels; default: build/kernels.", show_default=False)
    ] = None,
    datasets: Annotated[
        Path | None, typer.Option(help="Staged datasets; default: build/datasets.", show_default=False)
    ] = None,
    output: Annotated[
        list[str], typer.Option(metavar="KERNEL=FOLDER", help="The output of a kernel that the rehearsed one attaches.")
    ] = [],
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for logs, outputs and report; default: build/rehearsal.", show_default=False),
    ] = None,
) -> None:
    """Run kernels as Kaggle would: no network, its folders, its versions, its limits, a hidden test set with every size
    and fault.
    """
    from hubmap_kit.rehearsal.request import Request, check_request
    from hubmap_kit.rehearsal.sandbox import check_machine

    request = Request(
        what=what,
        layouts=("new", "flat") if layout == "both" else (layout,),
        slides=slides,
        faults=faults,
        largest=largest,
        seed=seed,
        data=data,
        overrides=tuple(set_),
        stop_after=stop_after,
        sample_size=sample_size,
        minutes=minutes,
        memory_gib=memory_gib,
        disk_gib=disk_gib,
        keep=keep,
        python=python,
        out=out,
        kernels=kernels,
        datasets=datasets,
        outputs=_outputs(output),
    )
    check_request(request)
    check_machine()
    from hubmap_kit.rehearsal.jobs import rehearse_request
    from hubmap_kit.rehearsal.reporting import dice_table, problem_lines, session_table

    try:
        with _interruptible():
            result = rehearse_request(request)
    except KeyboardInterrupt:
        typer.echo("error: stopped; the kernel was ended, and nothing of the rehearsal goes on", err=True)
        sys.exit(INTERRUPTED)
    steps, failing = result.steps, result.must_fail
    parts = (session_table(steps, failing), dice_table(steps), "\n".join(problem_lines(steps, failing)))
    typer.echo("\n" + "\n\n".join(part for part in parts if part) + "\n")
    typer.echo(f"report:  {result.folder}/report.json, a log and the output of each session in its folder beside it")
    if result.picture:
        typer.echo(f"picture: {result.picture}")
    if result.kept:
        typer.echo(
            f"kept:    {result.kept}, the last rehearsal of this kind, whose output the next one attaches unless a"
            " newer one passes"
        )
    if result.wrong:
        raise RehearsalError(
            f"the rehearsal failed: {result.wrong[0]}"
            + (f" (and {len(result.wrong) - 1} more)" if len(result.wrong) > 1 else "")
        )
    typer.echo("every fault was found, each for its own reason" if what == "faults" else "the rehearsal passed")


@contextmanager
def _interruptible() -> Iterator[None]:
    """SIGTERM and a closed terminal end a rehearsal as Ctrl-C does: its sessions end, their folders are removed."""
    before = {number: signal.signal(number, signal.default_int_handler) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _outputs(words: list[str]) -> dict[str, Path]:
    found = {}
    for word in words:
        name, equals, folder = word.partition("=")
        if not equals or not folder:
            raise RehearsalError(f"--output is '{word}'; expected a kernel and a folder, such as train=FOLDER")
        found[name] = Path(folder)
    return found
