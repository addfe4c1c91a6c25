"""A comparison pairs the same slides, gives intervals that hold, names the keys that differ, and survives damaged
runs.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_runs import DICE, made_run
from scipy import stats

from hubmap_kit.errors import CheckpointError, TableError
from hubmap_kit.jobs.runs import compare
from hubmap_kit.report.compare import UNSET, by_organ, dice_by_organ, difference, differing, pairs, same_split

BETTER = {"a": 0.45, "b": 0.95, "c": 0.5, "d": 0.9}


class Page(HTMLParser):
    """Tables as rows of text, headings with the text under them, texts of pictures."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self.parts: dict[str, str] = {}
        self.alts: list[str] = []
        self.tag = self.heading = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tag = tag
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        elif tag == "h2":
            self.heading = ""
        elif tag == "img":
            self.alts.append(str(dict(attributes)["alt"]))

    def handle_data(self, data: str) -> None:
        if self.tag == "h2" and not self.heading:
            self.heading = data
        if self.tag in ("td", "th") and data.strip():
            self.tables[-1][-1][-1] = data
        self.parts[self.heading] = self.parts.get(self.heading, "") + data

    def handle_endtag(self, tag: str) -> None:
        self.tag = ""

    def table(self, first: str) -> dict[str, list[str]]:
        """First cell -> the others, of the table whose first column has that name."""
        (found,) = [rows for rows in self.tables if rows[0][0] == first]
        return {row[0]: row[1:] for row in found[1:]}


@pytest.fixture
def two(tmp_path: Path) -> list[Path]:
    return [
        made_run(tmp_path / "old"),
        made_run(tmp_path / "new", ["training.lr=3e-4", "model.options={decoder_channels: [8, 4]}"], BETTER, epochs=5),
    ]


def oof(dice: dict[str, float], organ: str = "kidney") -> pd.DataFrame:
    return pd.DataFrame(
        [{"id": name, "organ": organ, "data_source": "HPA", "fold": 0, "dice": value} for name, value in dice.items()]
    )


def test_the_page_of_two_runs(two: list[Path], tmp_path: Path) -> None:
    told = compare(two, tmp_path / "c.html")
    assert told.problems == [] and told.written == [tmp_path / "c.html"]
    page = Page(tmp_path / "c.html")
    keys = page.table("key")
    assert keys.pop("training.lr") == ["0.001", "0.0003"] and keys.pop("training.epochs") == ["3", "5"]
    assert keys == {"model.options.decoder_channels": [UNSET, "8, 4"]}
    dice = page.table("organ")
    assert list(dice) == ["kidney", "spleen", "lung", "all"]
    assert dice["kidney"][:2] == ["0.6250 (2)", "0.7000 (2)"] and dice["kidney"][2].startswith("+0.0750 [")
    assert dice["spleen"][2] == "+0.0000" and dice["all"][2].startswith("+0.1000 [")
    assert list(page.table("slide")) == ["a", "d", "b", "c"]
    times = next(rows for rows in page.tables if rows[0][1] == "machine")
    assert times[1][2:4] == ["6", "120"] and times[2][2:4] == ["10", "180"] and times[2][-1] == "0.50"
    assert (
        "1 better" not in page.parts["Slides: new against old"]
        and "2 better, 1 worse, 1 equal" in page.parts["Slides: new against old"]
    )
    assert all("old" in alt for alt in page.alts) and len(page.alts) == 2
    assert "kidney" in told.text and "+0.1000" in told.text


def test_three_runs_are_measured_against_the_first(two: list[Path], tmp_path: Path) -> None:
    third = made_run(tmp_path / "third", dice={"a": 0.1, "x": 0.9})
    page_of = compare([*two, third, two[0]], tmp_path / "c.html")
    page = Page(tmp_path / "c.html")
    (header,) = [rows[0] for rows in page.tables if rows[0][0] == "organ"]
    assert header == ["organ", "old", "new", "third", "new - old", "third - old"]
    assert page.table("organ")["kidney"][4] == "-0.4000"
    assert "1 slide in common (3 only in old, 1 only in third)" in page.parts["Slides: third against old"]
    assert page_of.problems == []


def test_the_page_reaches_for_nothing(two: list[Path], tmp_path: Path) -> None:
    compare(two, tmp_path / "c.html")
    text = re.sub(r"data:image/svg\+xml;base64,[A-Za-z0-9+/=]+", "", (tmp_path / "c.html").read_text(encoding="utf-8"))
    assert not re.search(r"https?:|@import|url\(|<link|<iframe|src=\"[^\"]", text)


def no_config(run: Path) -> None:
    (run / "config.yaml").unlink()


def bad_config(run: Path) -> None:
    (run / "config.yaml").write_text("training: 3")


def no_oof(run: Path) -> None:
    (run / "oof.csv").unlink()


def twice_in_oof(run: Path) -> None:
    lines = (run / "oof.csv").read_text().splitlines()
    (run / "oof.csv").write_text("\n".join([*lines, lines[-1]]) + "\n")


def bad_metrics(run: Path) -> None:
    (run / "fold0" / "metrics.csv").write_bytes(b"\x00\xff")


def bad_timing(run: Path) -> None:
    (run / "fold0" / "timing.csv").write_text("fold,epoch\n0,1\n")


def only_begun(run: Path) -> None:
    for name in ("oof.csv", "fold0", "fold1", "thresholds.json", "folds.csv"):
        path = run / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize(
    "spoil",
    [no_config, bad_config, no_oof, twice_in_oof, bad_metrics, bad_timing, only_begun],
    ids=lambda spoil: spoil.__name__,
)
def test_a_damaged_run_costs_its_part(
    two: list[Path], tmp_path: Path, spoil: Callable[[Path], None], place: int
) -> None:
    spoil(two[place])
    told = compare(two, tmp_path / "c.html")
    assert told.problems and all(two[place].name in problem and "\n" not in problem for problem in told.problems)
    page = Page(tmp_path / "c.html")
    assert all(problem in page.parts["Left out"] for problem in told.problems)
    assert page.table("organ")["kidney"][0] in ("0.6250 (2)", "0.7000 (2)")


def test_nothing_to_compare(two: list[Path], tmp_path: Path) -> None:
    for run in two:
        no_config(run)
    with pytest.raises(CheckpointError, match="none of these runs"):
        compare(two, tmp_path / "c.html")
    with pytest.raises(TableError, match="is a folder"):
        compare(two, tmp_path)
    assert not (tmp_path / "c.html").exists()


DICES = st.dictionaries(st.sampled_from("abcdefgh"), st.floats(0, 1), min_size=1)


@settings(deadline=None, max_examples=50)
@given(DICES, DICES)
def test_pairs_are_the_common_slides_the_worst_first(first: dict[str, float], other: dict[str, float]) -> None:
    found = pairs(oof(first), oof(other))
    expected = sorted((other[name] - first[name], name) for name in first.keys() & other.keys())
    assert list(zip(found["difference"], found["id"], strict=True)) == expected


def test_slides_of_another_data_folder_are_no_pairs() -> None:
    assert pairs(oof(DICE), oof(DICE, "lung")).empty
    assert by_organ(pairs(oof(DICE), oof(DICE, "lung"))) == {}


def test_the_interval_agrees_with_the_t_interval_of_normal_values() -> None:
    values = np.random.default_rng(5).normal(0.02, 0.1, 350)
    found = difference(values)
    low, high = stats.t.interval(0.95, len(values) - 1, values.mean(), stats.sem(values))
    assert found.mean == pytest.approx(values.mean()) and found.slides == 350
    assert (found.low, found.high) == (pytest.approx(low, abs=0.001), pytest.approx(high, abs=0.001))


def test_the_interval_holds_as_often_as_it_says() -> None:
    draws = np.random.default_rng(0).normal(0.1, 1, (120, 60))
    held = sum(found.low <= 0.1 <= found.high for found in map(difference, draws))
    assert 106 <= held < 120  # 95 % of 120 is 114; fewer than 106, or all, come once in some hundred seeds


@settings(deadline=None, max_examples=15)
@given(st.lists(st.floats(-1, 1), min_size=2, max_size=30), st.floats(-1, 1))
def test_the_interval_holds_the_mean_and_moves_with_the_values(values: list[float], shift: float) -> None:
    found, moved = difference(values), difference([value + shift for value in values])
    assert found.low - 1e-9 <= found.mean <= found.high + 1e-9
    assert [moved.low, moved.mean, moved.high] == pytest.approx(
        [found.low + shift, found.mean + shift, found.high + shift], abs=1e-9
    )


def test_one_slide_has_no_interval() -> None:
    assert str(difference([0.25])) == "+0.2500"


@given(DICES)
def test_dice_by_organ_is_that_of_pandas(dice: dict[str, float]) -> None:
    table = oof(dice)
    assert dice_by_organ(table) == {
        "kidney": (pytest.approx(table["dice"].mean()), len(dice)),
        "all": (pytest.approx(table["dice"].mean()), len(dice)),
    }


TREES = st.recursive(
    st.integers(0, 2) | st.booleans() | st.text("xy", max_size=2),
    lambda inner: st.dictionaries(st.sampled_from("pqr"), inner),
    max_leaves=6,
)
SECTIONS = st.dictionaries(st.sampled_from("pqr"), TREES)


@given(SECTIONS)
def test_equal_settings_have_no_difference(values: dict[str, object]) -> None:
    assert differing([values, values, values]) == {}


def test_differing_keys() -> None:
    first = {"a": {"x": 1, "y": [1, 2], "same": 0.5}, "name": "one"}
    other = {"a": {"x": 1.5, "y": [1, 2], "same": 0.5, "new": True}, "name": ""}
    assert differing([first, other]) == {"a.x": ["1", "1.5"], "a.new": [UNSET, "true"], "name": ["one", "(empty)"]}


def test_splits_are_the_same_whatever_their_numbers() -> None:
    first = oof({"a": 0.5, "b": 0.5, "c": 0.5}).assign(fold=["0", "1", "1"])
    assert same_split(first, first.assign(fold=["3", "0", "0"]))
    assert not same_split(first, first.assign(fold=["0", "0", "1"]))
