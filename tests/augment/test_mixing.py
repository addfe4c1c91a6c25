"""CutMix, copy-paste and MixUp on tiles whose pixels say from which tile they come and whether they are a unit."""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from hubmap_kit.augment import mixing
from hubmap_kit.augment.mixing import Mixing, copy_paste, cutmix, mixup, tissue_ground, whole_units
from hubmap_kit.errors import ConfigError

# Tissue colours: unit and ground of the tile, unit and ground of its partner.
COLOURS = np.array([[150, 60, 120], [190, 130, 170], [60, 60, 150], [120, 170, 140]], np.uint8)


def marked(size: int, seed: int, source: int, share: float = 0.3) -> mixing.Tile:
    """A tile of smooth units; its image is the mask in the two colours of its source (0 or 1)."""
    noise = cv2.GaussianBlur(np.random.default_rng(seed).random((size, size)), (0, 0), size / 12)
    mask = (noise > np.quantile(noise, 1 - share)).astype(np.uint8)
    return COLOURS[2 * source + 1 - mask], mask


def origin(image: np.ndarray) -> np.ndarray:
    """Which of COLOURS each pixel has, (H, W); -1 for none of them."""
    same = (image[:, :, None] == COLOURS).all(axis=3)
    return np.where(same.any(axis=2), same.argmax(axis=2), -1)


def discs(size: int, places: list[tuple[int, int, int]], source: int) -> mixing.Tile:
    mask = np.zeros((size, size), np.uint8)
    for row, col, radius in places:
        cv2.circle(mask, (col, row), radius, 1, -1)
    return COLOURS[2 * source + 1 - mask], mask


@given(st.integers(0, 2**32 - 1), st.sampled_from([64, 96]))
@settings(max_examples=60, deadline=None)
def test_cutmix_lays_one_rectangle_over_and_the_mask_follows(seed: int, size: int) -> None:
    tile, other = marked(size, 1, 0), marked(size, 2, 1)
    kept = [part.copy() for part in (*tile, *other)]
    image, mask = cutmix(tile, other, np.random.default_rng(seed))
    where = origin(image)
    np.testing.assert_array_equal(mask, where % 2 == 0)
    foreign = where >= 2
    if foreign.any():
        rows, cols = np.flatnonzero(foreign.any(axis=1)), np.flatnonzero(foreign.any(axis=0))
        assert foreign[rows[0] : rows[-1] + 1, cols[0] : cols[-1] + 1].all()
    for before, after in zip(kept, (*tile, *other), strict=True):
        np.testing.assert_array_equal(before, after)


def test_cutmix_takes_the_share_that_the_beta_distribution_says() -> None:
    """Without the part that reaches over the edge: with any centre, a span of s keeps s - s^2 / 4 of its length on
    average.
    """
    tile, other = marked(64, 1, 0), marked(64, 2, 1)
    shares = [(origin(cutmix(tile, other, np.random.default_rng(seed))[0]) >= 2).mean() for seed in range(400)]
    side = np.sqrt(np.random.default_rng(0).random(100_000))
    assert np.mean(shares) == pytest.approx(np.mean((side - side**2 / 4) ** 2), abs=0.04)


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=40, deadline=None)
def test_mixup_blends_image_and_mask_by_one_weight(seed: int) -> None:
    tile, other = marked(64, 1, 0), marked(64, 2, 1)
    image, mask = mixup(tile, other, np.random.default_rng(seed))
    assert mask.dtype == np.uint8 and image.dtype == np.uint8
    only_first = (tile[1] == 1) & (other[1] == 0)
    weight = mask[only_first][0] / 255
    assert weight >= 0.5 - 1 / 255
    np.testing.assert_allclose(mask / 255, weight * tile[1] + (1 - weight) * other[1], atol=1.01 / 255)
    wanted = weight * tile[0].astype(float) + (1 - weight) * other[0]
    np.testing.assert_allclose(image, wanted, atol=1.2)


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_copy_paste_adds_whole_units_beside_the_old_ones(seed: int) -> None:
    tile = discs(128, [(30, 30, 14)], 0)
    other = discs(128, [(40, 40, 9), (90, 60, 12), (60, 105, 15), (0, 64, 20)], 1)
    image, mask = copy_paste(tile, other, np.random.default_rng(seed))
    added = (mask == 1) & (tile[1] == 0)
    assert (mask >= tile[1]).all()
    labels, count = ndimage.label(added, np.ones((3, 3)))
    areas = {int(np.pi * radius**2) for radius in (9, 12, 15)}
    for number in range(1, count + 1):
        area = (labels == number).sum()
        assert (
            min(abs(area - wanted) / wanted for wanted in areas) < 0.1
        )  # whole, and never the one that the border cuts
    assert not (ndimage.binary_dilation(added) & (tile[1] == 1)).any()
    where, deep = origin(image), ndimage.distance_transform_edt(added)
    far = ndimage.distance_transform_edt(~added)
    assert (where[deep > 6] == 2).all()  # the partner's unit colour, where the mask grew
    assert (image[far > 7] == tile[0][far > 7]).all()


def test_the_edge_of_a_pasted_unit_is_soft_and_its_mask_ends_in_the_middle() -> None:
    tile, other = discs(128, [], 0), discs(128, [(64, 64, 20)], 1)
    # A partner of one colour throughout: the image then shows the share of it directly.
    image, mask = copy_paste(tile, (np.full_like(other[0], COLOURS[2]), other[1]), np.random.default_rng(0))
    share = (image[..., 0].astype(float) - COLOURS[1][0]) / (float(COLOURS[2][0]) - COLOURS[1][0])
    assert ((share > 0.5) == (mask == 1)).mean() > 0.999
    between = (share > 0.1) & (share < 0.9)
    assert between.sum() > 100 and (np.abs(share[between] - 0.5) < 0.2).any()
    assert np.abs(np.diff(share, axis=0)).max() < 0.4


def test_units_go_on_tissue_only() -> None:
    image, mask = discs(128, [], 0)
    image[:, :40] = image[:, 62:] = 247
    other = discs(128, [(64, 64, 10)], 1)
    pasted = 0
    for seed in range(40):
        grown = copy_paste((image, mask), other, np.random.default_rng(seed))[1]
        pasted += int(grown.any())
        assert grown[tissue_ground(image)].sum() >= 0.95 * grown.sum()
    assert pasted >= 30
    assert not tissue_ground(np.full((64, 64, 3), 250, np.uint8)).any()
    bare = np.full((128, 128, 3), 250, np.uint8)
    out, grown = copy_paste((bare, mask), other, np.random.default_rng(0))
    np.testing.assert_array_equal(out, bare)
    assert not grown.any()


def test_pasted_units_are_found_a_place_where_there_is_just_one() -> None:
    tile = discs(
        128, [(row, col, 15) for row in (16, 48, 80, 112) for col in (16, 48, 80, 112) if (row, col) != (80, 48)], 0
    )
    other = discs(128, [(64, 64, 8)], 1)
    grown = [copy_paste(tile, other, np.random.default_rng(seed))[1] for seed in range(10)]
    assert sum(mask.sum() > tile[1].sum() for mask in grown) >= 8


def test_whole_units_are_those_that_a_label_count_finds_inside() -> None:
    for seed in range(10):
        _, mask = marked(160, seed, 0)
        labels, count = ndimage.label(mask, np.ones((3, 3)))
        border = set(np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]]).tolist())
        wanted = [
            labels == number
            for number in range(1, count + 1)
            if number not in border and (labels == number).sum() >= 30
        ]
        found = whole_units(mask)
        assert sorted(unit.tobytes() for unit in found) == sorted(unit.tobytes() for unit in wanted)


@pytest.mark.parametrize("method", [cutmix, copy_paste, mixup])
def test_empty_partners_and_one_seed(method: Callable[..., mixing.Tile]) -> None:
    tile, bare = marked(64, 1, 0), (COLOURS[np.full((64, 64), 3)], np.zeros((64, 64), np.uint8))
    for other in (marked(64, 2, 1), bare):
        first, again = (method(tile, other, np.random.default_rng(3)) for _ in range(2))
        np.testing.assert_array_equal(first[0], again[0])
        np.testing.assert_array_equal(first[1], again[1])
    image, mask = copy_paste(tile, bare, np.random.default_rng(0))
    np.testing.assert_array_equal(image, tile[0])
    np.testing.assert_array_equal(mask, tile[1])


def test_each_method_happens_as_often_as_its_probability_says() -> None:
    tile, drawn = marked(64, 1, 0), []

    def partner() -> mixing.Tile:
        drawn.append(1)
        return marked(64, 2, 1)

    mix = Mixing({"cutmix": 0.3, "mosaic": 0.2, "copy_paste": 0.0})
    asked = []
    for seed in range(600):
        drawn.clear()
        mix(tile, partner, np.random.default_rng(seed))
        asked.append(len(drawn))
    shares = [asked.count(number) / len(asked) for number in (0, 1, 3)]
    assert shares == pytest.approx([0.5, 0.3, 0.2], abs=0.06)
    assert mix.mask_scale == 1


def test_masks_of_a_run_with_mixup_are_all_of_255() -> None:
    tile = marked(64, 1, 0)
    mix = Mixing({"mixup": 0.5, "cutmix": 0.5})
    assert mix.mask_scale == 255
    masks = [mix(tile, lambda: marked(64, 2, 1), np.random.default_rng(seed))[1] for seed in range(40)]
    soft = [mask for mask in masks if len(np.unique(mask)) > 2]
    assert 8 < len(soft) < 32
    assert all(mask.dtype == np.uint8 and mask.max() == 255 for mask in masks)
    np.testing.assert_array_equal(Mixing({"mixup": 0.0})(tile, lambda: tile, np.random.default_rng(0))[1], tile[1])


def test_no_mixing_leaves_the_tile_and_asks_for_no_partner() -> None:
    tile = marked(64, 1, 0)
    image, mask = Mixing({})(tile, lambda: pytest.fail("asked for a partner"), np.random.default_rng(0))
    assert image is tile[0] and mask is tile[1]


def test_wrong_probabilities_are_one_sentence() -> None:
    with pytest.raises(ConfigError, match="augment.mixing names 'cutmx'.*did you mean 'cutmix'"):
        Mixing({"cutmx": 0.5})
    with pytest.raises(ConfigError, match="augment.mixing.mixup is 1.5; a probability"):
        Mixing({"mixup": 1.5})
    with pytest.raises(ConfigError, match="1.2 together"):
        Mixing({"mixup": 0.6, "cutmix": 0.6})
