"""Carrying out what `hubmap rehearse` was asked for: the journey, one kernel as it is rendered, or the faults.

A rehearsal's folder is made anew each time. What the last one left is set aside until the new one has passed: it may be
the only output to go on with.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from hubmap_kit.build_id import KINDS
from hubmap_kit.errors import RehearsalError
from hubmap_kit.publish.metadata import KERNELS, dataset_slug
from hubmap_kit.publish.root import repository
from hubmap_kit.rehearsal import reporting
from hubmap_kit.rehearsal.hidden import HiddenSet
from hubmap_kit.rehearsal.image import prepare_image
from hubmap_kit.rehearsal.journey import CONTROL, journey, make_inputs, make_sample, rehearse_faults, requested_hidden
from hubmap_kit.rehearsal.judge import not_resumed
from hubmap_kit.rehearsal.request import Request
from hubmap_kit.rehearsal.sandbox import Limits, remove_tree
from hubmap_kit.rehearsal.steps import (
    LocalSources,
    Plan,
    Step,
    Workspace,
    competition_files,
    kernel_mounts,
    read_rendered,
    rehearse_kernel,
    run_folder,
)

IMAGE = "venv"
MARKER, REPORT = ".hubmap-rehearsal", "report.json"
BULKY = ("data", "test", "hidden", "datasets", "outputs", "stores")  # what can be made again


@dataclass(frozen=True)
class Result:
    """All sessions, what did not turn out as it must, and where the report and the picture are.

    `must_fail` names the sessions with a fault; `kept` is the last good rehearsal where this one failed.
    """

    steps: list[Step]
    wrong: list[str]
    folder: Path
    picture: Path | None
    must_fail: tuple[str, ...] = ()
    kept: Path | None = None


def rehearse_request(request: Request) -> Result:
    """Carry out a rehearsal that `check_request` has passed.

    Raises RehearsalError when it cannot be set up; a failed kernel is a Result.
    """
    root = repository()
    build = root / "build" / "rehearsal"
    home = (request.out or build) / request.what
    request = _with_sources(request, root, home)
    name = IMAGE if not request.python else f"{IMAGE}-{Path(request.python).name}"
    image = prepare_image(build / name, root / "constraints.txt", request.python)
    out = start_folder(home)
    request = replace(request, outputs={name: _moved(path, home) for name, path in request.outputs.items()})
    limits = Limits(request.minutes, request.memory_gib, request.disk_gib)
    workspace = Workspace(image, out, root, limits)
    steps, hidden, wrong = _run_sessions(workspace, request)
    failing = tuple(step.name for step in steps if step.name != CONTROL) if request.what == "faults" else ()
    picture = reporting.draw_hidden(out / "hidden.png", hidden, steps) if hidden else None
    reporting.write_report(out / REPORT, request.what, steps, wrong)
    if not request.keep:
        for name in BULKY:
            remove_tree(out / name)
    return Result(steps, wrong, out, picture, failing, finish_folder(home, not wrong))


def _with_sources(request: Request, root: Path, home: Path) -> Request:
    """The request with everything named that one kernel attaches; what is missing is said before anything is made."""
    named = [("--data", request.data), ("--kernels", request.kernels), ("--datasets", request.datasets)]
    named += [("--output", path) for path in request.outputs.values() if not _is_inside(path, last_good(home))]
    for option, path in named:
        if path is not None and (_is_inside(path, home) or _is_inside(path, previous(home))):
            raise RehearsalError(
                f"{option} is {path}, but this rehearsal makes {home} anew; copy it elsewhere, or choose another folder"
                " with --out"
            )
    if request.what not in KERNELS:
        return request
    build = root / "build"
    kernels, datasets = request.kernels or build / "kernels", request.datasets or build / "datasets"
    outputs = {name: _last_output(name, home.parent, build / "rehearsal") for name in KERNELS} | dict(request.outputs)
    request = replace(request, kernels=kernels, datasets=datasets, outputs=outputs)
    kernel_mounts(read_rendered(kernels / request.what)[1], _local_sources(request), "new")
    return request


def _last_output(kernel: str, *folders: Path) -> Path:
    """The output of a kernel's own last good rehearsal, in the first of the folders that holds one."""
    found = [last_good(folder / kernel) / kernel / "working" for folder in folders]
    return next((path for path in found if path.is_dir()), found[0])


def _moved(path: Path, home: Path) -> Path:
    """Where an output lies now: a former rehearsal of the same name has been set aside."""
    return previous(home) / path.resolve().relative_to(home.resolve()) if _is_inside(path, home) else path


def _is_inside(path: Path, folder: Path) -> bool:
    return path.resolve().is_relative_to(folder.resolve())


def _local_sources(request: Request) -> LocalSources:
    assert request.datasets is not None
    datasets = {dataset_slug(kind): request.datasets / kind for kind in KINDS}
    return LocalSources(datasets, {KERNELS[name]: path for name, path in request.outputs.items()})


def _run_sessions(workspace: Workspace, request: Request) -> tuple[list[Step], HiddenSet | None, list[str]]:
    if request.what == "faults":
        inputs = make_inputs(workspace, request)
        steps, wrong = rehearse_faults(inputs)
        return steps, inputs.hidden, wrong
    hidden: HiddenSet | None = None
    if request.what == "journey":
        inputs = make_inputs(workspace, request)
        steps, hidden = journey(inputs), inputs.hidden
    else:
        steps, hidden = _rehearse_rendered(workspace, request)
    for step in steps:
        if request.data and step.verdict.scores:
            step.verdict.notes.append(
                "the hidden slides are made of training slides, so this Dice says nothing about new ones"
            )
    return steps, hidden, [f"{step.name}: {problem}" for step in steps for problem in step.verdict.problems]


def _rehearse_rendered(workspace: Workspace, request: Request) -> tuple[list[Step], HiddenSet | None]:
    """A kernel as `hubmap kernels` rendered it, with the datasets as they are staged."""
    assert request.kernels is not None
    folder, infers = request.kernels / request.what, request.what == "infer"
    train, hidden = request.data, requested_hidden(workspace, request) if infers else None
    if train is None:
        train = make_sample(workspace.out / "data", request.seed, *((1, 256) if infers else (4, request.sample_size)))
    test = hidden.folder if hidden else train
    if not (test / "test.csv").is_file():
        test = make_sample(workspace.out / "test", request.seed, 1, 256)
    sources = replace(_local_sources(request), competition=competition_files(train, test))
    layouts: Sequence[str] = request.layouts if infers else request.layouts[:1]
    steps = []
    for layout in layouts:
        name = f"{request.what}-{layout}" if len(layouts) > 1 else request.what
        plan = Plan(folder, sources, layout, hidden, may_stop=request.what == "train")
        steps.append(rehearse_kernel(workspace, name, plan))
    constants = read_rendered(folder)[2]
    if constants.get("RESUME") and steps[0].verdict.passed:
        run = run_folder(constants)
        steps[0].verdict.problems += not_resumed(request.outputs["train"] / run, steps[0].outcome.working / run)
    return steps, hidden


def start_folder(folder: Path) -> Path:
    """An empty folder; the better one of two former rehearsals is set aside.

    Raises RehearsalError where something lies that no rehearsal made.
    """
    aside = previous(folder)
    for path in (folder, aside):
        _check_own(path)
    if last_good(folder) == folder and folder.exists() and any(folder.iterdir()):
        remove_tree(aside)
        folder.rename(aside)
    remove_tree(folder)
    folder.mkdir(parents=True)
    (folder / MARKER).touch()
    return folder


def finish_folder(folder: Path, passed: bool) -> Path | None:
    """Remove what was set aside once the new rehearsal has passed; otherwise return where it is, if anywhere."""
    aside = previous(folder)
    if passed:
        remove_tree(aside)
    return aside if aside.is_dir() else None


def last_good(folder: Path) -> Path:
    """Where the last good rehearsal of `folder` lies: there, or set aside because a later one failed or broke off."""
    aside = previous(folder)
    return aside if _worth(aside) > _worth(folder) else folder


def previous(folder: Path) -> Path:
    """Where the former rehearsal of `folder` is set aside."""
    return folder.with_name(f"{folder.name}.previous")


def _worth(folder: Path) -> int:
    """-1: there is nothing; 0: broken off; 1: failed; 2: passed."""
    if not folder.is_dir():
        return -1
    try:
        return 2 if json.loads((folder / REPORT).read_text(encoding="utf-8"))["passed"] else 1
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def _check_own(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise RehearsalError(f"{folder} is a file; choose a folder with --out")
    if folder.exists() and any(folder.iterdir()) and not (folder / MARKER).is_file():
        raise RehearsalError(f"{folder} is not empty and was not made by a rehearsal; choose another folder with --out")
