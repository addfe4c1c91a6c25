"""Encoder weights from a local file, never from the network.

Accepts safetensors, and torch files read with `weights_only=True`: nothing in the file can run code.
"""

from __future__ import annotations

import logging
import os
import pickle
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from hubmap_kit.errors import WeightsError

log = logging.getLogger(__name__)
LEAST_SHARE = 0.9  # below this share of the encoder's tensors a file is for another network
PREFIXES = ("module.", "encoder.", "backbone.", "model.")


@dataclass(frozen=True)
class LoadReport:
    """What a weights file gave an encoder: names of tensors loaded, missing in the file, and left over in it."""

    loaded: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]


def read_tensors(path: str | Path) -> dict[str, torch.Tensor]:
    """All tensors of a weights file by name. Raises WeightsError when it is missing, damaged, or not a plain table of tensors."""
    path = Path(path)
    if not path.is_file():
        raise WeightsError(f"{path} does not exist; give model.encoder_weights the path of a .safetensors or .pth file")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        values = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # Either not a torch file at all, or one with pickled code in it, which is never run.
        raise WeightsError(f"{path} is not a plain file of tensors; save the network's state dict, best as safetensors") from error
    except Exception as error:
        # A cut-off or alien file makes torch's readers fail in a dozen ways, from OSError to struct.error.
        raise WeightsError(f"{path} is damaged or not a weights file ({_first_line(error)}); copy or download it again") from error
    for key in ("state_dict", "model", "model_state_dict"):
        if isinstance(values, dict) and isinstance(values.get(key), dict):
            values = values[key]
    tensors = {key: value for key, value in values.items() if isinstance(value, torch.Tensor)} if isinstance(values, dict) else {}
    if not tensors:
        raise WeightsError(f"{path} holds no table of tensors; save the network's state dict into it")
    return tensors


def load_encoder(encoder: nn.Module, path: str | Path) -> LoadReport:
    """Copy a file's tensors into an encoder in place, by name and shape.

    smp's encoders take the file's names as they are; of a timm (`tu-`) encoder the inner network does, after timm's own renaming
    for feature extraction. Raises WeightsError when less than 90 % of the encoder's tensors are in the file: an encoder that
    is silently random is worse than none.
    """
    target = getattr(encoder, "model", None) if type(encoder).__name__ == "TimmUniversalEncoder" else encoder
    own = {name: value for name, value in target.state_dict().items() if not name.endswith("num_batches_tracked")}
    given = _best_names(read_tensors(path), own)
    matching = {name: value for name, value in given.items() if name in own and value.shape == own[name].shape}
    report = LoadReport(tuple(matching), tuple(n for n in own if n not in matching), tuple(n for n in given if n not in matching))
    if len(matching) < LEAST_SHARE * len(own):
        raise WeightsError(
            f"{path} fits {len(matching)} of the encoder's {len(own)} tensors (missing e.g. {_some(report.missing)}; "
            f"the file has e.g. {_some(report.unexpected)}); give weights of the same encoder"
        )
    # Straight into the parameters: some smp encoders override load_state_dict and return nothing.
    nn.Module.load_state_dict(target, matching, strict=False)
    log.info("encoder weights from %s: %d tensors loaded, %d missing, %d unused", os.fspath(path), *map(len, vars(report).values()))
    return report


def _best_names(tensors: dict[str, torch.Tensor], own: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The file's tensors under the spelling that fits most of the encoder's names: a prefix more or less, dots or underscores."""
    spellings = [tensors]
    for prefix in PREFIXES:
        spellings.append({name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)})
        spellings.append({prefix + name: value for name, value in tensors.items()})
    # timm flattens nested stages for feature extraction: `stages.0.blocks` becomes `stages_0.blocks`, `blocks.1` stays.
    spellings.append({_flattened(name, own): value for name, value in tensors.items()})
    return max(spellings, key=lambda names: sum(name in own for name in names))


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
