"""Odd lung slides dropped and weighed down, and that the lists name real lungs."""

from __future__ import annotations

from pathlib import Path

import pytest

from hubmap_kit.competition.external import LISTS, THIRD_PLACE, TYPE_TWO, dropped, odd, weighted
from hubmap_kit.competition.tables import read_train
from hubmap_kit.errors import TableError

ROWS = [
    {"id": "127", "organ": "lung"},
    {"id": "1", "organ": "lung"},
    {"id": "x1", "organ": "lung", "parent": "25516", "weight": "0.5"},
    {"id": "7359", "organ": "spleen"},
    {"id": "x2", "organ": "lung", "parent": "1", "weight": "0.8"},
]


def test_lists_name_lungs_of_the_competition(shared_data: Path) -> None:
    lungs = {
        slide.id
        for slide in read_train(shared_data / "hubmap-2022/train.csv.gz", check_files=False)
        if slide.organ == "lung"
    }
    assert len(THIRD_PLACE) == 15 and len(TYPE_TWO) == 13 and all(ids <= lungs for ids in LISTS.values())


def test_odd_lungs_and_their_descendants() -> None:
    assert odd(ROWS) == ["127", "x1"] and odd(ROWS, TYPE_TWO) == ["127"]
    assert [row["id"] for row in dropped(ROWS)] == ["1", "7359", "x2"]
    assert [row["weight"] for row in weighted(ROWS, 0.25)] == ["0.25", "1", "0.125", "1", "0.8"]
    assert "weight" not in ROWS[0], "the rows given stay as they are"


@pytest.mark.parametrize(("weight", "cell"), [(1.5, ""), (float("nan"), ""), (0.5, "much"), (0.5, "-1")])
def test_weights_are_shares(weight: float, cell: str) -> None:
    with pytest.raises(TableError, match="a number from 0 to 1 was expected"):
        weighted([{"id": "127", "organ": "lung", "weight": cell}], weight)
