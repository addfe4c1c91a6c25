"""Packing encoder weights into a folder: NAME.safetensors with its card.

Downloading happens here only, on a machine of one's own.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file
from segmentation_models_pytorch.encoders import encoders as smp_encoders
from segmentation_models_pytorch.encoders import get_encoder, get_preprocessing_params
from torch import nn

from hubmap_kit.config import Triple
from hubmap_kit.errors import ConfigError, WeightsError, did_you_mean
from hubmap_kit.files import atomic_path
from hubmap_kit.models.decoders import ErfnetEncoder
from hubmap_kit.models.pretrained import UNKNOWN, Card, load_encoder, sha256, triple

log = logging.getLogger(__name__)
OWN = {"erfnet": ErfnetEncoder}
VERSIONS = ("timm", "segmentation-models-pytorch", "torch")
# Of weights whose hub page, not the code, names the licence; as their authors' repositories state it.
SMP_LICENCES = {"mit_b": "NVIDIA Source Code License for SegFormer (non-commercial)"}


@dataclass(frozen=True)
class Packed:
    """A packed encoder: its weights file, its card, and how many tensors it holds."""

    weights: Path
    card: Card
    tensors: int


@dataclass(frozen=True)
class Given:
    """What a file of weights cannot say itself: the input mean and std that its network learnt from; source and licence
    as far as known.
    """

    mean: Triple
    std: Triple
    source: str = ""
    licence: str = UNKNOWN


def pack_file(encoder: str, file: Path, given: Given, out: Path) -> Packed:
    """Pack an encoder's weights out of a local file: of a classifier, of an encoder, or of a whole trained network.

    Raises ConfigError for an unknown encoder, and WeightsError where the file does not fit it.
    """
    network = reference(encoder)
    loaded = set(load_encoder(network, file).loaded)
    # Only what came from the file: a tensor that stayed random must be missed when the packed file is loaded.
    tensors = {name: value for name, value in _state(network).items() if name in loaded}
    return _save(encoder, tensors, given.mean, given.std, given.source or file.name, "", given.licence, out)


def pack_download(encoder: str, out: Path) -> Packed:
    """Pack an encoder's weights as timm or smp download them from their hub.

    Raises ConfigError for an unknown encoder or one without published weights, and WeightsError where nothing can be
    downloaded.
    """
    check_name(encoder)
    if encoder in OWN:
        raise ConfigError(
            f"nobody publishes weights of {encoder}; pack those of a run of your own with --from"
            " RUN/fold0/model.safetensors"
        )
    return _download_timm(encoder, out) if encoder.startswith("tu-") else _download_smp(encoder, out)


def reference(encoder: str) -> nn.Module:
    """The network whose names packed files of an encoder have, at random: timm's own without its classifier, or smp's
    encoder.
    """
    check_name(encoder)
    if encoder in OWN:
        return OWN[encoder]()
    if encoder.startswith("tu-"):
        return timm.create_model(encoder.removeprefix("tu-"), pretrained=False, num_classes=0)
    return get_encoder(encoder, weights=None)


def check_name(encoder: str) -> None:
    """Raise ConfigError for an encoder that neither timm nor smp nor the kit has."""
    bare = encoder.removeprefix("tu-")
    if encoder in OWN or encoder in smp_encoders or (encoder != bare and timm.is_model(bare)):
        return
    known = [*OWN, *smp_encoders, *(f"tu-{name}" for name in timm.list_models())]
    raise ConfigError(f"'{encoder}' is no encoder of timm (tu-NAME), smp or the kit{did_you_mean(encoder, known)}")


def _download_timm(encoder: str, out: Path) -> Packed:
    bare = encoder.removeprefix("tu-")
    if not timm.models.is_model_pretrained(bare):
        raise ConfigError(f"timm has no pretrained weights of {bare}; name another encoder, or give a file with --from")
    network = _downloaded(encoder, lambda: timm.create_model(bare, pretrained=True, num_classes=0))
    config = network.pretrained_cfg  # from here on: not seen at work where nothing can be downloaded
    source = config.get("hf_hub_id") or config.get("url") or "timm"
    tag, licence = str(config.get("tag") or ""), str(config.get("license") or UNKNOWN)
    return _save(encoder, _state(network), triple(config["mean"]), triple(config["std"]), source, tag, licence, out)


def _download_smp(encoder: str, out: Path) -> Packed:
    settings = smp_encoders[encoder]["pretrained_settings"]
    if not settings:
        raise ConfigError(
            f"smp has no pretrained weights of {encoder}; name another encoder, or give a file with --from"
        )
    tag = "imagenet" if "imagenet" in settings else next(iter(settings))
    network, inputs = _downloaded(
        encoder, lambda: (get_encoder(encoder, weights=tag), get_preprocessing_params(encoder, tag))
    )
    # From here on: not seen at work where nothing can be downloaded.
    if inputs["input_space"] != "RGB" or inputs["input_range"] != [0, 1]:
        raise WeightsError(
            f"{encoder} ({tag}) expects {inputs['input_space']} in {inputs['input_range']}, and the kit shows RGB in"
            " 0..1; take another one"
        )
    licence = next((words for start, words in SMP_LICENCES.items() if encoder.startswith(start)), UNKNOWN)
    return _save(
        encoder,
        _state(network),
        triple(inputs["mean"]),
        triple(inputs["std"]),
        settings[tag]["repo_id"],
        tag,
        licence,
        out,
    )


def _downloaded(encoder: str, get: Any) -> Any:
    try:
        return get()
    except Exception as error:
        # The hub's client fails in as many ways as there are networks and proxies.
        reason = (str(error).strip().splitlines() or [""])[0][:160]
        raise WeightsError(
            f"the weights of {encoder} could not be downloaded ({type(error).__name__}: {reason}); run this on a"
            " machine with internet access, or give a file that you have with --from"
        ) from error


def _state(network: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value for name, value in network.state_dict().items() if not name.endswith("num_batches_tracked")}


def _save(
    encoder: str,
    tensors: dict[str, torch.Tensor],
    mean: Triple,
    std: Triple,
    source: str,
    tag: str,
    licence: str,
    out: Path,
) -> Packed:
    path = out / f"{encoder}.safetensors"
    with atomic_path(path) as temporary:
        save_file(
            {name: value.detach().contiguous().clone() for name, value in tensors.items()}, temporary, {"format": "pt"}
        )
    versions = {name: version(name) for name in VERSIONS}
    card = Card(encoder, mean, std, os.fspath(source), tag, licence, sha256(path), versions)
    card.write(path)
    log.info("%s: %d tensors, licence %s", path, len(tensors), licence)
    return Packed(path, card, len(tensors))
