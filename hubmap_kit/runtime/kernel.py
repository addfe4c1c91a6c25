"""What a Kaggle kernel runs once its script has found, checked and installed the kit: train, infer, tiles.

Each job returns its outcome instead of raising: the script ends its log with it, whatever happened. Everything below
/kaggle/working becomes the kernel's output, so what only serves the session goes to a temporary folder.
"""

from __future__ import annotations

import logging
import re
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from hubmap_kit.errors import HubmapError, KernelError

log = logging.getLogger(__name__)
INPUT, WORKING = Path("/kaggle/input"), Path("/kaggle/working")
SUBMISSION = "submission.csv"


class Outcome(NamedTuple):
    """How a kernel ended: status complete, degraded (a valid submission, but too many slides failed), stopped (all is
    saved, the next session goes on) or failed; one sentence; more for kernel.json.
    """

    status: str
    sentence: str
    facts: Mapping[str, object] = MappingProxyType({})


def train(
    config: str,
    folds: Sequence[int] = (),
    overrides: Sequence[str] = (),
    hours: float = 11.5,
    accelerator: str = "t4x2",
    root: Path = INPUT,
    working: Path = WORKING,
    scratch: Path | None = None,
    resume: bool = False,
) -> Outcome:
    """Train `folds` (none: all) of a shipped experiment into `working`/<its name>, on all cards, within `hours` of the
    process's start.

    Goes on with the run of that name where a kernel's output with one is attached; with `resume` its absence is an
    error, for a session that begins anew without a word costs a week's quota. A tile store that is attached is used
    where it lies. `model.encoder_weights` may be the bare name of a file in an attached dataset.
    """

    def job(temporary: Path) -> Outcome:
        from hubmap_kit.runtime.accelerator import prove
        from hubmap_kit.runtime.clock import SessionClock

        clock, devices = SessionClock(hours * 3600), prove(accelerator)
        from hubmap_kit.runtime.kernel_train import train_attached
        from hubmap_kit.training.clock import OutOfTime

        try:
            return Outcome(
                "complete", train_attached(config, folds, overrides, clock, devices, root, working, temporary, resume)
            )
        except OutOfTime as stop:
            return Outcome(
                "stopped",
                f"{stop.cause}: {stop.where}; everything so far is saved in {working}, to go on "
                "attach this kernel's output to the next session (--resume)",
            )

    return _guarded(job, working, scratch)


def infer(
    overrides: Sequence[str] = (),
    hours: float = 8.5,
    accelerator: str = "t4x2",
    root: Path = INPUT,
    working: Path = WORKING,
    scratch: Path | None = None,
    weights: str = "",
) -> Outcome:
    """Segment test.csv as it is mounted with every attached run, and write `working`/submission.csv.

    `weights` is the build of published weights that must be mounted, "" takes whichever is; kernel.json names those
    that were used. Weights that were published as a blend are weighed as it says, and other runs left out; where one of
    its runs is missing, all runs count alike, because a mean scores more than empty masks. The file is always complete:
    a slide that fails, or for which no time is left, gets an empty mask. The facts count all slides and those that
    failed; with more than the share `inference.tolerated_failures` of them the outcome is degraded, and where nothing
    worked at all every mask is empty and the outcome is failed.
    """

    def job(temporary: Path) -> Outcome:
        from hubmap_kit.inference.predict import NothingWorkedError
        from hubmap_kit.runtime import mounts
        from hubmap_kit.runtime.accelerator import prove
        from hubmap_kit.runtime.clock import SessionClock
        from hubmap_kit.runtime.infer_job import predict

        (working / SUBMISSION).unlink(
            missing_ok=True
        )  # one that was there would pass for this session's, should this one fail
        clock = SessionClock(hours * 3600)
        devices = ",".join(str(device) for device in prove(accelerator))
        attached = mounts.with_weights(root, temporary, weights)
        runs = attached.runs()
        if not runs:
            raise KernelError(
                "no trained run is attached; attach the weights dataset or the output of a training; mounted are"
                f" {attached.tree()}"
            )
        runs, blend = _weighed(runs, attached.blend())
        log.info("runs: %s", ", ".join(str(run) for run in runs))
        facts = {"weights": attached.weights_ids()} | ({"blend": [run.name for run in runs]} if blend else {})
        try:
            done = predict(
                runs,
                attached.test_table(),
                working / SUBMISSION,
                None,
                overrides,
                devices,
                "degrade",
                left=clock.left,
                blend=blend,
            )
        except NothingWorkedError as error:
            return Outcome("failed", str(error), facts | _counts(error.slides, error.slides))
        report, failed = done.report, len(done.failures)
        sentence = (
            f"{done.path}: {report.rows} rows, {report.empty} empty masks, {failed} of them after a failure, "
            f"mean coverage {report.mean_coverage:.2%}"
        )
        return Outcome(
            "degraded" if done.trouble else "complete", done.trouble or sentence, facts | _counts(report.rows, failed)
        )

    outcome = _guarded(job, working, scratch)
    if outcome.status == "failed" and not (working / SUBMISSION).is_file():
        try:
            rows = _leave_empty(root, working)
            return outcome._replace(facts={**outcome.facts, **_counts(rows, rows)})
        except Exception as error:
            log.error("not even a submission of empty masks could be written: %s", error)
    return outcome


def tiles(
    config: str, overrides: Sequence[str] = (), root: Path = INPUT, working: Path = WORKING, scratch: Path | None = None
) -> Outcome:
    """Cut the training slides at an experiment's scale into `working`/stores/<fingerprint>, for training kernels to
    attach.
    """

    def job(temporary: Path) -> Outcome:
        from hubmap_kit import experiment
        from hubmap_kit.competition.tables import read_train
        from hubmap_kit.runtime import mounts
        from hubmap_kit.tiles.convert import open_or_build
        from hubmap_kit.training.run import of_organs

        data = mounts.inputs(root, temporary).competition()
        settings = experiment.load(config, overrides, str(data))
        slides = of_organs(read_train(data / "train.csv"), settings.data)
        store = open_or_build(working / "stores", slides, settings.scale, settings.tiles)
        return Outcome(
            "complete", f"{store.folder}: {len(store)} slides, {len(store.tiles)} tiles of {settings.tiles.size} px"
        )

    return _guarded(job, working, scratch)


def run_name(name: str) -> str:
    """The folder of an experiment's run: its name, without what a folder cannot be called."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip(".-") or "run"


def _guarded(job: Callable[[Path], Outcome], working: Path, scratch: Path | None = None) -> Outcome:
    """Run a job with a folder for what is not output; whatever it raises becomes a failed outcome."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr, force=True)
    logging.getLogger("hubmap_kit").setLevel(logging.INFO)
    try:
        from hubmap_kit.runtime.facts import facts_line

        try:
            log.info(facts_line(working))
        except Exception as error:
            log.warning("the facts of this machine are unknown: %s", error)  # a line of the log is not worth a session
        with tempfile.TemporaryDirectory(prefix="hubmap-session-", ignore_cleanup_errors=True) as made:
            return job(scratch or Path(made))
    except HubmapError as error:
        return Outcome("failed", str(error))
    except Exception as error:
        # A traceback belongs into the log; its last line must still be the script's marker.
        log.exception("unexpected")
        if "out of memory" in str(error):
            return Outcome(
                "failed",
                "the card ran out of memory; lower training.batch_size, inference.batch_size or tiles.size with --set",
            )
        return Outcome("failed", f"{type(error).__name__}: {' '.join(str(error).split())}")


def _weighed(runs: list[Path], blend: Path | None) -> tuple[list[Path], Path | None]:
    """The runs of the blend in its order, and the blend; all runs and no blend where it cannot be used."""
    if blend is None:
        return runs, None
    from hubmap_kit.inference.blend import runs_among

    try:
        chosen = runs_among(blend, runs)
    except HubmapError as error:
        log.warning("the blend is not used, all runs count alike: %s", error)
        return runs, None
    for run in runs:
        if run not in chosen:
            log.info("%s is no run of the blend and is left out", run)
    return chosen, blend


def _counts(slides: int, failed: int) -> dict[str, int]:
    """What the end marker tells of the slides."""
    return {"slides": slides, "failed_slides": failed}


def _leave_empty(root: Path, working: Path) -> int:
    from hubmap_kit.runtime import mounts
    from hubmap_kit.runtime.infer_job import empty_submission

    # No dataset is unfolded for this, so there is no need for a folder to do it in.
    rows = empty_submission(mounts.inputs(root, working).test_table(), working / SUBMISSION)
    log.warning("%s holds %d empty masks, so that there is a complete file", working / SUBMISSION, rows)
    return rows
