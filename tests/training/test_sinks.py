"""Metrics are read back with the readers of those who made the formats."""

from __future__ import annotations

import json
import logging
import math
import os
import struct
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from tiny import TINY

from hubmap_kit import experiment
from hubmap_kit.errors import ConfigError
from hubmap_kit.training import sinks as sinks_module
from hubmap_kit.training.sinks import check_sinks, open_sinks

SETTINGS = experiment.load("baseline", [*TINY])


def row(epoch: int, **more: Any) -> dict[str, Any]:
    return {"fold": 1, "epoch": epoch, "lr": 0.1 / epoch, "train_loss": 2.0 / epoch, "dice@0.5": 0.1 * epoch, **more}


def session(names: Sequence[str], run: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    opened = open_sinks(names, run, 1, SETTINGS)
    for values in rows:
        for sink in opened:
            sink.write(values, values["epoch"])
    for sink in opened:
        sink.close()


def tensorboard_of(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    reader.Reload()
    return {tag: [(event.step, event.value) for event in reader.Scalars(tag)] for tag in reader.Tags()["scalars"]}


def test_tensorboard_reads_what_was_written(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    rows = [row(1), row(2, dice=0.5, note="text", gap=math.nan, dice_lung=1), row(3, flag=True)]
    session(["tensorboard"], tmp_path, rows)
    found = tensorboard_of(tmp_path / "tensorboard" / "fold1")
    assert set(found) == {"lr", "train_loss", "dice_at_0.5", "dice", "dice_lung"}
    assert found["train_loss"] == [(1, 2.0), (2, 1.0), (3, pytest.approx(2 / 3))]
    assert found["dice"] == [(2, 0.5)] and found["dice_lung"] == [(2, 1.0)]


def test_tensorboard_shows_a_repeated_epoch_once(tmp_path: Path) -> None:
    """A training that goes on from its best weights repeats later epochs."""
    pytest.importorskip("tensorboard")
    session(["tensorboard"], tmp_path, [row(1), row(2), row(3, dice=0.1)])
    session(["tensorboard"], tmp_path, [row(3, dice=0.9), row(4, dice=0.8)])
    found = tensorboard_of(tmp_path / "tensorboard" / "fold1")
    assert [step for step, _ in found["train_loss"]] == [1, 2, 3, 4]
    assert found["dice"] == [(3, pytest.approx(0.9)), (4, pytest.approx(0.8))]


def log_records(path: Path) -> Iterator[bytes]:
    """The records of a log in LevelDB's format, of which the first block begins with 7 bytes that say what file it is.

    Blocks of 32 KiB hold pieces: a checksum (4 bytes), a length (2) and a kind (1: a whole record, 2, 3, 4: its first,
    a middle, its last piece).
    """
    content, place, record = path.read_bytes(), 7, b""
    assert content.startswith(b":W&B")
    while place + 7 <= len(content):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        length, kind = struct.unpack_from("<HB", content, place + 4)
        record += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            yield record
            record = b""


def wandb_history(folder: Path) -> tuple[str, list[dict[str, float]]]:
    """Id and rows of an offline run, from its own log of records."""
    from wandb.proto import wandb_internal_pb2 as records

    [path] = folder.glob("*.wandb")
    name, rows = "", []
    for data in log_records(path):
        record = records.Record()
        record.ParseFromString(data)
        if record.HasField("run"):
            name = record.run.run_id
        if record.HasField("history"):
            items = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            rows.append(
                {"step": items["_step"], **{key: value for key, value in items.items() if not key.startswith("_")}}
            )
    return name, rows


# A process of its own, as a training is one: the package keeps a service and settings for the whole of it.
WANDB_SESSION = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from test_sinks import row, session
session(["wandb"], Path(sys.argv[2]), [row(epoch, dice=0.25 * epoch) for epoch in map(int, sys.argv[3:])])
"""


def wandb_session(run: Path, home: Path, *epochs: int) -> str:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    here = str(Path(__file__).parent)
    done = subprocess.run(
        [sys.executable, "-c", WANDB_SESSION, here, str(run), *map(str, epochs)],
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
        env={
            **kept,
            "HOME": str(home),
            "WANDB_API_KEY": "0123456789abcdef" * 2 + "deadbeef",
            "PYTHONPATH": str(Path(here).parent),
            "USER": "someuser",
        },
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_wandb_keeps_the_history_offline_and_goes_on_under_one_id(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    run, home = tmp_path / "run", tmp_path / "home"
    home.mkdir()
    said = wandb_session(run, home, 1, 2) + wandb_session(run, home, 3)
    assert "login" not in said.lower() and "warning" not in said.lower(), said
    folders = sorted((run / "wandb").glob("offline-run-*"), key=lambda folder: folder.stat().st_mtime_ns)
    assert len(folders) == 2
    (first, early), (second, late) = map(wandb_history, folders)
    assert first == second == (run / "wandb" / "fold1.id").read_text().strip()
    assert [(values["step"], values["dice"], values["train_loss"]) for values in early] == [
        (1, 0.25, 2.0),
        (2, 0.5, 1.0),
    ]
    assert [(values["step"], values["dice"]) for values in late] == [(3, 0.75)]
    assert "epoch" not in early[0] and "fold" not in early[0]
    everything = b"".join(path.read_bytes() for path in run.rglob("*") if path.is_file() and not path.is_symlink())
    name = os.uname().nodename.encode()
    # A name of a few letters is found in any file of bytes.
    for secret in (b"deadbeef", b"someuser", *([name] if len(name) > 5 else [])):
        assert secret not in everything


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_an_absent_package_is_one_sentence(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(
        ConfigError, match=rf"training\.sinks has {name}, which is not installed here .*pip install hubmap-kit\[sinks\]"
    ) as raised:
        open_sinks([name], tmp_path, 0, SETTINGS)
    assert "\n" not in str(raised.value) and not list(tmp_path.iterdir())
    check_sinks([])


def test_nothing_is_opened_before_the_first_row(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    session(["tensorboard", "tensorboard"], tmp_path, [])
    assert not list(tmp_path.iterdir())


def test_a_sink_that_fails_is_dropped_with_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("tensorboard")
    (tmp_path / "tensorboard").write_text("a file where the folder would be")
    with caplog.at_level(logging.WARNING, sinks_module.__name__):
        session(["tensorboard"], tmp_path, [row(1), row(2)])
    [record] = [record for record in caplog.records if record.name == sinks_module.__name__]
    assert "tensorboard takes no more metrics" in record.getMessage()
