"""The hyper-parameter search: its space, its study that survives kills, and the job with real trainings."""

from __future__ import annotations

import fcntl
import math
import re
import signal
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import warm
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import TINY

from hubmap_kit import experiment
from hubmap_kit.errors import CheckpointError, ConfigError, HubmapError
from hubmap_kit.jobs.search import Found, search
from hubmap_kit.training.search import (
    LEAST_TRIALS,
    Outcome,
    Pruned,
    Search,
    Trial,
    Watch,
    check_space,
    parse,
    read_space,
)

optuna = pytest.importorskip("optuna")
SPACE = ["training.lr=log:1e-4:1e-1", "training.loss=bce+dice,0.5*bce+dice", "training.batch_size=int:2:8:2"]
SETTINGS = (*TINY, "training.samples_per_epoch=8", "training.epochs=2", "inference.views=none", "augment.pipeline=none")
TRIALS = 2


# The space.


@given(
    low=st.floats(1e-8, 1.0), wide=st.floats(1.5, 1e6), kind=st.sampled_from(["log", "float"]), seed=st.integers(0, 99)
)
@settings(deadline=None, max_examples=40)
def test_a_drawn_number_lies_in_its_range_and_is_what_the_experiment_gets(
    low: float, wide: float, kind: str, seed: int
) -> None:
    dimension = parse("training.lr", f"{kind}:{low!r}:{low * wide!r}", "test")
    trial = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed)).ask()
    text = dimension.suggest(trial)
    assert low <= float(text) <= low * wide
    assert (
        experiment.load("baseline", [f"training.lr={text}"]).training.lr == trial.params["training.lr"] == float(text)
    )


@given(low=st.integers(1, 50), more=st.integers(1, 50), step=st.integers(1, 60), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=40)
def test_whole_numbers_go_in_steps(low: int, more: int, step: int, seed: int) -> None:
    if step > more:
        with pytest.raises(ConfigError, match="no range"):
            parse("training.batch_size", f"int:{low}:{low + more}:{step}", "test")
        return
    dimension = parse("training.batch_size", f"int:{low}:{low + more}:{step}", "test")
    drawn = int(dimension.suggest(optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed)).ask()))
    assert drawn in range(low, low + more + 1, step)
    assert int(dimension.ends()[1]) == max(range(low, low + more + 1, step))


def test_choices_keep_what_brackets_hold() -> None:
    (found,) = read_space(
        ["model.options={encoder_depth: 3, decoder_channels: [16, 8, 8]}, {encoder_depth: 2, decoder_channels: [8, 8]}"]
    )
    loaded = [
        experiment.load("baseline", [f"{found.key}={choice}"]).model.options["decoder_channels"]
        for choice in found.choices
    ]
    assert loaded == [[16, 8, 8], [8, 8]]


def test_a_file_says_the_same_as_words_and_words_go_before_it(tmp_path: Path) -> None:
    file = tmp_path / "space.yaml"
    file.write_text(
        "training.lr: log:1e-4:1e-1\ntraining.loss: [bce+dice, 0.5*bce+dice]\ntraining.batch_size: int:2:8:2\n"
    )
    assert read_space([], file) == read_space(SPACE)
    replaced = {dimension.key: dimension.text for dimension in read_space(["training.lr=1e-3,3e-4"], file)}
    assert replaced == {dimension.key: dimension.text for dimension in read_space(SPACE)} | {"training.lr": "1e-3,3e-4"}
    file.write_text(
        "model.options: [{decoder_channels: [16, 8]}]\ntraining.lr: [1e-3, 0.01]\ntraining.balance_organs: [true,"
        " false]\n"
    )
    values = [
        experiment.load("baseline", [f"{each.key}={choice}"])
        for each in read_space([], file)
        for choice in each.choices
    ]
    assert values[0].model.options == {"decoder_channels": [16, 8]}
    assert [value.training.lr for value in values[1:3]] == [0.001, 0.01]
    assert [value.training.balance_organs for value in values[3:]] == [True, False]


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("training.lr", "has no 'section.key=values' form"),
        ("training.lr=log:1e-2:1e-4", "no range of positive"),
        ("training.lr=log:0:1", "of positive"),
        ("training.lr=float:1", "no two numbers"),
        ("training.lr=log:a:b", "no two numbers"),
        ("training.lr=log:1:2:3", "too many"),
        ("training.lr=float:0:inf", "infinite"),
        ("training.batch_size=int:2:8:0", "no range"),
        ("training.batch_size=int:2:4:1:1", "too many"),
        ("training.loss=bce,bce", "repeated choice"),
        ("training.loss=bce,,dice", "an empty"),
        ("data.n_folds=2,3", "cannot be searched"),
        ("name=a,b", "cannot be searched"),
    ],
)
def test_words_of_another_form_are_refused(word: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as raised:
        read_space([word])
    assert word.partition("=")[0] in str(raised.value)


@pytest.mark.parametrize(
    "text",
    [
        "- a\n",
        "training.lr: {low: 1}\n",
        "training.lr:\n",
        "training.lr: []\n",
        "training.lr: [1, 1]\n",
        "a: [\n",
        "\xff",
    ],
)
def test_files_of_another_form_are_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "space.yaml"
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match="space.yaml"):
        read_space([], file)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_space([], tmp_path / "absent.yaml")
    with pytest.raises(ConfigError, match="nothing is searched"):
        read_space([])


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("training.learning=1,2", "unknown key 'training.learning'"),
        ("training.lr=float:-1:1", "training.lr is -1"),
        ("training.batch_size=0.5,2", "training.batch_size is 0.5"),
        ("model.arch.x=a,b", "not a section|unknown|valid"),
    ],
)
def test_every_value_is_tried_on_the_experiment(word: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        check_space(read_space([word]), lambda more: experiment.load("baseline", ["model.arch=unet", *more]))
    check_space(read_space(SPACE), lambda more: experiment.load("baseline", more))


# The study.

BASE = experiment.dump(experiment.load("baseline"))


def score(trial: Trial) -> float:
    """A smooth peak at a learning rate of 0.01; the other loss is a little worse."""
    return (
        1 - abs(math.log10(float(trial.words["training.lr"])) + 2) / 10 - 0.05 * ("0.5" in trial.words["training.loss"])
    )


def fields(outcomes: list[Outcome]) -> list[tuple]:
    return [(each.number, each.state, dict(each.words), each.value) for each in outcomes]


def test_an_interrupted_study_draws_what_an_undisturbed_one_does(tmp_path: Path) -> None:
    """A study that is dropped between ask and tell is what a kill leaves: a running trial in the file."""
    whole, broken = tmp_path / "a.sqlite", tmp_path / "b.sqlite"
    space, count = read_space(SPACE), 13  # beyond the ten that are drawn blindly
    study = Search(whole, space, BASE, [0])
    for _ in range(count):
        trial = study.ask()
        study.complete(trial, score(trial), 1.0)
    for stop in (0, 0, 11):  # twice in the same trial; a blind and an informed one
        study = Search(broken, space, BASE, [0])
        while (trial := study.ask()).number <= stop:
            study.complete(trial, score(trial), 1.0)
        running = trial
        again = Search(broken, space, BASE, [0]).ask()
        assert (again.number, again.words) == (running.number, running.words)
    study = Search(broken, space, BASE, [0])
    while len(study.outcomes()) < count:
        trial = study.ask()
        study.complete(trial, score(trial), 1.0)
    assert fields(study.outcomes()) == fields(Search(whole, space, BASE, [0]).outcomes())
    assert [each.number for each in study.outcomes()] == list(range(1, count + 1))
    importance = study.importance()
    assert set(importance) == {dimension.key for dimension in space}
    assert max(importance, key=lambda key: importance[key]) == "training.lr" and sum(
        importance.values()
    ) == pytest.approx(1)


def test_trials_below_the_median_of_the_others_are_pruned(tmp_path: Path) -> None:
    """The same rule in numpy: after the first trials, and after the warm-up, the best so far against the others' at
    that epoch.
    """
    study, random = (
        Search(tmp_path / "study.sqlite", read_space(SPACE), BASE, [1, 0], warmup=2),
        np.random.default_rng(0),
    )
    finished: list[np.ndarray] = []
    states = []
    for _ in range(9):
        curve, trial = random.random(5), study.ask()
        wanted = next(
            (
                epoch
                for epoch in range(2, 6)
                if len(finished) >= LEAST_TRIALS
                and max(curve[:epoch]) < np.median([other[epoch - 1] for other in finished])
            ),
            None,
        )
        watch, pruned = Watch(trial, [1, 0]), None
        for epoch, dice in enumerate(curve, 1):
            try:
                watch(1, {"epoch": epoch, "dice": dice})
                watch(1, {"epoch": epoch})  # an epoch that was not validated
            except Pruned:
                pruned = epoch
                break
        assert pruned == wanted
        if pruned:
            study.prune(trial, 1.0, "worse")
        else:
            finished.append(curve)
            study.complete(trial, curve.max(), 1.0)
        states.append("pruned" if pruned else "complete")
    assert [each.state for each in study.outcomes()] == states and {"pruned", "complete"} == set(states)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"space": read_space([*SPACE[:2], "training.batch_size=2,4"])}, "begun with space"),
        ({"folds": [0, 1]}, "begun with folds"),
        ({"base": experiment.dump(experiment.load("baseline", ["training.epochs=7"]))}, "training.epochs"),
    ],
)
def test_a_study_of_another_search_is_refused(tmp_path: Path, changes: dict, said: str) -> None:
    given_first = {"space": read_space(SPACE), "base": BASE, "folds": [0]}
    Search(tmp_path / "study.sqlite", **given_first)
    with pytest.raises(CheckpointError, match=said):
        Search(tmp_path / "study.sqlite", **given_first | changes)


def test_a_file_that_is_no_study_is_refused(tmp_path: Path) -> None:
    (tmp_path / "study.sqlite").write_text("nothing of the kind " * 100)
    with pytest.raises(CheckpointError, match="damaged or no study"):
        Search(tmp_path / "study.sqlite", read_space(SPACE), BASE, [0])


def test_without_optuna_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(HubmapError, match=r"pip install 'hubmap-kit\[tune\]'"):
        Search(tmp_path / "study.sqlite", read_space(SPACE), BASE, [0])


# The job.


def run(out: Path, data: Path, trials: int = TRIALS, words: list[str] = SPACE, **more: object) -> Found:
    return search("baseline", out, words, overrides=SETTINGS, data=str(data), trials=trials, device="cpu", **more)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def whole(sample_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Found:
    return run(tmp_path_factory.mktemp("search") / "out", sample_data)


def table(out: Path) -> pd.DataFrame:
    return pd.read_csv(out / "trials.csv", float_precision="round_trip").drop(columns="seconds")


def test_what_a_search_leaves(whole: Found) -> None:
    out, trials = whole.out, table(whole.out)
    assert list(trials["trial"]) == list(range(1, TRIALS + 1)) and not whole.stopped
    for each in whole.outcomes:
        made = experiment.read(out / "trials" / str(each.number) / "config.yaml")
        assert (made.training.lr, made.training.loss, made.training.batch_size) == (
            float(each.words["training.lr"]),
            each.words["training.loss"],
            int(each.words["training.batch_size"]),
        )
        if each.state == "complete":
            scored = pd.read_csv(out / "trials" / str(each.number) / "oof.csv")
            assert set(scored["fold"]) == {0} and each.value == pytest.approx(scored["dice"].mean(), abs=1e-6)
            metrics = pd.read_csv(out / "trials" / str(each.number) / "metrics.csv")
            np.testing.assert_allclose(list(each.curve.values()), metrics["dice"])
    assert whole.best is not None and whole.best.value == trials.loc[trials["state"] == "complete", "dice"].max()
    best = experiment.dump(experiment.load(str(out / "best.yaml")))
    own = yaml.safe_load((out / "trials" / str(whole.best.number) / "config.yaml").read_text())
    assert best | {"name": ""} == own | {"name": ""}


def test_the_page_stands_alone_and_lists_every_trial(whole: Found) -> None:
    page = (whole.out / "index.html").read_text(encoding="utf-8")
    assert not re.search(r"""(src|href|srcset)=["'](?!data:|#)""", page) and "<script" not in page
    rows = re.findall(r"<tr>\s*<td>(\d+)</td>\s*<td>(\w+)</td>", page)
    assert sorted((int(number), state) for number, state in rows) == [
        (each.number, each.state) for each in whole.outcomes
    ]
    assert all(title in page for title in ("History", "Curves", "Each setting", "Settings together", "Importance"))


def test_the_same_call_again_trains_nothing_and_more_trials_go_on(whole: Found, sample_data: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (whole.out / "trials").rglob("*") if path.is_file()}
    again = run(whole.out, sample_data)
    assert fields(again.outcomes) == fields(whole.outcomes)
    assert {path: path.stat().st_mtime_ns for path in (whole.out / "trials").rglob("*") if path.is_file()} == before


def test_killed_in_a_trial_it_goes_on_inside_it(whole: Found, sample_data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code = (
        "import sys; from pathlib import Path; from hubmap_kit.jobs.search import search\nsearch('baseline',"
        f" Path(sys.argv[1]), {SPACE!r}, overrides={SETTINGS!r}, data=sys.argv[2], trials=1, device='cpu')"
    )
    metrics = out / "trials" / "1" / "fold0" / "metrics.csv"
    done = warm.run([sys.executable, "-c", code, str(out), str(sample_data)], warm.TRAINING, kill_when=metrics.is_file)
    assert done.returncode == -signal.SIGKILL, f"the search ended before it could be killed: {done.stderr}"
    first = metrics.read_bytes()
    assert not (out / "trials.csv").exists()
    found = run(out, sample_data, 1)
    assert metrics.read_bytes().startswith(first)
    pd.testing.assert_frame_equal(table(out), table(whole.out).iloc[:1])
    assert found.outcomes[0].curve == whole.outcomes[0].curve
    names = ("metrics.csv", "oof.csv", "thresholds.json", "config.yaml")
    assert all(
        (out / "trials" / "1" / name).read_bytes() == (whole.out / "trials" / "1" / name).read_bytes() for name in names
    )


class Ends:
    """A clock that is up once a trial has weights."""

    def __init__(self, trials: Path) -> None:
        self.trials = trials

    def fits(self, seconds: float) -> bool:
        return not any(self.trials.glob("*/fold0/model.safetensors"))


def test_the_time_ends_a_search_in_a_trial_and_failures_do_not(sample_data: Path, tmp_path: Path) -> None:
    out, words = tmp_path / "out", ["model.encoder=tu-test_resnet,tu-nonsense"]
    first = run(out, sample_data, 10, words, clock=Ends(out / "trials"), seed=2, prune=False)
    (begun,) = out.glob("trials/*/fold0/last.ckpt")
    number = int(begun.parts[-3])
    assert first.stopped == f"the time is up in trial {number}"
    assert [each.number for each in first.outcomes] == list(range(1, number)) and {
        each.state for each in first.outcomes
    } <= {"failed"}
    found = run(out, sample_data, 10, words, seed=2, prune=False)
    states = [each.state for each in found.outcomes]
    assert len(states) == 10 and set(states) == {"complete", "failed"}
    for each in found.outcomes:
        assert (each.state == "failed") == (each.words["model.encoder"] == "tu-nonsense")
        assert each.state == "complete" or "tu-nonsense" in each.reason
    # One choice can be trained; wherever it was drawn again it has the same Dice, and no folder.
    trained, *repeated = [each for each in found.outcomes if each.state == "complete"]
    assert trained.number == number and not trained.reason and repeated
    assert all(each.value == trained.value and f"trial {number}" in each.reason for each in repeated)
    assert not any((out / "trials" / str(each.number)).exists() for each in repeated)
    assert "only one setting was searched" in (out / "index.html").read_text(encoding="utf-8")


def test_a_failure_that_all_trials_share_ends_the_search(sample_data: Path, tmp_path: Path) -> None:
    with pytest.raises(HubmapError, match=r"^all 5 trials of .* failed, the last one with: training.loss is 'foo'"):
        search(
            "baseline",
            tmp_path / "out",
            ["training.lr=log:1e-4:1e-2"],
            overrides=[*SETTINGS, "training.loss=foo"],
            data=str(sample_data),
            trials=30,
            device="cpu",
        )


def test_all_failed_is_an_error(sample_data: Path, tmp_path: Path) -> None:
    with pytest.raises(HubmapError, match=r"^all 3 trials of .* failed, the last one with: .*tu-no") as raised:
        run(tmp_path / "out", sample_data, 3, ["model.encoder=tu-nonsense,tu-nothing", "training.lr=log:1e-4:1e-2"])
    assert "\n" not in str(raised.value)
    assert set(table(tmp_path / "out")["state"]) == {"failed"} and not (tmp_path / "out" / "best.yaml").exists()
    assert "failed" in (tmp_path / "out" / "index.html").read_text(encoding="utf-8")


def test_two_searches_do_not_share_a_folder(whole: Found, sample_data: Path, tmp_path: Path) -> None:
    with (whole.out / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(HubmapError, match="another search works in"):
            run(whole.out, sample_data)
    (tmp_path / "letter.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="holds no search"):
        run(tmp_path, sample_data)
    with pytest.raises(ConfigError, match="without an end"):
        search("baseline", tmp_path / "new", SPACE, overrides=SETTINGS, data=str(sample_data))
    with pytest.raises(ConfigError, match="fold 7"):
        run(tmp_path / "new", sample_data, folds=[7])
    assert not (tmp_path / "new").exists()
