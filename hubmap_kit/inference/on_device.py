"""What happens to pixels on the device: slide and windows as bytes, floats only where a network reads them.

Nothing here asks which device it is, unless a line says so; the lines for CUDA alone are marked where no GPU has run
them.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from hubmap_kit.config import InferenceConfig, ModelConfig
from hubmap_kit.errors import HubmapError
from hubmap_kit.inference.views import Tour, moved
from hubmap_kit.tiles.scaling import resize_image
from hubmap_kit.tiles.store import mirror

log = logging.getLogger(__name__)


@dataclass
class Stopwatch:
    """Seconds spent in a network so far."""

    seconds: float = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Add the time of the block."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - start


# A CPU computes larger batches more slowly, because they leave its caches: a U-Net on efficientnet-b0 took 1.5 times as
# long per window of 512 px in batches of four as alone, and no longer per window of 256 px.
CPU_PIXELS = 512 * 512


class MemoryShort(HubmapError):
    """Not even one window fits into the device's memory."""


@dataclass
class Limits:
    """What fits into memory; what one slide taught, the following ones keep.

    `windows` in one forward pass, and the longest side `whole` of a slide that is predicted in one piece (0: none).
    """

    windows: int
    whole: int = 0

    @classmethod
    def at_first(cls, config: InferenceConfig, device: torch.device) -> Limits:
        """What the config asks for; on a CPU no more pixels at once than it computes at full speed."""
        most = max(1, CPU_PIXELS // config.window**2) if device.type == "cpu" else config.batch_size
        return cls(min(config.batch_size, most), config.whole_slide)

    def shrink(self, tried: int, shape: Sequence[int], device: torch.device) -> None:
        """After `tried` windows of `shape` (.., H, W) did not fit: half as many from now on.

        Raises MemoryShort when it was one.
        """
        if tried <= 1:
            raise MemoryShort(
                f"a window of {shape[-2]} x {shape[-1]} px does not fit into the memory of {device}; "
                "set inference.window smaller, or predict with --device cpu"
            )
        self.windows = tried // 2
        log.warning("memory is short on %s: from now on %d windows in one forward pass", device, self.windows)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch failed because memory is short.

    On a CPU it says so in an ordinary RuntimeError, in its own or oneDNN's words.
    """
    text, signs = str(error), ("out of memory", "can't allocate memory", "could not create a primitive")
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(sign in text for sign in signs)
    )


def to_device(image: np.ndarray, device: torch.device) -> torch.Tensor:
    """A slide (H, W, 3) uint8 as a tensor on the device; on the CPU it is the same memory, where numpy lets it be
    written.
    """
    tensor = torch.from_numpy(np.require(image, requirements=["C", "W"]))
    if device.type != "cuda":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)  # no GPU has run this line


def scale_on_device(slide: np.ndarray, shape: tuple[int, int], device: torch.device) -> torch.Tensor:
    """A slide (H, W, 3) uint8 at the size `shape` (h, w), on the device.

    OpenCV resamples, which is the definition; only where a GPU shrinks by a whole number it does so itself.
    """
    if (
        device.type == "cuda"
        and slide.shape[:2] != shape
        and slide.shape[0] % shape[0] == slide.shape[1] % shape[1] == 0
    ):
        return reduce_by_area(to_device(slide, device), shape)  # no GPU has run this line
    return to_device(resize_image(slide, shape), device)


def reduce_by_area(image: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """Area averages of a slide (H, W, 3) uint8 over whole blocks of pixels; `shape` (h, w) must divide (H, W).

    The rounded mean differs from OpenCV's INTER_AREA by one level at most.
    """
    factors = image.shape[0] // shape[0], image.shape[1] // shape[1]
    if (shape[0] * factors[0], shape[1] * factors[1]) != tuple(image.shape[:2]):
        raise ValueError(f"{tuple(image.shape[:2])} is no multiple of {shape}")
    planes = image.permute(2, 0, 1)[None].float()
    return F.avg_pool2d(planes, factors)[0].add_(0.5).byte().permute(1, 2, 0).contiguous()


def extended(image: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """The slide (h, w, 3), mirrored at its lower and right edges up to `height` x `width`; unchanged where it is as
    large.
    """
    for axis, (length, wanted) in enumerate(zip(image.shape[:2], (height, width), strict=True)):
        if length < wanted:
            index = mirror(np.arange(length)[:, None], (0, wanted - length, 0, 0))[:, 0]
            image = image.index_select(axis, torch.from_numpy(index).to(image.device))
    return image


class MeanProbability:
    """The mean probability of windows over all networks and views, as one function of windows.

    It holds one batch of floats, which every view and every network reads, and one of results, and lives as long as one
    slide.
    """

    def __init__(
        self,
        networks: Sequence[nn.Module],
        tour: Tour,
        model: ModelConfig,
        device: torch.device,
        limits: Limits,
        dtype: torch.dtype | None = None,
        watch: Stopwatch | None = None,
        organ: int = 0,
    ) -> None:
        """`dtype` is the half type to compute in.

        `watch`, for a CPU, takes the time of the networks' own forward passes.

        `organ` is the class index of the slide's organ, for networks that know organs apart; 0 where it is not known.
        """
        self.organ = organ
        self.networks, self.tour, self.device, self.dtype = networks, tour, device, dtype
        self.limits, self.watch = limits, watch or Stopwatch()
        # In 0..255, because windows come as bytes.
        self.mean, self.std = (
            torch.tensor(values, device=device).view(3, 1, 1) * 255 for values in (model.mean, model.std)
        )
        self._inputs = self._probabilities = self._means = torch.empty(0)

    @torch.inference_mode()
    def __call__(self, windows: torch.Tensor) -> torch.Tensor:
        """(N, 3, H, W) uint8 on the device -> (N, H, W) float32, which the next call overwrites. Raises MemoryShort."""
        shape = (len(windows), *windows.shape[2:])
        if self._means.shape != shape:
            self._means = torch.empty(shape, device=self.device)
        total = self._means
        done = 0
        while done < len(windows):
            part = slice(done, done + self.limits.windows)
            if self._fits(windows[part], total[part]):
                done = part.stop
            else:
                # Outside of the `except`: the error would hold on to the memory of the failed pass.
                self.limits.shrink(len(windows[part]), windows.shape, self.device)
        return total

    def _fits(self, windows: torch.Tensor, total: torch.Tensor) -> bool:
        try:
            # Around all views and networks: leaving it forgets the weights that were cast.
            with torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype is not None):
                self._fill(windows, total)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        else:
            return True
        self._inputs = self._probabilities = torch.empty(0)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # no GPU has run this line
        return False

    def _fill(self, windows: torch.Tensor, total: torch.Tensor) -> None:
        """Probabilities are averaged, never logits: one very sure view would outvote the rest.

        One view is in memory at a time.
        """
        inputs, added, count = self._normalised(windows), total, 0
        for move in (None, *self.tour.moves):
            if move is not None:
                inputs, added = moved(inputs, move), moved(added, move)
            for network in self.networks:
                logits = self._forward(
                    network, inputs
                ).float()  # half precision would round a probability to three digits
                added = added.add_(self._sigmoid(logits)) if count else torch.sigmoid(logits, out=added)
                count += 1
        for move in self.tour.home:
            added = moved(added, move)
        if count > 1:
            torch.div(added, count, out=total)

    def _normalised(self, windows: torch.Tensor) -> torch.Tensor:
        """Network input (N, 3, H, W) of windows: bytes become floats in the one buffer.

        Channel by channel in memory, because three means over the last axis of channels-last memory take twice as long.
        A network in channels-last memory brings its input into that order itself.
        """
        if self._inputs.shape[1:] != windows.shape[1:] or len(self._inputs) < len(windows):
            self._inputs = torch.empty(windows.shape, device=self.device)
        inputs = self._inputs[: len(windows)]
        for window, floats in zip(windows, inputs, strict=True):
            floats.copy_(window).sub_(self.mean).div_(self.std)
        return inputs

    def _sigmoid(self, logits: torch.Tensor) -> torch.Tensor:
        if self._probabilities.shape != logits.shape:
            self._probabilities = torch.empty(logits.shape, device=self.device)
        return torch.sigmoid(logits, out=self._probabilities)

    def _forward(self, network: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
        with self.watch.running():
            return unit_logits(network(inputs), self.organ)


def unit_logits(logits: torch.Tensor, organ: int = 0) -> torch.Tensor:
    """Logits (N, C, H, W) of a network -> logits (N, H, W) of being a unit.

    With one channel, that one. With background and organs (C = 6), the organ against background, as if there were no
    other organs: the slide's organ is known. Without it (0), any organ against background.
    """
    if logits.shape[1] == 1:
        return logits[:, 0]
    unit = logits[:, organ] if organ else torch.logsumexp(logits[:, 1:].float(), dim=1)
    return unit - logits[:, 0]
