"""Training data: a crop, and a batch of them, from the tile store against files that are decoded again for every
sample.

And what the store costs: a conversion against reading the slide. Augmentation of whole batches is at the end.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import albumentations as A
import cv2
import numpy as np
import torch
from torch.utils.data import default_collate

from benchmarks import augment
from benchmarks.material import tissue
from benchmarks.measure import Comparison, check_equal, compare
from hubmap_kit import experiment
from hubmap_kit.augment.classic import pipeline
from hubmap_kit.competition import rle
from hubmap_kit.competition import slides as slide_files
from hubmap_kit.competition.tables import Slide
from hubmap_kit.config import ScaleConfig
from hubmap_kit.sample.generate import write_tiff
from hubmap_kit.tiles.store import TileStore, build, open_or_build
from hubmap_kit.training.dataset import TileDataset

SIZE, BATCH, SLIDES = 512, 16, 4
AS_PNG, AS_TIFF, AS_USUAL, READING = (
    "PNG tile, OpenCV",
    "the slide's TIFF again",
    "PNG + albumentations + floats",
    "reading the slide alone",
)
CROP_TARGETS = {AS_PNG: 30.0, AS_TIFF: 200.0}
BATCH_TARGETS = {"none": 40.0, "flips": 20.0}
MOST_CONVERSION = 1.2  # times the reading
Sample = tuple[np.ndarray, np.ndarray]
NOTES = {
    "bytes": (
        "ours hands over bytes, which become floats on the network's device; the rivals' batches are normalised floats"
    ),
    "warm": "all files are in the page cache",
    "conversion": (
        f"the target allows the conversion {MOST_CONVERSION} times the reading, so the reading at least"
        f" {1 / MOST_CONVERSION:.2f} of ours"
    ),
}


@dataclass(frozen=True)
class Material:
    """The same tissue as a TIFF, as PNG tiles of the grid, and in a tile store of several such slides."""

    folder: Path
    slide: Slide
    store: TileStore
    places: list[tuple[int, int]]

    def from_tiff(self, place: int) -> Sample:
        """Decode the whole slide and its mask, keep one crop."""
        row, col = self.places[place]
        image = slide_files.read(self.slide.path)[row : row + SIZE, col : col + SIZE].copy()
        return image, rle.decode(self.slide.rle or "", self.slide.height, self.slide.width)[
            row : row + SIZE, col : col + SIZE
        ].copy()

    def from_png(self, place: int) -> Sample:
        """Decode one tile that was cut beforehand."""
        image = cv2.cvtColor(cv2.imread(str(self.folder / f"{place}.png")), cv2.COLOR_BGR2RGB)
        return image, cv2.imread(str(self.folder / f"{place}-mask.png"), cv2.IMREAD_GRAYSCALE)

    def from_store(self, place: int, slide: int = 0) -> Sample:
        """Copy one crop out of the memory map."""
        return self.store.crop(slide, *self.places[place], SIZE)


def make(folder: Path, side: int) -> Material:
    """Write the material into `folder`."""
    image, mask = tissue(side)
    write_tiff(folder / "slide.tiff", image)
    text = rle.encode(mask)
    slides = [
        Slide(str(n), "kidney", "Hubmap", side, side, 0.5, 10.0, folder / "slide.tiff", text)
        for n in range(1, SLIDES + 1)
    ]
    settings = experiment.load("baseline", ["scale.policy=reduce", "scale.reduce=1", f"tiles.size={SIZE}"])
    store = open_or_build(folder / "stores", slides, settings.scale, settings.tiles)
    places = [(row, col) for row in range(0, side - SIZE + 1, SIZE) for col in range(0, side - SIZE + 1, SIZE)]
    for place, (row, col) in enumerate(places):
        cv2.imwrite(
            str(folder / f"{place}.png"), cv2.cvtColor(image[row : row + SIZE, col : col + SIZE], cv2.COLOR_RGB2BGR)
        )
        cv2.imwrite(str(folder / f"{place}-mask.png"), mask[row : row + SIZE, col : col + SIZE])
    return Material(folder, slides[0], store, places)


def run(quick: bool = False) -> list[Comparison]:
    """Crops and batches of 512 px from slides of 3000 px (1024 when `quick`)."""
    with tempfile.TemporaryDirectory() as folder:
        material = make(Path(folder), 1024 if quick else 3000)
        repeats = 2 if quick else 9
        return [
            _crops(material, 3 if quick else 9),
            *_batches(material, repeats),
            _conversion(material, repeats),
            *augment.run(quick),
        ]


def _crops(material: Material, repeats: int) -> Comparison:
    for part in (0, 1):
        check_equal("crop", material.from_store(0)[part], material.from_png(0)[part])
        check_equal("crop", material.from_store(0)[part], material.from_tiff(0)[part])

    def turns(read: Callable[[int], Sample]) -> Callable[[], Sample]:
        random = np.random.default_rng(0)
        return lambda: read(int(random.integers(len(material.places))))

    rivals = {AS_PNG: turns(material.from_png), AS_TIFF: turns(material.from_tiff)}
    return compare(
        "one crop of 512 px with its mask", turns(material.from_store), rivals, CROP_TARGETS, repeats, [NOTES["warm"]]
    )


def _batches(material: Material, repeats: int) -> list[Comparison]:
    for slide in range(SLIDES):
        material.store.image(slide).max()  # every page is mapped by now, as it is after the first epoch
    return [_batch(material, name, repeats) for name in ("none", "flips", "light", "classic")]


def _batch(material: Material, name: str, repeats: int) -> Comparison:
    """A batch of 16 tiles by the training's own data set, against PNG tiles through the same augmentation."""
    settings = experiment.load(
        "baseline", [f"augment.pipeline={name}", f"tiles.size={SIZE}", "training.sampler=random", "scale.reduce=1"]
    )
    dataset = TileDataset(material.store, range(SLIDES), settings)
    steps = A.Compose([*pipeline(name).transforms, A.Normalize()], strict=True)
    random = np.random.default_rng(0)

    def ours() -> object:
        return dataset.__getitems__(random.integers(dataset.per_epoch, size=BATCH).tolist())

    def usual() -> object:
        return default_collate(
            [_usual_sample(material, steps, int(place)) for place in random.integers(len(material.places), size=BATCH)]
        )

    what = f"a batch of {BATCH} tiles, {'no' if name == 'none' else name} augmentation"
    targets = {AS_USUAL: BATCH_TARGETS[name]} if name in BATCH_TARGETS else {}
    return compare(what, ours, {AS_USUAL: usual}, targets, repeats, [NOTES["bytes"]])


def _conversion(material: Material, repeats: int) -> Comparison:
    """A slide as the competition has them, LZW, into a store of half its side, mask and tables included."""
    path = material.folder / "lzw.tiff"
    image = slide_files.read(material.slide.path)
    cv2.imwrite(
        str(path),
        cv2.cvtColor(image, cv2.COLOR_RGB2BGR),
        [cv2.IMWRITE_TIFF_COMPRESSION, cv2.IMWRITE_TIFF_COMPRESSION_LZW],
    )
    check_equal("LZW slide", slide_files.read(path), image)
    slide, scale, numbers = (
        replace(material.slide, path=path),
        ScaleConfig(policy="reduce", reduce=2),
        itertools.count(),
    )

    def ours() -> None:
        build(material.folder / f"converted-{next(numbers)}", [slide], scale, "benchmark")

    return compare(
        f"a slide of {len(image)} px, LZW, to a store at reduce 2",
        ours,
        {READING: lambda: slide_files.read(path)},
        {READING: 1 / MOST_CONVERSION},
        repeats,
        [NOTES["warm"], NOTES["conversion"]],
    )


def _usual_sample(material: Material, steps: A.Compose, place: int) -> tuple[torch.Tensor, torch.Tensor]:
    image, mask = material.from_png(place)
    made = steps(image=image, mask=mask)
    return torch.from_numpy(made["image"].transpose(2, 0, 1).copy()), torch.from_numpy(made["mask"]).float()
