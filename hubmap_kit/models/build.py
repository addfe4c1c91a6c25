"""ModelConfig -> network: any decoder of segmentation_models_pytorch, or of the kit's own, on any smp or timm
encoder.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from segmentation_models_pytorch.encoders import get_encoder_names

from hubmap_kit.config import ModelConfig, Triple
from hubmap_kit.errors import ConfigError, did_you_mean
from hubmap_kit.models.architectures import ARCHITECTURES, Architecture
from hubmap_kit.models.network import Network, use_group_norm
from hubmap_kit.models.pretrained import load_encoder

CHANNELS = {"binary": 1, "organs": 6}  # organs: background, then competition.organs in their order
NORMS = ("batch", "group")


def build(config: ModelConfig, pretrained: bool = True) -> Network:
    """Build the network of a config, in train mode on the CPU.

    Input (N, 3, H, W) float, normalised with the config's mean and std, of any size from 32 px; output (N, C, H, W)
    logits, C = 1, or 6 for classes organs; in train mode with auxiliary heads models.heads.Outputs. With `pretrained`
    the encoder takes its weights from `config.encoder_weights`, if that is set; loading a trained fold passes False, so
    a finished run does not need that file any more. Raises ConfigError and WeightsError.
    """
    architecture = ARCHITECTURES.get(config.arch.lower())
    if architecture is None:
        raise ConfigError(
            f"model.arch is '{config.arch}'; known are"
            f" {', '.join(ARCHITECTURES)}{did_you_mean(config.arch, list(ARCHITECTURES))}"
        )
    if not architecture.own_encoder:
        _check_encoder(config.encoder)
    _check_options(architecture, config)
    options = dict(config.options)
    norm = options.pop("decoder_norm", "batch")
    try:
        network = architecture.make(config.encoder, CHANNELS[config.classes], options)
        if norm == "group":
            use_group_norm(network.decoder)
        network.add_heads(list(config.auxiliary), CHANNELS[config.classes])
    except (KeyError, ValueError, TypeError, RuntimeError, AttributeError, AssertionError) as error:
        raise ConfigError(
            f"model: {config.arch} on {config.encoder} cannot be built with options {config.options}: {error}"
        ) from error
    if norm == "group":
        use_group_norm(network.auxiliary)
    if pretrained and config.encoder_weights:
        load_encoder(network.encoder, config.encoder_weights, config)
    return network


def normalise(tiles: torch.Tensor, config: ModelConfig) -> torch.Tensor:
    """uint8 tiles (N, H, W, 3) on any device -> network input (N, 3, H, W) float32, channels last, on the same device.

    Tiles travel as bytes and become floats where the network is: a quarter of the traffic.
    """
    mean, std = _statistics(config.mean, config.std, tiles.device)
    return (tiles.permute(0, 3, 1, 2).float() - mean) / std


@lru_cache(maxsize=16)
def _statistics(mean: Triple, std: Triple, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and std in 0..255, (1, 3, 1, 1), kept on the device: copying them for every batch would make a GPU wait."""
    return tuple(torch.tensor(values, device=device).view(1, 3, 1, 1) * 255 for values in (mean, std))  # type: ignore[return-value]


def _check_encoder(name: str) -> None:
    if name.startswith("tu-"):
        import timm

        if not timm.is_model(name.removeprefix("tu-")):
            known = timm.list_models()
            raise ConfigError(
                f"model.encoder is '{name}', which timm does not"
                f" have{did_you_mean(name.removeprefix('tu-'), known, 'tu-')}"
            )
    elif name not in get_encoder_names():
        raise ConfigError(
            f"model.encoder is '{name}', which smp does not have; give one of its names or tu-NAME for a timm network"
            f"{did_you_mean(name, get_encoder_names())}"
        )


def _check_options(architecture: Architecture, config: ModelConfig) -> None:
    for key in config.options:
        if key not in architecture.options:
            known = architecture.options
            raise ConfigError(
                f"model.options has '{key}'; {config.arch} takes {', '.join(known)}{did_you_mean(key, known)}"
            )
    if config.options.get("decoder_norm", "batch") not in NORMS:
        raise ConfigError(
            f"model.options.decoder_norm is '{config.options['decoder_norm']}'; give {' or '.join(NORMS)}"
        )
