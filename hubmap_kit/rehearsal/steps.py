"""One rehearsed kernel: its rendered folder, mounted as its metadata says, run in the sandbox, judged.

A kernel finds below /kaggle/input exactly the sources that its kernel-metadata.json lists, in either of Kaggle's
layouts. Both layouts are what users report of 2026; when Kaggle shows which is not documented, so a kernel must work
with both.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from hubmap_kit import experiment
from hubmap_kit.build_id import METADATA
from hubmap_kit.errors import RehearsalError
from hubmap_kit.files import write_text
from hubmap_kit.publish.kernels import rendered_constants
from hubmap_kit.publish.metadata import KERNELS, read_metadata
from hubmap_kit.rehearsal.hidden import TRUTH, HiddenSet
from hubmap_kit.rehearsal.image import Image
from hubmap_kit.rehearsal.judge import KERNEL_JSON, SUBMISSION, Expected, Verdict, judge
from hubmap_kit.rehearsal.sandbox import GIB, Limits, Outcome, Session, run_session

log = logging.getLogger(__name__)
MINUTES = {"train": 720.0, "infer": 540.0, "tiles": 720.0}  # Kaggle's session; a code competition's 9 hours
GOVERNOR = "governor.csv"  # what the inference spent on each slide, beside the submission
CARD = Path("/dev/nvidia0")
INPUT = "/kaggle/input"
TRAIN_FILES = ("train.csv", "train_images")
TEST_FILES = ("test.csv", "test_images", "sample_submission.csv")
STAGED_BY = {
    "code": "hubmap bundle",
    "weights": "hubmap push weights --run RUN --dry-run",
    "tiles": "hubmap push tiles --store STORE --dry-run",
    "pretrained": "hubmap push pretrained --weights FILE --dry-run",
}
_ACCELERATOR = re.compile(r"^ACCELERATOR = .*$", re.MULTILINE)  # rendering writes it so
Mount = tuple[Path, str]


@dataclass(frozen=True)
class LocalSources:
    """Where a kernel's sources lie on this machine: folders by slug, the competition as files by name."""

    datasets: Mapping[str, Path] = field(default_factory=dict)
    outputs: Mapping[str, Path] = field(default_factory=dict)
    competition: Mapping[str, Path] = field(default_factory=dict)


@dataclass(frozen=True)
class Workspace:
    """What all sessions of a rehearsal share: environment, output folder, checkout, limits (minutes 0: Kaggle's)."""

    image: Image
    out: Path
    repository: Path
    limits: Limits


@dataclass(frozen=True)
class Plan:
    """What to run: a rendered folder, what it may attach, and how.

    `as_rendered` keeps its accelerator where there is no card.
    """

    folder: Path
    sources: LocalSources
    layout: str = "new"
    hidden: HiddenSet | None = None
    may_stop: bool = False
    shim: str = ""
    as_rendered: bool = False


@dataclass(frozen=True)
class Step:
    """A rehearsed session: what ran, how it went, and where its log and output are."""

    name: str
    kernel: str
    layout: str
    outcome: Outcome
    verdict: Verdict
    limits: Limits
    python: str  # "3.11"


def rehearse_kernel(workspace: Workspace, name: str, plan: Plan) -> Step:
    """Run a rendered kernel in a session of its own and judge it.

    Raises RehearsalError when there is nothing to run.
    """
    kernel, metadata, constants = read_rendered(plan.folder)
    script, notes = plan.folder / metadata["code_file"], list[str]()
    if not plan.as_rendered:
        script, notes = _for_this_machine(script, str(constants.get("ACCELERATOR", "cpu")), workspace.out / name)
    limits = replace(workspace.limits, minutes=workspace.limits.minutes or MINUTES[kernel])
    truth = (plan.hidden.masks, plan.hidden.masks.with_name(TRUTH)) if plan.hidden else ()
    inputs = kernel_mounts(metadata, plan.sources, plan.layout)
    session = Session(script, inputs, limits, (workspace.repository, *truth), plan.shim)
    outcome = run_session(session, workspace.image, workspace.out / name, name)
    verdict = judge(outcome, limits, expected_output(kernel, constants, plan))
    verdict.notes += [*notes, *_short_of_memory(limits)]
    if metadata.get("enable_internet"):
        verdict.notes.append("kernel-metadata.json asks for internet, which a rehearsal never has")
    word = "PASS" if verdict.passed else f"FAIL, {verdict.problems[0]},"
    log.info("%s: %s after %.0f s", name, word, outcome.seconds)
    return Step(name, kernel, plan.layout, outcome, verdict, limits, workspace.image.version)


def judge_again(step: Step, name: str, plan: Plan, tamper: Callable[[Path], None]) -> Step:
    """Judge a copy of a session's output after `tamper` has changed it; nothing runs."""
    kernel, _, constants = read_rendered(plan.folder)
    former = step.outcome.log.parent
    folder = former.with_name(name)
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(former, folder, symlinks=True)
    tamper(folder / "working")
    outcome = replace(step.outcome, log=folder / step.outcome.log.name, working=folder / "working")
    verdict = judge(outcome, step.limits, expected_output(kernel, constants, plan))
    return replace(step, name=name, outcome=outcome, verdict=verdict)


def expected_output(kernel: str, constants: Mapping[str, Any], plan: Plan) -> Expected:
    """What a good session of this kernel leaves behind."""
    statuses = ("complete", *(["stopped"] if plan.may_stop else []))
    build = str(constants["BUILD_ID"])
    if kernel == "infer":
        if plan.hidden is not None and _is_degraded(plan.hidden, constants.get("OVERRIDES", ())):
            statuses += ("degraded",)
        return Expected(kernel, build, statuses, (SUBMISSION, GOVERNOR), (SUBMISSION, KERNEL_JSON), plan.hidden)
    if kernel == "tiles":
        return Expected(kernel, build, statuses, ("stores/**",), ("stores", KERNEL_JSON))
    run = run_folder(constants)
    folds = [f"{run}/fold{number}/model.safetensors" for number in constants["FOLDS"]]
    done = [] if plan.may_stop else [f"{run}/thresholds.json", f"{run}/oof.csv", *folds]
    return Expected(kernel, build, statuses, (f"{run}/**",), (f"{run}/config.yaml", KERNEL_JSON, *done))


def _is_degraded(hidden: HiddenSet, overrides: Sequence[str]) -> bool:
    """Whether a kernel with these overrides must call its submission degraded for the slides made unreadable."""
    tolerated = experiment.load("baseline", overrides).inference.tolerated_failures
    return sum(slide.unreadable for slide in hidden.slides) > tolerated * len(hidden.slides)


def run_folder(constants: Mapping[str, Any]) -> str:
    """The name of the run folder that the train kernel writes."""
    from hubmap_kit.kernel.kernels import run_name  # imports torch, which a rehearsal can mostly do without

    return run_name(experiment.load(constants["CONFIG"], constants["OVERRIDES"]).name)


def keep_output(step: Step, target: Path) -> dict[str, Path]:
    """A copy of a rehearsed kernel's output, by the kernel's slug, for other kernels to attach."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(step.outcome.working, target, symlinks=True)
    return {KERNELS[step.kernel]: target}


def read_rendered(folder: Path) -> tuple[str, dict[str, Any], dict[str, Any]]:
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


def competition_files(train: Path, test: Path) -> dict[str, Path]:
    """The competition's files by name: the training part of one folder and the test part of another, as far as each
    has them.
    """
    parts = ((train, TRAIN_FILES), (test, TEST_FILES))
    return {name: folder / name for folder, names in parts for name in names if (folder / name).exists()}


def kernel_mounts(metadata: Mapping[str, Any], sources: LocalSources, layout: str) -> tuple[Mount, ...]:
    """The mounts of a kernel; raises RehearsalError for a missing source, with the command that makes it."""
    found = list(_mounts(metadata, sources, layout))
    targets = [target for _, target in found]
    if twice := [target for index, target in enumerate(targets) if target in targets[:index]]:
        raise RehearsalError(f"two sources of the kernel would be mounted at {twice[0]}; rename one, or leave it out")
    return tuple(found)


def _mounts(metadata: Mapping[str, Any], sources: LocalSources, layout: str) -> Iterator[Mount]:
    def place(kind: str, source: str) -> str:
        return f"{INPUT}/{kind}/{source}" if layout == "new" else f"{INPUT}/{_slug(source)}"

    for source in metadata.get("dataset_sources", []):
        command = STAGED_BY.get(_slug(source).rpartition("-")[2])
        only_own = "a rehearsal knows the kit's own datasets only; leave it out"
        advice = f"stage it with '{command}'" if command else only_own
        yield from _entries(source, sources.datasets, place("datasets", source), advice)
    for source in metadata.get("kernel_sources", []):
        advice = f"rehearse or download it, and name its folder with --output {_slug(source)}=FOLDER"
        yield from _entries(source, sources.outputs, place("notebooks", source), advice)
    for source in metadata.get("competition_sources", []):
        for name, path in sources.competition.items():
            yield path, f"{place('competitions', source)}/{name}"


def _entries(source: str, known: Mapping[str, Path], target: str, advice: str) -> list[Mount]:
    """Entry by entry, because the metadata beside staged files is not uploaded."""
    folder = known.get(_slug(source))
    if folder is None or not folder.is_dir():
        where = f"{folder} does not exist" if folder else "nothing on this machine stands for it"
        raise RehearsalError(f"the kernel attaches {source}, but {where}; {advice}")
    return [(path, f"{target}/{path.name}") for path in sorted(folder.iterdir()) if path.name != METADATA]


def _slug(source: str) -> str:
    return source.rpartition("/")[2]


def step_summary(step: Step) -> dict[str, Any]:
    """A step for report.json."""
    outcome, verdict = step.outcome, step.verdict
    limits = asdict(step.limits)
    del limits["scratch_gib"]
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
        "limits": limits,
        "problems": verdict.problems,
        "notes": verdict.notes,
        "dice": verdict.dice,
        "slides": [
            {name: getattr(each.slide, name) for name in ("id", "organ", "source", "fault")}
            | {"dice": round(each.dice, 4)}
            for each in verdict.scores
        ],
        "network": list(outcome.network),
        "probes": outcome.probes,
        "log": str(outcome.log),
        "working": str(outcome.working),
    }
