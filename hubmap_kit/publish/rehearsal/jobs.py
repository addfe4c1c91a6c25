"""Carrying out what `hubmap rehearse` was asked for: the journey, one kernel as it is rendered, or the faults."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hubmap_kit.publish.kernel_metadata import KERNELS
from hubmap_kit.publish.metadata import slug
from hubmap_kit.publish.rehearsal import image, reporting
from hubmap_kit.publish.rehearsal.hidden import HiddenSet, make_hidden
from hubmap_kit.publish.rehearsal.inputs import Shelf, competition, mounts
from hubmap_kit.publish.rehearsal.journey import journey, prepare, sample
from hubmap_kit.publish.rehearsal.must_fail import CONTROL, must_fail, small_run
from hubmap_kit.publish.rehearsal.request import Request
from hubmap_kit.publish.rehearsal.room import fresh, tidy
from hubmap_kit.publish.rehearsal.steps import Plan, Room, Step, rehearse, rendered
from hubmap_kit.publish.root import repository
from hubmap_kit.runtime.build_id import KINDS

IMAGE = "venv"


@dataclass(frozen=True)
class Result:
    """All sessions, what did not turn out as it must, and where the report and the picture are."""

    steps: list[Step]
    wrong: list[str]
    folder: Path
    picture: Path | None
    must_fail: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether everything turned out as it must."""
        return not self.wrong


def run(request: Request) -> Result:
    """Carry out a rehearsal that `request.check` has passed. Raises RehearsalError when it cannot be set up; a failed kernel is a Result."""
    root = repository()
    build = root / "build" / "rehearsal"
    name = IMAGE if not request.python else f"{IMAGE}-{Path(request.python).name}"
    ready = image.prepare(build / name, root / "constraints.txt", request.python)
    out = fresh((request.out or build) / request.what)
    room = Room(ready, out, root, request.minutes, request.memory_gib, request.disk_gib)
    steps, hidden, wrong = _all_faults(room, request) if request.what == "faults" else _sessions(room, request)
    picture = _picture(out / "hidden.png", steps, hidden)
    failing = tuple(step.name for step in steps if step.name != CONTROL) if request.what == "faults" else ()
    result = Result(steps, wrong, out, picture, failing)
    reporting.write_report(out / "report.json", request.what, result.passed, steps, {"wrong": wrong})
    if not request.keep:
        tidy(out)
    return result


def _sessions(room: Room, request: Request) -> tuple[list[Step], HiddenSet | None, list[str]]:
    if request.what == "journey":
        kitchen = prepare(room, request.options)
        steps, hidden = journey(kitchen), kitchen.hidden
    else:
        steps, hidden = _rendered(room, request)
    return steps, hidden, [f"{step.name}: {problem}" for step in steps for problem in step.verdict.problems]


def _all_faults(room: Room, request: Request) -> tuple[list[Step], HiddenSet | None, list[str]]:
    kitchen = prepare(room, request.options)
    steps, wrong = must_fail(kitchen, small_run(kitchen))
    return steps, kitchen.hidden, wrong


def _rendered(room: Room, request: Request) -> tuple[list[Step], HiddenSet | None]:
    """A kernel as `hubmap kernels` rendered it, with the datasets as they are staged."""
    build, options = room.repository / "build", request.options
    folder = (request.kernels or build / "kernels") / request.what
    staged = request.datasets or build / "datasets"
    rehearsed = {name: build / "rehearsal" / name / name / "working" for name in KERNELS} | dict(request.outputs)
    datasets, outputs = {slug(kind): staged / kind for kind in KINDS}, {KERNELS[name]: path for name, path in rehearsed.items()}
    mounts(rendered(folder)[1], Shelf(datasets, outputs), "new")  # what is missing is said before slides are drawn
    infers = request.what == "infer"
    train = options.data or sample(room.out / "data", options.seed, *((1, 256) if infers else (4, options.sample_size)))
    hidden = make_hidden(room.out / "hidden", options.slides, options.faults, options.seed, options.data, options.largest) if infers else None
    test = hidden.folder if hidden else train if (train / "test.csv").is_file() else sample(room.out / "test", options.seed, 1, 256)
    shelf = Shelf(datasets, outputs, competition(train, test))
    layouts: Sequence[str] = options.layouts if infers else options.layouts[:1]
    names = [f"{request.what}-{layout}" if len(layouts) > 1 else request.what for layout in layouts]
    plans = [Plan(folder, shelf, layout, hidden, may_stop=request.what == "train") for layout in layouts]
    return [rehearse(room, name, plan) for name, plan in zip(names, plans, strict=True)], hidden


def _picture(path: Path, steps: Sequence[Step], hidden: HiddenSet | None) -> Path | None:
    scored = next((step for step in reversed(steps) if step.verdict.scores), None)
    if hidden is None or scored is None:
        return None
    reporting.picture(path, hidden, scored.verdict.scores)
    return path
