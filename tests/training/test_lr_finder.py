"""The range test where the answer is known; that nothing is left of it; the job on a real data folder."""

from __future__ import annotations

import math
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tiny import TINY
from torch import nn

from hubmap_kit import experiment
from hubmap_kit.competition.folds import assign_folds, write_folds
from hubmap_kit.competition.tables import read_train
from hubmap_kit.errors import ConfigError, HubmapError
from hubmap_kit.jobs.lr_find import lr_find, preserved, steepest, sweep, valley

CPU = torch.device("cpu")


def quadratic(steepness: float) -> tuple[nn.Parameter, torch.optim.Optimizer]:
    """The bowl `steepness` * x^2 / 2, whose gradient descent is best at 1 / steepness and bursts beyond 2 /
    steepness.
    """
    place = nn.Parameter(torch.full((1,), 3.0, dtype=torch.float64))
    return place, torch.optim.SGD([place], lr=1.0)


@pytest.mark.parametrize("steepness", [0.5, 20.0, 1000.0])
def test_a_bowl_whose_best_rate_is_known(steepness: float) -> None:
    place, optimizer = quadratic(steepness)

    def step() -> float:
        optimizer.zero_grad()
        loss = steepness * place.square().sum() / 2
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    # Ten thousandths of the best rate to a hundred times it.
    found = sweep(step, optimizer, 1e-4 / steepness, 100 / steepness, 120)
    best = 1 / steepness
    assert found.valley is not None and found.steep is not None
    assert best / 100 < found.valley < 2 * best
    assert best / 100 < found.steep < 2 * best
    assert found.exploded and 2 * best < found.rates[-1] < 100 * best, "it bursts, but only where it must"
    assert (
        found.smoothed[-1] > 4 * found.smoothed.min() > 0
        and (found.smoothed[:-1] <= 4 * np.minimum.accumulate(found.smoothed)[:-1]).all()
    )


def test_rates_rise_by_equal_factors_and_groups_keep_their_proportion() -> None:
    weights = [nn.Parameter(torch.zeros(1)) for _ in range(2)]
    optimizer = torch.optim.SGD([{"params": [weights[0]], "lr": 0.02}, {"params": [weights[1]], "lr": 0.005}], lr=1.0)
    seen: list[list[float]] = []

    def step() -> float:
        seen.append([group["lr"] for group in optimizer.param_groups])
        return 1.0

    found = sweep(step, optimizer, 1e-5, 1e-1, 41)
    assert found.rates == pytest.approx(np.geomspace(1e-5, 1e-1, 41))
    assert np.array(seen) == pytest.approx(np.geomspace(1e-5, 1e-1, 41)[:, None] * [1, 0.25])
    assert not found.exploded and found.valley is None and found.steep is None, (
        "a loss that never falls suggests nothing"
    )


def test_the_smoothed_loss_is_a_weighted_mean_of_all_so_far() -> None:
    losses = np.random.default_rng(0).uniform(1, 1.5, 30)
    coming = iter(losses)
    found = sweep(lambda: next(coming), quadratic(1.0)[1], 1e-4, 1e-2, 30, smoothing=0.9)
    for count in range(1, 31):
        weights = 0.9 ** np.arange(count)[::-1]
        assert found.smoothed[count - 1] == pytest.approx(np.average(losses[:count], weights=weights))
    assert (found.losses == losses).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_no_number_ends_it(bad: float) -> None:
    losses = iter([3.0 - 0.01 * number for number in range(40)] + [bad])
    found = sweep(lambda: next(losses), quadratic(1.0)[1], 1e-4, 1.0, 60)
    assert found.exploded and len(found.rates) == 40 and found.valley is not None and np.isfinite(found.smoothed).all()
    at_once = sweep(lambda: bad, quadratic(1.0)[1], 1e-4, 1.0, 60)
    assert at_once.exploded and len(at_once.rates) == 0 and at_once.valley is None and at_once.steep is None


@pytest.mark.parametrize(("low", "high", "steps"), [(1e-3, 1e-3, 50), (0.0, 1.0, 50), (1e-5, 1.0, 5)])
def test_ranges_that_are_none(low: float, high: float, steps: int) -> None:
    with pytest.raises(HubmapError, match="range test"):
        sweep(lambda: 1.0, quadratic(1.0)[1], low, high, steps)


def test_the_valley_is_half_way_down_and_the_steepest_place_is_steepest() -> None:
    rates = np.geomspace(1e-6, 1, 61)
    # Flat, then straight down from number 20 to 50, then up.
    losses = np.concatenate([np.full(20, 2.0), np.linspace(2, 1, 31), np.linspace(1.5, 4, 10)])
    found = valley(rates, losses)
    assert found is not None and found == pytest.approx(rates[35], rel=0.5)
    losses[40:] -= 0.4
    assert steepest(rates, losses) == pytest.approx(rates[39])
    assert valley(rates, np.linspace(1, 2, 61)) is None and steepest(rates, np.linspace(1, 2, 61)) is None


@given(st.lists(st.integers(0, 6), min_size=2, max_size=9))
def test_the_valley_is_inside_the_longest_fall(values: list[int]) -> None:
    """Against all subsequences there are."""
    losses, rates = np.array(values, float), np.arange(1.0, len(values) + 1)
    falls = [
        chosen
        for count in range(2, len(values) + 1)
        for chosen in combinations(range(len(values)), count)
        if (np.diff(losses[list(chosen)]) < 0).all()
    ]
    found = valley(rates, losses)
    if not falls:
        assert found is None
        return
    longest = max(len(fall) for fall in falls)
    end = min(fall[-1] for fall in falls if len(fall) == longest)
    assert found is not None
    place = found - 1
    assert 0 <= place <= end and end - longest <= place
    assert abs(place - (end - longest / 2)) < 2


def test_nothing_is_left_of_it() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Conv2d(4, 1, 3))
    network[1].eval()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)

    def step() -> float:
        optimizer.zero_grad()
        loss = network(torch.randn(2, 3, 16, 16)).square().mean()
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    def everything() -> list[torch.Tensor]:
        moments = [value for state in optimizer.state.values() for value in state.values()]
        return [value.clone() for value in (*network.state_dict().values(), *moments, torch.get_rng_state())]

    step()
    before, rates = everything(), [group["lr"] for group in optimizer.param_groups]
    numbers = np.random.get_state()[1].copy()
    with pytest.raises(RuntimeError, match="in the middle"), preserved(network, optimizer, CPU):
        network.train()
        sweep(step, optimizer, 1e-5, 1e3, 40)
        np.random.rand()
        assert not all(torch.equal(one, two) for one, two in zip(before, everything(), strict=True))
        raise RuntimeError("in the middle")
    assert all(torch.equal(one, two) for one, two in zip(before, everything(), strict=True))
    assert [group["lr"] for group in optimizer.param_groups] == rates and (np.random.get_state()[1] == numbers).all()
    assert network.training and not network[1].training and all(weight.grad is None for weight in network.parameters())


def test_the_job_suggests_a_rate_and_touches_no_run(sample_data: Path, tmp_path: Path) -> None:
    settings = experiment.load(
        "baseline", [*TINY, "training.freeze_epochs=1", "training.encoder_lr=0.3"], str(sample_data)
    )
    run = tmp_path / "run"
    slides = read_train(sample_data / "train.csv")
    write_folds(run / "folds.csv", assign_folds(slides, 2, 5), slides)
    # A checkpoint that is read would be an error, and one that is written another file.
    for name in ("fold1/last.ckpt", "fold1/model.safetensors", "fold1/metrics.csv", "config.yaml"):
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).write_text(f"{name} of a training")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    found = lr_find(
        settings,
        run,
        fold=1,
        steps=30,
        device="cpu",
        low=1e-5,
        high=3.0,
        words=["--config", "baseline", "--data", "my data"],
    )
    made = {path for path in run.rglob("*") if path.is_file()} - before.keys()
    assert made == {run / "lr_find.csv", run / "lr_find.png"} == {found.table, found.picture}
    assert all(path.read_bytes() == content for path, content in before.items())
    table = pd.read_csv(found.table)
    assert list(table) == ["lr", "loss", "smoothed"] and 10 <= len(table) <= 30 and np.isfinite(table).all(axis=None)
    assert table["lr"].to_numpy() == pytest.approx(np.geomspace(1e-5, 3.0, 30)[: len(table)])
    assert found.suggestion is not None and 1e-5 < found.suggestion < 3
    assert f"hubmap train --config baseline --data 'my data' --set training.lr={found.suggestion:.2g}" in str(found)
    with Image.open(found.picture) as picture:
        assert picture.size[0] > 600 and len(set(picture.convert("L").tobytes())) > 20


def test_the_same_job_finds_the_same(sample_data: Path, tmp_path: Path) -> None:
    settings = experiment.load("baseline", [*TINY, "training.accumulate=2"], str(sample_data))
    tables = [
        lr_find(settings, tmp_path / name, steps=20, device="cpu", stores=tmp_path / "stores").table.read_bytes()
        for name in "ab"
    ]
    assert tables[0] == tables[1]


def test_a_job_without_slides_or_with_an_unknown_fold(sample_data: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--data"):
        lr_find(experiment.load("baseline", TINY), tmp_path / "a", device="cpu")
    with pytest.raises(ConfigError, match="fold 7"):
        lr_find(experiment.load("baseline", TINY, str(sample_data)), tmp_path / "b", fold=7, device="cpu")
    assert not (tmp_path / "b").exists()
