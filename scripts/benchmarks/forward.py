"""A real network on the CPU: what the kit adds to its bare forward passes, and what folding and memory order save."""

from __future__ import annotations

import time
from functools import partial

import numpy as np
import torch
from torch import nn

from benchmarks import stitchers
from benchmarks.material import network, tissue, title
from benchmarks.measure import Comparison, check_equal, compare, limit
from hubmap_kit.config import Experiment, InferenceConfig, ModelConfig
from hubmap_kit.inference.ensemble import Ensemble
from hubmap_kit.models.build import normalise
from hubmap_kit.models.fastest import FORMS, Form, fuse

SIZE, OVERLAP = 512, 0.25
DIFFERENCE = 1e-5  # of a probability, that memory order and folding may make


class Timed(nn.Module):
    """A network and the seconds spent inside it. For a GPU, whose passes return before they are done, see `gpu`."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network, self.seconds = network, 0.0

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """As the network."""
        start = time.perf_counter()
        outputs = self.network(inputs)
        self.seconds += time.perf_counter() - start
        return outputs


def overhead(model: ModelConfig, side: int, repeats: int, at_most: float | None) -> Comparison:
    """Time outside of the network's forward passes, in percent of the time inside."""
    image, timed = tissue(side)[0], Timed(network(model).to(memory_format=torch.channels_last))
    inference = InferenceConfig(
        window=SIZE, overlap=OVERLAP, views="none", batch_size=1, skip_background=False, tune_speed=False
    )
    ours = Ensemble(Experiment(inference=inference), [timed], {}, torch.device("cpu"))
    shares = {"ours": [_share(timed, partial(ours.plane, image)) for _ in range(repeats)]}
    for name in ("MONAI constant", "notebook loop"):
        rival = stitchers.RIVALS[name]()
        if rival is not None:
            shares[name] = [
                _share(timed, partial(_stitch_logits, rival, image, timed)) for _ in range(max(1, repeats // 2))
            ]
    others = {name: float(np.median(values)) for name, values in shares.items() if name != "ours"}
    what = f"time beyond forward passes, {title(model)}, {side} x {side}, 1 view"
    return limit(what, shares["ours"], "%", at_most, others)


def _stitch_logits(rival: stitchers.Stitcher, image: np.ndarray, made: nn.Module) -> object:
    with torch.inference_mode():
        return rival(image, lambda inputs: torch.sigmoid(made(inputs)), SIZE, OVERLAP)


def _share(timed: Timed, call: partial[object]) -> float:
    timed.seconds, start = 0.0, time.perf_counter()
    call()
    return 100 * (time.perf_counter() - start - timed.seconds) / timed.seconds


def forward_times(model: ModelConfig, size: int, repeats: int, target: float | None) -> Comparison:
    """One window through the form that the kit prefers on a CPU, against the network as it was trained, and what lies
    between.

    Input is what the kit gives: channel by channel in memory; a network in channels-last memory changes that itself.
    """
    window = normalise(torch.from_numpy(tissue(size)[0])[None], model).contiguous()
    forms = {str(form): form.of(network(model), fuse(network(model), window)) for form in FORMS}
    ours, *others = forms
    passes = {name: partial(made, window) for name, made in forms.items()}
    eager = str(Form(folded=False, channels_last=False))
    with torch.inference_mode():
        for name in forms:
            check_equal(name, torch.sigmoid(passes[name]()).numpy(), torch.sigmoid(passes[eager]()).numpy(), DIFFERENCE)
        what = f"forward pass of one window of {size} px, {title(model)}: {ours}"
        return compare(
            what, passes[ours], {name: passes[name] for name in others}, {eager: target} if target else None, repeats
        )
