"""`hubmap submit`: hand in a kernel version, wait for its score, keep it in the ledger."""

from __future__ import annotations

import sys
from datetime import UTC
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hubmap_kit.cli.options import INTERRUPTED
from hubmap_kit.errors import PublishError

if TYPE_CHECKING:
    from hubmap_kit.publish.client import Kaggle, Submission
    from hubmap_kit.publish.submit import Entry, Lost, Ran

# In the ref of a row without an answer, where Kaggle did not tell which submission was the latest before it.
UNKNOWN = "unknown"


def submit(
    kernel: Annotated[str, typer.Option(help="owner/slug or slug of the kernel.")] = "hubmap-infer",
    version: Annotated[
        int | None, typer.Option(min=1, help="Its version; default: the last one pushed from here.", show_default=False)
    ] = None,
    message: Annotated[str, typer.Option("--message", "-m", help="What is new; shown on Kaggle.")] = "",
    run: Annotated[
        Path | None, typer.Option(help="The run that was handed in; the ledger lies in its folder.", show_default=False)
    ] = None,
    ledger: Annotated[
        Path | None,
        typer.Option(
            help="Another place for the list of submissions; without --run: runs/submissions.csv.", show_default=False
        ),
    ] = None,
    file: Annotated[str, typer.Option(help="The output file to hand in.")] = "submission.csv",
    wait: Annotated[bool, typer.Option(help="Wait for the score; the run on the hidden slides takes hours.")] = True,
    refresh: Annotated[
        bool, typer.Option("--refresh", help="Hand nothing in; complete the ledger's pending rows.")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Hand in whatever a look at the kernel says, also a degraded run.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Look at the kernel and say what would be handed in; hand nothing in.")
    ] = False,
    every: Annotated[float, typer.Option(min=0.01, help="Seconds between two looks while waiting.")] = 60.0,
    timeout: Annotated[float, typer.Option(min=0, help="Stop waiting after these hours.")] = 12.0,
    rendered: Annotated[
        Path | None, typer.Option(help="Folder of rendered kernels; default: build/kernels.", show_default=False)
    ] = None,
) -> None:
    """Hand a finished kernel version in to the competition, wait for its score and keep both in submissions.csv."""
    from hubmap_kit.publish.answers import a_check
    from hubmap_kit.publish.client import Kaggle
    from hubmap_kit.publish.submit import Entry, check, limits
    from hubmap_kit.report import submissions as book

    table = ledger or book.submissions_file(run or book.RUNS)
    if run is not None and not run.is_dir():
        raise PublishError(f"{run} is no folder; give the run that was handed in with --run")
    book.read_submissions(table)  # a damaged file is found before a submission is spent
    if refresh:
        _refresh(table, every)
        return
    if not message.strip():
        raise PublishError("--message is missing; say what is new in this submission, Kaggle and the ledger show it")
    with Kaggle(pause_s=min(2.0, every)) as client:
        ref = kernel if "/" in kernel else f"{client.owner}/{kernel}"
        entry = Entry(ref, version or _last_version(client, ref, rendered), file, message)
        ran = check(client, entry, force)
        with a_check(force):
            _check_lost(client, table)
        if dry_run:
            builds = f"build {ran.build_id or 'unknown'}, weights {ran.weights or 'unknown'}"
            typer.echo(
                f"would hand in {entry.file} of {entry.kernel} version {entry.version}, {builds}; {limits(client)}"
            )
            return
        _hand_in(client, entry, ran, run, table, every, timeout if wait else 0.0)


def _hand_in(client: Kaggle, entry: Entry, ran: Ran, run: Path | None, table: Path, every: float, hours: float) -> None:
    from hubmap_kit.publish import submit as job

    number = _ask(client, entry, ran, run, table, every)
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
        raise PublishError(
            f"submission {number} failed to score ({found.error or 'no reason given'}); try the kernel with 'hubmap"
            " rehearse'"
        )


def _ask(client: Kaggle, entry: Entry, ran: Ran, run: Path | None, table: Path, every: float) -> int:
    """Hand in, with a row in the ledger before and after: whatever comes between, it can be looked up what became of
    it.
    """
    import uuid
    from datetime import datetime

    from hubmap_kit.publish import submit as job
    from hubmap_kit.publish.client import AnswerLost
    from hubmap_kit.publish.session import submissions_page
    from hubmap_kit.report import submissions as book

    dice, newest = book.oof_dice(run) if run else None, job.newest(client, entry.competition)
    token = f"after-{UNKNOWN if newest is None else newest}-{uuid.uuid4().hex[:8]}"
    row = {
        "time_utc": datetime.now(UTC).isoformat(timespec="seconds"),
        "run": run or "",
        "kernel": entry.kernel,
        "version": entry.version,
        "build_id": ran.build_id,
        "weights_id": ran.weights,
        "message": entry.message,
        "ref": token,
        "status": book.ASKED,
        "oof_dice": dice,
    }
    book.add_submission(table, row)
    page = submissions_page(entry.competition)
    look = (
        f"it may have been taken all the same, and each one counts: 'hubmap submit --refresh --ledger {table}' asks, as"
        f" {page} shows too"
    )
    try:
        number = job.submit(client, entry)
    except AnswerLost as error:
        mine = next(row for row in book.read_submissions(table) if row["ref"] == token)
        found = job.wait_for_lost(client, _lost(table, mine), min(every, 5.0), entry.competition)
        if found is None:
            raise PublishError(f"{error}; {look}") from error
        number = found
        typer.echo(f"warning: {error}; but Kaggle's list has it as submission {number}", err=True)
    except KeyboardInterrupt:
        typer.echo(f"error: stopped while {entry.kernel} version {entry.version} was being handed in; {look}", err=True)
        sys.exit(INTERRUPTED)
    except PublishError:
        book.complete_submission(table, token, ref="", status=book.REFUSED)
        raise
    # Before the ledger, so that the number is seen whatever happens to that.
    typer.echo(f"submission {number}: {entry.file} of {entry.kernel} version {entry.version} was handed in")
    book.complete_submission(table, token, ref=number, status=book.PENDING)
    return number


def _settle(table: Path, number: int, found: Submission) -> None:
    """Say what became of a submission, and keep it in the ledger."""
    from hubmap_kit.report import submissions as book

    if found.status == "COMPLETE":
        typer.echo(
            f"submission {number}: public {_score(found.public_score)}, private {_score(found.private_score)}; kept in"
            f" {table}"
        )
    else:
        typer.echo(f"submission {number}: {found.status.lower()} {found.error}".rstrip())
    book.complete_submission(
        table, number, status=found.status, public_score=found.public_score, private_score=found.private_score
    )


def _refresh(table: Path, every: float) -> None:
    from hubmap_kit.publish.client import Kaggle
    from hubmap_kit.report import submissions as book

    rows = book.pending_submissions(table)
    if not rows:
        typer.echo(f"{table} has no pending submission")
        return
    with Kaggle(pause_s=min(2.0, every)) as client:
        failures = []
        for row in rows:
            try:
                _refresh_row(client, table, row)
            except PublishError as error:  # the rows after it are not its fault
                failures.append(f"submission {row['ref']}: {error}")
                typer.echo(f"warning: {failures[-1]}", err=True)
    if failures:
        raise PublishError(
            f"{len(failures)} of {len(rows)} pending rows of {table} could not be completed ({failures[0].rstrip('.')})"
        )


def _check_lost(client: Kaggle, table: Path) -> None:
    """Raise PublishError where an earlier submission without an answer was taken, or may have been: each one counts."""
    from hubmap_kit.report import submissions as book

    for row in book.pending_submissions(table):
        if row["status"] != book.ASKED:
            continue
        try:
            number = _looked_up(client, table, row)
        except PublishError as error:
            raise PublishError(f"{str(error).rstrip('.')}, or hand in another with --force") from error
        if number:
            raise PublishError(
                f'the submission "{row["message"]}" of {row["time_utc"]}, whose answer was lost, was taken as'
                f" submission {number}; get its score with "
                f"'hubmap submit --refresh --ledger {table}', or run this again to hand in another"
            )


def _looked_up(client: Kaggle, table: Path, row: dict[str, str]) -> int | None:
    """The number of a submission without an answer, kept in its row as well; None where it was not taken.

    Raises PublishError where Kaggle's list cannot tell.
    """
    from hubmap_kit.publish.submit import find_lost
    from hubmap_kit.report import submissions as book

    number = find_lost(client, _lost(table, row))
    book.complete_submission(table, row["ref"], ref=number or "", status=book.PENDING if number else book.REFUSED)
    return number


def _refresh_row(client: Kaggle, table: Path, row: dict[str, str]) -> None:
    from hubmap_kit.report import submissions as book

    ref = row["ref"]
    if row["status"] == book.ASKED:
        ref = str(_looked_up(client, table, row) or "")
        if not ref:
            typer.echo(
                f'the submission "{row["message"]}" of {row["time_utc"]} is not in Kaggle\'s list, so it was not taken;'
                " hand it in again"
            )
            return
    if not ref.isdigit():
        raise PublishError(
            f"{table} has a pending row whose ref is '{ref}'; expected the submission's number, mend the row"
        )
    _settle(table, int(ref), client.submission(int(ref)))


def _lost(table: Path, row: dict[str, str]) -> Lost:
    """What is known of a request without an answer, from its row; its ref says which submission was the latest before
    it.
    """
    from datetime import datetime

    from hubmap_kit.publish.submit import Lost
    from hubmap_kit.report import submissions as book

    words = row["ref"].split("-")
    if len(words) != 3 or not (words[1].isdigit() or words[1] == UNKNOWN):
        raise PublishError(
            f"{table} has a row without an answer whose ref is '{row['ref']}'; put the submission's number there, or"
            " delete the row"
        )
    try:
        asked = datetime.fromisoformat(row["time_utc"]).astimezone(UTC)
    except ValueError:
        asked = datetime.fromtimestamp(0, UTC)
    known = {other["ref"] for other in book.read_submissions(table)}
    return Lost(row["message"], None if words[1] == UNKNOWN else int(words[1]), asked, known)


def _last_version(client: Kaggle, ref: str, rendered: Path | None) -> int:
    """The version of the last push from here to an address. Raises PublishError where it is not known."""
    from hubmap_kit.publish.metadata import KERNELS
    from hubmap_kit.publish.records import Intent, last_push, recover
    from hubmap_kit.publish.root import build_folder
    from hubmap_kit.publish.session import kernel_page

    folder, give = rendered or build_folder() / "kernels", f"give the number that {kernel_page(ref)} shows for it"
    for name in KERNELS:
        unknown = recover(client, folder / name)
        if isinstance(unknown, Intent) and unknown.ref == ref:
            raise PublishError(
                f"--version is missing, and whether the push of {ref} at {unknown.time_utc} was taken is not known;"
                f" {give}"
            )
        pushed = last_push(folder / name)
        if pushed is not None and pushed.ref == ref:
            if not pushed.version:
                raise PublishError(f"--version is missing, and Kaggle named none when {ref} was pushed; {give}")
            return pushed.version
    raise PublishError(f"--version is missing, and no push of {ref} from here is known; {give}")


def _score(value: float | None) -> str:
    return "not shown" if value is None else f"{value:.5f}"
