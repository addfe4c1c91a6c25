"""What tests of publishing share: staged folders, the real command line against a double of Kaggle, and a table of its
failures.
"""

from __future__ import annotations

import base64
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import warm
from kaggle_double import Double
from kaggle_double.server import KEY, TOKEN
from kaggle_double.state import Dataset, DatasetVersion

WRITES = {
    "StartBlobUpload",
    "PUT /upload",
    "CreateDataset",
    "CreateDatasetVersion",
    "SaveKernel",
    "CreateCodeSubmission",
}


@dataclass(frozen=True)
class Done:
    """A finished command."""

    code: int
    out: str
    err: str

    @property
    def sentence(self) -> str:
        """The one sentence of a failure, after `error: `."""
        lines = [line.removeprefix("error: ") for line in self.err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, self.err
        assert self.err.rstrip().endswith(lines[0]), self.err
        return lines[0]


class Cli:
    """Commands in a subprocess, in the hermetic environment of a double.

    Secrets in their output fail the test, as does a traceback that was not asked for.
    """

    def __init__(self, double: Double, folder: Path, token: bool = False, **extra: str) -> None:
        self.double, self.folder = double, folder
        self.environment = {**double.environment(folder / "environment", token), **extra}

    def start(self, *words: str | Path) -> subprocess.Popen[str]:
        """Start Python with arguments, for a test that meets it while it runs."""
        command = [sys.executable, *map(str, words)]
        return subprocess.Popen(
            command, env=self.environment, cwd=self.folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def end(self, process: subprocess.Popen[str]) -> Done:
        """Wait for a command's end."""
        out, err = process.communicate(timeout=60)
        return self._checked(subprocess.CompletedProcess(process.args, process.returncode, out, err))

    def run(self, *words: str | Path) -> Done:
        """Run Python with arguments to its end."""
        return self._checked(
            warm.run([sys.executable, *map(str, words)], env=self.environment, cwd=self.folder, timeout=60)
        )

    def _checked(self, done: subprocess.CompletedProcess[str]) -> Done:
        basic = base64.b64encode(f"{self.double.owner}:{KEY}".encode()).decode()
        for secret in (KEY, TOKEN, basic):
            assert secret not in done.stdout + done.stderr
        assert "Traceback" not in done.stdout + done.stderr or "-v" in done.args, done.stderr
        return Done(done.returncode, done.stdout, done.stderr)

    def __call__(self, *words: str | Path) -> Done:
        """`hubmap WORDS`."""
        return self.run("-m", "hubmap_kit", *words)

    def push(self, folder: Path, *options: str | Path) -> Done:
        """`hubmap push pretrained` of a staged folder."""
        return self("push", "pretrained", "--staged", folder, *options)

    def interrupted(self, when: Callable[[], bool], *words: str | Path) -> Done:
        """Start `hubmap WORDS`, press Ctrl-C as soon as `when` holds, and wait for its end."""
        process = self.start("-m", "hubmap_kit", *words)
        self.until(lambda: when() or process.poll() is not None)
        assert process.poll() is None, process.communicate()
        process.send_signal(signal.SIGINT)
        return self.end(process)

    @staticmethod
    def until(holds: Callable[[], bool], seconds: float = 30.0) -> None:
        """Wait until something holds."""
        end = time.monotonic() + seconds
        while not holds():
            assert time.monotonic() < end, "waited in vain"
            time.sleep(0.02)

    def held(self, ref: str) -> dict[str, bytes]:
        """The files of a dataset's last version on the double."""
        state = self.double.state
        return {file.name: state.path(file).read_bytes() for file in state.datasets[ref].versions[-1].files}

    def written(self) -> list[str]:
        """The requests that would change something at Kaggle."""
        return [name for name in self.double.called if name in WRITES]


@pytest.fixture
def kaggle(tmp_path: Path) -> Callable[..., Any]:
    """Opens a double with faults and settings, and the command line against it."""

    @contextmanager
    def opened(
        *faults: str, token: bool = False, extra: dict[str, str] | None = None, **settings: Any
    ) -> Iterator[Cli]:
        with Double(faults, **settings) as double:
            yield Cli(double, tmp_path, token, **(extra or {}))
            assert not double.escapes
            assert not double.mistakes

    return opened


@pytest.fixture(scope="session")
def builds(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two builds of the pretrained dataset, an older and a newer one, staged as users stage them."""
    import numpy as np
    from safetensors.numpy import save_file

    from hubmap_kit.publish.staging import stage_pretrained

    root = tmp_path_factory.mktemp("builds")
    for number, name in enumerate(("older", "newer")):
        (root / f"{name}-files").mkdir()
        files = [root / f"{name}-files" / f"{part}.safetensors" for part in ("encoder", "head")]
        for file in files:
            save_file({"weight": np.full((8, 8), number, dtype=np.float32)}, file)
        stage_pretrained(files, root / name)
    return root / "older", root / "newer"


@pytest.fixture
def staged(builds: tuple[Path, Path], tmp_path: Path) -> Path:
    """A copy of the newer build, for one test to change."""
    return Path(shutil.copytree(builds[1], tmp_path / "staged"))


@pytest.fixture
def hold(builds: tuple[Path, Path]) -> Callable[[Double], Dataset]:
    """Make a double hold the older build as version 1 of the pretrained dataset."""

    def held(double: Double) -> Dataset:
        files = [
            double.state.add(path.name, path.read_bytes())
            for path in sorted(builds[0].iterdir())
            if path.name != "dataset-metadata.json"
        ]
        version = DatasetVersion(1, "older", files, "2026-01-01T00:00:00.000Z", polls=1_000_000)
        dataset = Dataset(
            double.owner, "hubmap-kit-pretrained", "hubmap-kit-pretrained", "other", True, 0, [version], "READY"
        )
        double.state.datasets[f"{double.owner}/{dataset.slug}"] = dataset
        return dataset

    return held
