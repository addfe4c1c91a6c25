"""Averages of weights: over the last epochs while training (SWA), and over weights that were kept in files."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from hubmap_kit.config import TrainingConfig
from hubmap_kit.errors import CheckpointError
from hubmap_kit.files import atomic_path, sweep

KEPT = re.compile(r"epoch-(\d+)\.safetensors")


class EqualAverage:
    """Stochastic weight averaging: `module` is the equal average of the networks that `update` was given, and nothing
    before.

    Running statistics of norms are averaged like weights. To estimate them anew, as the method's authors did, takes an
    epoch's forward passes at the end, which a session may have no time for and which would have to be resumed as well;
    they averaged over a high constant rate, where weights differ much more than at the end of the kit's schedules.
    Whole numbers, such as counts of batches, are the latest ones.
    """

    def __init__(self, network: nn.Module) -> None:
        self.module, self.count = deepcopy(network).requires_grad_(False).eval(), 0

    @torch.no_grad()
    def update(self, network: nn.Module) -> None:
        """Take one more network into the average."""
        self.count += 1
        for mine, new in zip(self.module.state_dict().values(), network.state_dict().values(), strict=True):
            if self.count > 1 and mine.is_floating_point():
                mine.lerp_(new, 1 / self.count)
            else:
                mine.copy_(new)

    def state_dict(self) -> dict[str, Any]:
        """The count and the averaged tensors."""
        return {"count": self.count, "module": self.module.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        self.count = int(state["count"])
        self.module.load_state_dict(state["module"])


def is_averaged(epochs_done: int, config: TrainingConfig) -> bool:
    """Whether the weights after that many epochs belong to the share `training.swa` at the end; the last epoch always
    does.
    """
    return bool(config.swa) and epochs_done > config.epochs - max(1, round(config.swa * config.epochs))


def average_files(paths: Sequence[Path]) -> dict[str, torch.Tensor]:
    """The equal average of safetensors files of one network, tensor by tensor: in float64, given back in each tensor's
    own type.

    Whole numbers are those of the last file. Raises CheckpointError without files, and for files that are damaged or of
    different networks.
    """
    if not paths:
        raise CheckpointError("there are no kept weights to average; train with training.keep_last of 2 or more")
    sums: dict[str, torch.Tensor] = {}
    last: dict[str, torch.Tensor] = {}
    for path in paths:
        last = _read(path)
        _check_same(paths[0], sums, path, last)
        for name, tensor in last.items():
            sums[name] = sums[name].add_(tensor) if name in sums else tensor.double()
    return {
        name: (sums[name] / len(paths)).to(tensor.dtype) if tensor.is_floating_point() else tensor
        for name, tensor in last.items()
    }


class KeepLast:
    """The weights of the last `count` epochs as files `epoch-0007.safetensors` in a folder of their own."""

    def __init__(self, folder: Path, count: int) -> None:
        self.folder, self.count = folder, count

    def save(self, epoch: int, tensors: Mapping[str, torch.Tensor]) -> None:
        """Write the weights of an epoch atomically, then remove those that are too old.

        Files of later epochs go too: they are of a training that was begun again from an earlier epoch.
        """
        if not self.count:
            return
        sweep(self.folder, ".epoch-*.tmp.safetensors")
        with atomic_path(self.folder / f"epoch-{epoch:04d}.safetensors") as temporary:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary)
        found = self._found()
        kept = sorted(number for number in found if number <= epoch)[-self.count :]
        for number, path in found.items():
            if number not in kept:
                path.unlink(missing_ok=True)

    def paths(self) -> list[Path]:
        """The kept files, the oldest epoch first."""
        return [path for _, path in sorted(self._found().items())]

    def _found(self) -> dict[int, Path]:
        return {
            int(match[1]): path
            for path in self.folder.glob("epoch-*.safetensors")
            if (match := KEPT.fullmatch(path.name))
        }


def _read(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} is missing or damaged ({error}); delete it to average the others") from error


def _check_same(first: Path, sums: Mapping[str, torch.Tensor], path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    other = (
        sums.keys() ^ tensors.keys() or {name for name in tensors if sums[name].shape != tensors[name].shape}
        if sums
        else set()
    )
    if other:
        raise CheckpointError(
            f"{path} is of another network than {first}: they differ in {min(other)}; average weights of one fold only"
        )
