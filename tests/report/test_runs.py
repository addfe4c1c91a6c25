"""The list of runs tells what the run folders hold, whatever state they are in, and keeps what people type in."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_runs import made_run
from rich.cells import cell_len

from hubmap_kit import experiment
from hubmap_kit.errors import HubmapError, TableError
from hubmap_kit.jobs.runs import list_runs, note_run
from hubmap_kit.models.build import build
from hubmap_kit.report import runs as runs_list
from hubmap_kit.report import submissions
from hubmap_kit.report.run_folder import labels
from hubmap_kit.report.runs import COLUMNS, SCORE, Column, cell_text
from hubmap_kit.report.submissions import keep_notes, read_notes

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    made_run(tmp_path / "runs" / "good")
    made_run(
        tmp_path / "runs" / "other",
        ["training.lr=3e-4", "training.loss=dice"],
        {"a": 0.6, "b": 0.7, "c": 0.2, "d": 0.8},
    )
    return tmp_path / "runs"


def row_of(folder: Path, name: str = "good", **options: Any) -> dict[str, Any]:
    (row,) = [row for row in runs_list.collect_runs([folder], **options).rows if row["run"] == name]
    return row


def test_a_real_run_is_told_as_it_is(tiny_run: Path) -> None:
    row, config = row_of(tiny_run, "run"), experiment.read(tiny_run / "config.yaml")
    oof = pd.read_csv(tiny_run / "oof.csv")
    timing = pd.concat(pd.read_csv(path) for path in tiny_run.glob("fold*/timing.csv"))
    network = build(config.model, pretrained=False)
    assert row["parameters"] * 1e6 == pytest.approx(sum(weight.numel() for weight in network.parameters()))
    assert row["cv"] == pytest.approx(oof["dice"].mean()) and row["spleen"] == pytest.approx(
        oof.loc[oof["organ"] == "spleen", "dice"].mean()
    )
    assert row["hours"] == pytest.approx(timing["seconds"].sum() / 3600)
    assert (row["state"], row["done"], row["model"], row["encoder"], row["size"]) == (
        "finished",
        "2/2",
        "unet",
        config.model.encoder,
        64,
    )
    assert row["conversion"] == "3.2 um/px" and row["machine"].startswith("cpu") and row["begun"].startswith("20")
    assert runs_list.collect_runs([tiny_run]).problems == []


def test_the_first_team_published_26(tmp_path: Path) -> None:
    rows = runs_list.collect_runs([tmp_path]).rows
    dice = [44.72, 39.98, 72.94, 72.79, 74.16, 80.97, 69.32, 70.38, 62.03, 77.45, 77.45, 78.95, 72.6]
    scores = [0.14, 0.27, 0.25, 0.18, 0.30, 0.44, 0.51, 0.52, 0.56, 0.58, 0.59, 0.60, 0.61, 0.62, 0.63, 0.64, 0.66]
    assert len(rows) == 26 and {row["whose"] for row in rows} == {"theirs"}
    assert sorted(round(100 * row["cv"], 2) for row in rows if row["cv"] is not None) == sorted(dice)
    assert sorted(row["lb"] for row in rows if row["lb"] is not None) == sorted(scores)
    assert runs_list.collect_runs([tmp_path], theirs=False).rows == []


def test_ours_and_theirs_sort_together(runs: Path) -> None:
    note_run(runs / "good", "public=0.655")
    names = [row["run"] for row in runs_list.collect_runs([runs], sort="lb").rows]
    assert names[:3] == ["fastai 13", "good", "fastai 12"] and names.index("other") > names.index("MMSeg 2")
    by_lr = [row["lr"] for row in runs_list.collect_runs([runs], sort="lr").rows]
    known = [lr for lr in by_lr if lr is not None]
    assert known == sorted(known) and by_lr[len(known) :] == [None] * (len(by_lr) - len(known))
    turned = [row["lr"] for row in runs_list.collect_runs([runs], sort="-lr").rows]
    assert turned[: len(known)] == known[::-1]
    with pytest.raises(TableError, match="did you mean 'lr'"):
        runs_list.collect_runs([runs], sort="lrr")


def cut(name: str) -> Callable[[Path], object]:
    return lambda run: (run / name).write_bytes((run / name).read_bytes()[:-9])


def overwrite(name: str, content: str) -> Callable[[Path], object]:
    return lambda run: (run / name).write_text(content)


SPOILED = {
    "config is no YAML": (overwrite("config.yaml", "a: [b"), "config.yaml"),
    "config is empty of sense": (overwrite("config.yaml", "training: {epoch: 3}"), "epoch"),
    "config is bytes": (lambda run: (run / "config.yaml").write_bytes(b"\xff\x00\xfe"), "config.yaml"),
    "config is gone": (lambda run: (run / "config.yaml").unlink(), "no config.yaml"),
    "oof cut off": (cut("oof.csv"), "oof.csv"),
    "oof without numbers": (overwrite("oof.csv", "id,organ,data_source,fold,dice\na,kidney,HPA,0,good\n"), "no number"),
    "oof empty": (overwrite("oof.csv", ""), "oof.csv"),
    "weights cut off": (cut("fold0/model.safetensors"), "model.safetensors"),
    "metrics bytes": (lambda run: (run / "fold1/metrics.csv").write_bytes(b"\xff\xfe\x00,\n"), "metrics.csv"),
    "metrics of something else": (overwrite("fold1/metrics.csv", "x,y\n1,2\n"), "metrics.csv"),
    "timing without numbers": (overwrite("fold0/timing.csv", "fold,epoch,seconds\n0,1,long\n"), "timing.csv"),
    "environment cut off": (cut("environment.json"), "environment.json"),
    "environment of numbers": (overwrite("environment.json", "[1, 2]"), "environment.json"),
    "thresholds of words": (overwrite("thresholds.json", '{"kidney": "low"}'), "thresholds.json"),
    "split cut off": (cut("folds.csv"), "folds.csv"),
    "typed scores damaged": (overwrite("tries.json", "{"), "tries.json"),
    "typed scores of words": (overwrite("tries.json", '{"public": "good"}'), "tries.json"),
    "submissions damaged": (overwrite("submissions.csv", "a,b\n1\n"), "submissions.csv"),
    "old ledger damaged": (overwrite("ledger.csv", "a,b\n1\n"), "ledger.csv"),
}


@pytest.mark.parametrize("spoil, said", SPOILED.values(), ids=SPOILED)
def test_a_damaged_run_costs_a_line(runs: Path, tmp_path: Path, spoil: Callable[[Path], object], said: str) -> None:
    whole = row_of(runs, "other")
    spoil(runs / "good")
    told = list_runs([runs], tmp_path / "t.csv", tmp_path / "t.html", curves="")
    assert row_of(runs, "other") == whole
    about = [problem for problem in told.problems if said in problem]
    assert len(about) == 1 and "good" in about[0] and "\n" not in about[0] and "Traceback" not in str(told)
    assert not [problem for problem in told.problems if "other" in problem]
    assert "other" in told.text and "Left out" in (tmp_path / "t.html").read_text()


def test_runs_that_are_not_done_say_how_far_they_came(runs: Path) -> None:
    good, other = runs / "good", runs / "other"
    lines = (good / "fold1/metrics.csv").read_text().splitlines()
    (good / "fold1/metrics.csv").write_text("\n".join(lines[:2]) + "\n")
    shutil.rmtree(other / "fold1")
    fresh = runs / "fresh"
    fresh.mkdir()
    shutil.copy(good / "config.yaml", fresh)
    found = {row["run"]: row for row in runs_list.collect_runs([runs], theirs=False).rows}
    assert found["good"]["state"] == "fold 1 after epoch 1 of 3" and found["good"]["done"] == "1/2…"
    assert found["other"]["state"] == "1 of 2 folds finished" and found["other"]["done"] == "1/2"
    assert found["fresh"]["state"] == "not begun" and "cv" not in found["fresh"]
    assert runs_list.collect_runs([runs]).problems == []


def test_runs_are_found_however_deep_and_once(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "good", runs / "deep" / "er" / "good")
    shutil.copytree(runs / "good", runs / "good" / "inside")
    shutil.copytree(runs / "good", runs / ".hidden" / "good")
    os.symlink(runs, runs / "deep" / "loop")
    found = runs_list.collect_runs([runs, runs / "good", tmp_path / "runs"], theirs=False)
    assert sorted(row["run"] for row in found.rows) == ["er/good", "other", "runs/good"]
    with pytest.raises(TableError, match="nowhere"):
        runs_list.collect_runs([tmp_path / "nowhere"])


@given(
    st.lists(st.lists(st.sampled_from("abc"), min_size=1, max_size=4).map(tuple), unique=True, min_size=1, max_size=6)
)
def test_names_are_unlike_and_ends_of_their_paths(parts: list[tuple[str, ...]]) -> None:
    paths = [Path("/nowhere").joinpath(*part) for part in parts]
    names = labels(paths)
    assert len(set(names)) == len(names)
    assert all(str(path).endswith("/" + name) for path, name in zip(paths, names, strict=True))


@settings(max_examples=30, deadline=None)
@given(st.integers(20, 260))
def test_the_terminal_is_not_overrun(width: int) -> None:
    rows = [
        *runs_list.first_team(),
        {
            "run": "a run with a long name that goes on",
            "whose": "ours",
            "cv": 0.5,
            "kidney": 0.25,
            "note": "漢字 " * 30,
        },
    ]
    lines = runs_list.render_runs(rows, width).splitlines()
    assert max(map(cell_len, lines)) <= max(width, 22) and len(lines) == len(rows) + 2


def test_all_columns_show_everything(runs: Path) -> None:
    note_run(runs / "good", note="a note of many words " * 5)
    found = list_runs([runs], everything=True).text
    assert (
        ("a note of many words " * 5).strip() in found
        and "kidney 0.4, spleen 0.5, lung 0.3" in found
        and "…" not in found
    )


def test_the_csv_holds_what_the_list_holds(runs: Path, tmp_path: Path) -> None:
    note_run(runs / "good", note='with "quotes", and commas')
    list_runs([runs], csv=tmp_path / "t.csv")
    with open(tmp_path / "t.csv", newline="", encoding="utf-8") as handle:
        cells = list(csv.DictReader(handle))
    rows = runs_list.collect_runs([runs]).rows
    assert len(cells) == len(rows) == 28
    for cell, row in zip(cells, rows, strict=True):
        for column in COLUMNS:
            value = row.get(column.key)
            assert (
                (float(cell[column.key]) == value)
                if isinstance(value, int | float)
                else (cell[column.key] == (value or ""))
            )


@given(st.floats(0, 1).map(lambda value: round(value, 5)))
def test_scores_are_shown_with_no_digit_lost(value: float) -> None:
    shown = cell_text(Column("lb", "", "", SCORE), value)
    assert float(shown) == value and re.fullmatch(r"[01]\.\d{2,5}", shown)


# What people type in, and what was handed in.

UNIT = st.floats(0, 1)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(["public", "private"]), st.none() | UNIT), max_size=6),
    st.none() | st.text(max_size=30),
)
def test_typed_scores_come_back(
    tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[str, float | None]], note: str | None
) -> None:
    run = tmp_path_factory.mktemp("run")
    (run / "config.yaml").write_text("")
    expected: dict[str, Any] = {}
    for name, value in changes:
        keep_notes(run, f"{name}={'' if value is None else repr(value)}")
        expected[name] = value
    note = None if note is None else note.encode("utf-8", "ignore").decode()
    keep_notes(run, note=note)
    expected["note"] = None if note is None else " ".join(note.split()) or None
    assert read_notes(run) == {key: value for key, value in expected.items() if value is not None}


@pytest.mark.parametrize(
    "words",
    ["public", "publik=0.5", "public=1.5", "public=nan", "public=-0.1", "public=0.1,public=0.2", "0.5", "public=a"],
)
def test_words_that_are_no_scores(words: str, runs: Path) -> None:
    with pytest.raises(TableError, match="--score"):
        note_run(runs / "good", words)
    assert not (runs / "good" / "tries.json").exists()


def test_a_damaged_note_is_left_as_it_is(runs: Path) -> None:
    (runs / "good" / "tries.json").write_text("{half")
    with pytest.raises(TableError, match="tries.json"):
        note_run(runs / "good", "public=0.5")
    assert (runs / "good" / "tries.json").read_text() == "{half"
    with pytest.raises(TableError, match="no run folder"):
        note_run(runs, "public=0.5")


def submitted(table: Path, run: str, public: float | None, ref: int, status: str = "COMPLETE") -> None:
    private = None if public is None else public - 0.1
    submissions.add_submission(
        table, {"run": run, "ref": ref, "status": status, "public_score": public, "private_score": private}
    )


def test_submissions_find_their_run(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(runs.parent)
    submitted(runs / "submissions.csv", "runs/good", 0.4, 1)
    submitted(runs / "submissions.csv", str(runs / "good"), 0.6, 2)
    submitted(runs / "submissions.csv", "/gone/on/another/machine/good", 0.5, 3)
    submitted(runs / "submissions.csv", "runs/good", None, 4, submissions.PENDING)
    submitted(runs / "submissions.csv", "runs/good", None, 5, submissions.REFUSED)
    submitted(runs / "other" / "ledger.csv", "", 0.3, 6)
    submitted(runs / "submissions.csv", "", 0.35, 7)
    found = runs_list.collect_runs([runs], theirs=False)
    rows = {row["run"]: row for row in found.rows}
    good, other = rows["good"], rows["other"]
    assert (good["public"], good["private"], good["submissions"], good["submitted"]) == (
        0.6,
        0.5,
        4,
        "3 scored, 1 pending",
    )
    assert (other["public"], other["submissions"]) == (0.3, 1)
    assert len(found.problems) == 1 and "has 1 row without" in found.problems[0]
    note_run(runs / "other", ref="7")
    found = runs_list.collect_runs([runs / "other"], theirs=False)
    assert (found.rows[0]["public"], found.rows[0]["submissions"], found.problems) == (0.35, 2, [])
    note_run(runs / "other", "public=0.61,private=0.58", "typed in")
    assert [row_of(runs, "other")[key] for key in ("public", "private", "lb", "note")] == [0.61, 0.58, 0.61, "typed in"]
    assert json.loads((runs / "other" / "tries.json").read_text())["ref"] == "7"


# The page.


class Page(HTMLParser):
    """The tables of a page as rows of text; every tag is closed."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "img", "source", "link", "br"):
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if {"td", "th"} & set(self.open):
            self.tables[-1][-1][-1] += data.strip()


def check_alone(page: str) -> Page:
    """Nothing on the page reaches for anything outside it."""
    found = Page(page)
    assert not {"link", "iframe", "object", "embed", "base", "form"} & {tag for tag, _ in found.tags}
    for tag, attributes in found.tags:
        assert not [name for name in attributes if name.startswith("on")] and (tag != "script" or not attributes)
        for name in {"src", "srcset", "href"} & set(attributes):
            assert str(attributes[name]).startswith("#" if tag == "a" else "data:image/svg+xml;base64,")
    assert not re.search(r"https?:|@import|url\(|fetch|XMLHttp|import\(", re.sub(r"base64,[A-Za-z0-9+/=]+", "", page))
    return found


def test_the_page_stands_alone_and_shows_every_row(runs: Path, tmp_path: Path) -> None:
    note_run(runs / "good", "public=0.655", "<script>alert(1)</script> & more")
    told = list_runs([runs], html=tmp_path / "t.html")
    page = (tmp_path / "t.html").read_text(encoding="utf-8")
    found = check_alone(page)
    results, made, record = found.tables
    assert len(results) == len(made) == 29 and len(record) == 3 and told.problems == []
    assert dict(zip(results[0], results[1], strict=True))["LB"] == "0.655"
    assert dict(zip(made[0], made[1], strict=True))["note"] == "<script>alert(1)</script> & more"
    assert page.count("<script>") == 1 and "prefers-color-scheme: dark" in page
    alts = [attributes["alt"] for tag, attributes in found.tags if tag == "img"]
    assert any("good" in alt and "other" in alt for alt in alts)
    assert "different losses" in page  # bce+dice beside dice


def test_the_curves_of_chosen_runs(runs: Path, tmp_path: Path) -> None:
    list_runs([runs], html=tmp_path / "t.html", curves="other")
    (alt,) = [attributes["alt"] for tag, attributes in Page((tmp_path / "t.html").read_text()).tags if tag == "img"]
    assert "other" in alt and "good" not in alt
    with pytest.raises(TableError, match="did you mean 'other'"):
        list_runs([runs], html=tmp_path / "t.html", curves="othr")
    with pytest.raises(TableError, match="is a folder"):
        list_runs([runs], html=tmp_path)


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium to click with")
def test_a_click_sorts(runs: Path, tmp_path: Path) -> None:
    """In a real browser: the largest score first, then the smallest; rows without one last both times."""
    note_run(runs / "good", "public=0.655")
    list_runs([runs], html=tmp_path / "t.html")
    page = (tmp_path / "t.html").read_text(encoding="utf-8")
    orders = {}
    for clicks in (1, 2):
        click = (
            f"for (let i = 0; i < {clicks}; i++) [...document.querySelectorAll('th')].find((h) => h.textContent ==="
            " 'LB').firstChild.click();"
        )
        (tmp_path / "click.html").write_text(
            page.replace("</body>", f"<script>{click}</script></body>"), encoding="utf-8"
        )
        command = [
            CHROMIUM,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            f"--user-data-dir={tmp_path}/chrome",
            "--dump-dom",
            (tmp_path / "click.html").as_uri(),
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
        results = Page(done.stdout).tables[0]
        orders[clicks] = [row[results[0].index("LB")] for row in results[1:]]
    scores = [float(score) for score in orders[1] if score]
    assert len(scores) == 18 and scores == sorted(scores, reverse=True) and not any(orders[1][18:])
    assert [float(score) for score in orders[2][:18]] == scores[::-1] and not any(orders[2][18:])


def test_without_a_folder_of_runs_theirs_are_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    told = list_runs()
    assert "fastai 13" in told.text and "no folder runs/ here" in str(told)
    made_run(tmp_path / "runs" / "mine")
    told = list_runs(theirs=False)
    assert "mine" in told.text and "fastai" not in told.text and told.problems == []
    with pytest.raises(HubmapError, match="absent"):
        list_runs([Path("absent")])
