"""Carrying out what `hubmap rehearse` was asked for: the journey, one kernel as it is rendered, or the faults."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from hubmap_kit.errors import RehearsalError
from hubmap_kit.publish.kernel_metadata import KERNELS
from hubmap_kit.publish.metadata import slug
from hubmap_kit.publish.rehearsal import image, reporting
from hubmap_kit.publish.rehearsal.hidden import HiddenSet, make_hidden
from hubmap_kit.publish.rehearsal.inputs import Shelf, competition, mounts
from hubmap_kit.publish.rehearsal.journey import journey, prepare, sample
from hubmap_kit.publish.rehearsal.must_fail import CONTROL, must_fail, small_run
from hubmap_kit.publish.rehearsal.request import Request
from hubmap_kit.publish.rehearsal.resumed import not_resumed
from hubmap_kit.publish.rehearsal.room import REPORT, fresh, last, set_aside, settle, tidy
from hubmap_kit.publish.rehearsal.steps import Plan, Room, Step, rehearse, rendered, run_folder
from hubmap_kit.publish.root import repository
from hubmap_kit.runtime.build_id import KINDS

IMAGE = "venv"


@dataclass(frozen=True)
class Result:
    """All sessions, what did not turn out as it must, and where the report and the picture are; `kept` is the last good
    output.
    """

    steps: list[Step]
    wrong: list[str]
    folder: Path
    picture: Path | None
    must_fail: tuple[str, ...] = ()
    kept: Path | None = None

    @property
    def passed(self) -> bool:
        """Whether everything turned out as it must."""
        return not self.wrong


def run(request: Request) -> Result:
    """Carry out a rehearsal that `request.check` has passed.

    Raises RehearsalError when it cannot be set up; a failed kernel is a Result.

    What the last rehearsal left is set aside until this one has passed, and may be attached to it.
    """
    root = repository()
    build = root / "build" / "rehearsal"
    home = (request.out or build) / request.what
    request = _at_hand(request, root, home)
    name = IMAGE if not request.python else f"{IMAGE}-{Path(request.python).name}"
    ready = image.prepare(build / name, root / "constraints.txt", request.python)
    out = fresh(home)
    request = replace(request, outputs={name: _moved(path, home) for name, path in request.outputs.items()})
    room = Room(ready, out, root, request.minutes, request.memory_gib, request.disk_gib)
    steps, hidden, wrong = _all_faults(room, request) if request.what == "faults" else _sessions(room, request)
    picture = _picture(out / "hidden.png", steps, hidden)
    failing = tuple(step.name for step in steps if step.name != CONTROL) if request.what == "faults" else ()
    reporting.write_report(out / REPORT, request.what, not wrong, steps, {"wrong": wrong})
    if not request.keep:
        tidy(out)
    return Result(steps, wrong, out, picture, failing, settle(home, not wrong))


def _at_hand(request: Request, root: Path, home: Path) -> Request:
    """The request with everything named that one kernel attaches.

    What is missing is said here, before anything is made or moved.
    """
    named = [("--data", request.options.data), ("--kernels", request.kernels), ("--datasets", request.datasets)]
    named += [("--output", path) for path in request.outputs.values() if not _inside(path, last(home))]
    for option, path in named:
        if path is not None and (_inside(path, home) or _inside(path, set_aside(home))):
            raise RehearsalError(
                f"{option} is {path}, but this rehearsal makes {home} anew; copy it elsewhere, or choose another folder"
                " with --out"
            )
    if request.what not in KERNELS:
        return request
    build = root / "build"
    kernels, datasets = request.kernels or build / "kernels", request.datasets or build / "datasets"
    outputs = {name: _rehearsed(name, home.parent, build / "rehearsal") for name in KERNELS} | dict(request.outputs)
    request = replace(request, kernels=kernels, datasets=datasets, outputs=outputs)
    mounts(rendered(kernels / request.what)[1], _shelf(request), "new")
    return request


def _rehearsed(kernel: str, *folders: Path) -> Path:
    """The output of a kernel's own last good rehearsal, in the first of the folders that holds one."""
    found = [last(folder / kernel) / kernel / "working" for folder in folders]
    return next((path for path in found if path.is_dir()), found[0])


def _moved(path: Path, home: Path) -> Path:
    """Where an output lies now: a former rehearsal of the same name has been set aside."""
    return set_aside(home) / path.resolve().relative_to(home.resolve()) if _inside(path, home) else path


def _inside(path: Path, folder: Path) -> bool:
    return path.resolve().is_relative_to(folder.resolve())


def _shelf(request: Request, files: dict[str, Path] | None = None) -> Shelf:
    assert request.datasets is not None
    datasets = {slug(kind): request.datasets / kind for kind in KINDS}
    return Shelf(datasets, {KERNELS[name]: path for name, path in request.outputs.items()}, files or {})


def _sessions(room: Room, request: Request) -> tuple[list[Step], HiddenSet | None, list[str]]:
    if request.what == "journey":
        kitchen = prepare(room, request.options)
        steps, hidden = journey(kitchen), kitchen.hidden
    else:
        steps, hidden = _rendered(room, request)
    for step in steps:
        if request.options.data and step.verdict.scores:
            step.verdict.notes.append(
                "the hidden slides are made of training slides, so this Dice says nothing about new ones"
            )
    return steps, hidden, [f"{step.name}: {problem}" for step in steps for problem in step.verdict.problems]


def _all_faults(room: Room, request: Request) -> tuple[list[Step], HiddenSet | None, list[str]]:
    kitchen = prepare(room, request.options)
    steps, wrong = must_fail(kitchen, small_run(kitchen))
    return steps, kitchen.hidden, wrong


def _rendered(room: Room, request: Request) -> tuple[list[Step], HiddenSet | None]:
    """A kernel as `hubmap kernels` rendered it, with the datasets as they are staged."""
    assert request.kernels is not None
    folder, options = request.kernels / request.what, request.options
    infers = request.what == "infer"
    train = options.data or sample(room.out / "data", options.seed, *((1, 256) if infers else (4, options.sample_size)))
    hidden = (
        make_hidden(room.out / "hidden", options.slides, options.faults, options.seed, options.data, options.largest)
        if infers
        else None
    )
    test = (
        hidden.folder
        if hidden
        else train
        if (train / "test.csv").is_file()
        else sample(room.out / "test", options.seed, 1, 256)
    )
    shelf = _shelf(request, competition(train, test))
    layouts: Sequence[str] = options.layouts if infers else options.layouts[:1]
    names = [f"{request.what}-{layout}" if len(layouts) > 1 else request.what for layout in layouts]
    plans = [Plan(folder, shelf, layout, hidden, may_stop=request.what == "train") for layout in layouts]
    steps = [rehearse(room, name, plan) for name, plan in zip(names, plans, strict=True)]
    constants = rendered(folder)[2]
    if constants.get("RESUME") and steps[0].verdict.passed:
        run_ = run_folder(constants)
        steps[0].verdict.problems += not_resumed(request.outputs["train"] / run_, steps[0].outcome.working / run_)
    return steps, hidden


def _picture(path: Path, steps: Sequence[Step], hidden: HiddenSet | None) -> Path | None:
    scored = next((step for step in reversed(steps) if step.verdict.scores), None)
    if hidden is None or scored is None:
        return None
    reporting.picture(path, hidden, scored.verdict.scores)
    return path
