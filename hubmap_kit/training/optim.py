"""The optimiser: which weights decay, which learn more slowly, and which do not learn yet."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import timm
import torch
from timm.models import group_parameters
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler, PolyLRScheduler
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR

from hubmap_kit.config import TrainingConfig
from hubmap_kit.errors import ConfigError

# Ranger: rectified Adam as its author set it, and every 6 steps half the way back to the weights of 6 steps before.
OPTIMIZERS: dict[str, tuple[str, dict[str, Any]]] = {
    "adamw": ("adamw", {}),
    "adam": ("adam", {}),
    "sgd": ("sgd", {"momentum": 0.9}),
    "adan": ("adan", {}),
    "ranger": ("lookahead_radam", {"betas": (0.95, 0.999), "eps": 1e-5, "decoupled_weight_decay": True}),
}
# Encoders of smp itself say nothing about their layers: ResNets and the likes of them, and Mix Transformers.
SMP_LAYERS = {"stem": r"^(?:conv1|bn1|layer0)\.", "stages": r"^(?:layer|patch_embed|block|norm)(\d)\."}
DECODER = "<decoder>"  # no parameter's name
FLAT = 0.75  # share of the steps after which flat-cosine falls
CYCLES = 3  # cosines of `restarts`, 1 + 2 + 4 parts long: a training of 30 epochs has a first one of 4
POWER = 0.9  # of the falling side of `poly`


class StepSchedule:
    """A learning rate per optimiser step. Contract: call `step()` once after every `optimizer.step()`, never per epoch.

    A group's rate when the schedule is made is its peak, so groups keep their proportions on every step. The rate
    begins at a 25th of the peak, but for `constant` (always the peak) and where `warmup` is 0, and falls to a 1000th
    (onecycle: to next to nothing).
    """

    def __init__(self, optimizer: torch.optim.Optimizer, config: TrainingConfig, total_steps: int) -> None:
        self.optimizer, self.done = optimizer, 0
        self._shares = [group["lr"] / config.lr for group in optimizer.param_groups]
        self._cycle = self._shape = None
        if config.schedule == "onecycle":
            # torch divides by the length of each phase: both need a step at least.
            share = min(max(config.warmup, 1 / total_steps), 1 - 1 / total_steps) if total_steps > 2 else 0.75
            peaks = [group["lr"] for group in optimizer.param_groups]
            self._cycle = OneCycleLR(
                optimizer, peaks, total_steps=total_steps + 1, pct_start=share, cycle_momentum=_has_momentum(optimizer)
            )
        elif config.schedule != "constant":
            self._shape = _Shape(config, total_steps)
            self._set()

    def step(self) -> None:
        """Go on to the rate of the next step."""
        self.done += 1
        if self._cycle is not None:
            self._cycle.step()
        else:
            self._set()

    def skip(self, steps: int) -> None:
        """Go where that many steps would have led, without the optimiser."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step", UserWarning)
            for _ in range(steps):
                self.step()

    @property
    def lr(self) -> float:
        """The rate of the next step, of the group that learns fastest, which is what `training.lr` is about."""
        return float(max(group["lr"] for group in self.optimizer.param_groups))

    def state_dict(self) -> dict[str, Any]:
        """The steps done, and the state of torch's own schedule where one is used."""
        return {"done": self.done, "cycle": self._cycle.state_dict() if self._cycle is not None else None}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict()` was taken. All schedules but onecycle have no state but the step count."""
        self.done = int(state["done"])
        if self._cycle is not None:
            self._cycle.load_state_dict(state["cycle"])
        else:
            self._set()

    def _set(self) -> None:
        if self._shape is None:
            return
        rate = self._shape.at(self.done)
        for group, share in zip(self.optimizer.param_groups, self._shares, strict=True):
            group["lr"] = rate * share


class _Shape:
    """The rate of a step, without the optimiser: timm's schedules know absolute rates only, so they drive a stand-in of
    one group.
    """

    def __init__(self, config: TrainingConfig, total: int) -> None:
        self._warmup = min(round(config.warmup * total), total - 1)
        self._hold = max(int(FLAT * total) - self._warmup, 0) if config.schedule == "flat-cosine" else 0
        self._stand_in = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=config.lr)
        falling = total - self._warmup - self._hold
        common: dict[str, Any] = {
            "lr_min": config.lr / 1000,
            "warmup_t": self._warmup,
            "warmup_lr_init": config.lr / 25,
            "warmup_prefix": True,
            "t_in_epochs": False,
        }
        self._schedule: PolyLRScheduler | CosineLRScheduler
        if config.schedule == "poly":
            self._schedule = PolyLRScheduler(self._stand_in, t_initial=falling, power=POWER, **common)
        elif config.schedule == "restarts":
            first = falling / (2**CYCLES - 1)  # no whole number as a rule: the last cosine ends with the training
            self._schedule = CosineLRScheduler(
                self._stand_in, t_initial=first, cycle_mul=2.0, cycle_limit=CYCLES, **common
            )
        else:
            self._schedule = CosineLRScheduler(self._stand_in, t_initial=falling, **common)

    def at(self, step: int) -> float:
        self._schedule.step_update(step - min(max(step - self._warmup, 0), self._hold))
        return float(self._stand_in.param_groups[0]["lr"])


def _has_momentum(optimizer: torch.optim.Optimizer) -> bool:
    """Whether onecycle has a momentum to lower while the rate rises.

    The first of Adan's three betas plays another part.
    """
    return "momentum" in optimizer.defaults or len(optimizer.defaults.get("betas", ())) == 2


def build_optimizer(network: nn.Module, config: TrainingConfig) -> torch.optim.Optimizer:
    """The optimiser of `training.optimizer` over all weights of a network, frozen ones too.

    Biases and norm weights (one dimension) have no weight decay. The encoder's rate is `encoder_lr` of the others', and
    with `layer_decay` each of its layers learns at that share of the one above. adam and sgd add the decay to the
    gradient, the others take it off the weights. Raises ConfigError when the network has no encoder, or its encoder no
    order of layers.
    """
    name, extra = OPTIMIZERS[config.optimizer]
    return create_optimizer_v2(
        _groups(network, config), opt=name, lr=config.lr, weight_decay=config.weight_decay, **extra
    )


def set_frozen(network: nn.Module, frozen: bool) -> None:
    """Stop or start the learning of `network.encoder`.

    Call it after every `network.train()`, which wakes the norms again.

    Frozen weights have no gradient, so no optimiser moves them, nor does weight decay; and norms keep their statistics.
    """
    encoder = _encoder(network, "freeze_epochs")
    for weight in encoder.parameters():
        weight.requires_grad_(not frozen)
        if frozen:
            weight.grad = None
    for part in encoder.modules():
        if hasattr(part, "running_mean"):
            part.train(network.training and not frozen)


def layer_order(encoder: nn.Module) -> tuple[dict[str, int], int]:
    """The layer of each of an encoder's weights by name, counted from the input, and the number of the decoder after
    them.

    What belongs to no layer, such as a ViT's last norm, has the decoder's number. The order is timm's, for every
    encoder that is a timm network, and that of the stages for smp's own ResNets and Mix Transformers. Raises
    ConfigError for others.
    """
    inner, prefix, matcher = _matcher(encoder)
    names = {_timm_name(name, prefix, inner): name for name, _ in encoder.named_parameters()}
    places = group_parameters(_Names((*names, DECODER)), matcher, reverse=True)
    order = {own: places[name] for name, own in names.items()}
    if matcher is SMP_LAYERS and max(order.values(), default=places[DECODER]) == places[DECODER]:
        raise ConfigError(
            f"training.layer_decay is set, but the layers of the encoder {type(encoder).__name__} have no known order; "
            "choose a timm encoder (tu-NAME), or set layer_decay to 1 and encoder_lr instead"
        )
    return order, places[DECODER]


class _Names(nn.Module):
    """What timm asks for names, with names that it does not see otherwise."""

    def __init__(self, names: Iterable[str]) -> None:
        super().__init__()
        self.names = tuple(names)

    def named_parameters(self, *_: Any, **__: Any) -> Iterator[tuple[str, Any]]:
        return ((name, None) for name in self.names)


def _groups(network: nn.Module, config: TrainingConfig) -> list[dict[str, Any]]:
    """Weights by their rate and decay.

    Without rates of their own they are the groups, in the order, that timm makes.
    """
    shares = _encoder_shares(network, config)
    found: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, weight in network.named_parameters():
        decay = 0.0 if weight.ndim <= 1 or name.endswith(".bias") else config.weight_decay
        found.setdefault((shares.get(name, 1.0), decay), []).append(weight)
    return [{"params": found[key], "weight_decay": key[1], "lr": config.lr * key[0]} for key in sorted(found)]


def _encoder_shares(network: nn.Module, config: TrainingConfig) -> dict[str, float]:
    if config.encoder_lr == 1 and config.layer_decay == 1:
        return {}
    encoder = _encoder(network, "encoder_lr" if config.encoder_lr < 1 else "layer_decay")
    if config.layer_decay == 1:
        return {f"encoder.{name}": config.encoder_lr for name, _ in encoder.named_parameters()}
    order, top = layer_order(encoder)
    return {f"encoder.{name}": config.encoder_lr * config.layer_decay ** (top - place) for name, place in order.items()}


def _encoder(network: nn.Module, key: str) -> nn.Module:
    encoder = getattr(network, "encoder", None)
    if not isinstance(encoder, nn.Module):
        raise ConfigError(
            f"training.{key} is set, but the network {type(network).__name__} has no encoder; leave it at its default"
        )
    return encoder


def _matcher(encoder: nn.Module) -> tuple[nn.Module | None, str, Any]:
    """What says where the layers are: the timm network inside, its path in the encoder, and its patterns."""
    part: Any
    for path, part in encoder.named_modules():
        if hasattr(part, "group_matcher"):
            return part, f"{path}." if path else "", part.group_matcher(coarse=False)
    name = getattr(encoder, "name", "")
    if isinstance(name, str) and timm.is_model(name):
        whole: Any = _whole(name)
        if hasattr(whole, "group_matcher"):
            return whole, "model.", whole.group_matcher(coarse=False)
    return None, "", SMP_LAYERS


def _whole(name: str) -> nn.Module:
    """A timm network as it was before it was cut into a list of features, which loses the patterns."""
    try:
        with torch.device("meta"):
            return timm.create_model(name, pretrained=False)
    except (RuntimeError, NotImplementedError):  # some ask for the value of a tensor while they are built
        with torch.random.fork_rng(devices=[]):
            return timm.create_model(name, pretrained=False)


def _timm_name(name: str, prefix: str, whole: nn.Module | None) -> str:
    """The name that a weight has in the timm network; what is outside of it keeps its own, which matches nothing."""
    if whole is None or not name.startswith(prefix):
        return name if whole is None else f"<outside>.{name}"
    name = name.removeprefix(prefix)
    # Lists of features write stages_0 for stages.0.
    return re.sub(
        r"^(\w+?)_(\d+)\.",
        lambda found: found[0] if hasattr(whole, f"{found[1]}_{found[2]}") else f"{found[1]}.{found[2]}.",
        name,
    )
