"""The contact sheet of labels: which slides are on it, in which order, and that the inside is tinted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hubmap_kit.report.overlays import Shown, save_sheet, spread


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
