"""One training in several processes, as torchrun starts them: who am I, and what do the others say.

Every process holds the same network and takes its share of each batch (`training.batch_size` is the whole), so the
losses are those of one process, as far as they are means over tiles: Dice and Lovasz are then means over the shares,
and batch norms see shares on a CPU. Files are written by the first process alone.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from timm.layers import convert_sync_batchnorm
from torch import nn

from hubmap_kit.errors import ConfigError, HubmapError

T = TypeVar("T")
# The others wait while the first one predicts held-out slides with all views.
PATIENCE = timedelta(hours=3)
LOST = (
    "onnection closed",
    "onnection reset",
    "roken pipe",
    "onnection refused",
)  # what gloo says when another process is gone


@dataclass(frozen=True)
class World:
    """This process among `size`. With one process everything here is free."""

    rank: int = 0
    size: int = 1
    group: Any = None  # for plain values; between processors even where the gradients go between cards

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files."""
        return self.rank == 0

    def gathered(self, value: T) -> list[T]:
        """What every process says, in the order of their ranks; all must call this."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def any(self, flag: bool) -> bool:
        """Whether it is so anywhere.

        All must call this, and all get the same answer: one that stopped alone would hang the others.
        """
        return any(self.gathered(flag)) if self.size > 1 else flag

    def wait(self) -> None:
        """Until all have come here."""
        self.gathered(None)

    def part(self, things: Any) -> Any:
        """This process's share, every `size`-th from its rank on."""
        return things[self.rank :: self.size]

    def wrapped(self, network: nn.Module, device: torch.device) -> nn.Module:
        """The network whose backward pass averages gradients over all processes.

        On cards batch norms are made to see the whole batch before (see `synchronised`).
        """
        if self.size == 1:
            return network
        cards = [device.index] if device.type == "cuda" else None  # no GPU has run this line
        # Encoders are frozen at times, and some end in layers that no decoder reads.
        return nn.parallel.DistributedDataParallel(network, device_ids=cards, find_unused_parameters=True)

    def synchronised(self, network: nn.Module, device: torch.device) -> nn.Module:
        """The network with batch norms over all processes, which torch has for cards alone; state dict names stay."""
        if self.size == 1 or device.type != "cuda":
            return network
        # timm's own: torch's drops the activations that timm keeps inside its norms.
        return convert_sync_batchnorm(network)  # no GPU has run this line


ALONE = World()


def is_one_of_many(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether torchrun started this process beside others."""
    return int(environment.get("WORLD_SIZE", "1") or 1) > 1 and "RANK" in environment


def own_device(names: str, environment: Mapping[str, str] = os.environ) -> str:
    """The device of this process: `cpu` for all, else the card of its number on this machine.

    Raises ConfigError for named cards.
    """
    if names not in ("auto", "cpu", "cuda"):
        raise ConfigError(
            f"--device is '{names}', but torchrun gives every process its own card; use auto, cuda or cpu"
        )
    if names == "cpu" or not torch.cuda.is_available():
        return "cpu"
    return f"cuda:{environment.get('LOCAL_RANK', '0')}"  # no GPU has run this line


@contextmanager
def joined(device: torch.device) -> Iterator[World]:
    """Join the processes that torchrun started, if it did, until the block's end.

    Raises HubmapError where another one is gone.
    """
    if not is_one_of_many():
        yield ALONE
        return
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
    try:
        group = dist.new_group(backend="gloo", timeout=PATIENCE)
        yield World(dist.get_rank(), dist.get_world_size(), group)
    except RuntimeError as error:
        if not (isinstance(error, dist.DistError) or any(words in str(error) for words in LOST)):
            raise
        raise HubmapError(
            "another process of this training is gone: it says above why, or was killed, mostly for want of memory; go"
            " on with --resume"
        ) from error
    finally:
        dist.destroy_process_group()
