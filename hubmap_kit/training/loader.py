"""Which draws an epoch takes, which of them are aimed at hard tiles, and the worker processes that cut them.

Hard tiles are those of the grid with the highest loss in the last epoch. The trainer notes the loss of every tile it
sees and ends an epoch with `learn`. The losses go into the checkpoint, so a resumed run aims where it would have aimed.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import cv2
import numpy as np
import torch
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, Sampler
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from hubmap_kit.config import Experiment
from hubmap_kit.errors import CheckpointError, ConfigError
from hubmap_kit.processes import become_worker, end, sigterm_held_back
from hubmap_kit.training.dataset import NOT_AIMED, Index, Tile, TileDataset
from hubmap_kit.training.world import ALONE, World

HARDEST = 0.25  # share of the tiles seen in an epoch that count as hard: fewer would repeat label errors over and over
STREAM = 7  # its own stream of random numbers: seeds of draws and turns are shorter


class HardTiles:
    """The mean loss of each tile in the last epoch (NaN where none was drawn), and the draws that follow from it.

    `tiles` (T, 3) are slide, row and col of the grid; `share` of the draws of an epoch are aimed at hard ones.
    """

    def __init__(self, tiles: np.ndarray, share: float, seed: int) -> None:
        self.tiles, self.share, self.seed = tiles, share, seed
        self.losses = np.full(len(tiles), np.nan, np.float32)
        self._noted: list[torch.Tensor] = []

    def hardest(self) -> np.ndarray:
        """Numbers of the hard tiles, the worst first; empty before the first epoch is over."""
        seen = np.flatnonzero(np.isfinite(self.losses))
        worst_first = seen[np.argsort(-self.losses[seen], kind="stable")]
        return worst_first[: math.ceil(HARDEST * len(seen))]

    def aims(self, epoch: int, count: int) -> np.ndarray:
        """What each of `count` draws is aimed at: the number of a tile, or NOT_AIMED.

        A pure function of the losses, seed and epoch.
        """
        random = np.random.default_rng((self.seed, epoch, 0, 0, STREAM))
        hard, chosen = self.hardest(), random.random(count) < self.share
        if not len(hard):
            return np.full(count, NOT_AIMED)
        return np.where(chosen, hard[random.integers(len(hard), size=count)], NOT_AIMED)

    def note(self, loss: nn.Module, logits: torch.Tensor, masks: torch.Tensor) -> None:
        """Keep the loss of each tile of a batch, logits and masks (N, 1, S, S), without waiting for the device."""
        with torch.no_grad():
            self._noted.append(torch.stack([loss(logits[n : n + 1], masks[n : n + 1]) for n in range(len(logits))]))

    def learn(self, places: np.ndarray) -> None:
        """End an epoch: `places` (D, 3) are slide, row and col of its draws in order; a last batch may have been
        dropped.
        """
        noted = torch.cat(self._noted).float().cpu().numpy()
        self._noted = []
        near = nearest(places[: len(noted)], self.tiles)
        near, noted = near[near != NOT_AIMED], noted[near != NOT_AIMED]
        sums, counts = (np.bincount(near, weights, minlength=len(self.tiles)) for weights in (noted, None))
        with np.errstate(invalid="ignore"):
            self.losses = (sums / counts).astype(np.float32)

    def state(self) -> torch.Tensor:
        """What a checkpoint keeps."""
        return torch.from_numpy(self.losses.copy())

    def restore(self, state: torch.Tensor) -> None:
        """Take over what a checkpoint kept. Raises CheckpointError when it is of another grid."""
        if len(state) != len(self.tiles):
            raise CheckpointError(
                f"the checkpoint has losses of {len(state)} tiles, the store has {len(self.tiles)} of them; train into"
                " another --out"
            )
        self.losses = state.numpy().astype(np.float32)


def nearest(places: np.ndarray, tiles: np.ndarray) -> np.ndarray:
    """For each place (D, 3) the number of the nearest tile (T, 3) of its slide, which in a grid is the one it covers
    most of; -1: none.
    """
    found = np.full(len(places), NOT_AIMED)
    for slide in np.unique(places[:, 0]):
        here, there = np.flatnonzero(places[:, 0] == slide), np.flatnonzero(tiles[:, 0] == slide)
        if len(there):
            away = places[here, None, 1:] - tiles[None, there, 1:]
            found[here] = there[np.argmin((away**2).sum(axis=2), axis=1)]
    return found


class DrawSampler(Sampler[Any]):
    """The draws of one epoch, in order; the shuffling is in the dataset. Set `epoch` before iterating.

    With `hard` a share of them is aimed at hard tiles. They are chosen here, not in the dataset, because worker
    processes hold a copy of that which knows nothing of the losses.
    """

    def __init__(self, per_epoch: int, hard: HardTiles | None = None) -> None:
        self.per_epoch, self.hard, self.epoch = per_epoch, hard, 0

    def __len__(self) -> int:
        return self.per_epoch

    def __iter__(self) -> Iterator[Any]:  # of Index; torch's batch samplers are typed for int alone
        return iter(self.draws())

    def draws(self) -> Sequence[Index]:
        """The indices of the epoch."""
        draws = range(self.epoch * self.per_epoch, (self.epoch + 1) * self.per_epoch)
        if self.hard is None:
            return draws
        return list(zip(draws, self.hard.aims(self.epoch, self.per_epoch).tolist(), strict=True))


class Shares(BatchSampler):
    """What one of several processes takes of each batch: every `size`-th draw.

    A last batch that cannot be shared evenly is cut.
    """

    def __init__(self, sampler: DrawSampler, batch_size: int, drop_last: bool, world: World) -> None:
        super().__init__(sampler, batch_size, drop_last)
        self.draws, self.world = sampler, world

    def __iter__(self) -> Iterator[list[Any]]:
        for batch in super().__iter__():
            if even := len(batch) - len(batch) % self.world.size:
                yield list(self.world.part(batch[:even]))

    def __len__(self) -> int:
        left = len(self.draws) % self.batch_size
        return super().__len__() - int(not self.drop_last and 0 < left < self.world.size)


class TileLoader(DataLoader[Tile]):
    """A loader whose workers, which stay from epoch to epoch, are ended by `close`: Python itself would wait for the
    garbage collector.
    """

    draws: DrawSampler

    def __iter__(self) -> Any:
        with sigterm_held_back():
            return super().__iter__()

    def close(self) -> None:
        """End the workers. A later epoch would start new ones."""
        iterator, self._iterator = self._iterator, None
        if isinstance(iterator, _MultiProcessingDataLoaderIter):
            try:
                iterator._shutdown_workers()  # torch has no public name for it
            finally:
                end(iterator._workers)


def build_loader(dataset: TileDataset, settings: Experiment, pin_memory: bool, world: World = ALONE) -> TileLoader:
    """Batches of (N, S, S, 3) uint8 images and (N, S, S) uint8 masks.

    Its `draws.epoch` chooses the epoch.

    With several processes a batch is what all of them take together; raises ConfigError where it cannot be shared. A
    last batch of one tile is dropped, if there are others, because batch norm cannot train on a single small map.
    """
    workers, batch, share = settings.training.workers, settings.training.batch_size, settings.training.hard_share
    hard = HardTiles(dataset.tiles, share, settings.training.seed) if share else None
    sampler, drop_last = DrawSampler(len(dataset), hard), len(dataset) > batch and len(dataset) % batch == 1
    if batch % world.size:
        raise ConfigError(
            f"training.batch_size is {batch}, which {world.size} processes cannot share; make it a multiple of"
            f" {world.size}"
        )
    loader = TileLoader(
        dataset,
        batch_sampler=Shares(sampler, batch, drop_last, world)
        if world.size > 1
        else BatchSampler(sampler, batch, drop_last),
        collate_fn=_as_it_is,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=pin_memory,
        worker_init_fn=_begin_worker,
        # By itself a fold that trains beside others, in a spawned process, would spawn these too, and each would import
        # torch for itself.
        multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
        # A loader with workers draws one number from torch's global generator when it starts, which a resumed run does
        # once more.
        generator=torch.Generator(),
    )
    loader.draws = sampler
    return loader


def _as_it_is(batch: Any) -> Any:
    return batch


def _begin_worker(_: int) -> None:
    become_worker()
    # OpenCV and OpenMP would start as many threads in every worker as the machine has cores.
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
