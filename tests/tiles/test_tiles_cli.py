"""`hubmap tiles` as a person types it: killed and rerun, locked, counted, and wrong."""

from __future__ import annotations

import hashlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from hubmap_kit.__main__ import main
from hubmap_kit.tiles.convert_config import ConvertConfig, load
from hubmap_kit.tiles.finishing import growing

VERB = [sys.executable, "-m", "hubmap_kit", "tiles"]


def hashes(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def run(*words: object) -> int:
    with pytest.raises(SystemExit) as stop:
        main(["tiles", *map(str, words)])
    return int(stop.value.code or 0)


def killed(call: list[str], out: Path, slides: int) -> bool:
    """Run a conversion with two processes, SIGKILL it once so many slides are done; whether that was before its end."""
    process = subprocess.Popen(
        [*call, "--out", str(out), "--jobs", "2"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while process.poll() is None and len(list(out.parent.rglob(".*.journal/[0-9]*.json"))) < slides:
        time.sleep(0.005)
    process.kill()
    return process.wait() == -signal.SIGKILL and not list(out.rglob("manifest.json"))


@pytest.mark.parametrize(
    ("name", "slides", "values"),
    [("hubmap-mini", 5, ["format=png", "size=256"]), ("glas", 30, ["kind=pad", "size=256"])],
    ids=["png", "store"],
)
def test_killed_and_run_again_gives_the_same_bytes(
    shared_data: Path, tmp_path: Path, name: str, slides: int, values: list[str]
) -> None:
    words = [str(shared_data / name), *(word for value in values for word in ("--set", f"convert.{value}"))]
    # A machine that is busy may finish before the signal comes; what then counts is the next attempt.
    out = next(
        place for number in range(5) if killed([*VERB, *words], (place := tmp_path / str(number) / "out"), slides)
    )
    assert run(*words, "--out", out) == 0
    assert run(*words, "--out", tmp_path / "straight") == 0
    assert hashes(out) == hashes(tmp_path / "straight")
    assert [path.name for path in out.parent.iterdir()] == ["out"] and not list(out.glob(".*"))


def test_counts_need_no_slides(shared_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(shared_data / "hubmap-2022", "--count") == 0
    lines = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines() if line}
    assert lines["3000-768-r2"][-4:] == ["1404", "351", "1404", "0.00%"] and lines["2048-512-r2"][-2:] == [
        "1404",
        "0.00%",
    ]
    assert run(shared_data / "hubmap-2022" / "train.csv.gz", "--count", "--set", "convert.kind=resize") == 0
    assert capsys.readouterr().out.rstrip().endswith(": 351")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--out", "OUT", "--config", "3000-500-r1"], "no conversion '3000-500-r1'"),
        (["--out", "OUT", "--set", "convert.kind=crob"], "did you mean 'crop'"),
        (["--out", "OUT", "--set", "convert.size=0"], "convert.size is 0"),
        (["--out", "OUT", "--set", "convert.edge=drop", "--set", "convert.size=2048"], "no tile is left of 26 slides"),
        ([], "--out is missing"),
    ],
)
def test_mistakes(
    shared_data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    record_property: Callable,
    words: list[str],
    said: str,
) -> None:
    assert run(shared_data / "hubmap-mini", *(str(tmp_path / "out") if word == "OUT" else word for word in words)) == 1
    errors = capsys.readouterr().err
    sentence = next(line for line in errors.splitlines() if line.startswith("error: "))
    assert said in sentence and "Traceback" not in errors
    record_property("sentence", sentence)
    assert list(tmp_path.rglob("*.*")) == []


def test_two_conversions_into_one_place_do_not_meet(
    shared_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from hubmap_kit.competition.tables import read_train
    from hubmap_kit.tiles.conversion import conversion_mark

    config: ConvertConfig = load("resize-512", ["convert.format=png"])
    mark = conversion_mark(read_train(shared_data / "hubmap-mini/train.csv"), config)
    with growing(tmp_path / "out", mark):
        assert (
            run(
                shared_data / "hubmap-mini",
                "--config",
                "resize-512",
                "--set",
                "convert.format=png",
                "--out",
                tmp_path / "out",
            )
            == 1
        )
    assert "written by another process" in capsys.readouterr().err
