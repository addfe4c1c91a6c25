"""Hard tiles: draws aimed at the tiles of the grid that had the highest loss in the last epoch.

The trainer notes the loss of every tile it sees and hands the table over after an epoch. It goes into the checkpoint,
so a run that is resumed aims where it would have aimed.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import nn

from hubmap_kit.errors import CheckpointError

HARDEST = 0.25  # share of the tiles seen in an epoch that count as hard: fewer would repeat label errors over and over
NOT_AIMED = -1
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
