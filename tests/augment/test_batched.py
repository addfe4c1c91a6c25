"""The batched engine against plain per-pixel arithmetic, OpenCV and SciPy, and in the training loop."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from scipy import ndimage
from tiny import TINY

from hubmap_kit import experiment
from hubmap_kit.augment import batched, classic
from hubmap_kit.augment.batched import RANGES, Batched, Ranges, draw_affine, draw_colours, jitter_stains
from hubmap_kit.augment.stain import DAB, EOSIN, HAEMATOXYLIN
from hubmap_kit.competition.tables import read_train
from hubmap_kit.config import ModelConfig
from hubmap_kit.models.build import normalise
from hubmap_kit.tiles.store import TileStore, open_or_build
from hubmap_kit.training.fold import FoldTask, FoldTrainer

MODEL = ModelConfig()
PLAIN = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))  # the network's input is then the picture in 0..1
IDENTITY = Ranges(geometry=1, elastic=1, bend=0, colour=1, stain=0)  # walks through every part, changes nothing


def batch_of(count: int = 4, height: int = 64, width: int = 96, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise that is smooth enough to be sampled between pixels, and masks of its own bright parts."""
    random = np.random.default_rng(seed)
    coarse = random.integers(1, 256, (count, height // 8, width // 8, 3), np.uint8)
    tiles = np.stack([cv2.resize(each, (width, height), interpolation=cv2.INTER_CUBIC) for each in coarse])
    return torch.from_numpy(tiles), torch.from_numpy((tiles[..., 0] > 128).astype(np.uint8))


def pictures(made: torch.Tensor) -> np.ndarray:
    """Network input with PLAIN statistics -> pictures (N, H, W, 3) in 0..255."""
    return made.permute(0, 2, 3, 1).numpy() * 255


def test_every_pipeline_of_classic_is_known() -> None:
    assert set(RANGES) == set(classic.PIPELINES)
    with pytest.raises(ValueError, match="augment.pipeline is 'flip'; known are none, flips"):
        Batched("flip", *PLAIN)


def test_without_ranges_it_is_the_normalised_input_to_the_bit() -> None:
    tiles, masks = batch_of()
    made, kept = Batched("none", MODEL.mean, MODEL.std)(tiles, masks, 0, 0)
    assert torch.equal(made, normalise(tiles, MODEL))
    assert made.is_contiguous(memory_format=torch.channels_last)
    assert kept.dtype == torch.float32
    assert torch.equal(kept, masks.float())


def test_identity_draws_through_every_part_change_nothing() -> None:
    tiles, masks = batch_of()
    made, kept = Batched(IDENTITY, MODEL.mean, MODEL.std, stain_share=1)(tiles.clamp(min=1), masks, 0, 0)
    assert torch.allclose(made, normalise(tiles.clamp(min=1), MODEL), atol=2e-4)
    assert made.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(kept, masks.float())


@hypothesis_settings(max_examples=25, deadline=None)
@given(
    name=st.sampled_from(["flips", "first-team", "strong"]),
    step=st.integers(0, 10_000),
    row=st.integers(20, 76),
    col=st.integers(20, 76),
)
def test_a_marker_stays_with_its_mask(name: str, step: int, row: int, col: int) -> None:
    mask = cv2.circle(np.zeros((96, 96), np.uint8), (col, row), 15, 1, -1)
    tiles, masks = (
        torch.from_numpy(np.stack([mask[..., None].repeat(3, 2) * 255] * 3)),
        torch.from_numpy(np.stack([mask] * 3)),
    )
    geometry = replace(RANGES[name], colour=0, grey=0, elastic=1 if name == "strong" else 0)
    made, moved = Batched(geometry, *PLAIN)(tiles, masks, 0, step)
    # The nearest of the four pixels that are mixed has at least a quarter of the weight.
    assert bool((moved[made[:, 0] > 0.76] == 1).all())
    assert bool((moved[made[:, 0] < 0.24] == 0).all())
    assert set(moved.unique().tolist()) <= {0.0, 1.0}


def test_flips_and_quarter_turns_are_the_eight_symmetries() -> None:
    tiles, masks = (part[:1].repeat(64, *[1] * (part.ndim - 1)) for part in batch_of(1, 64, 64))
    made, moved = Batched(Ranges(mirror=True, quarters=True), *PLAIN)(tiles, masks, 0, 0)
    tile, mask = tiles[0].numpy().astype(float), masks[0].numpy()
    turned = [
        (np.rot90(a, k), np.rot90(b, k)) for a, b in ((tile, mask), (tile[:, ::-1], mask[:, ::-1])) for k in range(4)
    ]
    seen = set()
    for picture, part in zip(pictures(made), moved.numpy(), strict=True):
        found = [place for place, (image, _) in enumerate(turned) if np.abs(image - picture).max() < 0.1]
        assert len(found) == 1
        assert np.array_equal(turned[found[0]][1], part)
        seen.add(found[0])
    assert seen == set(range(8))


@pytest.mark.parametrize("scale", [2.0, 0.5])
def test_a_scale_above_one_enlarges(scale: float) -> None:
    tiles, masks = batch_of(1, 64, 64)
    made, _ = Batched(Ranges(geometry=1, scale=(scale, scale)), *PLAIN)(tiles, masks, 0, 0)
    if scale > 1:
        large = cv2.resize(tiles[0].numpy().astype(np.float32), (128, 128), interpolation=cv2.INTER_LINEAR)
        assert np.abs(pictures(made)[0] - large[32:96, 32:96]).max() < 0.1
    else:  # every second pixel's corner, the mean of the four around it; the tile mirrored at its border around it
        small = tiles[0].numpy().astype(np.float32).reshape(32, 2, 32, 2, 3).mean(axis=(1, 3))
        assert np.abs(pictures(made)[0] - np.pad(small, ((16, 16), (16, 16), (0, 0)), "symmetric")).max() < 0.1


def test_moved_pixels_are_those_of_scipy() -> None:
    tiles, masks = batch_of(6)
    count, height, width = masks.shape
    # Without elastic, the only other draw: the affine maps are the first numbers that a call takes.
    affine = draw_affine(replace(RANGES["strong"], geometry=1), (count, height, width), np.random.default_rng(5))
    made, moved = batched._move(tiles.permute(0, 3, 1, 2).float(), masks.float(), affine, {})
    rows, cols = np.mgrid[:height, :width]
    for place in range(count):
        flat = np.stack([(2 * cols + 1) / width - 1, (2 * rows + 1) / height - 1, np.ones_like(rows)]).reshape(3, -1)
        x, y = (affine[place] @ flat).reshape(2, height, width)
        where = [((y + 1) * height - 1) / 2, ((x + 1) * width - 1) / 2]
        for channel in range(3):
            expected = ndimage.map_coordinates(
                tiles[place, ..., channel].numpy().astype(float), where, order=1, mode="reflect"
            )
            assert np.abs(made[place, channel].numpy() - expected).max() < 0.1
        nearest = ndimage.map_coordinates(masks[place].numpy(), where, order=0, mode="reflect")
        assert (
            np.mean(nearest != moved[place].numpy()) < 0.001
        )  # a place half-way between two pixels may fall either way


def test_a_turn_is_a_turn_in_pixels_whatever_the_shape() -> None:
    affine = draw_affine(Ranges(geometry=1, rotate=45), (50, 64, 96), np.random.default_rng(0))
    linear = np.diag((48, 32)) @ affine[:, :, :2] @ np.diag((1 / 48, 1 / 32))
    assert np.allclose(linear @ linear.transpose(0, 2, 1), np.eye(2))
    angles = np.degrees(np.arctan2(linear[:, 1, 0], linear[:, 0, 0]))
    assert np.abs(angles).max() <= 45
    assert angles.min() < -30 < 30 < angles.max()


@pytest.mark.parametrize(
    ("brightness", "contrast", "saturation"), [(1.3, 0.7, 1.8), (0.7, 1.4, 0.3), (1.0, 1.0, 0.0), (1.2, 1.5, 1.0)]
)
def test_the_colour_matrix_does_what_the_steps_do_pixel_by_pixel(
    brightness: float, contrast: float, saturation: float
) -> None:
    tiles, masks = batch_of(3)
    tiles = (
        tiles[:, ::8, ::8].repeat_interleave(8, 1).repeat_interleave(8, 2)
    )  # so that the mean grey is that of every eighth pixel
    ranges = Ranges(colour=1, brightness=(brightness,) * 2, contrast=(contrast,) * 2, saturation=(saturation,) * 2)
    made, _ = Batched(ranges, MODEL.mean, MODEL.std)(tiles, masks, 0, 0)
    for place in range(3):
        picture = tiles[place].numpy() / 255.0
        middle = float(np.mean(0.299 * picture[..., 0] + 0.587 * picture[..., 1] + 0.114 * picture[..., 2]))
        picture = ((picture - middle) * contrast + middle) * brightness
        luma = 0.299 * picture[..., 0] + 0.587 * picture[..., 1] + 0.114 * picture[..., 2]
        picture = np.clip(luma[..., None] + saturation * (picture - luma[..., None]), 0, 1)
        expected = (picture - np.array(MODEL.mean)) / np.array(MODEL.std)
        assert np.abs(made[place].permute(1, 2, 0).numpy() - expected).max() < 1e-4


def test_hue_turns_about_grey_and_a_third_of_the_circle_exchanges_the_channels() -> None:
    matrices = draw_colours(Ranges(colour=1, hue=0.1), 200, np.random.default_rng(0)).matrices
    assert np.allclose(matrices @ matrices.transpose(0, 2, 1), np.eye(3))
    assert np.allclose(matrices.sum(axis=2), 1)
    degrees = np.degrees(np.arccos((np.trace(matrices, axis1=1, axis2=2) - 1) / 2))
    assert 30 < degrees.max() <= 36
    third = batched._about_grey(np.array([2 * np.pi / 3]))[0]
    assert np.allclose(third @ (1, 0, 0), (0, 1, 0))  # red becomes green, as in the usual circle


def test_draws_stay_in_their_ranges_and_shares() -> None:
    colours = draw_colours(Ranges(colour=0.5, brightness=(0.7, 1.3), channels=0.1), 2000, np.random.default_rng(0))
    factors = colours.matrices[:, 0, 0]
    assert 0.7 <= factors.min() < 0.72
    assert 1.28 < factors.max() <= 1.3
    assert 0.45 < np.mean(factors != 1) < 0.55
    assert 25 < np.abs(colours.offsets).max() <= 25.5


@pytest.mark.parametrize("second", [EOSIN, DAB], ids=["eosin", "dab"])
def test_stain_factors_multiply_what_the_stains_take(second: tuple[float, float, float]) -> None:
    random = np.random.default_rng(0)
    first, other = (np.array(vector)[:, None, None] for vector in (HAEMATOXYLIN, second))
    amounts = random.uniform(0, 0.6, (2, 2, 1, 32, 48))
    amounts[:, :, :, :8] = 0  # glass
    factors = np.array([[1.25, 0.8], [0.75, 1.2]])
    shown = 255 * 10 ** -(amounts[:, 0] * first + amounts[:, 1] * other)
    strong = amounts * factors[:, :, None, None, None]
    expected = 255 * 10 ** -(strong[:, 0] * first + strong[:, 1] * other)
    made = jitter_stains(torch.from_numpy(shown).float(), factors).numpy()
    assert np.abs(made - expected).max() < 0.01
    assert np.abs(made[:, :, :8] - 255).max() < 0.01


def test_stains_are_jittered_in_the_share_that_was_asked_for() -> None:
    tiles, masks = batch_of(200, 16, 16)
    made, _ = Batched("none", *PLAIN, stain_share=0.3)(tiles, masks, 0, 0)
    changed = (np.abs(pictures(made) - tiles.numpy()) > 0.01).any(axis=(1, 2, 3))
    assert 0.2 < changed.mean() < 0.4


def test_the_same_numbers_for_the_same_seed_epoch_and_step_and_others_for_others() -> None:
    tiles, masks = batch_of()
    engine = Batched("strong", *PLAIN, seed=3, stain_share=0.5)
    first = engine(tiles, masks, 2, 7)
    torch.manual_seed(99)
    np.random.seed(99)  # global generators have no say
    before = torch.get_rng_state()
    engine(tiles, masks, 0, 0)
    again = Batched("strong", *PLAIN, seed=3, stain_share=0.5)(tiles, masks, 2, 7)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    for seed, epoch, step in ((3, 2, 8), (3, 7, 2), (4, 2, 7)):
        assert not torch.equal(
            Batched("strong", *PLAIN, seed=seed, stain_share=0.5)(tiles, masks, epoch, step)[0], first[0]
        )


@pytest.mark.parametrize("name", RANGES)
def test_nothing_of_it_is_left_on_the_host_or_waits_for_the_device(name: str) -> None:
    # A meta tensor has a device and a shape but no values: reading one, or mixing it with one of the host, is an error.
    tiles, masks = (part.to("meta") for part in batch_of())
    made, moved = Batched(name, *PLAIN, stain_share=0.9)(tiles, masks, 0, 0)
    assert made.device.type == moved.device.type == "meta"
    assert made.shape == (4, 3, 64, 96)
    assert moved.shape == masks.shape


def test_other_shapes_and_types_are_refused() -> None:
    tiles, masks = batch_of()
    for wrong in ((tiles.float(), masks), (tiles.permute(0, 3, 1, 2), masks), (tiles, masks[:, None])):
        with pytest.raises(ValueError, match=r"expected \(N, H, W, 3\) uint8"):
            Batched("none", *PLAIN)(*wrong, 0, 0)


@pytest.fixture(scope="module")
def store(sample_data: Path, tmp_path_factory: pytest.TempPathFactory) -> TileStore:
    settings = experiment.load("baseline", list(TINY))
    return open_or_build(
        tmp_path_factory.mktemp("stores"), read_train(sample_data / "train.csv"), settings.scale, settings.tiles
    )


def train(store: TileStore, folder: Path, *changes: str, stop_after: int = 0) -> dict[str, torch.Tensor]:
    """Train a tiny network; returns the weights kept.

    `stop_after`: interrupted after that epoch, then resumed by a new trainer.
    """
    settings = experiment.load("baseline", [*TINY, "training.lr=0.01", *changes])
    task = FoldTask(0, store, range(7), range(7, 10), folder, torch.device("cpu"))

    def interrupt(fold: int, row: dict) -> None:
        if row["epoch"] == stop_after:
            raise KeyboardInterrupt

    folder.mkdir()
    if stop_after:
        with pytest.raises(KeyboardInterrupt):
            FoldTrainer(settings, task).run(interrupt)
    trainer = FoldTrainer(settings, task)
    trainer.run()
    assert trainer.state.epoch == settings.training.epochs
    return {name: value.clone() for name, value in trainer.network.state_dict().items()} | load_file(
        folder / "model.safetensors"
    )


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first)


def test_the_training_loop_uses_it_and_resumes_to_the_same_weights(store: TileStore, tmp_path: Path) -> None:
    plain = train(store, tmp_path / "classic-none", "augment.pipeline=none", "augment.engine=classic")
    assert same(plain, train(store, tmp_path / "none", "augment.pipeline=none", "augment.engine=batched"))
    strong = ("augment.pipeline=strong", "augment.engine=batched", "augment.stain=jitter")
    whole = train(store, tmp_path / "strong", *strong)
    assert not same(plain, whole)
    assert same(whole, train(store, tmp_path / "resumed", *strong, stop_after=1))
