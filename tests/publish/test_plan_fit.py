"""What fits: a step into a card, a training into weeks of quota.

Against the tensors of real steps and against plans of the result.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from tiny import TINY, overrides
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hubmap_kit import experiment
from hubmap_kit.__main__ import main
from hubmap_kit.config import Experiment, TrainingConfig
from hubmap_kit.errors import PublishError
from hubmap_kit.models.catalog import GIB
from hubmap_kit.publish.plan import WEEK, Budget, Job, Session, Terms, held, lay_out, memory_lines
from hubmap_kit.publish.speed import estimate
from hubmap_kit.training.learner import Batch, Learner
from hubmap_kit.training.losses import About
from hubmap_kit.training.memory import STATES, batch_that_fits, copies_of, step_memory
from hubmap_kit.training.optim import build_optimizer

NOW = datetime(2026, 11, 23, 8, tzinfo=UTC)
LARGEST = ("winner-like", "winner-like-b5", "winner-like-convnext")  # the other recipes of the winners are smaller


class Alive(TorchDispatchMode):
    """Counts the bytes of all storages that operations make, as long as they live; `peak` is the most there were at
    once.
    """

    def __init__(self, before: list[torch.Tensor]) -> None:
        super().__init__()
        self.seen: dict[int, int] = {}
        self.now = self.peak = 0
        for value in before:
            self.count(value)

    def count(self, value: torch.Tensor) -> None:
        storage = value.untyped_storage()
        key = storage._cdata
        if key not in self.seen:
            self.seen[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.gone, key)

    def gone(self, key: int) -> None:
        self.now -= self.seen.pop(key)

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):  # type: ignore[no-untyped-def]
        made = function(*arguments, **(keywords or {}))
        for value in tree_leaves(made):
            if isinstance(value, torch.Tensor):
                self.count(value)
        return made


def real_peak(settings: Experiment) -> int:
    """Bytes of tensors alive at the worst moment of a real step on the CPU; the step before has made the optimiser's
    numbers.
    """
    side, size = settings.tiles.size, settings.training.batch_size
    learner = Learner(settings, 10, torch.device("cpu"), pretrained=False)
    about = About(torch.zeros(size, dtype=torch.int64), torch.zeros(size))
    tiles, masks = (
        torch.randint(256, (size, side, side, 3), dtype=torch.uint8),
        torch.randint(2, (size, side, side), dtype=torch.uint8),
    )
    learner.begin(0)
    learner.learn([Batch(0, tiles, masks, about)], 0)
    modules = [learner.network, *([learner.ema.module] if learner.ema else [])]
    kept = [value for module in modules for value in (*module.parameters(), *module.buffers())]
    kept += [value for state in learner.optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    with Alive([*kept, *(value.grad for value in learner.network.parameters() if value.grad is not None)]) as alive:
        learner.learn([Batch(0, tiles, masks, about)], 0)
    return alive.peak


@pytest.mark.parametrize(
    "change",
    [
        [
            "model.arch=segformer",
            "model.encoder=mit_b0",
            "model.options={decoder_norm: group}",
            "training.loss=bce+3*lovasz",
        ],
        [
            "model.encoder=tu-efficientnet_b0",
            "training.loss=dice+focal",
            "model.auxiliary={organ: 0.1, pixel_size: 0.1}",
            "training.optimizer=adan",
        ],
    ],
    ids=["segformer", "cnn"],
)
def test_the_estimate_is_a_little_above_a_real_step(change: list[str]) -> None:
    settings = experiment.load(
        "baseline", ["tiles.size=128", "training.precision=fp32", "training.batch_size=2", *change]
    )
    need = step_memory(settings, half=False)
    assert 0.8 < real_peak(settings) / (need.total - need.spare) <= 1.0


@pytest.mark.parametrize("name", sorted(STATES))
def test_optimisers_keep_as_many_numbers_as_is_said(name: str) -> None:
    network = torch.nn.ModuleDict({"encoder": torch.nn.Linear(60, 70), "decoder": torch.nn.Linear(70, 1)})
    optimizer = build_optimizer(network, TrainingConfig(optimizer=name))
    for _ in range(7):  # the slow weights of lookahead come with the sixth step
        network["decoder"](network["encoder"](torch.randn(2, 60))).sum().backward()
        optimizer.step()
    weights = sum(value.numel() for value in network.parameters())
    tensors = [
        value
        for state in optimizer.state_dict()["state"].values()
        for value in state.values()
        if torch.is_tensor(value)
    ]
    kept = sum(value.numel() for value in tensors if value.numel() > 1)
    assert kept / weights == pytest.approx(STATES[name], abs=0.02)


def test_more_is_needed_for_more() -> None:
    base = experiment.load("net-unet-b0", ["training.batch_size=4"])
    for change in (
        ["training.batch_size=8"],
        ["training.optimizer=adan"],
        ["tiles.size=1024"],
        ["training.ema_decay=0.9"],
    ):
        changed = experiment.load("net-unet-b0", ["training.batch_size=4", *change])
        more = step_memory(changed, half=True).total - step_memory(base, half=True).total
        assert more > 0 if change != ["training.ema_decay=0.9"] else more == 0  # it averages already
    assert copies_of(base) == 5 and step_memory(base, half=True).total < step_memory(base, half=False).total
    batch = batch_that_fits(base, True, 14.7)
    fits, not_any_more = (
        experiment.load("net-unet-b0", [f"training.batch_size={size}"]) for size in (batch, batch + 2)
    )
    assert step_memory(fits, True).total <= 14.7 * GIB < step_memory(not_any_more, True).total


@pytest.mark.parametrize("name", LARGEST)
def test_the_winners_recipes_fit_a_t4_and_a_week(name: str) -> None:
    settings = experiment.load(name)
    assert step_memory(settings, half=True).total <= 14.7 * GIB
    assert not [line for line in memory_lines(settings, "t4x2") if "WARNING" in line]
    speed = estimate(settings, "t4x2")
    job = Job(tuple(range(5)), settings.training.epochs, speed.epoch_s / 3600, speed.last_s / 3600)
    assert lay_out(job, Budget(30, 30, NOW + WEEK), Terms(), NOW)[-1].starts < NOW + WEEK


def test_what_does_not_fit_is_told_with_what_to_lower() -> None:
    lines = memory_lines(experiment.load("winner-like", ["training.batch_size=4"]), "t4x2")
    assert "ESTIMATE" in lines[0] and "too much" in lines[1]
    assert "WARNING" in lines[-1] and "--set training.batch_size=1 --set training.accumulate=4" in lines[-1]
    large = ["tiles.size=3200", "training.batch_size=1"]
    lines = memory_lines(experiment.load("net-segformer-b0", large), "p100")
    side = int(re.search(r"tiles\.size=(\d+)", lines[-1])[1])  # type: ignore[index]
    told = experiment.load("net-segformer-b0", [*large, f"tiles.size={side}"])
    assert (
        "not even one tile" in lines[-1]
        and side % 32 == 0
        and 0.7 * 15.9 * GIB < step_memory(told, half=True).total <= 15.9 * GIB
    )
    assert "WARNING" not in "".join(memory_lines(experiment.load("baseline"), "t4x2"))


@examples(deadline=None, max_examples=25)
@given(st.floats(0.5, 10), st.integers(1, 4), st.integers(1, 60), st.sampled_from([0, 4000, 45000]), st.integers(1, 5))
def test_what_is_held_fits_and_more_would_not(
    hours: float, weeks: int, epochs: int, iterations: int, folds: int
) -> None:
    """`hours` are those of a fold with the planned number."""
    base = experiment.load("baseline", [f"training.epochs={epochs}", f"training.iterations={iterations}"])
    planned = iterations or epochs

    def sessions(changed: Experiment) -> list[Session]:
        share = (changed.training.iterations or changed.training.epochs) / planned
        if changed.training.samples_per_epoch:
            share *= changed.training.samples_per_epoch / 10_000
        job = Job(tuple(range(folds)), changed.training.epochs, hours * share / changed.training.epochs, 0.01)
        return lay_out(job, Budget(30, 30, NOW + WEEK), Terms(), NOW)

    told = held(base, sessions, weeks, NOW, 30)
    found = re.search(r"--set training\.(\w+)=(\d+)", told)
    assert found is not None and f"({weeks * 30} h)" in told
    key, number = found[1], int(found[2])
    assert key == ("iterations" if iterations else "epochs") or (key == "samples_per_epoch" and not iterations)
    for changed, fits in ((number, True), (number * 1.12 + 1, False)):
        if fits or (changed < 20 * planned and key != "samples_per_epoch"):
            assert ends_in_time(with_number(base, key, int(changed)), sessions, weeks) == fits


def with_number(base: Experiment, key: str, number: int) -> Experiment:
    return base.model_copy(update={"training": base.training.model_copy(update={key: number})})


def ends_in_time(changed: Experiment, sessions: Callable[[Experiment], list[Session]], weeks: int) -> bool:
    try:
        return sessions(changed)[-1].starts < NOW + weeks * WEEK
    except PublishError:  # an epoch longer than a session
        return False


def plan(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        main(["plan", "--offline", *words])
    captured = capsys.readouterr()
    return int(stop.value.code or 0), captured.out, captured.err


def test_the_verb_tells_memory_and_what_a_week_holds(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = plan(capsys, "--config", "winner-like", "--fit-weeks", "1")
    assert code == 0 and "ESTIMATE, no card has run it" in out and "T4 14.7 GiB" in out and "P100 15.9 GiB" in out
    held_line = next(line for line in out.splitlines() if line.startswith("1 week of quota (30 h) holds"))
    iterations = int(re.search(r"training\.iterations=(\d+) \(45000 are planned\)", held_line)[1])  # type: ignore[index]
    code, out, _ = plan(capsys, "--config", "winner-like", "--set", f"training.iterations={iterations}")
    assert code == 0 and f"x {iterations} iterations in 50 epochs" in out
    assert float(re.search(r"([\d.]+) hours of quota in", out)[1]) <= 30  # type: ignore[index]
    code, out, err = plan(capsys, "--config", "baseline", "--accelerator", "cpu", "--fit-weeks", "1")
    assert code == 1 and "--fit-weeks is about the quota" in err


def test_an_epoch_longer_than_a_session_is_not_planned_but_fitted(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = plan(
        capsys, "--config", "baseline", "--fit-weeks", "1", "--set", "training.samples_per_epoch=9000000"
    )
    assert (
        code == 0
        and "cannot be planned" in out
        and "--set training.samples_per_epoch=" in out
        and "session 1:" not in out
    )


def test_a_winners_recipe_trains_small_and_without_further_files(sample_data: Path, tmp_path: Path) -> None:
    small = [word for word in TINY if word.split("=")[0] in ("data.n_folds", "training.workers")]
    small += [
        "model.encoder=mit_b0",
        "scale.fit=64",
        "tiles.size=64",
        "inference.window=64",
        "inference.whole_slide=64",
        "training.epochs=1",
        "training.iterations=3",
        "training.validate_every=1",
    ]
    words = [
        "train",
        "--config",
        "winner-like",
        "--data",
        str(sample_data),
        "--out",
        str(tmp_path / "run"),
        "--device",
        "cpu",
        "--folds",
        "0",
    ]
    with pytest.raises(SystemExit) as stop:
        main([*words, *overrides(*small)])
    assert stop.value.code == 0 and (tmp_path / "run" / "fold0" / "model.safetensors").is_file()
