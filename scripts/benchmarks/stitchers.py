"""The same sliding window by other means: (H, W, 3) uint8 slide -> (H, W) float32 plane, everything between included.

Each is used as its own examples use it. `network` takes normalised floats (N, 3, T, T) and gives (N, 1, T, T)
probabilities.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch

from benchmarks.material import MEAN, STD
from benchmarks.measure import optional

Network = Callable[[torch.Tensor], torch.Tensor]
Stitcher = Callable[[np.ndarray, Network, int, float], np.ndarray]
BATCH = 4


def normalised(image: np.ndarray) -> torch.Tensor:
    """The slide as network input (1, 3, H, W)."""
    return by_channel(torch.from_numpy(image).permute(2, 0, 1).contiguous()[None])


def by_channel(batch: torch.Tensor) -> torch.Tensor:
    """uint8 (N, 3, H, W) -> normalised floats: planes first, because three values broadcast over the last axis take
    twice as long.
    """
    mean, deviation = (torch.from_numpy(values * 255).view(1, 3, 1, 1) for values in (MEAN, STD))
    return batch.float().sub_(mean).div_(deviation)


def monai(mode: str) -> Stitcher | None:
    """MONAI's sliding_window_inference; `mode` is constant or gaussian."""
    inferers = optional("monai.inferers")
    if inferers is None:
        return None

    def stitch(image: np.ndarray, network: Network, size: int, overlap: float) -> np.ndarray:
        return inferers.sliding_window_inference(normalised(image), size, BATCH, network, overlap=overlap, mode=mode)[
            0, 0
        ].numpy()

    return stitch


def monai_views(mode: str = "constant") -> Stitcher | None:
    """The usual test-time views around MONAI: each of the 8 symmetries of the whole slide is stitched, turned back and
    averaged.
    """
    inferers = optional("monai.inferers")
    if inferers is None:
        return None

    def stitch(image: np.ndarray, network: Network, size: int, overlap: float) -> np.ndarray:
        inputs, total = normalised(image), torch.zeros(image.shape[:2])
        for turn in range(4):
            for flip in (False, True):
                seen = torch.rot90(inputs.flip(3) if flip else inputs, turn, (2, 3)).contiguous()
                plane = torch.rot90(
                    inferers.sliding_window_inference(seen, size, BATCH, network, overlap=overlap, mode=mode),
                    -turn,
                    (2, 3),
                )
                total += (plane.flip(3) if flip else plane)[0, 0]
        return (total / 8).numpy()

    return stitch


def toolbelt() -> Stitcher | None:
    """pytorch-toolbelt: ImageSlicer and TileMerger with pyramid weights, batches by a DataLoader in this process."""
    tiles = optional("pytorch_toolbelt.inference.tiles")
    if tiles is None:
        return None

    def stitch(image: np.ndarray, network: Network, size: int, overlap: float) -> np.ndarray:
        slicer = tiles.ImageSlicer(image.shape, tile_size=size, tile_step=int(size * (1 - overlap)), weight="pyramid")
        merger = tiles.TileMerger(slicer.target_shape, 1, slicer.weight)
        cut = [torch.from_numpy(np.ascontiguousarray(np.moveaxis(tile, -1, 0))) for tile in slicer.split(image)]
        loader = torch.utils.data.DataLoader(list(zip(cut, slicer.crops, strict=True)), batch_size=BATCH)
        for batch, places in loader:
            merger.integrate_batch(network(by_channel(batch)), places)
        return slicer.crop_to_orignal_size(np.moveaxis(merger.merge().numpy(), 0, -1))[..., 0]

    return stitch


def patchly(weights: str) -> Stitcher | None:
    """patchly: GridSampler and Aggregator; `weights` is avg or gaussian."""
    sampler, aggregator = optional("patchly.sampler"), optional("patchly.aggregator")
    if sampler is None or aggregator is None:
        return None

    def stitch(image: np.ndarray, network: Network, size: int, overlap: float) -> np.ndarray:
        step = int(size * (1 - overlap))
        grid = sampler.GridSampler(
            image=image, spatial_size=image.shape[:2], patch_size=(size, size), step_size=(step, step)
        )
        merger = aggregator.Aggregator(
            sampler=grid, output_size=(1, *image.shape[:2]), spatial_first=False, weights=weights
        )
        for patch, place in grid:
            merger.append(network(normalised(patch))[0], place)
        return np.asarray(merger.get_output(inplace=True))[0]

    return stitch


def notebook() -> Stitcher:
    """What most notebooks do: a grid of windows, one at a time, added up in NumPy beside a count of how often a pixel
    was seen.
    """

    def stitch(image: np.ndarray, network: Network, size: int, overlap: float) -> np.ndarray:
        total = np.zeros(image.shape[:2], np.float32)
        count = np.zeros(image.shape[:2], np.float32)
        for row, col in make_grid(image.shape[:2], size, int(size * overlap)):
            window = (image[row : row + size, col : col + size].astype(np.float32) / 255 - MEAN) / STD
            batch = torch.from_numpy(np.ascontiguousarray(window.transpose(2, 0, 1)))[None]
            total[row : row + size, col : col + size] += network(batch)[0, 0].numpy()
            count[row : row + size, col : col + size] += 1
        return total / count

    return stitch


def make_grid(shape: tuple[int, int], size: int, overlap: int) -> Iterator[tuple[int, int]]:
    """Corners of windows that cover `shape`, at least `overlap` pixels shared, evenly spread."""
    starts = []
    for length in shape:
        count = max(1, -(-(length - overlap) // (size - overlap)))
        starts.append(np.linspace(0, length - size, count).round().astype(int))
    yield from ((int(row), int(col)) for row in starts[0] for col in starts[1])


# Made when asked for: MONAI alone takes seconds to import.
RIVALS: dict[str, Callable[[], Stitcher | None]] = {
    "MONAI constant": partial(monai, "constant"),
    "MONAI gaussian": partial(monai, "gaussian"),
    "pytorch-toolbelt": toolbelt,
    "patchly": partial(patchly, "avg"),
    "notebook loop": notebook,
}


def everyone() -> dict[str, Stitcher | None]:
    """All rivals by name; None for those that are not installed."""
    return {name: make() for name, make in RIVALS.items()}
