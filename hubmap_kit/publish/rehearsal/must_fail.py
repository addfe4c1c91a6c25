"""Rehearsals that must fail, each for its own reason: what proves that the others can."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from hubmap_kit import experiment
from hubmap_kit.publish.metadata import slug
from hubmap_kit.publish.rehearsal.inputs import Shelf
from hubmap_kit.publish.rehearsal.journey import Kitchen
from hubmap_kit.publish.rehearsal.judge import SUBMISSION
from hubmap_kit.publish.rehearsal.steps import Plan, Room, Step, judge_again, rehearse
from hubmap_kit.publish.staging import stage_weights
from hubmap_kit.runtime.build_id import FILE, METADATA

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
    changed = {**plan.shelf.datasets, **{slug(kind): folder for kind, folder in datasets.items()}}
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
    from hubmap_kit.runtime.train_job import train

    out = kitchen.room.out / "run"
    settings = experiment.load("demo", [*SMALL, *kitchen.options.overrides], str(kitchen.train))
    train(settings, out, device="cpu", stores=kitchen.room.out / "stores")
    return out
