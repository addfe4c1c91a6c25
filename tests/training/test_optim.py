"""The learning rate of every step against the formulas; stopping and going on; what decays and what does not."""

from __future__ import annotations

import io
import math
import warnings

import pytest
import torch
from torch import nn

from hubmap_kit.config import ModelConfig, TrainingConfig
from hubmap_kit.models.build import build
from hubmap_kit.training.optim import StepSchedule, build_optimizer

LR = 3e-3
SCHEDULES = ("onecycle", "cosine", "constant")


def setup(schedule: str, total: int, warmup: float = 0.25) -> tuple[nn.Module, torch.optim.Optimizer, StepSchedule]:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 1))
    config = TrainingConfig(lr=LR, schedule=schedule, warmup=warmup)
    optimizer = build_optimizer(network, config)
    return network, optimizer, StepSchedule(optimizer, config, total)


def train(network: nn.Module, optimizer: torch.optim.Optimizer, schedule: StepSchedule, steps: range) -> list[float]:
    """One optimiser step each; returns the rate that each step was made with."""
    rates = []
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        inputs = torch.randn(16, 4, generator=generator)
        rates.append(schedule.lr)
        assert {group["lr"] for group in optimizer.param_groups} == {rates[-1]}
        optimizer.zero_grad()
        ((network(inputs) - inputs.sum(1, keepdim=True)) ** 2).mean().backward()
        optimizer.step()
        schedule.step()
    return rates


def between(start: float, end: float, share: float) -> float:
    """Half a cosine from `start` to `end`."""
    return end + (start - end) * (1 + math.cos(math.pi * share)) / 2


@pytest.mark.parametrize(("total", "warmup"), [(100, 0.25), (40, 0.5), (7, 0.3), (1000, 0.1)])
def test_onecycle_rises_and_falls_along_two_half_cosines(total: int, warmup: float) -> None:
    rates = train(*setup("onecycle", total, warmup), range(total))
    top = warmup * (total + 1) - 1  # torch's place of the peak in a cycle of total + 1 values
    low, end = LR / 25, LR / 25 / 1e4
    rise = [between(low, LR, step / top) for step in range(total) if step <= top]
    expected = rise + [between(LR, end, (step - top) / (total - top)) for step in range(len(rise), total)]
    assert rates == pytest.approx(expected, rel=1e-6, abs=1e-12)
    assert rates[0] == pytest.approx(low) and rates[-1] < 0.35 * max(rates)


@pytest.mark.parametrize(("total", "warmup"), [(100, 0.25), (40, 0.0), (7, 0.3), (500, 0.1)])
def test_cosine_warms_up_along_a_line_and_falls_along_a_cosine(total: int, warmup: float) -> None:
    rates = train(*setup("cosine", total, warmup), range(total))
    rise = round(warmup * total)
    expected = [
        LR / 25 + (LR - LR / 25) * step / rise if step < rise else between(LR, LR / 1000, (step - rise) / (total - rise)) for step in range(total)
    ]
    assert rates == pytest.approx(expected, rel=1e-6)


def test_constant_stays() -> None:
    assert train(*setup("constant", 20), range(20)) == [LR] * 20


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("total", [1, 2, 3, 4, 10])
@pytest.mark.parametrize("warmup", [0.0, 0.25, 1.0])
def test_runs_of_any_length_and_warm_up(schedule: str, total: int, warmup: float) -> None:
    """A trial run of one epoch may have a single step."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rates = train(*setup(schedule, total, warmup), range(total))
    assert len(rates) == total and all(math.isfinite(rate) and 0 < rate <= LR * (1 + 1e-9) for rate in rates)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("stop", [1, 9, 10, 23, 39])
def test_a_stopped_run_goes_on_as_if_it_had_not(schedule: str, stop: int) -> None:
    straight = setup(schedule, 40)
    expected = train(*straight, range(40))
    first = setup(schedule, 40)
    rates = train(*first, range(stop))
    # Through a file, read as checkpoints are read: plain values only.
    buffer = io.BytesIO()
    torch.save({"network": first[0].state_dict(), "optimizer": first[1].state_dict(), "schedule": first[2].state_dict()}, buffer)
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    second = setup(schedule, 40)
    for part, name in zip(second, ("network", "optimizer", "schedule"), strict=True):
        part.load_state_dict(saved[name])
    assert second[2].done == stop and second[2].lr == first[2].lr
    rates += train(*second, range(stop, 40))
    assert rates == expected
    for one, two in zip(straight[0].parameters(), second[0].parameters(), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("encoder", ["resnet18", "tu-convnext_atto"])
def test_only_matrices_and_kernels_decay(encoder: str) -> None:
    network = build(ModelConfig(encoder=encoder))
    optimizer = build_optimizer(network, TrainingConfig(weight_decay=0.03, lr=LR))
    assert isinstance(optimizer, torch.optim.AdamW)
    decay = {id(weight): group["weight_decay"] for group in optimizer.param_groups for weight in group["params"]}
    assert len(decay) == len(list(network.parameters())) == sum(len(group["params"]) for group in optimizer.param_groups)
    norms = (nn.BatchNorm2d, nn.LayerNorm, nn.GroupNorm)
    for part in network.modules():
        for name, weight in part.named_parameters(recurse=False):
            if isinstance(part, norms) or name == "bias":
                assert decay[id(weight)] == 0, f"{type(part).__name__}.{name}"
            elif isinstance(part, nn.Conv2d | nn.Linear) and name == "weight":
                assert decay[id(weight)] == 0.03, f"{type(part).__name__}.{name}"


def test_decay_shrinks_weights_without_a_gradient_and_leaves_biases() -> None:
    network = nn.Linear(3, 3)
    optimizer = build_optimizer(network, TrainingConfig(weight_decay=0.1, lr=0.5))
    weight, bias = network.weight.detach().clone(), network.bias.detach().clone()
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    torch.testing.assert_close(network.weight.detach(), weight * (1 - 0.5 * 0.1))
    assert torch.equal(network.bias.detach(), bias)
