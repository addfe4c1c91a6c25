"""Overlays: where colours may and must appear, on small, large and odd pictures, and what the files hold."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import ndimage

from hubmap_kit.report import overlays
from hubmap_kit.report.overlays import Shown, save_sheet, spread

GREY = 200


def slide(height: int = 120, width: int = 160) -> np.ndarray:
    return np.full((height, width, 3), GREY, np.uint8)


def box(height: int, width: int, top: int, left: int, bottom: int, right: int) -> np.ndarray:
    mask = np.zeros((height, width), np.uint8)
    mask[top:bottom, left:right] = 1
    return mask


def has(picture: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    return (picture == np.array(colour, np.uint8)).all(axis=2)


def test_outlines_lie_on_the_boundaries_and_nowhere_else() -> None:
    truth, prediction = box(120, 160, 20, 30, 60, 80), box(120, 160, 70, 90, 110, 150)
    out = overlays.overlay(slide(), truth, prediction)
    for mask, colour in ((truth, overlays.TRUTH), (prediction, overlays.PREDICTION)):
        drawn = has(out, colour)
        inside, outside = ndimage.distance_transform_edt(mask), ndimage.distance_transform_edt(1 - mask)
        assert drawn.any() and (inside[drawn] + outside[drawn]).max() <= 2
        contours, _ = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
        assert all(drawn[max(0, y - 1) : y + 2, max(0, x - 1) : x + 2].any() for (x, y) in contours[0][:, 0])
    far = ndimage.distance_transform_edt(1 - (truth | prediction)) > 3
    assert (out[far] == GREY).all()


def test_regions_are_tinted_by_their_case() -> None:
    truth, prediction = box(120, 160, 20, 20, 100, 100), box(120, 160, 20, 60, 100, 140)
    out = overlays.overlay(slide(), truth, prediction).astype(int)
    for (y, x), colour in {(60, 40): overlays.MISSED, (60, 80): overlays.CORRECT, (60, 120): overlays.WRONG}.items():
        change, towards = out[y, x] - GREY, np.array(colour) - GREY
        assert 0 < np.abs(change).max() < 120
        assert np.dot(change, towards) > 0.95 * np.linalg.norm(change) * np.linalg.norm(towards)


def test_agreement_shows_both_outlines() -> None:
    mask = box(120, 160, 20, 20, 100, 100)
    out = overlays.overlay(slide(), mask, mask)
    assert has(out, overlays.TRUTH).sum() > 200 and has(out, overlays.PREDICTION).sum() > 200


def test_without_masks_the_picture_is_unchanged_and_with_one_only_its_outline_is_drawn() -> None:
    image, mask = slide(), box(120, 160, 20, 20, 100, 100)
    assert np.array_equal(overlays.overlay(image, None, None), image)
    out = overlays.overlay(image, None, mask)
    assert ((out == GREY).all(axis=2) | has(out, overlays.PREDICTION)).all()


def test_inputs_stay_as_they_are_and_outputs_are_not_views() -> None:
    image, truth, prediction = slide(), box(120, 160, 1, 1, 50, 50) * 5, box(120, 160, 2, 2, 60, 60).astype(bool)
    copies = [array.copy() for array in (image, truth, prediction)]
    for arguments in ((truth, prediction), (None, None)):
        overlays.overlay(image, *arguments)[:] = 0
    assert all(np.array_equal(*pair) for pair in zip(copies, (image, truth, prediction), strict=True))


def test_large_slides_shrink_by_one_factor_with_thicker_lines() -> None:
    image, mask = slide(4500, 3000), box(4500, 3000, 1000, 1000, 2000, 2000)
    out = overlays.overlay(image, mask, None)
    assert out.shape == (1600, 1067, 3)
    row = has(out, overlays.TRUTH)[533]
    left = round(1000 * 1067 / 3000)
    assert row[:left].sum() >= 3 and not row[left + 3 : 2 * left - 3].any()


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**32 - 1), st.sampled_from([7, 40, 1600]))
def test_any_size_and_any_mask(height: int, width: int, seed: int, max_side: int) -> None:
    random = np.random.default_rng(seed)
    image = random.integers(0, 256, (height, width, 3)).astype(np.uint8)
    truth, prediction = (random.random((2, height, width)) < random.random()).astype(np.uint8)
    out = overlays.overlay(image, truth, prediction, max_side)
    assert out.dtype == np.uint8 and out.shape[2] == 3 and max(out.shape[:2]) == min(max_side, max(height, width))
    if prediction.any() and not prediction.all() and max_side == 1600:
        assert has(out, overlays.PREDICTION).any()


def test_colours_differ_in_lightness_for_every_kind_of_colour_blindness() -> None:
    """Luma by ITU-R BT.601: what is left when no hue at all is seen."""
    truth, prediction = (np.dot(colour, (0.299, 0.587, 0.114)) for colour in (overlays.TRUTH, overlays.PREDICTION))
    assert abs(truth - prediction) > 80


@pytest.mark.parametrize("wrong", [np.zeros((10, 11), np.uint8), np.zeros((120, 160, 1), np.uint8)])
def test_masks_that_do_not_fit_are_refused(wrong: np.ndarray) -> None:
    with pytest.raises(ValueError, match="prediction mask has shape"):
        overlays.overlay(slide(), None, wrong)


@pytest.mark.parametrize(
    "image", [np.zeros((5, 6), np.uint8), np.zeros((5, 6, 3), np.float32), np.zeros((5, 6, 4), np.uint8)]
)
def test_images_of_another_layout_are_refused(image: np.ndarray) -> None:
    with pytest.raises(ValueError, match="expected \\(H, W, 3\\) uint8"):
        overlays.overlay(image, None, None)


def test_the_file_shows_slide_and_overlay_side_by_side(tmp_path: Path) -> None:
    path, image, truth = tmp_path / "new" / "overlay.png", slide(500, 600), box(500, 600, 100, 100, 300, 400)
    overlays.save_overlay(path, image, truth, truth, "10078 spleen\n" + "a very long title " * 40)
    with Image.open(path) as picture:
        assert picture.format == "PNG" and picture.mode == "RGB"
        sheet = np.array(picture)
    assert sheet.shape[1] > 2 * 600 and 500 < sheet.shape[0] < 640
    half = sheet.shape[1] // 2
    body = slice(60, 480)
    assert not has(sheet[body, :half], overlays.TRUTH).any() and has(sheet[body, half:], overlays.TRUTH).any()
    assert (sheet[body, :half] == GREY).all(axis=2).sum() > 0.9 * 420 * 580
    assert not (sheet[:12] < 128).any() and (sheet[:60] < 128).any()  # the title is there, inside the margin
    assert list(path.parent.iterdir()) == [path]


def test_tiny_slides_are_enlarged_in_files(tmp_path: Path) -> None:
    overlays.save_overlay(tmp_path / "tiny.png", slide(3, 5), np.eye(3, 5, dtype=np.uint8), None, "tiny")
    assert Image.open(tmp_path / "tiny.png").width >= 800


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "overlay.png"
    path.write_bytes(b"old")
    with pytest.raises(ValueError):
        overlays.save_overlay(path, slide(), np.zeros((3, 3), np.uint8), None, "x")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(("count", "columns", "across", "down"), [(1, 3, 1, 1), (4, 3, 3, 2), (6, 2, 2, 3)])
def test_a_contact_sheet_has_a_cell_for_each_item(
    tmp_path: Path, count: int, columns: int, across: int, down: int
) -> None:
    heights = [30 + 300 * index for index in range(count)]
    items = [(slide(height, 40), None, box(height, 40, 5, 5, 20, 20), f"slide of {height}") for height in heights]
    overlays.contact_sheet(tmp_path / "sheet.png", items, columns)
    sheet = np.array(Image.open(tmp_path / "sheet.png"))
    assert across * 480 < sheet.shape[1] < across * 520 and down * 480 < sheet.shape[0] < down * 530 + 60
    cells = sheet[: down * 520].shape[0] // down, sheet.shape[1] // across
    for index in range(count):
        y, x = index // across * cells[0], index % across * cells[1]
        assert (sheet[y : y + cells[0], x : x + cells[1]] == GREY).all(axis=2).any()


def test_an_empty_contact_sheet_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="0 items"):
        overlays.contact_sheet(tmp_path / "sheet.png", [])
    assert not list(tmp_path.iterdir())


def test_a_real_slide_with_its_truth(tmp_path: Path, shared_data: Path) -> None:
    path = sorted((shared_data / "hubmap-mini" / "train_images").glob("*.tiff"))[0]
    image = cv2.imread(str(path))[..., ::-1]
    mask = (image.mean(axis=2) < 150).astype(np.uint8)
    overlays.save_overlay(tmp_path / "real.png", image, mask, None, path.stem)
    with Image.open(tmp_path / "real.png") as picture:
        picture.load()
        assert min(picture.size) > 240


@pytest.mark.parametrize(("count", "most", "expected"), [(3, 5, [0, 1, 2]), (9, 3, [0, 4, 8]), (5, 1, [0]), (0, 4, [])])
def test_slides_are_spread_over_their_order(count: int, most: int, expected: list[int]) -> None:
    slides = [Shown(str(number), "", number) for number in range(count)]
    assert [int(shown.id) for shown in spread(slides, most)] == expected


def test_the_sheet_shows_the_least_sure_first_and_tints_the_inside(tmp_path: Path) -> None:
    read_ids: list[str] = []

    def read(slide_id: str) -> tuple[np.ndarray, np.ndarray]:
        read_ids.append(slide_id)
        mask = np.zeros((960, 960), np.uint8)
        mask[:, 480:] = 1
        return np.full((960, 960, 3), 200, np.uint8), mask

    path = tmp_path / "sheet.png"
    assert save_sheet(path, [Shown("sure", "one", 0.4), Shown("unsure", "two", 0.1)], read, 5) == 2 and read_ids == [
        "unsure",
        "sure",
    ]
    pixels = np.asarray(Image.open(path)).astype(int)
    middle = pixels[pixels.shape[0] // 2]
    outside, inside = middle[12 + 120], middle[12 + 360]
    assert outside.tolist() == [200, 200, 200] and inside[2] > inside[0] + 40, "blue on the right half only"
    assert save_sheet(path, [], read, 5) == 0 and not path.exists()
