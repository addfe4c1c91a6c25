"""Rehearsals whose inputs this machine makes itself: the journey from tiles to a submission, and faults that must fail.

The journey trains in two sessions: the first is stopped, the second goes on from the first one's output.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hubmap_kit import experiment
from hubmap_kit.build_id import FILE, METADATA, read
from hubmap_kit.publish.kernels import render, rendered_constants
from hubmap_kit.publish.metadata import dataset_slug
from hubmap_kit.publish.staging import stage_code, stage_weights
from hubmap_kit.rehearsal.hidden import HiddenSet, make_hidden
from hubmap_kit.rehearsal.judge import SUBMISSION, not_resumed
from hubmap_kit.rehearsal.request import Request
from hubmap_kit.rehearsal.steps import (
    CARD,
    LocalSources,
    Plan,
    Step,
    Workspace,
    competition_files,
    judge_again,
    keep_output,
    rehearse_kernel,
    run_folder,
)
from hubmap_kit.sample.generate import generate

OWNER = "rehearsal"
CONFIG, FOLDS = "demo", (0, 1)
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
ONE_PAGE_GIB = 4096 / 2**30
CONTROL = "control"  # the session without a fault


@dataclass(frozen=True)
class Inputs:
    """What a rehearsal makes: the code bundle of the checkout, training slides, the hidden set."""

    workspace: Workspace
    request: Request
    build: str
    code: Path
    train: Path
    hidden: HiddenSet

    def sources(
        self, outputs: Mapping[str, Path] | None = None, weights: Path | None = None, rerun: bool = False
    ) -> LocalSources:
        """What a kernel may attach; in the `rerun` of a submission the hidden set replaces the public test set."""
        test = self.hidden.folder if rerun or not (self.train / "test.csv").is_file() else self.train
        datasets = {dataset_slug("code"): self.code} | ({dataset_slug("weights"): weights} if weights else {})
        return LocalSources(datasets, outputs or {}, competition_files(self.train, test))

    def render(self, name: str, into: str = "kernels", weights: Path | None = None, **choice: Any) -> Path:
        """Render a kernel for this machine into a folder of the rehearsal; it must find `weights`."""
        chosen: dict[str, Any] = {} if name == "infer" else {"config": CONFIG}
        if name != "tiles":
            chosen["accelerator"] = "t4x2" if CARD.exists() else "cpu"
        overrides = self.request.overrides
        chosen["overrides"] = [text for text in overrides if name != "infer" or text.startswith("inference.")]
        builds = {"code": self.build} | ({"weights": read(weights).build_id} if weights else {})
        return render([name], OWNER, builds, self.workspace.out / into, **chosen | choice)[0]


def make_inputs(workspace: Workspace, request: Request) -> Inputs:
    """Build the bundle of the checkout as it is, the training slides, and the hidden set."""
    code = stage_code(workspace.repository, workspace.out / "datasets" / "code", allow_dirty=True)
    train = request.data or make_sample(workspace.out / "data", request.seed, 4, request.sample_size)
    return Inputs(workspace, request, read(code).build_id, code, train, requested_hidden(workspace, request))


def requested_hidden(workspace: Workspace, request: Request) -> HiddenSet:
    """The hidden test set that was asked for."""
    return make_hidden(
        workspace.out / "hidden",
        request.slides,
        faults=request.faults,
        seed=request.seed,
        data=request.data,
        largest=request.largest,
    )


def make_sample(folder: Path, seed: int, slides_per_organ: int, size: int) -> Path:
    """Embedded slides in the competition's format, as the training data."""
    generate(folder, seed, slides_per_organ, size)
    return folder


def journey(inputs: Inputs) -> list[Step]:
    """Run all kernels in turn; the first that fails is the last, for the others would only stumble over it."""
    out = inputs.workspace.out
    steps = [rehearse_kernel(inputs.workspace, "tiles", Plan(inputs.render("tiles"), inputs.sources()))]
    if not steps[-1].verdict.passed:
        return steps
    steps += _train(inputs, keep_output(steps[-1], out / "outputs" / "tiles"))
    if not steps[-1].verdict.passed:
        return steps
    run = steps[-1].outcome.working / run_folder(rendered_constants(out / "kernels" / "train"))
    plan = _inference(inputs, run)
    for layout in inputs.request.layouts:
        steps.append(rehearse_kernel(inputs.workspace, f"infer-{layout}", replace(plan, layout=layout)))
    return steps


def _train(inputs: Inputs, outputs: dict[str, Path]) -> list[Step]:
    """A session that its own clock stops, then another that has the first one's output attached."""
    workspace, layouts, minutes = inputs.workspace, inputs.request.layouts, inputs.request.stop_after
    attach = ("kernel:tiles",)
    short = inputs.render("train", folds=FOLDS, attach=attach, hours=minutes / 60 if minutes else None)
    shim = "" if minutes else "leap"
    first = rehearse_kernel(
        workspace, "train", Plan(short, inputs.sources(outputs), layouts[0], may_stop=True, shim=shim)
    )
    if not first.verdict.passed:
        return [first]
    run = run_folder(rendered_constants(short))
    if first.verdict.status == "complete":
        first.verdict.problems.append(
            "the training was over before its session was, so nothing was left to go on with; lower --stop-after"
        )
    elif not any((first.outcome.working / run).glob("fold*/last.ckpt")):
        first.verdict.problems.append(
            "the session ended before the first epoch, so nothing was there to go on with; raise --stop-after"
        )
    if not first.verdict.passed:
        return [first]
    outputs = outputs | keep_output(first, workspace.out / "outputs" / "train")
    again = inputs.render("train", folds=FOLDS, attach=attach, resume=True)
    second = rehearse_kernel(workspace, "train-resumed", Plan(again, inputs.sources(outputs), layouts[-1]))
    if second.verdict.passed:
        second.verdict.problems += not_resumed(first.outcome.working / run, second.outcome.working / run, further=True)
    return [first, second]


def _inference(inputs: Inputs, run: Path) -> Plan:
    """The inference kernel with a trained run, on the hidden set."""
    weights = stage_weights([run], inputs.workspace.out / "datasets" / "weights")
    folder, sources = inputs.render("infer", weights=weights), inputs.sources(weights=weights, rerun=True)
    return Plan(folder, sources, inputs.request.layouts[0], inputs.hidden)


@dataclass(frozen=True)
class Fault:
    """Something that goes wrong, by a changed plan or by changed `Limits`, and a pattern for the sentence about it."""

    name: str
    sentence: str
    plan: Callable[[Inputs, Plan], Plan] = lambda _, plan: plan
    limits: Mapping[str, float] = field(default_factory=dict)


def _stale_bundle(inputs: Inputs, plan: Plan) -> Plan:
    """The dataset's former version is mounted: the same files under another build id."""
    folder = inputs.workspace.out / "datasets" / "stale"
    shutil.copytree(inputs.code, folder, ignore=shutil.ignore_patterns(METADATA), dirs_exist_ok=True)
    table = json.loads((folder / FILE).read_text(encoding="utf-8"))
    (folder / FILE).write_text(json.dumps({**table, "build_id": "000000000000-former000000"}), encoding="utf-8")
    datasets = {**plan.sources.datasets, dataset_slug("code"): folder}
    return replace(plan, sources=replace(plan.sources, datasets=datasets), shim="no-waiting")


def _no_weights(inputs: Inputs, plan: Plan) -> Plan:
    """An inference kernel that was rendered without its weights."""
    return replace(plan, folder=inputs.render("infer", "kernels-no-weights", attach=()))


def _network(_: Inputs, plan: Plan) -> Plan:
    return replace(plan, shim="network")


def _p100(inputs: Inputs, plan: Plan) -> Plan:
    """The kernel asks for a card, and the session has one that torch was not built for."""
    folder = inputs.render("infer", "kernels-p100", accelerator="t4x2")
    return replace(plan, folder=folder, shim="p100", as_rendered=True)


ROW_MISSING = r"submission\.csv has 1 problem: id \d+ is missing"
FAULTS = (
    Fault(
        "stale-bundle", r"code bundles \['000000000000-former000000'\], expected .* has not propagated", _stale_bundle
    ),
    Fault("no-weights", r"no trained run is attached", _no_weights),
    Fault("network", r"used the network.*updates\.example\.org:80 at .*", _network),
    Fault("p100", r"Tesla P100.*sm_60.*no kernels", _p100),
    Fault("memory", r"out of memory: its processes held", limits={"memory_gib": 0.2}),
    Fault("disk", r"disk full: its output filled", limits={"disk_gib": ONE_PAGE_GIB}),
    Fault("time", r"out of time: it ran past", limits={"minutes": 1 / 60}),
)


def rehearse_faults(inputs: Inputs) -> tuple[list[Step], list[str]]:
    """Rehearse inference as it should be, then with each fault; return the sessions and what did not turn out as it
    must.

    The first session must pass, every other must fail with a sentence that names its fault, and with no other one: a
    fault that hides a second one, or is taken for one, would not be recognised on Kaggle.
    """
    workspace, plan = inputs.workspace, _inference(inputs, _train_small_run(inputs))
    control = rehearse_kernel(workspace, CONTROL, plan)
    if not control.verdict.passed:
        return [control], [f"the session without a fault failed: {problem}" for problem in control.verdict.problems]
    failed = [(judge_again(control, "row-missing", plan, _drop_last_row), ROW_MISSING)]
    for fault in FAULTS:
        changed = replace(workspace, limits=replace(workspace.limits, **fault.limits))
        failed.append((rehearse_kernel(changed, fault.name, fault.plan(inputs, plan)), fault.sentence))
    wrong = [line for step, sentence in failed for line in unexpected_results(step, sentence)]
    return [control, *(step for step, _ in failed)], wrong


def _train_small_run(inputs: Inputs) -> Path:
    """Train a very small network in this process, for the kernels to attach."""
    from hubmap_kit.jobs.train import train

    out = inputs.workspace.out
    settings = experiment.load("demo", [*SMALL, *inputs.request.overrides], str(inputs.train))
    train(settings, out / "run", device="cpu", stores=out / "stores")
    return out / "run"


def _drop_last_row(working: Path) -> None:
    path = working / SUBMISSION
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    path.write_text("".join(lines[:-1]), encoding="utf-8")


def unexpected_results(step: Step, sentence: str) -> list[str]:
    """What is wrong with a session that must fail for the reason that `sentence` matches; puts that reason first."""
    verdict = step.verdict
    if verdict.passed:
        return [f"{step.name} passed, but must fail"]
    reasons = [problem for problem in verdict.problems if re.search(sentence, problem)]
    others = [problem for problem in verdict.problems if problem not in reasons]
    verdict.problems[:], verdict.notes[:], verdict.scores[:] = reasons + others, [], []
    how = "failed as it must, but besides" if reasons else "failed for another reason"
    return [f"{step.name} {how}: {problem}" for problem in others]
