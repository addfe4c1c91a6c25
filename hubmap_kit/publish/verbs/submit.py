"""`hubmap submit`: hand in a kernel version, wait for its score, keep it in the ledger."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hubmap_kit.errors import PublishError

if TYPE_CHECKING:
    from hubmap_kit.publish.client import Kaggle, Submission
    from hubmap_kit.publish.launch import Pushed
    from hubmap_kit.publish.submit import Entry

INTERRUPTED = 130


def add(app: typer.Typer) -> None:
    """Add `hubmap submit`."""
    app.command()(submit)


def submit(
    kernel: Annotated[str, typer.Option(help="owner/slug or slug of the kernel.")] = "hubmap-infer",
    version: Annotated[int | None, typer.Option(min=1, help="Its version; default: the last one pushed from here.", show_default=False)] = None,
    message: Annotated[str, typer.Option("--message", "-m", help="What is new; shown on Kaggle.")] = "",
    run: Annotated[Path | None, typer.Option(help="The run that was handed in; the ledger lies in its folder.", show_default=False)] = None,
    ledger: Annotated[Path | None, typer.Option(help="Another place for the ledger; without --run: runs/ledger.csv.", show_default=False)] = None,
    file: Annotated[str, typer.Option(help="The output file to hand in.")] = "submission.csv",
    wait: Annotated[bool, typer.Option(help="Wait for the score; the run on the hidden slides takes hours.")] = True,
    refresh: Annotated[bool, typer.Option("--refresh", help="Hand nothing in; complete the ledger's pending rows.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Hand in without looking at the kernel first.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Look at the kernel and say what would be handed in; hand nothing in.")] = False,
    every: Annotated[float, typer.Option(min=0.01, help="Seconds between two looks while waiting.")] = 60.0,
    timeout: Annotated[float, typer.Option(min=0, help="Stop waiting after these hours.")] = 12.0,
    rendered: Annotated[Path | None, typer.Option(help="Folder of rendered kernels; default: build/kernels.", show_default=False)] = None,
) -> None:
    """Hand a finished kernel version in to the competition, wait for its score and keep both in ledger.csv."""
    from hubmap_kit.publish.client import Kaggle
    from hubmap_kit.publish.submit import Entry, check, limits
    from hubmap_kit.report import ledger as book

    table = ledger or (run / book.NAME if run else Path("runs") / book.NAME)
    if run is not None and not run.is_dir():
        raise PublishError(f"{run} is no folder; give the run that was handed in with --run")
    book.read(table)  # a damaged ledger is found before a submission is spent
    if refresh:
        _refresh(table)
        return
    if not message.strip():
        raise PublishError("--message is missing; say what is new in this submission, Kaggle and the ledger show it")
    with Kaggle() as client:
        ref = kernel if "/" in kernel else f"{client.owner}/{kernel}"
        pushed = _last_push(ref, rendered)
        entry = Entry(ref, _version(version, pushed, ref), file, message)
        build = "" if force else check(client, entry, pushed.version if pushed else None)
        if dry_run:
            typer.echo(f"would hand in {entry.file} of {entry.kernel} version {entry.version}, build {build or 'unknown'}; {limits(client)}")
            return
        _hand_in(client, entry, build, run, table, every, timeout if wait else 0.0)


def _hand_in(client: Kaggle, entry: Entry, build: str, run: Path | None, table: Path, every: float, hours: float) -> None:
    from datetime import datetime, timezone

    from hubmap_kit.publish import submit as job
    from hubmap_kit.report import ledger as book

    dice = book.oof_dice(run) if run else None
    number = job.submit(client, entry)
    # First of all, so that the number is seen whatever happens to the ledger.
    typer.echo(f"submission {number}: {entry.file} of {entry.kernel} version {entry.version} was handed in")
    row = {
        "time_utc": datetime.now(timezone.utc).isoformat(timespec="seconds"), "run": run or "", "kernel": entry.kernel, "version": entry.version,
        "build_id": build, "message": entry.message, "ref": number, "status": book.PENDING, "oof_dice": dice,
    }  # fmt: skip
    book.append(table, row)
    later = f"look in some hours with 'hubmap submit --refresh --ledger {table}'"
    if not hours:
        typer.echo(later)
        return
    try:
        found = job.wait(client, number, every, hours)
    except KeyboardInterrupt:
        typer.echo(f"error: stopped waiting for submission {number}; Kaggle scores it all the same, {later}", err=True)
        sys.exit(INTERRUPTED)
    if found is None:
        raise PublishError(f"submission {number} has no score after {hours:g} h; {later}")
    _settle(table, number, found)
    if found.status != "COMPLETE":
        raise PublishError(f"submission {number} failed to score ({found.error or 'no reason given'}); try the kernel with 'hubmap rehearse'")


def _settle(table: Path, number: int, found: Submission) -> None:
    """Say what became of a submission, and keep it in the ledger."""
    from hubmap_kit.report import ledger as book

    if found.status == "COMPLETE":
        typer.echo(f"submission {number}: public {_score(found.public_score)}, private {_score(found.private_score)}; kept in {table}")
    else:
        typer.echo(f"submission {number}: {found.status.lower()} {found.error}".rstrip())
    book.complete(table, number, status=found.status, public_score=found.public_score, private_score=found.private_score)


def _refresh(table: Path) -> None:
    from hubmap_kit.publish.client import Kaggle
    from hubmap_kit.report import ledger as book

    rows = book.pending(table)
    if not rows:
        typer.echo(f"{table} has no pending submission")
        return
    with Kaggle() as client:
        for row in rows:
            if not row["ref"].isdigit():
                raise PublishError(f"{table} has a pending row whose ref is '{row['ref']}'; expected the submission's number, mend the row")
            _settle(table, int(row["ref"]), client.submission(int(row["ref"])))


def _last_push(ref: str, rendered: Path | None) -> Pushed | None:
    """What was pushed from here to an address last, if anything."""
    from hubmap_kit.publish.kernel_metadata import KERNELS
    from hubmap_kit.publish.launch import last_push
    from hubmap_kit.publish.root import repository

    folder = rendered or repository() / "build" / "kernels"
    found = [pushed for name in KERNELS if (pushed := last_push(folder / name)) is not None and pushed.ref == ref]
    return found[0] if found else None


def _version(version: int | None, pushed: Pushed | None, ref: str) -> int:
    if version is not None:
        return version
    if pushed is None:
        raise PublishError(f"--version is missing, and no push of {ref} from here is known; give the number that Kaggle shows for it")
    return pushed.version


def _score(value: float | None) -> str:
    return "not shown" if value is None else f"{value:.5f}"
