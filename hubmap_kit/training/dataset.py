"""Training tiles out of the store. Every tile is a pure function of (seed, epoch, position in the epoch).

So two workers never draw the same stream, epochs differ, one seed repeats, the number of workers changes nothing, and a
run that is resumed draws what it would have drawn. With `training.hard_share` the losses of the epoch before have their
say too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import cv2
import numpy as np
import torch
from torch.utils.data import Dataset

from hubmap_kit.augment.changes import Changes
from hubmap_kit.augment.classic import apply, pipeline
from hubmap_kit.augment.mixing import Mixing
from hubmap_kit.competition.organs import FACTS
from hubmap_kit.config import Experiment, TrainingConfig
from hubmap_kit.errors import TableError
from hubmap_kit.tiles.scaling import resize_image, resize_mask
from hubmap_kit.tiles.store import TileStore

Tile = tuple[torch.Tensor, torch.Tensor]
NOT_AIMED = -1  # instead of the number of a grid tile
ORDERS_KEPT = 16  # a turn for each organ, and more than enough
Index = int | tuple[int, int]  # a draw, or a draw and the number of the grid tile that it is aimed at


class TileDataset(Dataset[Tile]):
    """Tiles of some slides of a store: image (S, S, 3) uint8 and mask (S, S) uint8, augmented; a mask holds 0 and 1, or
    with `model.classes` organs the index of its organ.

    The index is a draw number: draw `epoch * per_epoch + position`, so an index names the epoch too; with the number of
    a grid tile beside it, the draw is aimed at that. `slides` are row numbers in `store.slides`. A loader asks for
    whole batches, which are filled in place: joining single tiles would copy all of them once more.
    """

    def __init__(
        self, store: TileStore, slides: Sequence[int], settings: Experiment, weights: Mapping[str, float] | None = None
    ) -> None:
        self.store = store
        shares = _shares(store, np.asarray(slides, np.int64), settings.training.organ_shares, weights or {})
        self.slides = np.asarray(slides, np.int64)[shares > 0]
        order = np.argsort(self.slides)
        self._sorted = self.slides[order]
        self._shares = None if (shares[shares > 0] == 1).all() else shares[shares > 0][order]
        self.size = settings.tiles.size
        self.training = settings.training
        # The batched engine augments where the network is.
        self.pipeline = "none" if settings.augment.engine == "batched" else settings.augment.pipeline
        self.augment = pipeline(self.pipeline)
        self.changes = Changes(settings.augment)
        self._organs = store.slides["organ"].to_numpy()
        self._um = (store.slides["um_per_px"] * store.slides["height"] / store.slides["rows"]).to_numpy(np.float64)
        self.mixing, self.same_organ = Mixing(settings.augment.mixing), settings.augment.mixing_same_organ
        table = store.tiles[store.tiles["slide"].isin(self.slides)]
        # Plain arrays, not a list of rows: worker processes then share the memory instead of copying it page by page.
        self.tiles = table[["slide", "row", "col"]].to_numpy(np.int64)
        self._foreground = self.tiles[(table["foreground"] > 0).to_numpy()]
        self._orders: dict[tuple[tuple[int, ...], int], np.ndarray] = {}
        organs = store.slides["organ"].to_numpy()[self.slides]
        self._by_organ = [self.slides[organs == organ] for organ in np.unique(organs)]
        # What a mask's ones become: with classes `organs`, the index of the slide's organ.
        named = settings.model.classes == "organs"
        self._label = [FACTS[organ].index if named else 1 for organ in store.slides["organ"]]
        self._own_organ = {int(slide): group for group in self._by_organ for slide in group}
        self.per_epoch = (
            len(self.tiles) if self.training.sampler == "grid" else _per_epoch(self.training, len(self.tiles))
        )

    def __len__(self) -> int:
        return self.per_epoch

    def __getitem__(self, index: Index) -> Tile:
        images, masks = self.__getitems__([index])
        return images[0], masks[0]

    def __getitems__(self, indices: Sequence[Index]) -> Tile:
        """A batch: images (N, S, S, 3) uint8 and masks (N, S, S) uint8."""
        shape = (len(indices), self.size, self.size)
        images, masks = np.empty((*shape, 3), np.uint8), np.empty(shape, np.uint8)
        for index, image, mask in zip(indices, images, masks, strict=True):
            self._fill(index, image, mask)
        return torch.from_numpy(images), torch.from_numpy(masks)

    def places(self, indices: Sequence[Index]) -> np.ndarray:
        """Where the crops of these draws begin: slide, row and col (N, 3)."""
        return np.array([self._start(index)[0] for index in indices], np.int64).reshape(-1, 3)

    def _fill(self, index: Index, image: np.ndarray, mask: np.ndarray) -> None:
        """Write a draw into its place in a batch."""
        place, random = self._start(index)
        if self.mixing.names or self.changes:
            tile = self.mixing(self._changed(*place, random), lambda: self._partner(place[0], random), random)
        else:
            tile = self._labelled(place[0], *window(self.store, *place, self.size))
        if self.pipeline == "flips":
            # Straight into the batch: albumentations would make further copies on the way.
            symmetry = int(
                random.integers(4)
            )  # left-right and up-down, as in augment.classic and augment.batched: no quarter turns
            turn(tile[0], symmetry, image)
            turn(tile[1], symmetry, mask)
            return
        if self.pipeline != "none":
            tile = apply(self.augment, *tile, seed=int(random.integers(2**32)))
        image[:], mask[:] = tile

    def _start(self, index: Index) -> tuple[tuple[int, int, int], np.random.Generator]:
        """Where a draw's crop begins, and the generator for all that is random about it from there on."""
        draw, aim = index if isinstance(index, tuple) else (index, NOT_AIMED)
        epoch, position = divmod(int(draw), self.per_epoch)
        random = np.random.default_rng((self.training.seed, epoch, position))
        if aim != NOT_AIMED:
            slide, row, col = self.tiles[aim]
            return self._near(int(slide), int(row), int(col), random), random
        if self.training.sampler == "grid":
            return self._grid_tile(epoch, position), random
        return self._random_crop(epoch, position, random), random

    def _changed(self, slide: int, row: int, col: int, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        organ, um_per_px = self._organs[slide], float(self._um[slide])
        side = self.changes.side(organ, self.size, random)
        if side != self.size:
            # The square keeps its middle, as far as the slide reaches.
            row, col = self._clamp(slide, row + (self.size - side) // 2, col + (self.size - side) // 2, side)
        image, mask = self.store.crop(slide, row, col, side)
        shape = (self.size, self.size)
        image, mask = self._labelled(slide, resize_image(image, shape), resize_mask(mask, shape))
        return self.changes(image, organ, um_per_px * side / self.size, random), mask

    def _labelled(self, slide: int, image: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        label = self._label[slide]
        return image, mask if label == 1 else mask * np.uint8(label)

    def _partner(self, slide: int, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """A tile to mix with: a random crop of any of these slides, or of one of the same organ."""
        other = int(random.choice(self._own_organ[slide] if self.same_organ else self.slides))
        return self._changed(*self._crop_of(other, random), random)

    def _grid_tile(self, epoch: int, position: int) -> tuple[int, int, int]:
        slide, row, col = self.tiles[self._order((self.training.seed, epoch), len(self.tiles))[position]]
        return int(slide), int(row), int(col)

    def _random_crop(self, epoch: int, position: int, random: np.random.Generator) -> tuple[int, int, int]:
        slide = self._slide(epoch, position)
        # Whoever is drawn too often gives some of its turns away, so that draws are in proportion to the shares.
        if self._shares is not None and random.random() >= self._shares[np.searchsorted(self._sorted, slide)]:
            slide = int(random.choice(self._sorted, p=self._shares / self._shares.sum()))
        return self._crop_of(slide, random)

    def _crop_of(self, slide: int, random: np.random.Generator) -> tuple[int, int, int]:
        if random.random() < self.training.foreground_share:
            candidates = self._foreground[self._foreground[:, 0] == slide]
            if len(candidates):
                _, row, col = candidates[random.integers(len(candidates))]
                return self._near(slide, int(row), int(col), random)
        rows, cols = self.store.image(slide).shape[:2]
        return (
            slide,
            int(random.integers(max(rows - self.size, 0) + 1)),
            int(random.integers(max(cols - self.size, 0) + 1)),
        )

    def _near(self, slide: int, row: int, col: int, random: np.random.Generator) -> tuple[int, int, int]:
        # Half a tile of jitter: the object is then anywhere in the crop, not always where the grid cut it.
        jitter = random.integers(-self.size // 2, self.size // 2 + 1, 2)
        return slide, *self._clamp(slide, row + int(jitter[0]), col + int(jitter[1]), self.size)

    def _clamp(self, slide: int, row: int, col: int, side: int) -> tuple[int, int]:
        rows, cols = self.store.image(slide).shape[:2]
        return min(max(row, 0), max(rows - side, 0)), min(max(col, 0), max(cols - side, 0))

    def _slide(self, epoch: int, position: int) -> int:
        """Slides (or organs, then their slides) take turns in an order that is shuffled anew for every turn."""
        if not self.training.balance_organs:
            return self._turn(self.slides, (self.training.seed, epoch, 0), position)
        organ = self._turn(np.arange(len(self._by_organ)), (self.training.seed, epoch, 1), position)
        return self._turn(self._by_organ[organ], (self.training.seed, epoch, 2, organ), position // len(self._by_organ))

    def _turn(self, choices: np.ndarray, seed: tuple[int, ...], position: int) -> int:
        turn, place = divmod(position, len(choices))
        return int(choices[self._order((*seed, turn), len(choices))[place]])

    def _order(self, seed: tuple[int, ...], count: int) -> np.ndarray:
        """A random order of `count` things; the last few are kept, because draws come in their order."""
        if (seed, count) not in self._orders:
            if len(self._orders) >= ORDERS_KEPT:
                self._orders.clear()
            self._orders[seed, count] = np.random.default_rng(seed).permutation(count)
        return self._orders[seed, count]


def window(store: TileStore, slide: int, row: int, col: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """What `store.crop` gives, but where the square is inside the slide its image (size, size, 3) is a read-only view.

    A crop that goes into a batch as it is would be copied twice.
    """
    image = store.image(slide)
    if row < 0 or col < 0 or row + size > image.shape[0] or col + size > image.shape[1]:
        return store.crop(slide, row, col, size)
    first_byte = col // 8
    packed = store._packed(slide)[row : row + size, first_byte : (col + size + 7) // 8]
    return image[row : row + size, col : col + size], np.unpackbits(packed, axis=1)[:, col - 8 * first_byte :][:, :size]


def turn(pixels: np.ndarray, symmetry: int, out: np.ndarray) -> None:
    """One of the 8 symmetries of a square (S, S) or (S, S, 3) uint8, written into `out`, which must be contiguous.

    The bits of `symmetry`, in this order: 1 turns it upside down, 4 transposes it, 2 mirrors it (upside down after a
    transposition).
    """
    if symmetry & 1:
        pixels = pixels[::-1]
    # A slide is read along its rows alone, and what is copied by then is turned in the cache: half the time of turning
    # it at once.
    if symmetry & 4:
        cv2.transpose(np.ascontiguousarray(pixels), out)
    else:
        out[:] = pixels
    if symmetry & 2:
        cv2.flip(out, 0 if symmetry & 4 else 1, out)


def _shares(
    store: TileStore, slides: np.ndarray, organs: Mapping[Any, float], weights: Mapping[str, float]
) -> np.ndarray:
    """How often each slide is drawn, as a share of the most frequent one's draws; 0: never.

    Raises TableError when nothing is left.
    """
    table = store.slides.iloc[slides]
    shares = np.array(
        [
            weights.get(name, 1.0) * organs.get(organ, 1.0)
            for name, organ in zip(table["id"], table["organ"], strict=True)
        ]
    )
    if not shares.any():
        raise TableError("every slide to learn from has weight 0 in train.csv; give some of them more")
    return shares / shares.max()


def _per_epoch(training: TrainingConfig, grid: int) -> int:
    """Random draws in an epoch: as many as the config says, as its share of all steps takes, or as there are tiles in
    the grid.
    """
    if training.iterations:
        return math.ceil(training.iterations / training.epochs) * training.accumulate * training.batch_size
    return training.samples_per_epoch or grid
