"""The page of a search: every trial is on it, and optuna's drawings go with light and dark pages."""

from __future__ import annotations

import base64
import re
from pathlib import Path

import matplotlib
import pytest

from hubmap_kit.report.drawings import DARK_INK, INK
from hubmap_kit.report.search_page import save_search_page
from hubmap_kit.training.search import Outcome, parse

SPACE = [
    parse("training.lr", "log:1e-4:1e-2", "test"),
    parse("training.loss", "bce,dice", "test"),
    parse("training.epochs", "int:1:9:2", "test"),
    parse("augment.strength", "float:0:1", "test"),
]


def outcome(number: int, state: str = "complete", reason: str = "") -> Outcome:
    words = {
        "training.lr": repr(10 ** (-4 + number / 4)),
        "training.loss": ("bce", "dice")[number % 2],
        "training.epochs": str(1 + 2 * (number % 5)),
        "augment.strength": repr(number / 10),
    }
    value = None if state == "failed" else 0.3 + number / 20
    return Outcome(number, state, words, value, 2.0, reason, {1: 0.2, 2: 0.3 + number / 20})


def svgs(page: str) -> list[str]:
    """The drawings as text, light and dark."""
    return [base64.b64decode(data).decode() for data in re.findall(r"svg\+xml;base64,([A-Za-z0-9+/=]+)", page)]


@pytest.mark.parametrize("done", [1, 6])
def test_the_page_shows_every_trial(tmp_path: Path, done: int) -> None:
    outcomes = [outcome(number) for number in range(1, done + 1)]
    outcomes += [outcome(7, "pruned", "below the median"), outcome(8, "failed", "<out of memory>")]
    before = dict(matplotlib.rcParams)
    importance = {"training.lr": 0.7, "training.loss": 0.3} if done > 1 else {}
    save_search_page(tmp_path / "index.html", "a name", outcomes, SPACE, importance, [0])
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert page.count("<td>complete</td>") == done and "below the median" in page and "&lt;out of memory&gt;" in page
    assert f"The best is trial {done} with a mean Dice of {0.3 + done / 20:.4f}" in page
    assert ("Settings together" in page) == ("share of the variance" in "".join(svgs(page))) == (done > 1)
    drawn = svgs(page)
    assert len(drawn) == 2 * (6 if done > 1 else 4), "history, curves, two rows of settings, together, importance"
    light, dark = drawn[1::2], drawn[::2]
    assert all(INK in text for text in light) and all(INK not in text and DARK_INK in text for text in dark)
    assert dict(matplotlib.rcParams) == before, "optuna's style must not leak into later figures"


def test_a_search_without_a_complete_trial(tmp_path: Path) -> None:
    save_search_page(tmp_path / "index.html", "a name", [outcome(1, "failed", "no memory")], SPACE, {}, [0, 1])
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert "no memory" in page and "Each setting" not in page and "0 are complete" in page
