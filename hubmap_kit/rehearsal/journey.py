"""The whole way, rehearsed: tiles, a training that is stopped and goes on from its own output, weights, inference on a
hidden set.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hubmap_kit.build_id import read
from hubmap_kit.competition.csv_rows import read_rows
from hubmap_kit.errors import TableError
from hubmap_kit.publish.kernels import render, rendered_constants
from hubmap_kit.publish.metadata import dataset_slug
from hubmap_kit.publish.staging import stage_code, stage_weights
from hubmap_kit.rehearsal.hidden import HiddenSet, make_hidden
from hubmap_kit.rehearsal.inputs import Shelf, competition
from hubmap_kit.rehearsal.request import Options
from hubmap_kit.rehearsal.steps import CARD, Plan, Room, Step, keep_output, rehearse, run_folder
from hubmap_kit.sample.generate import generate

# Whether a training session went on where the one before it had stopped, by what the two left behind.

TIMING, METRICS = "timing.csv", "metrics.csv"


def not_resumed(before: Path, after: Path, further: bool = False) -> list[str]:
    """What speaks against it, one sentence a fold; both are folders of one run, and `before` must hold an epoch at
    least.

    What each epoch took tells: training twice on a CPU gives the same losses, but not the same seconds and tiles a
    second. With `further` the later session must have added something.
    """
    begun = [folder.name for folder in _folds(before) if _rows(folder, TIMING)]
    if not begun:
        return [
            f"the former session left no finished epoch in {before}, so nothing shows that this one went on with it"
        ]
    problems = [problem for fold in begun for problem in _fold(before / fold, after / fold)]
    if not problems:
        problems = [problem for folder in _folds(after) for problem in _counted(folder)]
    if not problems and further and _epochs(after) <= _epochs(before):
        problems = [f"no epoch came to those of the former session in {before}"]
    return problems


def _fold(before: Path, after: Path) -> list[str]:
    """A fold of the former session must stand in the later one row by row."""
    for name in (TIMING, METRICS):
        old, new = _rows(before, name), _rows(after, name)
        if len(new) < len(old):
            return [
                f"{after.name}/{name} holds {len(new)} epochs, but the former session had finished {len(old)}: they"
                " were not kept"
            ]
        for epoch, (one, two) in enumerate(zip(old, new, strict=False), start=1):
            odd = next((column for column in one if one[column] != two.get(column)), "")
            if odd:
                other = f"{odd} {two.get(odd, 'nothing')}, in the former session {one[odd]}"
                return [f"{after.name}/{name} says of epoch {epoch} {other}: it was trained again instead of kept"]
    return []


def _counted(fold: Path) -> list[str]:
    """Epochs count 1, 2, 3, ...: none was left out, and none came twice."""
    epochs = [row.get("epoch", "") for row in _rows(fold, TIMING)]
    wanted = [str(number) for number in range(1, len(epochs) + 1)]
    return (
        []
        if epochs == wanted
        else [f"{fold.name}/{TIMING} counts the epochs {', '.join(epochs)}, expected {', '.join(wanted)}"]
    )


def _epochs(run: Path) -> int:
    return sum(len(_rows(fold, TIMING)) for fold in _folds(run))


def _folds(run: Path) -> list[Path]:
    return sorted(run.glob("fold[0-9]*"))


def _rows(fold: Path, name: str) -> list[dict[str, str]]:
    """The rows without the columns that are empty: a later session may have added some."""
    try:
        found = read_rows(fold / name, ("epoch",))
    except TableError:
        return []
    return [{column: text for column, text in row.items() if text} for _, row in found]


OWNER = "rehearsal"
CONFIG, FOLDS = "demo", (0, 1)


@dataclass(frozen=True)
class Kitchen:
    """The inputs that the rehearsal makes itself: the code bundle, training data, the hidden set."""

    room: Room
    options: Options
    build: str
    code: Path
    train: Path
    hidden: HiddenSet

    def shelf(self, outputs: dict[str, Path] | None = None, weights: Path | None = None, hidden: bool = False) -> Shelf:
        """What a kernel may attach; `hidden` puts the hidden set where the public test set was, as the rerun of a
        submission does.
        """
        hidden = hidden or not (self.train / "test.csv").is_file()
        datasets = {dataset_slug("code"): self.code} | ({dataset_slug("weights"): weights} if weights else {})
        return Shelf(datasets, outputs or {}, competition(self.train, self.hidden.folder if hidden else self.train))

    def render(self, name: str, into: str = "kernels", weights: Path | None = None, **choice: Any) -> Path:
        """Render a kernel for this machine into a folder of the rehearsal; `weights` are those that it must find,
        `choice` goes to `render`.
        """
        chosen: dict[str, Any] = {} if name == "infer" else {"config": CONFIG}
        if name != "tiles":
            chosen["accelerator"] = "t4x2" if CARD.exists() else "cpu"
        chosen["overrides"] = [
            text for text in self.options.overrides if name != "infer" or text.startswith("inference.")
        ]
        builds = {"code": self.build} | ({"weights": read(weights).build_id} if weights else {})
        return render([name], OWNER, builds, self.room.out / into, **chosen | choice)[0]


def prepare(room: Room, options: Options) -> Kitchen:
    """Build the bundle of the checkout as it is, the training slides, and the hidden set."""
    code = stage_code(room.repository, room.out / "datasets" / "code", allow_dirty=True)
    train = options.data or sample(room.out / "data", options.seed, 4, options.sample_size)
    hidden = make_hidden(
        room.out / "hidden", options.slides, options.faults, options.seed, options.data, options.largest
    )
    return Kitchen(room, options, read(code).build_id, code, train, hidden)


def journey(kitchen: Kitchen) -> list[Step]:
    """Run all kernels in turn; the first that fails is the last, for the others would only stumble over it."""
    steps = [rehearse(kitchen.room, "tiles", Plan(kitchen.render("tiles"), kitchen.shelf()))]
    if not steps[-1].verdict.passed:
        return steps
    outputs = keep_output(steps[-1], kitchen.room.out / "outputs" / "tiles")
    steps += _train(kitchen, outputs)
    if not steps[-1].verdict.passed:
        return steps
    run = steps[-1].outcome.working / run_folder(rendered_constants(kitchen.room.out / "kernels" / "train"))
    weights = stage_weights([run], kitchen.room.out / "datasets" / "weights")
    return [*steps, *infer(kitchen, weights, kitchen.options.layouts)]


def infer(kitchen: Kitchen, weights: Path, layouts: Sequence[str]) -> list[Step]:
    """The inference kernel on the hidden set, once in each layout of the mounts."""
    folder = kitchen.render("infer", weights=weights)
    plans = [Plan(folder, kitchen.shelf(weights=weights, hidden=True), layout, kitchen.hidden) for layout in layouts]
    return [rehearse(kitchen.room, f"infer-{plan.layout}", plan) for plan in plans]


def _train(kitchen: Kitchen, outputs: dict[str, Path]) -> list[Step]:
    """A session that its own clock stops, then another that has the first one's output attached."""
    attach, layouts, minutes = ("kernel:tiles",), kitchen.options.layouts, kitchen.options.stop_after
    short = kitchen.render("train", folds=FOLDS, attach=attach, hours=minutes / 60 if minutes else None)
    plan = Plan(short, kitchen.shelf(outputs), layouts[0], may_stop=True, shim="" if minutes else "leap")
    first = rehearse(kitchen.room, "train", plan)
    if not first.verdict.passed:
        return [first]
    if first.verdict.status == "complete":
        first.verdict.problems.append(
            "the training was over before its session was, so nothing was left to go on with; lower --stop-after"
        )
        return [first]
    run = run_folder(rendered_constants(short))
    if not any((first.outcome.working / run).glob("fold*/last.ckpt")):
        first.verdict.problems.append(
            "the session ended before the first epoch, so nothing was there to go on with; raise --stop-after"
        )
        return [first]
    outputs = outputs | keep_output(first, kitchen.room.out / "outputs" / "train")
    again = kitchen.render("train", folds=FOLDS, attach=attach, resume=True)
    second = rehearse(kitchen.room, "train-resumed", Plan(again, kitchen.shelf(outputs), layouts[-1]))
    if second.verdict.passed:
        second.verdict.problems += not_resumed(first.outcome.working / run, second.outcome.working / run, further=True)
    return [first, second]


def sample(folder: Path, seed: int, slides_per_organ: int, size: int) -> Path:
    """Embedded slides in the competition's format, as the training data."""
    generate(folder, seed, slides_per_organ, size)
    return folder
