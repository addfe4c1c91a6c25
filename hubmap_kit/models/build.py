"""ModelConfig -> network: any decoder of segmentation_models_pytorch, or of the kit's own, on any smp or timm
encoder.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import segmentation_models_pytorch as smp
import torch
from segmentation_models_pytorch.base import SegmentationHead
from segmentation_models_pytorch.encoders import get_encoder, get_encoder_names
from torch import nn

from hubmap_kit.config import ModelConfig, Triple
from hubmap_kit.errors import ConfigError, did_you_mean
from hubmap_kit.models import encoders
from hubmap_kit.models.decoders import (
    DaformerDecoder,
    ErfnetDecoder,
    ErfnetEncoder,
    MaskTransformer,
    ShuffleDecoder,
    UnextDecoder,
    Upsample,
)
from hubmap_kit.models.network import Network, use_group_norm
from hubmap_kit.models.pretrained import load_encoder

# The architectures by name: what each one is, which options it takes, and how it is put together.

Options = dict[str, Any]
FIXED = {"self", "encoder_name", "encoder_weights", "in_channels", "classes", "aux_params", "activation", "kwargs"}
STAGED = ("Unet", "UnetPlusPlus", "MAnet", "Linknet")  # of smp's, those whose decoder climbs in blocks


@dataclass(frozen=True)
class Architecture:
    """One architecture.

    `make(encoder, classes, options)` gives the network; `options` are the names that model.options may hold.
    """

    words: str
    make: Callable[[str, int, Options], Network]
    options: tuple[str, ...]
    own_encoder: bool = field(default=False)  # model.encoder is not read


def _smp(kind: Any) -> Callable[[str, int, Options], Network]:
    def make(encoder: str, classes: int, options: Options) -> Network:
        # encoder_weights=None is the only value that is sure not to download.
        more = _timm(encoder, options)
        network: Any = kind(
            encoders.smp_name(encoder), encoder_weights=None, in_channels=3, classes=classes, **more, **options
        )
        stages = _stages(network.decoder) if kind.__name__ in STAGED else []
        # PAN halves the deepest map three times more.
        least = 128 if kind is smp.PAN else 32
        multiple = encoders.multiple_of(network.encoder)
        return Network(
            network.encoder, network.decoder, network.segmentation_head, multiple=multiple, least=least, stages=stages
        )

    return make


def _timm(encoder: str, options: Options) -> Options:
    """What timm needs beside smp's own arguments; takes img_size out of the options."""
    size = {"img_size": options.pop("img_size")} if "img_size" in options else {}
    if size and not encoders.takes_image_size(encoder):
        raise ValueError(f"img_size is for MaxViT's windows, and {encoder} is none")
    return encoders.extras(encoder) | size


def _stages(decoder: Any) -> list[str]:
    """The blocks of a decoder but the last one, which the head reads; of UNet++ those of its last diagonal, each twice
    as large as the one before.
    """
    names = [name for name, _ in decoder.blocks.named_children()]
    return [f"blocks.{name}" for name in names if not name.startswith("x_") or name.startswith("x_0_")][:-1]


def _encoder(name: str, options: Options, depth: int = 5) -> Any:
    return get_encoder(encoders.smp_name(name), in_channels=3, depth=depth, weights=None, **_timm(name, options))


def _unet(encoder: str, classes: int, options: Options) -> Network:
    shuffle, attention = (_switch(options, name) for name in ("pixel_shuffle", "self_attention"))
    if not (shuffle or attention):
        return _smp(smp.Unet)(encoder, classes, options)
    refused = [key for key in options if key not in ("encoder_depth", "decoder_channels", "img_size")]
    if refused:
        raise ValueError(f"{refused[0]} does not go together with pixel_shuffle and self_attention")
    depth = options.pop("encoder_depth", 5)
    network = _encoder(encoder, options, depth)
    channels = options.pop("decoder_channels", [256, 128, 64, 32, 16][:depth])
    decoder = ShuffleDecoder(network.out_channels, channels, shuffle, attention)
    head = SegmentationHead(channels[-1], classes, kernel_size=3)
    return Network(network, decoder, head, multiple=encoders.multiple_of(network), stages=_stages(decoder))


def _switch(options: Options, name: str) -> bool:
    value = options.pop(name, False)
    if not isinstance(value, bool):
        raise TypeError(f"{name} is '{value}' and must be true or false")
    return value


def _unext50(encoder: str, classes: int, options: Options) -> Network:
    network = _encoder(encoder, options)
    decoder = UnextDecoder(
        network.out_channels, options.pop("decoder_channels", [256, 128, 64, 32]), options.pop("pyramid_channels", 16)
    )
    head = nn.Sequential(nn.Conv2d(decoder.out_channels, classes, 1), Upsample(2))
    return Network(network, decoder, head, multiple=encoders.multiple_of(network), stages=_stages(decoder))


def _daformer(encoder: str, classes: int, options: Options) -> Network:
    network = _encoder(encoder, options, options.pop("encoder_depth", 5))
    channels = options.pop("decoder_channels", 256)
    decoder = DaformerDecoder(network.out_channels, channels, options.pop("decoder_rates", [1, 6, 12, 18]))
    return Network(
        network,
        decoder,
        nn.Sequential(nn.Conv2d(channels, classes, 1), Upsample(4)),
        multiple=encoders.multiple_of(network),
    )


def _segmenter(encoder: str, classes: int, options: Options) -> Network:
    if not encoders.is_vit(encoder):
        raise ValueError("it needs a plain vision transformer of timm, such as tu-vit_small_patch16_224")
    network = encoders.VitEncoder(encoder.removeprefix("tu-"))
    decoder = MaskTransformer(network.out_channels[-1], classes, options.pop("decoder_layers", 2))
    return Network(network, decoder, Upsample(network.patch), multiple=encoders.multiple_of(network))


def _erfnet(_encoder_name: str, classes: int, _options: Options) -> Network:
    decoder = ErfnetDecoder()
    return Network(
        ErfnetEncoder(), decoder, nn.ConvTranspose2d(16, classes, 2, stride=2), stages=["blocks.0", "blocks.1"]
    )


def _options(kind: type[nn.Module], *own: str) -> tuple[str, ...]:
    return (
        *(name for name in inspect.signature(kind.__init__).parameters if name not in FIXED),
        *own,
        "decoder_norm",
        "img_size",
    )


WORDS = {
    "Unet": "U-Net; options pixel_shuffle and self_attention as in fastai's DynamicUnet",
    "UnetPlusPlus": "U-Net with nested skip connections",
    "FPN": "feature pyramid",
    "MAnet": "U-Net with attention over places and scales",
    "Linknet": "U-Net that adds skips: small and fast",
    "PSPNet": "pyramid pooling on a shallow encoder: coarse and fast",
    "PAN": "pyramid attention; sees 128 px at least",
    "DeepLabV3": "atrous pyramid; encoder_output_stride 8 or 16; convolutional encoders",
    "DeepLabV3Plus": "atrous pyramid with one skip; encoder_output_stride 8 or 16; convolutional encoders",
    "UPerNet": "pyramid pooling and feature pyramid; the usual decoder for ViT, Swin and ConvNeXt",
    "Segformer": "a linear layer a level, joined; the usual decoder for mit_b0 to mit_b5",
}
ARCHITECTURES: dict[str, Architecture] = {
    name.lower(): Architecture(words, _smp(getattr(smp, name)), _options(getattr(smp, name)))
    for name, words in WORDS.items()
} | {
    "unet": Architecture(WORDS["Unet"], _unet, _options(smp.Unet, "pixel_shuffle", "self_attention")),
    "unext50": Architecture(
        "U-Net with pixel shuffle, atrous pyramid and feature pyramid; meant for resnext50_32x4d",
        _unext50,
        ("decoder_channels", "pyramid_channels", "decoder_norm", "img_size"),
    ),
    "daformer": Architecture(
        "levels embedded alike, joined by separable atrous convolutions; for mit, CoaT, PVTv2",
        _daformer,
        ("decoder_channels", "decoder_rates", "encoder_depth", "decoder_norm", "img_size"),
    ),
    "segmenter": Architecture(
        "mask transformer on a plain ViT (tu-vit_..., tu-deit_..., tu-eva02_...)", _segmenter, ("decoder_layers",)
    ),
    "erfnet": Architecture(
        "two million weights, with an encoder of its own; model.encoder is not read",
        _erfnet,
        ("decoder_norm",),
        own_encoder=True,
    ),
}


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
    first, second = (torch.tensor(values, device=device).view(1, 3, 1, 1) * 255 for values in (mean, std))
    return first, second


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
