"""The optimiser: which weights decay, which learn more slowly, and which do not learn yet."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

import timm
import torch
from timm.models import group_parameters
from timm.optim import create_optimizer_v2
from torch import nn

from hubmap_kit.config import TrainingConfig
from hubmap_kit.errors import ConfigError
from hubmap_kit.training.schedules import StepSchedule

__all__ = ["StepSchedule", "build_optimizer", "layer_order", "set_frozen"]

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
    for path, part in encoder.named_modules():
        if hasattr(part, "group_matcher"):
            return part, f"{path}." if path else "", part.group_matcher(coarse=False)
    name = getattr(encoder, "name", "")
    if isinstance(name, str) and timm.is_model(name):
        whole = _whole(name)
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
