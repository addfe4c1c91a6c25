"""Carrying out what `hubmap rehearse` was asked for: the journey, one kernel as it is rendered, or the faults."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from hubmap_kit import experiment
from hubmap_kit.build_id import FILE, KINDS, METADATA
from hubmap_kit.errors import RehearsalError
from hubmap_kit.publish.metadata import KERNELS, dataset_slug
from hubmap_kit.publish.root import repository
from hubmap_kit.publish.staging import stage_weights
from hubmap_kit.rehearsal import image, reporting
from hubmap_kit.rehearsal.hidden import HiddenSet, make_hidden
from hubmap_kit.rehearsal.inputs import REPORT, Shelf, competition, fresh, last, mounts, set_aside, settle, tidy
from hubmap_kit.rehearsal.journey import Kitchen, journey, not_resumed, prepare, sample
from hubmap_kit.rehearsal.judge import SUBMISSION
from hubmap_kit.rehearsal.request import Request
from hubmap_kit.rehearsal.steps import Plan, Room, Step, judge_again, rehearse, rendered, run_folder

# Rehearsals that must fail, each for its own reason: what proves that the others can.

# A network of a few thousand weights: what is rehearsed is the kernel, not the segmentation.
SMALL = (
    "data.n_folds=2",
    "scale.um_per_px=6.4",
    "tiles.size=64",
    "model.encoder=tu-test_resnet",
    "model.options={encoder_depth: 3, decoder_channels: [16, 8, 8]}",
    "training.epochs=1",
    "training.samples_per_epoch=16",
    "training.batch_size=4",
    "training.workers=0",
    "inference.window=64",
)
LITTLE_MEMORY_GIB = 0.2
LITTLE_DISK_GIB = 4096 / 2**30  # one page


@dataclass(frozen=True)
class Fault:
    """One thing that goes wrong, and a pattern that the sentence about it must fit."""

    name: str
    sentence: str
    plan: Callable[[Kitchen, Plan], Plan] = lambda _, plan: plan
    room: Callable[[Room], Room] = lambda room: room


def _attach(plan: Plan, **datasets: Path | None) -> Plan:
    """The plan with other datasets on the shelf, by kind."""
    changed = {**plan.shelf.datasets, **{dataset_slug(kind): folder for kind, folder in datasets.items()}}
    return replace(
        plan,
        shelf=Shelf(
            {name: folder for name, folder in changed.items() if folder}, plan.shelf.outputs, plan.shelf.competition
        ),
    )


def _stale(kitchen: Kitchen, plan: Plan) -> Plan:
    """The dataset's former version is mounted: the same files under another build id."""
    folder = kitchen.room.out / "datasets" / "stale"
    shutil.copytree(kitchen.code, folder, ignore=shutil.ignore_patterns(METADATA), dirs_exist_ok=True)
    table = json.loads((folder / FILE).read_text(encoding="utf-8"))
    (folder / FILE).write_text(json.dumps({**table, "build_id": "000000000000-former000000"}), encoding="utf-8")
    return replace(_attach(plan, code=folder), shim="impatient")


def _no_weights(kitchen: Kitchen, plan: Plan) -> Plan:
    """An inference kernel that was rendered without its weights."""
    return replace(plan, folder=kitchen.render("infer", "kernels-no-weights", attach=()))


def _p100(kitchen: Kitchen, plan: Plan) -> Plan:
    """The kernel asks for a card, and the session has one that torch was not built for."""
    return replace(
        plan, folder=kitchen.render("infer", "kernels-p100", accelerator="t4x2"), shim="p100", as_rendered=True
    )


def _drop_row(working: Path) -> None:
    path = working / SUBMISSION
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    path.write_text("".join(lines[:-1]), encoding="utf-8")


CONTROL = "control"
ROW_MISSING = r"submission\.csv has 1 problem: id \d+ is missing"
FAULTS = (
    Fault("stale-bundle", r"code bundles \['000000000000-former000000'\], expected .* has not propagated", _stale),
    Fault("no-weights", r"no trained run is attached", _no_weights),
    Fault(
        "network", r"used the network.*updates\.example\.org:80 at .*", lambda _, plan: replace(plan, shim="network")
    ),
    Fault("p100", r"Tesla P100.*sm_60.*no kernels", _p100),
    Fault(
        "memory", r"out of memory: its processes held", room=lambda room: replace(room, memory_gib=LITTLE_MEMORY_GIB)
    ),
    Fault("disk", r"disk full: its output filled", room=lambda room: replace(room, disk_gib=LITTLE_DISK_GIB)),
    Fault("time", r"out of time: it ran past", room=lambda room: replace(room, minutes=1 / 60)),
)


def must_fail(kitchen: Kitchen, run: Path) -> tuple[list[Step], list[str]]:
    """Rehearse inference as it should be, then with each fault; return the sessions and what did not turn out as it
    must.

    `run` is a trained run folder. The first session must pass, every other must fail with a sentence that names its
    fault, and with no other one: a fault that hides a second one, or is taken for one, would not be known as such on
    Kaggle.
    """
    weights = stage_weights([run], kitchen.room.out / "datasets" / "weights")
    plan = Plan(
        kitchen.render("infer", weights=weights),
        kitchen.shelf(weights=weights, hidden=True),
        kitchen.options.layouts[0],
        kitchen.hidden,
    )
    control = rehearse(kitchen.room, CONTROL, plan)
    if not control.verdict.passed:
        return [control], [f"the session without a fault failed: {problem}" for problem in control.verdict.problems]
    failed = [(judge_again(control, "row-missing", plan, _drop_row), ROW_MISSING)]
    for fault in FAULTS:
        failed.append((rehearse(fault.room(kitchen.room), fault.name, fault.plan(kitchen, plan)), fault.sentence))
    return [control, *(step for step, _ in failed)], [
        line for step, sentence in failed for line in surprises(step, sentence)
    ]


def surprises(step: Step, sentence: str) -> list[str]:
    """What is wrong with a session that must fail for the reason that `sentence` describes; puts that reason first."""
    verdict = step.verdict
    if verdict.passed:
        return [f"{step.name} passed, but must fail"]
    reasons = [problem for problem in verdict.problems if re.search(sentence, problem)]
    others = [problem for problem in verdict.problems if problem not in reasons]
    verdict.problems[:], verdict.notes[:], verdict.scores[:] = reasons + others, [], []
    if not reasons:
        return [f"{step.name} failed for another reason: {problem}" for problem in others]
    return [f"{step.name} failed as it must, but besides: {problem}" for problem in others]


def small_run(kitchen: Kitchen) -> Path:
    """Train a very small network in this process, for the kernels to attach."""
    from hubmap_kit.jobs.train import train

    out = kitchen.room.out / "run"
    settings = experiment.load("demo", [*SMALL, *kitchen.options.overrides], str(kitchen.train))
    train(settings, out, device="cpu", stores=kitchen.room.out / "stores")
    return out


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
    datasets = {dataset_slug(kind): request.datasets / kind for kind in KINDS}
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
