"""Nothing that the kit starts outlives it: however a job ends, its processes are gone, and a command leaves after its
last line.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import family
import pytest
import warm
from clocks import Countdown
from tiny import TINY, overrides

from hubmap_kit import experiment, processes
from hubmap_kit.config import Experiment
from hubmap_kit.jobs.lr_find import lr_find
from hubmap_kit.jobs.train import train
from hubmap_kit.training.clock import OutOfTime

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/stat").exists(), reason="only Linux tells which processes belong to a session"
)
HUBMAP = [sys.executable, "-m", "hubmap_kit"]


def settings_of(data: Path, *changes: str) -> Experiment:
    return experiment.load("baseline", [*TINY, "inference.views=none", *changes], str(data))


class Stop(Exception):
    """An error that nobody has foreseen."""


def raising(error: BaseException) -> Callable[[int, object], None]:
    def stop(_fold: int, _row: object) -> None:
        raise error

    return stop


def test_whoever_starts_workers_ends_them_before_it_returns(sample_data: Path, tmp_path: Path) -> None:
    """In one process, where nothing but the job itself can end them: its objects are kept, and so is every error with
    its frames.
    """
    kept: list[object] = []
    settings = settings_of(sample_data, "training.workers=2")
    kept.append(train(settings, tmp_path / "whole", device="cpu", stores=tmp_path / "stores"))
    assert not multiprocessing.active_children()
    for name, words, error in (
        ("error", {"on_epoch": raising(Stop("a full disk, say"))}, Stop),
        ("ctrl-c", {"on_epoch": raising(KeyboardInterrupt())}, KeyboardInterrupt),
        ("clock", {"clock": Countdown(4)}, OutOfTime),
    ):
        with pytest.raises(error) as raised:
            train(settings, tmp_path / name, device="cpu", stores=tmp_path / "stores", **words)  # type: ignore[arg-type]
        kept.append(raised)
        assert not multiprocessing.active_children(), name
    kept.append(lr_find(settings, tmp_path / "lr", steps=20, device="cpu", stores=tmp_path / "stores"))
    assert not multiprocessing.active_children()


def test_a_loader_that_nobody_closes_does_not_keep_a_process_alive(sample_data: Path, tmp_path: Path) -> None:
    """Python ends such workers by SIGTERM when it exits, and waits for them; a SIGTERM of anybody else is not theirs to
    answer.
    """
    code = (
        "import os, signal, subprocess, sys, time\n"
        "from pathlib import Path\n"
        "from hubmap_kit import experiment\n"
        "from hubmap_kit.competition.tables import read_train\n"
        "from hubmap_kit.tiles.store import open_or_build\n"
        "from hubmap_kit.training.dataset import TileDataset\n"
        "from hubmap_kit.training.loader import build_loader\n"
        "data, stores, *changes = sys.argv[1:]\n"
        "settings = experiment.load('baseline', changes, data)\n"
        "store = open_or_build(Path(stores), read_train(Path(data) / 'train.csv'), settings.scale, settings.tiles)\n"
        "loader = build_loader(TileDataset(store, range(len(store)), settings), settings, False)\n"
        "sys.kept = kept = iter(loader); next(kept)\n"
        "pids = [worker.pid for worker in kept._workers]\n"
        "subprocess.run(['kill', '-TERM', *map(str, pids)], check=True)\n"
        "rest = len(list(kept))\n"
        "print(rest, all(worker.is_alive() for worker in kept._workers), flush=True)\n"
        "sys.exit(0)\n"
    )
    words = [*TINY, "training.workers=2"]
    done = warm.run(
        [sys.executable, "-c", code, str(sample_data), str(tmp_path / "stores"), *words], warm.TRAINING, timeout=120
    )
    assert (done.returncode, done.stdout) == (0, "3 True\n"), done.stderr


@pytest.mark.parametrize("verb", ["train", "tune", "tiles", "predict", "demo"])
def test_a_command_leaves_after_its_last_line(verb: str, sample_data: Path, tiny_run: Path, tmp_path: Path) -> None:
    """`warm.run` fails where anything is left; the training is the one of which a worker of each fold once was."""
    data, out, tiny = (
        ["--data", str(sample_data)],
        ["--out", str(tmp_path / "out")],
        overrides(*TINY, "inference.views=none"),
    )
    words = {
        "train": ["--config", "baseline", *data, *out, *tiny, "--set", "training.workers=2"],
        "tune": [
            "--config",
            "baseline",
            *data,
            *out,
            *tiny,
            "--set",
            "training.workers=1",
            "--search",
            "training.lr=1e-3,1e-2",
            "--trials",
            "2",
        ],
        "tiles": [str(sample_data), *out, "--config", "resize-512", "--jobs", "2"],
        "predict": [str(tiny_run), "--test", str(sample_data / "test.csv"), "--out", str(tmp_path / "out.csv")],
        "demo": [str(tmp_path / "out"), *TINY, "training.workers=1"],
    }
    # The verb has no smaller slides; its job has.
    small = (
        "import sys, pathlib; from hubmap_kit.jobs.demo import demo; demo(pathlib.Path(sys.argv[1]),"
        " sys.argv[2:], 'cpu', 0, 2, 256)"
    )
    command = [sys.executable, "-c", small] if verb == "demo" else [*HUBMAP, verb]
    done = warm.run([*command, *words[verb]], warm.TRAINING)
    assert done.returncode == 0, done.stderr


def test_all_workers_end_with_a_parent_that_is_killed(sample_data: Path, tmp_path: Path) -> None:
    """SIGKILL lets nobody clean up: the processes of two folds side by side, and the loader's workers of each, see for
    themselves.
    """
    settings = overrides(*TINY, "training.epochs=5000", "training.workers=1")
    command = [
        *HUBMAP,
        "train",
        "--config",
        "baseline",
        "--data",
        str(sample_data),
        "--out",
        str(tmp_path / "run"),
        "--device",
        "cpu,cpu",
        *settings,
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        while len(family.members(process.pid)) < 6:  # with the helper for shared memory that Python starts
            assert process.poll() is None
            time.sleep(0.05)
        process.kill()
        process.wait()
        family.check_gone(process.pid)
    finally:
        for pid in family.members(process.pid):
            os.kill(pid, signal.SIGKILL)


def test_threads_drop_what_they_have_not_begun() -> None:
    begun: list[int] = []

    def work(number: int) -> None:
        begun.append(number)
        time.sleep(0.05)

    with pytest.raises(KeyboardInterrupt), processes.threads(2) as pool:
        for _ in pool.map(work, range(200)):
            raise KeyboardInterrupt
    assert len(begun) < 20


def test_a_command_waits_for_no_thread_but_does_what_was_registered_for_its_exit() -> None:
    code = (
        "import atexit, sys, threading, time\n"
        "from hubmap_kit import processes\n"
        "threading.Thread(target=time.sleep, args=(600,)).start()\n"
        "atexit.register(print, 'registered')\n"
        "sys.stdout.write('unflushed ')\n"
        "processes.leave(3)\n"
    )
    done = warm.run([sys.executable, "-c", code], timeout=60)
    assert (done.returncode, done.stdout) == (3, "unflushed registered\n"), done.stderr
