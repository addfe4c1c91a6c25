"""Augmentation of a whole batch at once, on the device where the network is: chosen by `augment.engine: batched`.

Three passes however long the list: one grid for mirroring, turning, scaling, shifting, shearing and bending, which
image and mask share; one 3 x 4 matrix a tile for brightness, contrast, saturation, hue, channel shifts and the
network's normalisation; one 3 x 3 matrix a tile in optical density for its stains. What is no such map has no place
here: blur, noise, gamma, compression and dropout of the pipelines are left to the engine `classic`.

Every number drawn is a function of (seed, epoch, step), drawn on the host: a resumed run draws what it would have
drawn, any device the same, and a GPU never waits for one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import torch
from torch.nn import functional

from hubmap_kit.augment.changes import jitter_on_device
from hubmap_kit.augment.stain import DAB, EOSIN, HAEMATOXYLIN
from hubmap_kit.config import AugmentConfig

Span = tuple[float, float]
Triple = tuple[float, float, float]
LUMA = np.array((0.299, 0.587, 0.114))  # weights of red, green and blue in a grey level: ITU-R BT.601
BEND = 32  # pixels between the knots of an elastic displacement, which is smooth in between
EVERY = 8  # pixels: a mean over every eighth in each direction is that of the tile, for a sixty-fourth of the work
STREAM = 1  # sets these numbers apart from those of the data set, which draws from (seed, epoch, position)
DECADE = float(np.log(10.0))


@dataclass(frozen=True)
class Ranges:
    """How strong a pipeline is. A factor is drawn from its span, anything else from minus to plus its value.

    Shares are of the tiles of a batch, 0..1. The defaults change nothing.
    """

    mirror: bool = False  # left-right and up-down, each for half of the tiles
    quarters: bool = False  # with `mirror`: the 8 symmetries of a square
    geometry: float = 0.0  # share of tiles that the next four apply to
    rotate: float = 0.0  # degrees
    scale: Span = (1.0, 1.0)  # above 1 enlarges; as many draws shrink as enlarge where the span is (1 / s, s)
    shift: float = 0.0  # share of the tile's side
    shear: float = 0.0  # degrees
    elastic: float = 0.0  # share of tiles that are bent
    bend: float = 3.0  # pixels: standard deviation of the displacement of a knot, knots BEND apart
    colour: float = 0.0  # share of tiles that the next five apply to
    brightness: Span = (1.0, 1.0)
    contrast: Span = (1.0, 1.0)  # about the tile's mean grey
    saturation: Span = (1.0, 1.0)
    hue: float = 0.0  # share of the colour circle
    channels: float = 0.0  # share of the full range that each channel is moved by
    grey: float = 0.0  # share of tiles that lose all colour
    stain: float = (
        0.25  # the strength of each stain is multiplied by 1 +- this, in the share of tiles that the caller names
    )

    @property
    def moves(self) -> bool:
        """Whether any pixel is moved."""
        return self.mirror or self.quarters or self.geometry > 0 or self.elastic > 0

    @property
    def recolours(self) -> bool:
        """Whether any colour is changed, stains apart."""
        return self.colour > 0 or self.grey > 0


_FIRST_TEAM = Ranges(
    mirror=True,
    quarters=True,
    geometry=0.5,
    rotate=45,
    scale=(0.7, 1.4),
    shift=0.06,
    colour=0.75,
    brightness=(0.8, 1.2),
    contrast=(0.75, 1.25),
    saturation=(0.7, 1.3),
    hue=0.11,
)
# The names, and as far as they are such maps the strengths, of augment.classic.
RANGES: Mapping[str, Ranges] = MappingProxyType(
    {
        "none": Ranges(),
        "flips": Ranges(mirror=True),
        "light": Ranges(
            mirror=True,
            quarters=True,
            colour=0.75,
            brightness=(0.85, 1.15),
            contrast=(0.8, 1.2),
            saturation=(0.75, 1.25),
            hue=0.08,
        ),
        "first-team": _FIRST_TEAM,
        "classic": _FIRST_TEAM,
        "colour": Ranges(
            mirror=True,
            quarters=True,
            colour=0.85,
            brightness=(0.7, 1.3),
            contrast=(0.7, 1.4),
            saturation=(0.3, 1.8),
            hue=0.12,
            channels=0.08,
            grey=0.15,
        ),
        "strong": Ranges(
            mirror=True,
            quarters=True,
            geometry=0.7,
            rotate=45,
            scale=(0.5, 2.0),
            shift=0.1,
            shear=8,
            elastic=0.25,
            colour=0.85,
            brightness=(0.65, 1.35),
            contrast=(0.6, 1.5),
            saturation=(0.2, 2.0),
            hue=0.15,
            channels=0.12,
            grey=0.1,
        ),
    }
)


class Batched:
    """A pipeline on batches: `batched(tiles, masks, epoch, step)` returns the network's input and the masks that go
    with it.
    """

    def __init__(
        self, ranges: Ranges | str, mean: Triple, std: Triple, seed: int = 0, stain_share: float = 0.0
    ) -> None:
        """`ranges` or the name of some in RANGES; `mean` and `std` in 0..1 are the network's.

        Raises ValueError for an unknown name.
        """
        if isinstance(ranges, str) and ranges not in RANGES:
            raise ValueError(f"augment.pipeline is '{ranges}'; known are {', '.join(RANGES)}")
        self.ranges = RANGES[ranges] if isinstance(ranges, str) else ranges
        self.mean, self.std, self.seed, self.stain_share = (
            np.asarray(mean, np.float64),
            np.asarray(std, np.float64),
            seed,
            stain_share,
        )

    @torch.no_grad()
    def __call__(
        self, tiles: torch.Tensor, masks: torch.Tensor, epoch: int, step: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Tiles (N, H, W, 3) uint8 and masks (N, H, W) uint8 on one device -> (N, 3, H, W) float32, normalised, and (N,
        H, W) float32.

        Both come back on that device, the tiles channels last; masks keep their values. Raises ValueError for other
        shapes or types.
        """
        if tiles.dtype != torch.uint8 or tiles.shape != (*masks.shape, 3) or masks.ndim != 3:
            raise ValueError(
                f"tiles are {tuple(tiles.shape)} {tiles.dtype}, masks {tuple(masks.shape)}; expected (N, H, W, 3) uint8"
                " and (N, H, W)"
            )
        random = np.random.default_rng(np.random.SeedSequence((self.seed, epoch, step), spawn_key=(STREAM,)))
        ranges, shape = self.ranges, (len(masks), masks.shape[1], masks.shape[2])
        # All draws come first, in one order, so that none depends on the device or on what another part does.
        affine, bends = draw_affine(ranges, shape, random), draw_bends(ranges, shape, random)
        colours, factors = draw_colours(ranges, len(tiles), random), self._draw_stains(len(tiles), random)
        # Plane by plane, although the network wants channels last: products with 3 x 3 matrices are four times as fast
        # so.
        images, masks = (
            tiles.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format),
            masks.float(),
        )
        grey = _mean_grey(tiles) if ranges.recolours else None
        if factors:
            chosen = _places(factors, images)
            images = images.index_copy(0, chosen, jitter_stains(images[chosen], np.stack(list(factors.values()))))
        if ranges.moves:
            images, masks = _move(images, masks, affine, bends)
        return self._coloured(images, colours, grey), masks

    def _draw_stains(self, count: int, random: np.random.Generator) -> dict[int, np.ndarray]:
        """Factors of two stains for the tiles that get any, by their places in the batch."""
        chosen = random.random(count) < self.stain_share
        factors = random.uniform(1 - self.ranges.stain, 1 + self.ranges.stain, (count, 2))
        return {int(place): factors[place] for place in np.flatnonzero(chosen)}

    def _coloured(self, images: torch.Tensor, colours: Colours, grey: torch.Tensor | None) -> torch.Tensor:
        """Images (N, 3, H, W) in 0..255 -> recoloured and normalised, channels last."""
        if grey is None:
            mean, std = (_to(values.reshape(1, 3, 1, 1), images) * 255 for values in (self.mean, self.std))
            return ((images - mean) / std).contiguous(
                memory_format=torch.channels_last
            )  # to the bit what models.build.normalise gives
        scale = 1 / (255 * self.std)
        matrices = _to(colours.matrices * scale[:, None], images)
        # The last column of the 3 x 4 matrix; contrast turns about a grey that only the device knows.
        fixed, pivots = (
            _to(colours.offsets * scale - self.mean / self.std, images),
            _to(colours.pivots[:, None] * scale, images),
        )
        column = fixed + pivots * grey[:, None]
        made = torch.baddbmm(column[:, :, None], matrices, images.flatten(2)).view_as(images)
        for channel, (mean, std) in enumerate(zip(self.mean.tolist(), self.std.tolist(), strict=True)):
            made[:, channel].clamp_(
                -mean / std, (1 - mean) / std
            )  # colours end at black and white, which normalised are these
        return made.contiguous(memory_format=torch.channels_last)


def from_settings(augment: AugmentConfig, mean: Triple, std: Triple, seed: int) -> Batched | None:
    """What an experiment asks for: None when its engine is `classic`.

    Stain jitter comes along; other stain methods are the data set's.
    """
    if augment.engine != "batched":
        return None
    return Batched(augment.pipeline, mean, std, seed, jitter_on_device(augment))


@dataclass(frozen=True)
class Colours:
    """Colour changes of N tiles: colour = matrices (N, 3, 3) @ colour + offsets (N, 3) + pivots (N,) * mean grey of the
    tile.
    """

    matrices: np.ndarray
    offsets: np.ndarray
    pivots: np.ndarray


def draw_colours(ranges: Ranges, count: int, random: np.random.Generator) -> Colours:
    """Draw for `count` tiles: contrast, then brightness, saturation, hue, channels, in 0..255, as one affine map
    each.
    """
    drawn = random.random(count) < ranges.colour
    contrast, brightness, saturation = (
        np.where(drawn, random.uniform(*span, count), 1.0)
        for span in (ranges.contrast, ranges.brightness, ranges.saturation)
    )
    turn = np.where(drawn, random.uniform(-ranges.hue, ranges.hue, count), 0.0) * 2 * np.pi
    offsets = np.where(drawn[:, None], random.uniform(-ranges.channels, ranges.channels, (count, 3)), 0.0) * 255
    saturation = np.where(random.random(count) < ranges.grey, 0.0, saturation)[:, None, None]
    mixed = _about_grey(turn) @ (saturation * np.eye(3) + (1 - saturation) * LUMA)
    # Saturation and hue leave grey alone, so the grey that contrast adds passes through them unchanged.
    return Colours((brightness * contrast)[:, None, None] * mixed, offsets, brightness * (1 - contrast))


def draw_affine(ranges: Ranges, shape: tuple[int, int, int], random: np.random.Generator) -> np.ndarray:
    """Draw for masks of `shape` (N, H, W): matrices (N, 2, 3) from a place in the result to its place in the tile, both
    in -1..1.
    """
    count, height, width = shape
    drawn = random.random(count) < ranges.geometry
    mirrored = random.random((count, 2)) < (0.5 if ranges.mirror else 0.0)
    quarter = random.integers(4, size=count) if ranges.quarters else np.zeros(count)
    limits = np.array((ranges.rotate, ranges.shear, ranges.shift * width, ranges.shift * height))
    turn, shear, right, down = np.where(drawn[:, None], random.uniform(-limits, limits, (count, 4)), 0.0).T
    scale = np.where(drawn, np.exp(random.uniform(np.log(ranges.scale[0]), np.log(ranges.scale[1]), count)), 1.0)
    angle = quarter * (np.pi / 2) + np.radians(turn)
    cos, sin, one, none = np.cos(angle), np.sin(angle), np.ones(count), np.zeros(count)
    rotation = np.stack([cos, -sin, sin, cos], axis=1).reshape(count, 2, 2)
    sheared = np.stack([one, np.tan(np.radians(shear)), none, one], axis=1).reshape(count, 2, 2)
    linear = rotation @ sheared * (np.where(mirrored, -1.0, 1.0) / scale[:, None])[:, None, :]
    matrix = np.concatenate([linear, np.stack([right, down], axis=1)[:, :, None]], axis=2)
    side = (
        np.array((width, height, 2.0)) / 2
    )  # turning and shearing are done in pixels, or a tile that is no square would be skewed
    return matrix * side / side[:2, None]


def draw_bends(ranges: Ranges, shape: tuple[int, int, int], random: np.random.Generator) -> dict[int, np.ndarray]:
    """Displacements (2, rows, cols) in -1..1 (x, then y) of coarse knots, by the places in the batch of the tiles that
    are bent.
    """
    count, height, width = shape
    chosen = np.flatnonzero(random.random(count) < ranges.elastic)
    knots = random.standard_normal((len(chosen), 2, height // BEND + 2, width // BEND + 2)) * ranges.bend
    knots *= (2 / np.array((width, height)))[:, None, None]
    return dict(zip(chosen.tolist(), knots, strict=True))


def jitter_stains(images: torch.Tensor, factors: np.ndarray) -> torch.Tensor:
    """Multiply the two stains of images (N, 3, H, W) float32 in 0..255 by `factors` (N, 2): one 3 x 3 matrix each in
    optical density.

    The stains are haematoxylin and eosin or DAB, whichever explains the tile better; what neither explains stays. Glass
    has next to no density, so it stays glass. Compare `augment.stain.jitter`, which also adds density and leaves bare
    glass as it is.
    """
    # The natural logarithm, negative: the matrix does not mind.
    densities = images.clamp(min=1).log_().sub_(float(np.log(255.0)))
    some = densities[:, :, ::EVERY, ::EVERY].flatten(2)
    changes, unexplained = zip(*(_stain_change(second, factors, some) for second in (EOSIN, DAB)), strict=True)
    change = torch.where((unexplained[0] <= unexplained[1])[:, None, None], changes[0], changes[1])
    made = torch.bmm(change, densities.flatten(2)).clamp_(max=0).exp_().mul_(255)
    return made.view_as(images)


def _stain_change(
    second: Sequence[float], factors: np.ndarray, densities: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """For one choice of the second stain: matrices (N, 3, 3) on densities, and (N,) how much of `densities` (N, 3, P)
    is unexplained.
    """
    rest = np.cross(HAEMATOXYLIN, second)
    basis = np.column_stack([HAEMATOXYLIN, second, rest / np.linalg.norm(rest)])
    strengths = np.concatenate([factors, np.ones((len(factors), 1))], axis=1)
    matrices = basis @ (strengths[:, :, None] * np.linalg.inv(basis))
    return _to(matrices, densities), (_to(basis[:, 2], densities) @ densities).square().sum(dim=1)


def _move(
    images: torch.Tensor, masks: torch.Tensor, affine: np.ndarray, bends: dict[int, np.ndarray]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sample images (N, 3, H, W) bilinearly and masks (N, H, W) by the nearest pixel, on one grid; tissue is mirrored
    at the border.
    """
    grid = _grid(affine, images)
    if bends:
        knots = _to(np.stack(list(bends.values())), images)
        shifts = functional.interpolate(knots, images.shape[2:], mode="bicubic", align_corners=True).permute(0, 2, 3, 1)
        grid.index_add_(0, _places(bends, images), shifts)
    moved = functional.grid_sample(images, grid, mode="bilinear", padding_mode="reflection", align_corners=False)
    return moved, functional.grid_sample(
        masks[:, None], grid, mode="nearest", padding_mode="reflection", align_corners=False
    )[:, 0]


def _grid(affine: np.ndarray, images: torch.Tensor) -> torch.Tensor:
    """What torch's affine_grid gives, (N, H, W, 2), but as one sum of what the column and what the row adds, at a
    quarter of the time.
    """
    matrix, (height, width) = _to(affine, images), images.shape[2:]
    across, down = ((torch.arange(size, device=images.device) * 2 + 1) / size - 1 for size in (width, height))
    columns = matrix[:, None, :, 0] * across[:, None]
    rows = matrix[:, None, :, 1] * down[:, None] + matrix[:, None, :, 2]
    return rows[:, :, None] + columns[:, None]


def _mean_grey(tiles: torch.Tensor) -> torch.Tensor:
    """Mean grey level (N,) of tiles (N, H, W, 3) uint8, about."""
    return tiles[:, ::EVERY, ::EVERY].float().mean(dim=(1, 2)) @ _to(LUMA, tiles)


def _about_grey(angles: np.ndarray) -> np.ndarray:
    """Rotations (N, 3, 3) of RGB about its grey axis (Rodrigues' formula): a turn of hue as a matrix."""
    cos, sin = np.cos(angles)[:, None, None], np.sin(angles)[:, None, None]
    across = np.array([[0.0, -1.0, 1.0], [1.0, 0.0, -1.0], [-1.0, 1.0, 0.0]]) / np.sqrt(3.0)
    return cos * np.eye(3) + sin * across + (1 - cos) / 3


def _places(chosen: Mapping[int, np.ndarray], like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(list(chosen)).to(like.device, non_blocking=True)


def _to(values: np.ndarray, like: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(values, np.float32)).to(like.device, non_blocking=True)
