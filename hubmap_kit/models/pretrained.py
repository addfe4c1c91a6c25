"""Encoder weights from a local file, never from the network.

Accepts safetensors, and torch files read with `weights_only=True`: nothing in the file can run code.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import pickle
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from timm.layers import resample_abs_pos_embed, resize_rel_pos_bias_table
from torch import nn

from hubmap_kit.config import ModelConfig, Triple
from hubmap_kit.errors import WeightsError
from hubmap_kit.files import write_json

# The card of a packed weights file: NAME.json beside NAME.safetensors, with what the encoder expects to see and where
# it comes from.

UNKNOWN = "unknown"
CLOSE = 1e-3  # of a mean or std in 0..1: cards and experiments round to three digits


@dataclass(frozen=True)
class Card:
    """Encoder name, input mean and std in 0..1 (RGB), source and tag of the weights, their licence, sha256 of the file,
    versions.
    """

    encoder: str
    mean: Triple
    std: Triple
    source: str
    tag: str
    licence: str
    sha256: str
    versions: dict[str, str]

    def write(self, weights: Path) -> Path:
        """Put the card beside a weights file; returns its path."""
        path = weights.with_suffix(".json")
        write_json(path, asdict(self))
        return path

    def check(self, weights: Path, config: ModelConfig) -> None:
        """Raise WeightsError where the file is not the packed one, or the experiment would show the encoder other
        numbers than it learnt from.
        """
        if sha256(weights) != self.sha256:
            raise WeightsError(
                f"{weights} is not the file that its card {weights.stem}.json was written for (other sha256); copy or"
                " pack both again"
            )
        if _differ(config.mean, self.mean) or _differ(config.std, self.std):
            raise WeightsError(
                f"{weights} expects inputs of mean {_words(self.mean)} and std {_words(self.std)}, but the experiment"
                f" has {_words(config.mean)} and {_words(config.std)}; add --set model.mean={_words(self.mean)} --set"
                f" model.std={_words(self.std)}"
            )


def read(weights: Path) -> Card | None:
    """The card beside a weights file, or None without one. Raises WeightsError where it is damaged."""
    path = weights.with_suffix(".json")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise WeightsError(
            f"{path} is damaged ({type(error).__name__}); pack the weights again, or take the card away"
        ) from error
    try:
        texts = {key: str(values[key]) for key in ("encoder", "source", "tag", "licence", "sha256")}
        return Card(mean=triple(values["mean"]), std=triple(values["std"]), versions=dict(values["versions"]), **texts)
    except (KeyError, ValueError, TypeError) as error:
        raise WeightsError(
            f"{path} is no card of packed weights ({error}); pack them again with 'hubmap pretrained pack'"
        ) from error


def triple(values: Sequence[float]) -> Triple:
    """Three numbers for red, green and blue. Raises ValueError."""
    numbers = tuple(float(value) for value in values)
    if len(numbers) != 3:
        raise ValueError(f"{len(numbers)} numbers where red, green and blue have one each")
    return numbers[0], numbers[1], numbers[2]


def sha256(path: Path) -> str:
    """The sha256 of a file as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _differ(one: Triple, other: Triple) -> bool:
    return any(abs(a - b) > CLOSE for a, b in zip(one, other, strict=True))


def _words(values: Triple) -> str:
    return "[" + ",".join(f"{value:g}" for value in values) + "]"


log = logging.getLogger(__name__)
LEAST_SHARE = 0.9  # below this share of the encoder's tensors a file is for another network
PREFIXES = ("module.", "encoder.", "backbone.", "model.")
MOST_PREFIXES = 5  # tokens before those of the patches: class, distillation, registers


@dataclass(frozen=True)
class LoadReport:
    """What a weights file gave an encoder: names of tensors loaded, missing in the file, and left over in it."""

    loaded: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]


def read_tensors(path: str | Path) -> dict[str, torch.Tensor]:
    """All tensors of a weights file by name.

    Raises WeightsError when it is missing, damaged, or not a plain table of tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise WeightsError(f"{path} does not exist; give model.encoder_weights the path of a .safetensors or .pth file")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        values = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # Either not a torch file at all, or one with pickled code in it, which is never run.
        raise WeightsError(
            f"{path} is not a plain file of tensors; save the network's state dict, best as safetensors"
        ) from error
    except Exception as error:
        # A cut-off or alien file makes torch's readers fail in a dozen ways, from OSError to struct.error.
        raise WeightsError(
            f"{path} is damaged or not a weights file ({_first_line(error)}); copy or download it again"
        ) from error
    for key in ("state_dict", "model", "model_state_dict"):
        if isinstance(values, dict) and isinstance(values.get(key), dict):
            values = values[key]
    tensors = (
        {key: value for key, value in values.items() if isinstance(value, torch.Tensor)}
        if isinstance(values, dict)
        else {}
    )
    if not tensors:
        raise WeightsError(f"{path} holds no table of tensors; save the network's state dict into it")
    return tensors


def load_encoder(encoder: nn.Module, path: str | Path, config: ModelConfig | None = None) -> LoadReport:
    """Copy a file's tensors into an encoder in place, by name and shape; `path` may be a folder that holds
    NAME.safetensors.

    smp's encoders take the file's names as they are; of a timm (`tu-`) encoder the inner network does, after timm's own
    renaming for feature extraction. Position embeddings of another input size, and biases of another window, are
    resampled. With `config` the card of packed weights is checked: the file's hash, and the input mean and std. Raises
    WeightsError when less than 90 % of the encoder's tensors, or of its numbers, are in the file: an encoder that is
    silently random is worse than none.
    """
    path = find_weights(path, config.encoder if config is not None else "")
    _check_card(path, config)
    target = _inner(encoder)
    own = {name: value for name, value in target.state_dict().items() if not name.endswith("num_batches_tracked")}
    given = {
        name: resampled(name, value, own[name]) if name in own else value
        for name, value in _best_names(read_tensors(path), own).items()
    }
    matching = {name: value for name, value in given.items() if name in own and value.shape == own[name].shape}
    report = LoadReport(
        tuple(matching), tuple(n for n in own if n not in matching), tuple(n for n in given if n not in matching)
    )
    if len(matching) < LEAST_SHARE * len(own) or _numbers(matching) < LEAST_SHARE * _numbers(own):
        raise WeightsError(
            f"{path} fits {len(matching)} of the encoder's {len(own)} tensors (missing e.g. {_some(report.missing)}; "
            f"the file has e.g. {_some(report.unexpected)}); give weights of the same encoder"
        )
    # Straight into the parameters: some smp encoders override load_state_dict and return nothing.
    nn.Module.load_state_dict(target, matching, strict=False)
    log.info(
        "encoder weights from %s: %d tensors loaded, %d missing, %d unused",
        os.fspath(path),
        *map(len, vars(report).values()),
    )
    if report.missing:
        log.warning(
            "%s lacks %d tensors of the encoder, which start at random: %s",
            path,
            len(report.missing),
            _some(report.missing),
        )
    return report


def find_weights(path: str | Path, encoder: str = "") -> Path:
    """The weights file that a path means: itself, or in a folder ENCODER.safetensors.

    Raises WeightsError for a folder without it.
    """
    path = Path(path)
    if not path.is_dir():
        return path
    if encoder and (path / f"{encoder}.safetensors").is_file():
        return path / f"{encoder}.safetensors"
    held = ", ".join(sorted(each.name for each in path.glob("*.safetensors"))) or "no .safetensors file"
    raise WeightsError(
        f"{path} holds {held} where {encoder or 'NAME'}.safetensors is needed; name the file itself, or pack that"
        " encoder into it"
    )


def resampled(name: str, value: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """A position embedding or a table of relative positions, brought to the size that a network has; anything else as
    it is.
    """
    if value.shape == own.shape:
        return value
    if name.endswith("pos_embed") and value.ndim == own.ndim == 3 and value.shape[2] == own.shape[2]:
        return _positions(value, own.shape[1])
    if name.endswith("relative_position_bias_table") and value.ndim == own.ndim:
        # Flat tables have (2w-1)^2 rows and a column for each head, those of MaxViT are (heads, 2w-1, 2w-1).
        heads = (value.shape[1], own.shape[1]) if own.ndim == 2 else (value.shape[0], own.shape[0])
        side = math.isqrt(own.shape[0]) if own.ndim == 2 else own.shape[1]
        if heads[0] == heads[1] and (own.ndim == 3 or side * side == own.shape[0]):
            return resize_rel_pos_bias_table(value, ((side + 1) // 2,) * 2, tuple(own.shape))
    return value


def _positions(value: torch.Tensor, wanted: int) -> torch.Tensor:
    """Embeddings (1, prefixes + n*n, C) for `wanted` tokens with the same prefixes, or with none; unchanged where they
    fit no square.
    """
    for prefixes in range(MOST_PREFIXES + 1):
        old = math.isqrt(max(value.shape[1] - prefixes, 0))
        if old * old != value.shape[1] - prefixes:
            continue
        for kept in (prefixes, 0):
            new = math.isqrt(max(wanted - kept, 0))
            if new and new * new == wanted - kept:
                return resample_abs_pos_embed(value[:, prefixes - kept :], [new, new], [old, old], kept)
    return value


def _check_card(path: Path, config: ModelConfig | None) -> None:
    card = read(path) if config is not None and path.is_file() and path.suffix == ".safetensors" else None
    if card is None or config is None:
        return
    card.check(path, config)
    if card.encoder != config.encoder:
        log.warning("%s was packed for the encoder %s and is loaded into %s", path, card.encoder, config.encoder)


def _inner(encoder: Any) -> nn.Module:
    """The network whose names files have: wrappers keep it as `model`, and timm's own wrapper of a ViT does so once
    more.

    What a wrapper has beside it, such as the scales that make a pyramid of a ViT, was never pretrained.
    """
    while isinstance(getattr(encoder, "model", None), nn.Module):
        encoder = encoder.model
    return encoder


def _numbers(tensors: dict[str, torch.Tensor]) -> int:
    return sum(value.numel() for value in tensors.values())


def _best_names(tensors: dict[str, torch.Tensor], own: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The file's tensors under the spelling that fits most of the encoder's names: up to three prefixes less or one
    more, dots or underscores.
    """
    bare = tensors
    spellings = [tensors, *({prefix + name: value for name, value in tensors.items()} for prefix in PREFIXES)]
    for _ in range(3):
        shorter = [
            {name.removeprefix(prefix): value for name, value in bare.items() if name.startswith(prefix)}
            for prefix in PREFIXES
        ]
        bare = max(shorter, key=lambda names: _fitting(names, own) + len(names) / (len(tensors) + 1))
        spellings += shorter
    # timm flattens nested stages for feature extraction: `stages.0.blocks` becomes `stages_0.blocks`, `blocks.1` stays.
    spellings += [{_flattened(name, own): value for name, value in names.items()} for names in spellings[:]]
    return max(spellings, key=lambda names: _fitting(names, own))


def _fitting(names: Iterable[str], own: dict[str, torch.Tensor]) -> int:
    return sum(name in own for name in names)


def _flattened(name: str, own: dict[str, torch.Tensor]) -> str:
    if name in own:
        return name
    parts = name.split(".")
    for count in range(1, len(parts)):
        candidate = "_".join(parts[: count + 1]) + "".join(f".{part}" for part in parts[count + 1 :])
        if candidate in own:
            return candidate
    return name


def _some(names: tuple[str, ...]) -> str:
    return ", ".join(names[:2]) or "none"


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:120]
