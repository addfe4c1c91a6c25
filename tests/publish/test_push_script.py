"""scripts/push.sh: which commands it runs, in which order, and what a failing one does."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


def script(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    values = {"PATH": os.environ["PATH"], **environment}
    return subprocess.run(
        ["bash", str(SCRIPTS / "push.sh"), *words], env=values, capture_output=True, text=True, timeout=60, check=False
    )


@pytest.fixture
def venv(tmp_path: Path) -> Callable[[str], str]:
    """A folder that the scripts take for their finished virtual environment; its Python is the shell code that is
    given.
    """

    def made(code: str) -> str:
        python = tmp_path / "venv" / "bin" / "python"
        python.parent.mkdir(parents=True)
        python.write_text(f"#!/bin/sh\n{code}\n")
        python.chmod(0o755)
        stamp = (
            f'. {shlex.quote(str(SCRIPTS / "_environment.sh"))}; hubmap_stamp push >"$hubmap_venv/.hubmap-stamp-push"'
        )
        subprocess.run(
            ["bash", "-c", stamp], env={"PATH": os.environ["PATH"], "HUBMAP_VENV": str(tmp_path / "venv")}, check=True
        )
        return str(tmp_path / "venv")

    return made


@pytest.mark.parametrize(("words", "code"), [((), 2), (("--help",), 0), (("all", "--help"), 0)])
def test_it_explains_itself(words: tuple[str, ...], code: int) -> None:
    done = script(*words)
    assert done.returncode == code
    text = done.stdout or done.stderr
    assert "usage: scripts/push.sh WHAT" in text
    for what in ("code", "weights", "tiles", "pretrained", "kernels", "all", "--rehearse"):
        assert what in text


def test_it_names_what_it_does_not_know() -> None:
    done = script("everything")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: 'everything' is nothing to push")


def test_all_is_code_then_weights_then_kernels_and_a_failing_step_ends_it(
    venv: Callable[[str], str], tmp_path: Path
) -> None:
    log = tmp_path / "calls"
    folder = venv(f'[ "$1" = -m ] || exit 0; echo "$@" >>{shlex.quote(str(log))}; [ "$4" != "$FAILS" ] || exit 7')
    words = (
        "all",
        "--run",
        "r1",
        "--run=r2",
        "--allow-dirty",
        "--force",
        "--dry-run",
        "--",
        "--run",
        "infer",
        "--follow",
    )
    steps = [
        "-m hubmap_kit push code --allow-dirty --force --dry-run",
        "-m hubmap_kit push weights --run r1 --run=r2 --force --dry-run",
        "-m hubmap_kit kernels --dry-run --run infer --follow",
    ]
    for fails, code, calls in (("nothing", 0, steps), ("weights", 7, steps[:2]), ("code", 7, steps[:1])):
        log.unlink(missing_ok=True)
        done = script(*words, HUBMAP_VENV=folder, HOME=str(tmp_path), FAILS=fails)
        assert done.returncode == code, done.stderr
        assert log.read_text().splitlines() == calls
    log.unlink()
    assert script("all", HUBMAP_VENV=folder, HOME=str(tmp_path), FAILS="nothing").returncode == 0
    assert log.read_text().splitlines() == ["-m hubmap_kit push code", "-m hubmap_kit kernels"]


def test_a_rehearsed_push_touches_no_credentials(venv: Callable[[str], str], staged: Path, tmp_path: Path) -> None:
    folder = venv(f'exec {shlex.quote(sys.executable)} "$@"')
    home = tmp_path / "home"
    (home / ".kaggle").mkdir(parents=True)
    (home / ".kaggle" / "kaggle.json").write_text(json.dumps({"username": "carol", "key": "carols-key"}))
    done = script(
        "pretrained",
        "--rehearse",
        "--staged",
        str(staged),
        HUBMAP_VENV=folder,
        HOME=str(home),
        KAGGLE_API_TOKEN="carols-token",
    )
    assert done.returncode == 0, done.stderr
    assert "alice/hubmap-kit-pretrained: created, version 1" in done.stdout
    assert "tried to leave" not in done.stdout
    assert "carol" not in done.stdout + done.stderr
    assert sorted(path.name for path in (home / ".kaggle").iterdir()) == ["kaggle.json"]
