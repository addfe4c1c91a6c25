"""Slides per hour on a GPU, for a table of networks, folds and views, and how much of the time the card computes.

Written for a machine with CUDA. Nobody has run it yet: it was only read, and the parts that need no card were tried on
a CPU.
"""

from __future__ import annotations

import time
from functools import partial

import torch
from torch import nn

from benchmarks.material import network, tissue
from benchmarks.measure import Comparison, limit
from hubmap_kit.config import Experiment, InferenceConfig, ModelConfig
from hubmap_kit.inference.ensemble import Ensemble

NETS = {
    "U-Net b0": ModelConfig(arch="unet", encoder="tu-efficientnet_b0"),
    "U-Net b3": ModelConfig(arch="unet", encoder="tu-efficientnet_b3"),
    "U-Net b7": ModelConfig(arch="unet", encoder="tu-efficientnet_b7"),
    "SegFormer b3": ModelConfig(arch="segformer", encoder="mit_b3"),
}
FOLDS, VIEWS = (1, 5), {"none": 1, "flips": 4, "d4": 8}
UM_PER_PX = 0.4


def run(quick: bool = False) -> list[Comparison]:
    """Slides of 3000 px at half scale, window 512, overlap 0.25, half precision; empty where there is no card."""
    if not torch.cuda.is_available():
        return []
    nets = dict(list(NETS.items())[:1]) if quick else NETS
    return [
        _line(name, model, folds, views, 1 if quick else 3)
        for name, model in nets.items()
        for folds in FOLDS
        for views in VIEWS
    ]


def _line(name: str, model: ModelConfig, folds: int, views: str, repeats: int) -> Comparison:
    device = torch.device("cuda")
    busy = Busy()
    ensemble = build_ensemble(model, folds, views, device, busy)
    image = tissue(3000)[0]
    predict = partial(ensemble.probability, image, UM_PER_PX)
    predict()  # kernels are chosen and memory is taken
    busy.seconds()
    start = time.perf_counter()
    for _ in range(repeats):
        predict()
    torch.cuda.synchronize()
    wall = time.perf_counter() - start
    note = (
        f"GPU busy in forward passes, {name}, {folds} folds, {VIEWS[views]} views: {100 * busy.seconds() / wall:.0f} %"
        " of the time"
    )
    return limit(
        f"{name}, {folds} folds, {VIEWS[views]} views, slides of 3000 px",
        3600 * repeats / wall,
        "slides/h",
        notes=[note],
    )


def build_ensemble(model: ModelConfig, folds: int, views: str, device: torch.device, busy: Busy) -> Ensemble:
    """The kit's predictor with `folds` copies of a network with random weights; `busy` watches them."""
    inference = InferenceConfig(
        window=512, overlap=0.25, views=views, batch_size=8, skip_background=False, precision="auto", tune_speed=False
    )
    settings = Experiment(model=model, inference=inference).model_copy(deep=True)
    settings = settings.model_copy(update={"scale": settings.scale.model_copy(update={"reduce": 2})})
    networks = [network(model).to(device, memory_format=torch.channels_last) for _ in range(folds)]
    for each in networks:
        busy.watch(each)
    return Ensemble(settings, networks, {}, device)


class Busy:
    """Time between the first and the last kernel of each forward pass, told by the card's own clock."""

    def __init__(self) -> None:
        self._pairs: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def watch(self, each: nn.Module) -> None:
        """Put an event before and behind every forward pass of a network on the card."""
        each.register_forward_pre_hook(self._before)
        each.register_forward_hook(self._after)

    def seconds(self) -> float:
        """Seconds since the last call of this; waits for the card."""
        torch.cuda.synchronize()
        total = sum(begin.elapsed_time(end) for begin, end in self._pairs) / 1e3
        self._pairs.clear()
        return total

    def _before(self, *_: object) -> None:
        self._pairs.append((torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)))
        self._pairs[-1][0].record()

    def _after(self, *_: object) -> None:
        self._pairs[-1][1].record()
