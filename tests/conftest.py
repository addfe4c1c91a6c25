"""What every test shares: the real tissue beside the project, and the switches that keep tests off the network."""

from __future__ import annotations

import csv
import logging
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny import TINY, overrides

SHARED_DATA = Path(os.environ.get("HUBMAP_SHARED_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))

# A file is one worker's, so a long one that comes last keeps all others waiting. These take longest.
FIRST = (
    "test_rehearsal.py",
    "test_journey.py",
    "test_side_by_side.py",
    "test_resume.py",
    "test_bench.py",
    "test_learner.py",
    "test_sandbox.py",
    "test_sandbox_processes.py",
    "test_tune.py",
    "test_blend.py",
    "test_shift.py",
    "test_notebook.py",
    "test_demo.py",
)


def pytest_configure() -> None:
    # A shell that starts the tests in the background makes them, and every process that they start, deaf to Ctrl-C.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first; the rest keeps its order."""
    items.sort(key=lambda item: FIRST.index(item.path.name) if item.path.name in FIRST else len(FIRST))


@pytest.fixture(autouse=True)
def _default_csv_limit() -> Iterator[None]:
    """Tests that read masks with the csv module raise its field limit, which is global; each test starts with the
    default.
    """
    csv.field_size_limit(131_072)
    yield
    csv.field_size_limit(131_072)


@pytest.fixture(autouse=True)
def _default_log_level() -> Iterator[None]:
    """The command line sets the level of the kit's logger for its process, which here runs other tests too."""
    logging.getLogger("hubmap_kit").setLevel(logging.NOTSET)
    yield


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with real tissue (hubmap-mini, hubmap-2022, glas, stain-references, weights)."""
    if not SHARED_DATA.is_dir():
        pytest.skip(
            f"real tissue is not at {SHARED_DATA}; set HUBMAP_SHARED_DATA to the folder that holds hubmap-mini/ and"
            " glas/"
        )
    return SHARED_DATA


@pytest.fixture(scope="session")
def sample_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small synthetic slides in the competition's folder format; tests copy what they change."""
    from hubmap_kit.sample.generate import generate

    folder = tmp_path_factory.mktemp("sample") / "data"
    generate(folder, seed=3, slides_per_organ=2, size=256)
    return folder


@pytest.fixture(scope="session")
def tiny_run(sample_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two trained folds, made with the real command line; tests copy what they change."""
    from hubmap_kit.__main__ import main

    out = tmp_path_factory.mktemp("tiny") / "run"
    with pytest.raises(SystemExit) as stop:
        main(
            [
                "train",
                "--config",
                "baseline",
                "--data",
                str(sample_data),
                "--out",
                str(out),
                "--device",
                "cpu",
                *overrides(*TINY),
            ]
        )
    assert stop.value.code == 0
    return out


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """A table of the failures that tests provoked and recorded: the test, the exit code, the sentence that users
    see.
    """
    rows = []
    for report in terminalreporter.stats.get("passed", []):
        facts = dict(report.user_properties)
        if "sentence" in facts:
            rows.append(
                (_row_name(report.nodeid), str(facts.get("exit code", "")), facts["sentence"].removeprefix("error: "))
            )
    if rows:
        terminalreporter.section("provoked failures: test, exit code, sentence")
        widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
        for name, code, sentence in sorted(rows):
            terminalreporter.write_line(f"{name:<{widths[0]}}  {code:<{widths[1]}}  {sentence}")


def _row_name(nodeid: str) -> str:
    """`push_failures[server_500]` for `tests/publish/test_push_failures.py::test_a_failure_at_kaggle[server_500]`."""
    path, _, test = nodeid.partition("::")
    name, bracket, values = test.partition("[")
    return Path(path).stem.removeprefix("test_") + (bracket + values if bracket else f"[{name.removeprefix('test_')}]")
