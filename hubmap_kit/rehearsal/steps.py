"""One rehearsed kernel: its rendered folder, mounted as its metadata says, run in the sandbox, judged."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hubmap_kit import experiment
from hubmap_kit.errors import RehearsalError
from hubmap_kit.files import write_text
from hubmap_kit.kernel.kernels import run_name
from hubmap_kit.publish.kernels import rendered_constants
from hubmap_kit.publish.metadata import KERNELS, read_metadata
from hubmap_kit.rehearsal.hidden import TRUTH, UNREADABLE, HiddenSet
from hubmap_kit.rehearsal.image import Image
from hubmap_kit.rehearsal.inputs import Shelf, mounts
from hubmap_kit.rehearsal.judge import KERNEL_JSON, SUBMISSION, Expected, Verdict, describe, judge
from hubmap_kit.rehearsal.sandbox import GIB, Limits, Outcome, Session, run

log = logging.getLogger(__name__)
MINUTES = {"train": 720.0, "infer": 540.0, "tiles": 720.0}  # Kaggle's session; a code competition's 9 hours
GOVERNOR = "governor.csv"  # what the inference spent on each slide, beside the submission
CARD = Path("/dev/nvidia0")
_ACCELERATOR = re.compile(r"^ACCELERATOR = .*$", re.MULTILINE)  # rendering writes it so


@dataclass(frozen=True)
class Room:
    """What all sessions of a rehearsal share: the environment, the folder for their remains, and limits (minutes 0:
    Kaggle's own).
    """

    image: Image
    out: Path
    repository: Path
    minutes: float = 0.0
    memory_gib: float = 29.0
    disk_gib: float = 20.0

    def limits(self, kernel: str) -> Limits:
        """The limits of a kernel's session."""
        return Limits(self.minutes or MINUTES[kernel], self.memory_gib, self.disk_gib)


@dataclass(frozen=True)
class Step:
    """A line of the table: what ran, how it went, and where its log and output are."""

    name: str
    kernel: str
    layout: str
    outcome: Outcome
    verdict: Verdict
    limits: Limits
    python: str  # "3.11"

    @property
    def folder(self) -> Path:
        """Where kernel.log and working/ lie."""
        return self.outcome.log.parent


@dataclass(frozen=True)
class Plan:
    """What to run: a rendered folder, what it may attach, and how.

    `as_rendered` keeps its accelerator where there is no card.
    """

    folder: Path
    shelf: Shelf
    layout: str = "new"
    hidden: HiddenSet | None = None
    may_stop: bool = False
    shim: str = ""
    as_rendered: bool = False


def rehearse(room: Room, name: str, plan: Plan) -> Step:
    """Run a rendered kernel in a session of its own and judge it.

    Raises RehearsalError when there is nothing to run.
    """
    kernel, metadata, constants = rendered(plan.folder)
    script, notes = plan.folder / metadata["code_file"], list[str]()
    if not plan.as_rendered:
        script, notes = _for_this_machine(script, str(constants.get("ACCELERATOR", "cpu")), room.out / name)
    inputs = mounts(metadata, plan.shelf, plan.layout)
    limits = room.limits(kernel)
    masks = (plan.hidden.masks, plan.hidden.masks.with_name(TRUTH)) if plan.hidden else ()
    session = Session(script, inputs, limits, (room.repository, *masks), plan.shim)
    outcome = run(session, room.image, room.out / name, name)
    verdict = judge(outcome, limits, expected(kernel, constants, plan))
    verdict.notes += [*notes, *_short_of_memory(limits)]
    if metadata.get("enable_internet"):
        verdict.notes.append("kernel-metadata.json asks for internet, which a rehearsal never has")
    log.info(
        "%s: %s after %.0f s", name, f"FAIL, {verdict.problems[0]}," if verdict.problems else "PASS", outcome.seconds
    )
    return Step(name, kernel, plan.layout, outcome, verdict, limits, room.image.version)


def judge_again(step: Step, name: str, plan: Plan, tamper: Callable[[Path], None]) -> Step:
    """Judge a copy of a session's output after `tamper` has changed it; nothing runs."""
    kernel, _, constants = rendered(plan.folder)
    folder = step.folder.with_name(name)
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(step.folder, folder, symlinks=True)
    tamper(folder / "working")
    outcome = replace(step.outcome, log=folder / step.outcome.log.name, working=folder / "working")
    return replace(
        step, name=name, outcome=outcome, verdict=judge(outcome, step.limits, expected(kernel, constants, plan))
    )


def expected(kernel: str, constants: Mapping[str, Any], plan: Plan) -> Expected:
    """What a good session of this kernel leaves behind."""
    statuses = ("complete", "stopped") if plan.may_stop else ("complete",)
    build = str(constants["BUILD_ID"])
    if kernel == "infer":
        if plan.hidden is not None and _is_broken(plan.hidden, constants.get("OVERRIDES", ())):
            statuses += ("degraded",)
        return Expected(kernel, build, statuses, (SUBMISSION, GOVERNOR), (SUBMISSION, KERNEL_JSON), plan.hidden)
    if kernel == "tiles":
        return Expected(kernel, build, statuses, ("stores/**",), ("stores", KERNEL_JSON))
    run_ = run_folder(constants)
    folds = [f"{run_}/fold{number}/model.safetensors" for number in constants["FOLDS"]]
    done = [] if plan.may_stop else [f"{run_}/thresholds.json", f"{run_}/oof.csv", *folds]
    return Expected(kernel, build, statuses, (f"{run_}/**",), (f"{run_}/config.yaml", KERNEL_JSON, *done))


def _is_broken(hidden: HiddenSet, overrides: Sequence[str]) -> bool:
    """Whether so many slides were made unreadable that a kernel with these overrides calls its submission degraded, as
    it must.
    """
    tolerated = experiment.load("baseline", overrides).inference.tolerated_failures
    return sum(slide.fault in UNREADABLE for slide in hidden.slides) > tolerated * len(hidden.slides)


def run_folder(constants: Mapping[str, Any]) -> str:
    """The name of the run folder that the train kernel writes."""
    return run_name(experiment.load(constants["CONFIG"], constants["OVERRIDES"]).name)


def keep_output(step: Step, target: Path) -> dict[str, Path]:
    """A copy of a rehearsed kernel's output, by the kernel's slug, for other kernels to attach."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(step.outcome.working, target, symlinks=True)
    return {KERNELS[step.kernel]: target}


def rendered(folder: Path) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """Name, metadata and constants of a rendered kernel. Raises RehearsalError for a folder that holds none."""
    if not (folder / "kernel-metadata.json").is_file():
        raise RehearsalError(f"{folder} holds no rendered kernel; render it with 'hubmap kernels {folder.name}'")
    constants = rendered_constants(folder)
    if not constants.get("BUILD_ID"):
        raise RehearsalError(f"{folder} names no build, so it was not rendered; run 'hubmap kernels {folder.name}'")
    return folder.name, read_metadata(folder), constants


def _for_this_machine(script: Path, accelerator: str, folder: Path) -> tuple[Path, list[str]]:
    """The script itself; where there is no card, a copy whose one line ACCELERATOR says cpu, and a note about it."""
    if CARD.exists() or accelerator == "cpu":
        return script, []
    changed, text = folder / "script" / script.name, script.read_text(encoding="utf-8")
    write_text(changed, _ACCELERATOR.sub('ACCELERATOR = "cpu"', text, count=1))
    no_card = f"this machine has no card, so ACCELERATOR was rehearsed as 'cpu' instead of '{accelerator}'"
    return changed, [f"{no_card}; the script's other lines are as rendered"]


def _short_of_memory(limits: Limits) -> list[str]:
    here = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / GIB
    short = f"this machine has {here:.1f} GiB of memory, less than the {limits.memory_gib:g} GiB of a session"
    return [f"{short}: a kernel that needs more fails in another way"] if here < limits.memory_gib else []


def summary(step: Step) -> dict[str, Any]:
    """A step for report.json."""
    outcome, verdict = step.outcome, step.verdict
    return {
        "name": step.name,
        "kernel": step.kernel,
        "layout": step.layout,
        "passed": verdict.passed,
        "status": verdict.status,
        "python": step.python,
        "seconds": round(outcome.seconds, 1),
        "peak_gib": round(outcome.peak_bytes / GIB, 3),
        "disk_gib": round(outcome.disk_bytes / GIB, 3),
        "limits": {
            "minutes": step.limits.minutes,
            "memory_gib": step.limits.memory_gib,
            "disk_gib": step.limits.disk_gib,
        },
        "problems": verdict.problems,
        "notes": verdict.notes,
        "dice": describe(verdict.scores),
        "slides": [
            {"id": s.id, "organ": s.organ, "source": s.source, "fault": s.fault, "dice": round(s.dice, 4)}
            for s in verdict.scores
        ],
        "network": [dict(note) for note in outcome.network],
        "probes": json.loads(json.dumps(dict(outcome.probes))),
        "log": str(outcome.log),
        "working": str(outcome.working),
    }
