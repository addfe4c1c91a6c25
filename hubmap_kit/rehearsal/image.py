"""A virtual environment in place of Kaggle's image: the versions of constraints.txt, without what the image lacks."""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from hubmap_kit.errors import RehearsalError
from hubmap_kit.files import write_text

log = logging.getLogger(__name__)
KAGGLE_PYTHON = "3.13"  # of Kaggle's image since October 2026, as users report
MISSING = ("segmentation_models_pytorch", "ttach", "hubmap_kit", "imagecodecs")  # modules that the image lacks
UNPINNED = ("pip", "jinja2")  # in the image, needed by a kernel, and not in constraints.txt
DESCRIBE = (
    "import json,os,sys,sysconfig; print(json.dumps([os.path.realpath(sys._base_executable), sys.base_prefix, "
    "sysconfig.get_path('purelib'), '%d.%d' % sys.version_info[:2]]))"
)
# Importing these once writes their compiled files: inside a session the packages are read-only. Prints which of the
# arguments are there as well.
IMPORT = """
import torch, torch.utils.data, torchvision, timm, timm.optim, timm.scheduler, albumentations, cv2, tifffile
import pandas, pyarrow.parquet, scipy.ndimage, sklearn.model_selection, matplotlib.pyplot, PIL.ImageFont
import matplotlib.backends.backend_agg, safetensors.torch, pydantic, typer, rich.table, yaml, tqdm
import pip, pip._internal.cli.main, pip._internal.commands.install, huggingface_hub.hub_mixin
import importlib.util, sys
print(*(name for name in sys.argv[1:] if importlib.util.find_spec(name)))
"""
# Become a command that ends with its parent, even by SIGKILL. A program of its own: between fork and exec, a process
# with threads may run no Python. 1 is PR_SET_PDEATHSIG.
END_WITH_PARENT = """
import ctypes, os, signal, sys
parent, command = int(sys.argv[1]), sys.argv[2:]
if ctypes.CDLL(None, use_errno=True).prctl(1, ctypes.c_ulong(signal.SIGKILL), 0, 0, 0):
    sys.exit(f"prctl: {os.strerror(ctypes.get_errno())}")
if os.getppid() != parent:
    sys.exit("its parent is gone already")
os.execvp(command[0], command)
"""


@dataclass(frozen=True)
class Image:
    """The packages of an environment, and the interpreter below it with the prefix that holds its library."""

    site_packages: Path
    executable: Path
    base_prefix: Path
    version: str  # "3.11"


def prepare_image(folder: Path, constraints: Path, python: str = "") -> Image:
    """Make the environment in `folder`, or take one that was made there from the same list and interpreter.

    `python` names another interpreter (a path or a command). Needs a package index once, and about 6 GB unless uv can
    link them from its cache. Raises RehearsalError when it cannot be made, or holds what Kaggle's image lacks.
    """
    python = python or sys.executable
    if not shutil.which(python):
        raise RehearsalError(
            f"--python is '{python}', which is no interpreter on the PATH; give a path such as /usr/bin/python3.13"
        )
    version = _run(
        [python, "-I", "-c", "import sys; print(sys.version, sys.base_prefix)"], f"'{python}' does not start"
    )
    wanted = hashlib.sha256(constraints.read_bytes() + repr((UNPINNED, IMPORT, version)).encode()).hexdigest()
    folder.parent.mkdir(parents=True, exist_ok=True)
    stamp, executable = folder / ".stamp", folder / "bin" / "python"
    with _locked(folder.with_name(f".{folder.name}.lock")):
        if not (stamp.is_file() and stamp.read_text() == wanted and executable.exists()):
            log.info("making the environment of Kaggle's versions in %s", folder)
            _make(folder, constraints, python)
            _import_all(folder)
            write_text(stamp, wanted)
    base, prefix, site, version = json.loads(
        _run([str(executable), "-I", "-c", DESCRIBE], "the environment does not start")
    )
    return Image(Path(site).resolve(), Path(base), Path(prefix).resolve(), version)


def _make(folder: Path, constraints: Path, python: str) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    executable, packages = str(folder / "bin" / "python"), ["--quiet", "-r", str(constraints), *UNPINNED]
    why = "the environment of Kaggle's versions could not be made, check the network and the free disk space"
    uv = [sys.executable, "-m", "uv"]
    if subprocess.run([*uv, "--version"], capture_output=True, check=False).returncode == 0:
        _run([*uv, "venv", "--quiet", "--python", python, str(folder)], why)
        _run([*uv, "pip", "install", "--python", executable, *packages], why)
    else:
        log.info("uv is not installed; pip takes minutes")
        _run([python, "-m", "venv", str(folder)], why)
        _run([executable, "-m", "pip", "install", *packages], why)


def _import_all(folder: Path) -> None:
    """Import what a kernel imports, which compiles it too; raises RehearsalError for modules that must be missing."""
    command = [str(folder / "bin" / "python"), "-I", "-W", "ignore", "-c", IMPORT, *MISSING]
    if found := _run(command, "a package of the environment does not load").split():
        raise RehearsalError(
            f"{folder} holds {', '.join(found)}, which Kaggle's image lacks; take it out of constraints.txt"
        )


def _run(command: Sequence[str], why: str) -> str:
    """The output of a command; it ends with this process, and an interruption ends it with all that it has started."""
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", END_WITH_PARENT, str(os.getpid()), *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, err = process.communicate()
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise
    if process.returncode:
        said = (err.strip() or out.strip()).splitlines() or [f"exit code {process.returncode}"]
        raise RehearsalError(f"{why} ({said[-1].strip()})")
    return out


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Two rehearsals that start together make one environment."""
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
