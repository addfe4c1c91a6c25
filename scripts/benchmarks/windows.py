"""The sliding window: what stitching, views and memory cost beside the network, and how fast the network itself is
run.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch

from benchmarks import stitchers
from benchmarks.forward import forward_times, overhead
from benchmarks.material import B0, MEAN, STD, TINY, ChannelCopy, tissue
from benchmarks.measure import Comparison, check_equal, compare, limit, peak_rss
from hubmap_kit.config import Experiment, InferenceConfig
from hubmap_kit.inference.ensemble import Ensemble
from hubmap_kit.inference.windows import stitch

SIZE, OVERLAP, BATCH = 512, 0.25, stitchers.BATCH
VIEWS_TARGET = {"MONAI, 8 calls": 8.0}
STITCH_TARGETS = {"MONAI constant": 3.0, "MONAI gaussian": 3.0, "pytorch-toolbelt": 4.0, "notebook loop": 3.5}
MEMORY_TARGETS = {3000: 64.0, 4500: 200.0}
MEMORY_NOTE = "memory: growth of a fresh process over what it held with libraries and slide loaded, the plane included"
HELD_NOTE = (
    "held at once: the same where the allocator returns freed blocks at once (MALLOC_MMAP_THRESHOLD_=65536); by default"
    " it varies"
)
MEGABYTE = 2**20


def run(quick: bool = False) -> list[Comparison]:
    """All comparisons, on slides of 3000 px; with `quick` on small ones, through a tiny network, and held to no
    target.
    """
    if quick:
        parts = [
            _stitching(700, 2, {}),
            _views(700, 2, {}),
            *_memory((700,)),
            overhead(TINY, 600, 1, None),
            forward_times(TINY, 256, 2, None),
        ]
    else:
        parts = [_stitching(3000, 9, STITCH_TARGETS), _views(3000, 5, VIEWS_TARGET), *_memory((3000, 4500))]
        parts += [overhead(B0, 1280, 3, 1.0), forward_times(B0, SIZE, 9, round(1 / 0.75, 2))]
    if torch.cuda.is_available():
        from benchmarks import gpu

        parts += gpu.run(quick)
    return parts


def stitched(
    image: np.ndarray, network: Callable[[torch.Tensor], torch.Tensor], size: int, overlap: float
) -> np.ndarray:
    """Our stitching alone, in the shape of the rivals' functions: normalised windows, a network that gives
    probabilities, no sigmoid.
    """
    mean, deviation = (torch.from_numpy(values * 255).view(3, 1, 1) for values in (MEAN, STD))
    floats = torch.empty(
        1, 3, size, size
    )  # on a CPU the kit takes windows of this size one by one: they stay in the caches

    def predict(windows: torch.Tensor) -> torch.Tensor:
        inputs = floats[: len(windows)]
        for window, place in zip(windows, inputs, strict=True):
            place.copy_(window).sub_(mean).div_(deviation)
        return network(inputs)[:, 0]

    return stitch(torch.from_numpy(image), predict, size, overlap, batch_size=1).numpy()


def ensemble(views: str) -> Ensemble:
    """The kit's own predictor around the trivial network: every window counts, nothing is measured to choose
    anything.
    """
    inference = InferenceConfig(
        window=SIZE, overlap=OVERLAP, views=views, batch_size=BATCH, skip_background=False, tune_speed=False
    )
    return Ensemble(Experiment(inference=inference), [ChannelCopy()], {}, torch.device("cpu"))


def sigmoid_copy(inputs: torch.Tensor) -> torch.Tensor:
    """What the trivial network gives as a probability, for those who do not apply the sigmoid themselves."""
    return torch.sigmoid(inputs[:, :1].clone(memory_format=torch.contiguous_format))


def _stitching(side: int, repeats: int, targets: dict[str, float]) -> Comparison:
    """A network that copies a channel: the plane must be that channel, whatever the window weights are."""
    image = tissue(side)[0]
    expected = (image[..., 0] / np.float32(255) - MEAN[0]) / STD[0]
    network = ChannelCopy()
    with torch.inference_mode():
        # Ours is for probabilities and keeps them between 0 and 1.
        check_equal("ours", stitched(image, network, SIZE, OVERLAP), expected.clip(0, 1), 1e-5)
        rivals: dict[str, Callable[[], object] | None] = {}
        for name, rival in stitchers.everyone().items():
            if rival is not None:
                check_equal(name, rival(image, network, SIZE, OVERLAP), expected, 1e-5)
            rivals[name] = None if rival is None else partial(rival, image, network, SIZE, OVERLAP)
        what = f"stitching {side} x {side}, free network, window {SIZE}, overlap {OVERLAP}"
        return compare(what, partial(stitched, image, network, SIZE, OVERLAP), rivals, targets, repeats)


def _views(side: int, repeats: int, targets: dict[str, float]) -> Comparison:
    """All eight symmetries: turned inside the window and stitched once, against a stitch for each."""
    image, ours = tissue(side)[0], ensemble("d4")
    rival = stitchers.monai_views()
    with torch.inference_mode():
        if rival is not None:
            check_equal("8 views", ours.plane(image), rival(image, sigmoid_copy, SIZE, OVERLAP), 1e-5)
        rivals = {"MONAI, 8 calls": None if rival is None else partial(rival, image, sigmoid_copy, SIZE, OVERLAP)}
        return compare(f"8 views of {side} x {side}, free network", lambda: ours.plane(image), rivals, targets, repeats)


def _memory(sides: tuple[int, ...]) -> list[Comparison]:
    """Resident memory as a process grows by default, and what was held at once; at 3000 px the rivals' too.

    Nothing where Linux is not.
    """
    parts = []
    for side in sides:
        target = MEMORY_TARGETS.get(side)
        grown = [peak_rss("benchmarks.windows", "prepare", "ours", side) for _ in range(1 if target is None else 3)]
        if None in grown:
            return []
        rivals = [name for name, make in stitchers.RIVALS.items() if make() is not None] if side == 3000 else []
        others = {name: peak_rss("benchmarks.windows", "prepare", name, side) / MEGABYTE for name in rivals}
        parts.append(
            limit(
                f"peak extra memory, {side} x {side}",
                [size / MEGABYTE for size in grown],
                "MB",
                target,
                others,
                [MEMORY_NOTE],
            )
        )
        if target is not None:
            held = peak_rss("benchmarks.windows", "prepare", "ours", side, returned=True) / MEGABYTE
            parts.append(limit(f"the same, held at once, {side} x {side}", held, "MB", notes=[HELD_NOTE]))
    return parts


def prepare(name: str, side: int) -> Callable[[], object]:
    """Everything ready for one stitch by ours or a rival; a small slide has gone through, so that libraries are
    warm.
    """
    rival = stitchers.RIVALS[name]() if name in stitchers.RIVALS else None
    image, network = tissue(side)[0], ChannelCopy()
    ours = ensemble("none")

    def call(pixels: np.ndarray) -> object:
        with torch.inference_mode():
            return ours.probability(pixels, 0.5) if rival is None else rival(pixels, network, SIZE, OVERLAP)

    call(np.ascontiguousarray(image[:SIZE, :SIZE]))
    return lambda: call(image)
