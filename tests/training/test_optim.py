"""Optimisers and rates of every step against formulas and the libraries; stopping and going on; what decays, what is
slow, what is frozen.
"""

from __future__ import annotations

import io
import math
import warnings

import pytest
import segmentation_models_pytorch as smp
import timm
import torch
from timm.optim import create_optimizer_v2, param_groups_layer_decay
from timm.scheduler import CosineLRScheduler
from torch import nn

from hubmap_kit.config import ModelConfig, TrainingConfig
from hubmap_kit.errors import ConfigError
from hubmap_kit.models.build import build
from hubmap_kit.training.optim import StepSchedule, build_optimizer, layer_order, set_frozen

LR = 3e-3
SCHEDULES = ("onecycle", "cosine", "flat-cosine", "poly", "restarts", "constant")
OPTIMIZERS = ("adamw", "adam", "sgd", "adan", "ranger")


def setup(
    schedule: str, total: int, warmup: float = 0.25, optimizer: str = "adamw"
) -> tuple[nn.Module, torch.optim.Optimizer, StepSchedule]:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 1))
    config = TrainingConfig(lr=LR, schedule=schedule, warmup=warmup, optimizer=optimizer)
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
        LR / 25 + (LR - LR / 25) * step / rise
        if step < rise
        else between(LR, LR / 1000, (step - rise) / (total - rise))
        for step in range(total)
    ]
    assert rates == pytest.approx(expected, rel=1e-6)


def test_cosine_is_timms_to_the_bit() -> None:
    """A run that was begun with timm's schedule on the optimiser itself goes on with the same rates."""
    rates = train(*setup("cosine", 50), range(50))
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=LR)
    theirs = CosineLRScheduler(
        optimizer,
        t_initial=38,
        lr_min=LR / 1000,
        warmup_t=12,
        warmup_lr_init=LR / 25,
        warmup_prefix=True,
        t_in_epochs=False,
    )
    for step, rate in enumerate(rates):
        theirs.step_update(step)
        assert optimizer.param_groups[0]["lr"] == rate


@pytest.mark.parametrize("total", [40, 100])
def test_flat_cosine_stays_up_for_three_quarters(total: int) -> None:
    rates = train(*setup("flat-cosine", total, 0.1), range(total))
    rise, edge = total // 10, total * 3 // 4
    expected = [LR / 25 + (LR - LR / 25) * step / rise for step in range(rise)] + [LR] * (edge - rise)
    expected += [between(LR, LR / 1000, (step - edge) / (total - edge)) for step in range(edge, total)]
    assert rates == pytest.approx(expected, rel=1e-6)


def test_poly_falls_with_the_power_of_what_is_left() -> None:
    rates = train(*setup("poly", 60, 0.0), range(60))
    assert rates == pytest.approx(
        [LR / 1000 + (LR - LR / 1000) * (1 - step / 60) ** 0.9 for step in range(60)], rel=1e-6
    )


def test_each_restart_is_twice_as_long_as_the_one_before() -> None:
    rates = train(*setup("restarts", 84, 0.0), range(84))
    assert [step for step in range(84) if rates[step] == pytest.approx(LR)] == [0, 12, 36]
    for start, length in ((0, 12), (12, 24), (36, 48)):
        expected = [between(LR, LR / 1000, step / length) for step in range(length)]
        assert rates[start : start + length] == pytest.approx(expected, rel=1e-6)


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


def test_skipping_is_stepping_without_the_optimiser() -> None:
    for schedule in SCHEDULES:
        walked, skipped = setup(schedule, 30), setup(schedule, 30)
        rates = train(*walked, range(30))
        skipped[2].skip(17)
        assert skipped[2].lr == rates[17] and skipped[2].done == 17


@pytest.mark.parametrize(
    ("optimizer", "schedule"), [("adamw", name) for name in SCHEDULES] + [(name, "onecycle") for name in OPTIMIZERS[1:]]
)
@pytest.mark.parametrize("stop", [1, 9, 10, 23, 39])
def test_a_stopped_run_goes_on_as_if_it_had_not(optimizer: str, schedule: str, stop: int) -> None:
    straight = setup(schedule, 40, optimizer=optimizer)
    expected = train(*straight, range(40))
    first = setup(schedule, 40, optimizer=optimizer)
    rates = train(*first, range(stop))
    # Through a file, read as checkpoints are read: plain values only.
    buffer = io.BytesIO()
    torch.save(
        {"network": first[0].state_dict(), "optimizer": first[1].state_dict(), "schedule": first[2].state_dict()},
        buffer,
    )
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    second = setup(schedule, 40, optimizer=optimizer)
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
    assert (
        len(decay) == len(list(network.parameters())) == sum(len(group["params"]) for group in optimizer.param_groups)
    )
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


@pytest.mark.parametrize("decay", [0.0, 0.03])
def test_groups_without_rates_of_their_own_are_timms(decay: float) -> None:
    """So the moments of a run that was begun before there were such rates still fit."""
    network = build(ModelConfig(encoder="resnet18"))
    mine = build_optimizer(network, TrainingConfig(weight_decay=decay, lr=LR))
    theirs = create_optimizer_v2(network, opt="adamw", lr=LR, weight_decay=decay, filter_bias_and_bn=True)
    assert len(mine.param_groups) == len(theirs.param_groups)
    for one, two in zip(mine.param_groups, theirs.param_groups, strict=True):
        assert {key: value for key, value in one.items() if key != "params"} == {
            key: value for key, value in two.items() if key != "params"
        }
        assert [id(weight) for weight in one["params"]] == [id(weight) for weight in two["params"]]


def descend(
    optimizer: torch.optim.Optimizer, weight: nn.Parameter, steps: int, scaler: torch.amp.GradScaler | None = None
) -> list[torch.Tensor]:
    """Walk down a bowl; returns the weights after every step."""
    places = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (weight**2 * torch.arange(1.0, 1 + weight.numel())).sum()
        (loss if scaler is None else scaler.scale(loss)).backward()
        if scaler is None:
            optimizer.step()
        else:
            scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
        places.append(weight.detach().clone())
    return places


def bowl(optimizer: str, **changes: float) -> tuple[torch.optim.Optimizer, nn.Parameter]:
    holder = nn.Module()
    holder.weight = nn.Parameter(torch.tensor([1.0, -2.0, 0.5]))
    return build_optimizer(
        holder, TrainingConfig(optimizer=optimizer, **{"lr": 0.02, "weight_decay": 0.0, **changes})
    ), holder.weight


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimiser_goes_down(name: str) -> None:
    optimizer, weight = bowl(name)
    places = descend(optimizer, weight, 800)
    assert places[-1].abs().max() < 0.1 * places[0].abs().max()


def test_sgd_is_nesterovs() -> None:
    optimizer, weight = bowl("sgd", lr=0.01)
    place, speed = weight.detach().clone(), torch.zeros(3)
    for found in descend(optimizer, weight, 20):
        slope = 2 * place * torch.arange(1.0, 4.0)
        speed = 0.9 * speed + slope
        place = place - 0.01 * (slope + 0.9 * speed)
        torch.testing.assert_close(found, place)


def test_ranger_goes_half_the_way_back_every_six_steps() -> None:
    optimizer, weight = bowl("ranger")
    fast = nn.Parameter(weight.detach().clone())
    plain = torch.optim.RAdam([fast], lr=0.02, betas=(0.95, 0.999), eps=1e-5)
    slow = None
    for step, found in enumerate(descend(optimizer, weight, 24), start=1):
        descend(plain, fast, 1)
        if step % 6 == 0:
            slow = fast.detach().clone() if slow is None else slow + 0.5 * (fast.detach() - slow)
            fast.data.copy_(slow)
        torch.testing.assert_close(found, fast.detach())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_gradient_scaler_changes_nothing_but_skips_what_overflows(name: str) -> None:
    plain, scaled = bowl(name), bowl(name)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    expected, found = descend(*plain, 14), descend(*scaled, 14, scaler)
    assert all(torch.equal(one, two) for one, two in zip(expected, found, strict=True))  # powers of two are exact
    scaled[0].zero_grad()
    scaler.scale(scaled[1].sum() * math.inf).backward()
    scaler.step(scaled[0])
    scaler.update()
    assert torch.equal(scaled[1], expected[-1]) and scaler.get_scale() == 2.0**9
    expected, found = descend(*plain, 14), descend(*scaled, 14, scaler)
    assert all(torch.equal(one, two) for one, two in zip(expected, found, strict=True))


def test_onecycle_lowers_a_momentum_while_the_rate_rises_and_leaves_adans_betas() -> None:
    for name, key, values in (
        ("adamw", "betas", (0.95, 0.85)),
        ("ranger", "betas", (0.95, 0.85)),
        ("sgd", "momentum", (0.95, 0.85)),
    ):
        network, optimizer, schedule = setup("onecycle", 40, optimizer=name)
        for start, value in zip((0, 9), values, strict=True):
            train(network, optimizer, schedule, range(start))
            momentum = optimizer.param_groups[0][key]
            assert (momentum[0] if key == "betas" else momentum) == pytest.approx(value, abs=0.002)
    network, optimizer, schedule = setup("onecycle", 40, optimizer="adan")
    before = optimizer.param_groups[0]["betas"]
    train(network, optimizer, schedule, range(10))
    assert optimizer.param_groups[0]["betas"] == before and len(before) == 3


def rates_of(network: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, float]:
    rate = {id(weight): group["lr"] for group in optimizer.param_groups for weight in group["params"]}
    assert len(rate) == sum(len(group["params"]) for group in optimizer.param_groups), "a weight is in two groups"
    return {name: rate[id(weight)] for name, weight in network.named_parameters()}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_slower_encoder_keeps_its_proportion_on_every_step(schedule: str) -> None:
    network = build(ModelConfig(encoder="resnet18"))
    config = TrainingConfig(lr=LR, encoder_lr=0.1, schedule=schedule)
    optimizer = build_optimizer(network, config)
    lone = StepSchedule(torch.optim.AdamW([torch.zeros(1, requires_grad=True)], lr=LR), config, 50)
    following = StepSchedule(optimizer, config, 50)
    for _ in range(50):
        assert following.lr == lone.lr
        for name, rate in rates_of(network, optimizer).items():
            assert rate == pytest.approx(lone.lr * (0.1 if name.startswith("encoder.") else 1), rel=1e-9)
        lone.skip(1)
        following.skip(1)


def test_layers_of_a_vit_learn_as_slowly_as_timm_has_them() -> None:
    network = nn.Module()
    network.encoder, network.head = timm.create_model("test_vit", pretrained=False), nn.Conv2d(8, 1, 1)
    rates = rates_of(network, build_optimizer(network, TrainingConfig(lr=LR, layer_decay=0.75, encoder_lr=0.5)))
    theirs = {
        id(weight): group["lr_scale"]
        for group in param_groups_layer_decay(network.encoder, layer_decay=0.75)
        for weight in group["params"]
    }
    for name, weight in network.encoder.named_parameters():
        assert rates[f"encoder.{name}"] == pytest.approx(LR * 0.5 * theirs[id(weight)])
    assert rates["head.weight"] == LR and len(set(rates.values())) >= 4


@pytest.mark.parametrize(
    ("name", "from_the_input"),
    [
        (
            "tu-convnext_atto",
            [
                "model.stem_0.weight",
                "model.stages_0.blocks.0.conv_dw.weight",
                "model.stages_0.blocks.1.conv_dw.weight",
                "model.stages_2.blocks.0.conv_dw.weight",
                "model.stages_3.blocks.1.mlp.fc2.weight",
            ],
        ),
        (
            "tu-efficientnet_b1",
            [
                "model.conv_stem.weight",
                "model.blocks.0.0.conv_dw.weight",
                "model.blocks.0.1.conv_dw.weight",
                "model.blocks.6.1.conv_pwl.weight",
            ],
        ),
        ("resnet18", ["conv1.weight", "layer1.0.conv1.weight", "layer2.1.bn2.bias", "layer4.1.conv2.weight"]),
        ("mit_b0", ["patch_embed1.proj.weight", "block2.0.attn.q.weight", "norm3.weight", "block4.1.mlp.fc2.weight"]),
    ],
)
def test_layers_near_the_input_learn_slowest(name: str, from_the_input: list[str]) -> None:
    network = smp.Unet(name, encoder_weights=None)
    rates = rates_of(network, build_optimizer(network, TrainingConfig(lr=LR, layer_decay=0.5)))
    found = [rates[f"encoder.{weight}"] for weight in from_the_input]
    assert found == sorted(found) and len(set(found)) == len(found)
    assert found[-1] == pytest.approx(LR / 2), "the last layer is one below the decoder"
    order, top = layer_order(network.encoder)
    assert found[0] == pytest.approx(LR * 0.5**top) and sorted(set(order.values())) == list(range(top))
    assert all(rate == LR for weight, rate in rates.items() if not weight.startswith("encoder."))


def test_layer_order_of_a_vit_that_gives_features() -> None:
    order, top = layer_order(timm.create_model("test_vit", pretrained=False, features_only=True))
    blocks = {place for name, place in order.items() if ".blocks." in name}
    assert min(order.values()) == 0 == order["model.pos_embed"] and len(blocks) > 1 and max(blocks) == top - 1


@pytest.mark.parametrize(
    ("network", "changes", "said"),
    [
        (
            lambda: smp.Unet("mobilenet_v2", encoder_weights=None),
            {"layer_decay": 0.8},
            "MobileNetV2Encoder have no known order",
        ),
        (
            lambda: nn.Linear(2, 2),
            {"layer_decay": 0.8},
            "training.layer_decay is set, but the network Linear has no encoder",
        ),
        (
            lambda: nn.Linear(2, 2),
            {"encoder_lr": 0.1},
            "training.encoder_lr is set, but the network Linear has no encoder",
        ),
    ],
    ids=["order", "decay", "rate"],
)
def test_rates_that_a_network_cannot_have(network, changes: dict[str, float], said: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ConfigError, match=said):
        build_optimizer(network(), TrainingConfig(**changes))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_frozen_encoder_stays_to_the_bit_and_learns_afterwards(name: str) -> None:
    torch.manual_seed(1)
    network = build(ModelConfig(encoder="tu-test_resnet", options={"encoder_depth": 3, "decoder_channels": [16, 8, 8]}))
    optimizer = build_optimizer(network, TrainingConfig(optimizer=name, weight_decay=0.1))
    inputs = torch.randn(2, 3, 64, 64)

    def learn() -> set[str]:
        """One step; returns the names of what it changed, statistics of norms included."""
        before = {key: value.clone() for key, value in network.state_dict().items()}
        network(inputs).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        return {key for key, value in network.state_dict().items() if not torch.equal(value, before[key])}

    def part(changed: set[str]) -> set[str]:
        return {key.split(".")[0] for key in changed}

    for _ in range(3):
        network.train()
        set_frozen(network, True)
        changed = learn()
        assert part(changed) == {"decoder", "segmentation_head"} and any(
            key.endswith("running_mean") for key in changed
        )
    network.train()
    set_frozen(network, False)
    changed = learn()
    assert part(changed) == {"encoder", "decoder", "segmentation_head"}
    assert any(key.startswith("encoder.") and key.endswith("running_mean") for key in changed)


def test_thawing_an_evaluated_network_does_not_wake_its_norms() -> None:
    network = build(ModelConfig(encoder="resnet18")).eval()
    set_frozen(network, False)
    assert not any(part.training for part in network.modules())
