"""What a Kaggle kernel runs once its script has found, checked and installed the kit: train, infer, tiles.

Each job returns its outcome instead of raising: the script ends its log with it, whatever happened. Everything below
/kaggle/working becomes the kernel's output, so what only serves the session goes to a temporary folder.
"""

from __future__ import annotations

import logging
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

from hubmap_kit import experiment
from hubmap_kit.competition.tables import Slide, read_train
from hubmap_kit.config import Experiment
from hubmap_kit.errors import LESS_MEMORY, CheckpointError, HubmapError, KernelError
from hubmap_kit.jobs import train as train_job
from hubmap_kit.kernel import mounts
from hubmap_kit.kernel.accelerator import adapt, detect, profile
from hubmap_kit.tiles.store import fingerprint
from hubmap_kit.training.clock import Clock
from hubmap_kit.training.history import unfinished
from hubmap_kit.training.run import of_organs

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
        from hubmap_kit.kernel.accelerator import prove
        from hubmap_kit.training.clock import SessionClock

        clock, devices = SessionClock(hours * 3600), prove(accelerator)
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
        from hubmap_kit.jobs.predict import predict
        from hubmap_kit.kernel import mounts
        from hubmap_kit.kernel.accelerator import prove
        from hubmap_kit.training.clock import SessionClock

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
        facts: dict[str, Any] = {"weights": attached.weights_ids()} | (
            {"blend": [run.name for run in runs]} if blend else {}
        )
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
        from hubmap_kit.kernel import mounts
        from hubmap_kit.tiles.store import open_or_build
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
        from hubmap_kit.kernel.accelerator import facts_line

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
            return Outcome("failed", f"the card ran out of memory; {LESS_MEMORY}")
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
    from hubmap_kit.jobs.predict import empty_submission
    from hubmap_kit.kernel import mounts

    # No dataset is unfolded for this, so there is no need for a folder to do it in.
    rows = empty_submission(mounts.inputs(root, working).test_table(), working / SUBMISSION)
    log.warning("%s holds %d empty masks, so that there is a complete file", working / SUBMISSION, rows)
    return rows


# The training kernel's own part: what is attached becomes the arguments of the train job.


def train_attached(
    config: str,
    folds: Sequence[int],
    overrides: Sequence[str],
    clock: Clock,
    devices: Sequence[torch.device],
    root: Path,
    working: Path,
    scratch: Path,
    must_resume: bool = False,
) -> str:
    """Train, and return one sentence about the result. Raises HubmapError, OutOfTime among them."""
    attached = mounts.inputs(root, scratch)
    data = attached.competition()
    settings = experiment.load(config, overrides, str(data))
    out = working / run_name(settings.name)
    resume = _bring_back(attached, out)
    if must_resume and not resume:
        raise KernelError(
            f"no attached output holds a begun run '{out.name}' to go on with; mounted are {attached.tree()}; attach"
            " the output of a session that trained an epoch, or push without --resume to begin anew"
        )
    settings = _with_weights(settings, attached, resume)
    settings = adapt(settings, detect() if devices[0].type == "cuda" else profile("cpu"), len(devices))
    stores = _link_store(
        attached, of_organs(read_train(data / "train.csv"), settings.data), settings, scratch / "stores"
    )
    names = ",".join(str(device) for device in devices)
    try:
        table = train_job.train(settings, out, list(folds) or None, resume, names, stores, clock, degrade=True)
    except CheckpointError as error:
        if not resume:
            raise
        raise KernelError(
            f"{error}; in a kernel, detach the former output or give the run another name with --set name=NAME"
        ) from error
    done, left = table[table["finished"]], list(unfinished(out, settings.training).values())
    sentence = (
        f"{out}: {done['fold'].nunique()} folds done, out-of-fold Dice {done['dice'].mean():.4f} over {len(done)}"
        " slides"
    )
    return sentence + (f"; not finished, but used if this output is attached: {', '.join(left)}" if left else "")


def _bring_back(attached: mounts.Inputs, out: Path) -> bool:
    """Copy the attached run of this name, with its checkpoints, to where it goes on; whether there was one."""
    found = attached.run_to_resume(out.name)
    if found is None:
        return False
    if out.exists():
        raise KernelError(
            f"{out} is there already although {found} is to be copied to it; start the kernel with an empty"
            f" {out.parent}"
        )
    log.info("going on with %s", found)
    # File by file: copytree would take over the mount's modes, which allow no writing.
    for source in sorted(path for path in found.rglob("*") if path.is_file()):
        target = out / source.relative_to(found)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
    return True


def _with_weights(settings: Experiment, attached: mounts.Inputs, resume: bool) -> Experiment:
    """The settings with the path of the encoder weights where only their name is given."""
    name = settings.model.encoder_weights
    if not name or Path(name).is_file():
        return settings
    try:
        # A name without an ending is a folder of packed weights, which travel one by one.
        path = attached.weights_file(Path(name).name if Path(name).suffix else f"{settings.model.encoder}.safetensors")
    except KernelError as error:
        if not resume:
            raise
        log.warning("%s; a fold that has begun does not need them", error)
        return settings
    return settings.model_copy(update={"model": settings.model.model_copy(update={"encoder_weights": str(path)})})


def _link_store(attached: mounts.Inputs, slides: Sequence[Slide], settings: Experiment, stores: Path) -> Path:
    """A folder of stores in which an attached store of these slides and this scale stands as links to its files.

    Links, because a store keeps the table of every grid beside its pixels, and a mount cannot be written.
    """
    mark = fingerprint(slides, settings.scale)
    found = attached.store(mark)
    if found is None:
        log.info("no attached tile store is of these slides and this scale (%s); it is made for this session", mark)
        return stores
    log.info("tile store %s", found)
    (stores / mark).mkdir(parents=True, exist_ok=True)
    for source in found.iterdir():
        link = stores / mark / source.name
        if not link.exists():
            link.symlink_to(source.resolve())
    return stores
