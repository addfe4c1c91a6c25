"""Training tiles out of the store. Every tile is a pure function of (seed, epoch, position in the epoch).

So two workers never draw the same stream, epochs differ, one seed repeats, the number of workers changes nothing, and a run
that is resumed draws what it would have drawn.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from hubmap_kit.augment.classic import apply, pipeline
from hubmap_kit.augment.mixing import Mixing
from hubmap_kit.augment.stain import StainChange
from hubmap_kit.config import Experiment
from hubmap_kit.tiles.store import TileStore

Tile = tuple[torch.Tensor, torch.Tensor]


class TileDataset(Dataset[Tile]):
    """Tiles of some slides of a store: image (S, S, 3) uint8 and mask (S, S) uint8, augmented.

    The index is a draw number: draw `epoch * per_epoch + position`, so an index names the epoch too. `slides` are row numbers
    in `store.slides`.
    """

    def __init__(self, store: TileStore, slides: Sequence[int], settings: Experiment) -> None:
        self.store = store
        self.slides = np.asarray(slides, np.int64)
        self.size = settings.tiles.size
        self.training = settings.training
        self.augment = pipeline(settings.augment.pipeline)
        self.stain = StainChange(settings.augment.stain, settings.augment.stain_probability, settings.augment.stain_references)
        self.mixing, self.same_organ = Mixing(settings.augment.mixing), settings.augment.mixing_same_organ
        table = store.tiles[store.tiles["slide"].isin(self.slides)]
        # Plain arrays, not a list of rows: worker processes then share the memory instead of copying it page by page.
        self._tiles = table[["slide", "row", "col"]].to_numpy(np.int64)
        self._foreground = self._tiles[(table["foreground"] > 0).to_numpy()]
        organs = store.slides["organ"].to_numpy()[self.slides]
        self._by_organ = [self.slides[organs == organ] for organ in np.unique(organs)]
        self._own_organ = {int(slide): group for group in self._by_organ for slide in group}
        self.per_epoch = len(self._tiles) if self.training.sampler == "grid" else self.training.samples_per_epoch or len(self._tiles)

    def __len__(self) -> int:
        return self.per_epoch

    def __getitem__(self, draw: int) -> Tile:
        epoch, position = divmod(int(draw), self.per_epoch)
        random = np.random.default_rng((self.training.seed, epoch, position))
        slide, row, col = self._grid_tile(epoch, position) if self.training.sampler == "grid" else self._random_crop(epoch, position, random)
        tile = self.mixing(self._stained(slide, row, col, random), lambda: self._partner(slide, random), random)
        image, mask = apply(self.augment, *tile, seed=int(random.integers(2**32)))
        return torch.from_numpy(image), torch.from_numpy(mask)

    def _stained(self, slide: int, row: int, col: int, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        image, mask = self.store.crop(slide, row, col, self.size)
        return self.stain(image, random), mask

    def _partner(self, slide: int, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """A tile to mix with: a random crop of any of these slides, or of one of the same organ."""
        other = int(random.choice(self._own_organ[slide] if self.same_organ else self.slides))
        return self._stained(*self._crop_of(other, random), random)

    def _grid_tile(self, epoch: int, position: int) -> tuple[int, int, int]:
        order = np.random.default_rng((self.training.seed, epoch)).permutation(len(self._tiles))
        slide, row, col = self._tiles[order[position]]
        return int(slide), int(row), int(col)

    def _random_crop(self, epoch: int, position: int, random: np.random.Generator) -> tuple[int, int, int]:
        return self._crop_of(self._slide(epoch, position), random)

    def _crop_of(self, slide: int, random: np.random.Generator) -> tuple[int, int, int]:
        if random.random() < self.training.foreground_share:
            candidates = self._foreground[self._foreground[:, 0] == slide]
            if len(candidates):
                _, row, col = candidates[random.integers(len(candidates))]
                # Half a tile of jitter: the object is then anywhere in the crop, not always where the grid cut it.
                jitter = random.integers(-self.size // 2, self.size // 2 + 1, 2)
                return slide, *self._clamp(slide, int(row) + int(jitter[0]), int(col) + int(jitter[1]))
        rows, cols = self.store.image(slide).shape[:2]
        return slide, int(random.integers(max(rows - self.size, 0) + 1)), int(random.integers(max(cols - self.size, 0) + 1))

    def _clamp(self, slide: int, row: int, col: int) -> tuple[int, int]:
        rows, cols = self.store.image(slide).shape[:2]
        return min(max(row, 0), max(rows - self.size, 0)), min(max(col, 0), max(cols - self.size, 0))

    def _slide(self, epoch: int, position: int) -> int:
        """Slides (or organs, then their slides) take turns in an order that is shuffled anew for every turn."""
        if not self.training.balance_organs:
            return self._turn(self.slides, (self.training.seed, epoch, 0), position)
        organ = self._turn(np.arange(len(self._by_organ)), (self.training.seed, epoch, 1), position)
        return self._turn(self._by_organ[organ], (self.training.seed, epoch, 2, organ), position // len(self._by_organ))

    @staticmethod
    def _turn(choices: np.ndarray, seed: tuple[int, ...], position: int) -> int:
        turn, place = divmod(position, len(choices))
        return int(np.random.default_rng((*seed, turn)).permutation(choices)[place])


class DrawSampler(Sampler[int]):
    """The draw numbers of one epoch, in order; the shuffling is in the dataset. Set `epoch` before iterating."""

    def __init__(self, per_epoch: int) -> None:
        self.per_epoch, self.epoch = per_epoch, 0

    def __len__(self) -> int:
        return self.per_epoch

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.epoch * self.per_epoch, (self.epoch + 1) * self.per_epoch))


def build_loader(dataset: TileDataset, settings: Experiment, pin_memory: bool) -> DataLoader[Tile]:
    """Batches of (N, S, S, 3) uint8 images and (N, S, S) uint8 masks. Its `sampler.epoch` chooses the epoch.

    A last batch of one tile is dropped, if there are others, because batch norm cannot train on a single small map.
    """
    workers, batch = settings.training.workers, settings.training.batch_size
    return DataLoader(
        dataset,
        batch_size=batch,
        sampler=DrawSampler(len(dataset)),
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=pin_memory,
        drop_last=len(dataset) > batch and len(dataset) % batch == 1,
        worker_init_fn=_quiet_worker,
        # A loader with workers draws one number from torch's global generator when it starts, which a resumed run does once more.
        generator=torch.Generator(),
    )


def _quiet_worker(_: int) -> None:
    # A signal to the whole group of processes is answered by the one that trains, which then ends its workers in order.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    # OpenCV and OpenMP would start as many threads in every worker as the machine has cores.
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
