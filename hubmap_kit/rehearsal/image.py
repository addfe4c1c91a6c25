"""A virtual environment that stands in for Kaggle's image: the versions of constraints.txt, without what the image
lacks.
"""

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
from hubmap_kit.rehearsal.leash import leashed

log = logging.getLogger(__name__)
KAGGLE_PYTHON = "3.13"  # of Kaggle's image since October 2026, as users report
MISSING = ("segmentation_models_pytorch", "ttach", "hubmap_kit", "imagecodecs")  # modules that the image does not have
BESIDES = ("pip", "jinja2")  # in the image, needed by a kernel, and not pinned in constraints.txt
# One import of each writes its compiled files: inside a session the packages are read-only.
WARMED = (
    "torch",
    "torch.utils.data",
    "torchvision",
    "timm",
    "timm.optim",
    "timm.scheduler",
    "albumentations",
    "cv2",
    "pandas",
    "pyarrow.parquet",
    "scipy.ndimage",
    "sklearn.model_selection",
    "matplotlib.pyplot",
    "matplotlib.backends.backend_agg",
    "safetensors.torch",
    "pydantic",
    "typer",
    "rich.table",
    "tifffile",
    "yaml",
    "tqdm",
    "pip",
    "pip._internal.cli.main",
    "pip._internal.commands.install",
    "huggingface_hub.hub_mixin",
    "PIL.ImageFont",
)
ABOUT = (
    "import json,os,sys,sysconfig; print(json.dumps([os.path.realpath(sys._base_executable), sys.base_prefix, "
    "sysconfig.get_path('purelib'), '%d.%d' % sys.version_info[:2]]))"
)


@dataclass(frozen=True)
class Image:
    """Where the environment's parts lie: its packages, and the interpreter below it with the prefix that holds its
    library.
    """

    folder: Path
    site_packages: Path
    executable: Path
    base_prefix: Path
    version: str  # "3.11"


def prepare(folder: Path, constraints: Path, python: str = "") -> Image:
    """Make the environment in `folder`, or take the one that is there when it was made from the same list and
    interpreter.

    `python` names another interpreter (a path or a command). Needs a package index once, and about 6 GB unless uv can
    link them from its cache. Raises RehearsalError when it cannot be made, or holds what Kaggle's image lacks.
    """
    python = python or sys.executable
    if not shutil.which(python):
        raise RehearsalError(
            f"--python is '{python}', which is no interpreter on the PATH; give a path such as /usr/bin/python3.13"
        )
    wanted = _stamp(constraints, python)
    folder.parent.mkdir(parents=True, exist_ok=True)
    stamp = folder / ".stamp"
    with _locked(folder.with_name(f".{folder.name}.lock")):
        if not (stamp.is_file() and stamp.read_text() == wanted and (folder / "bin" / "python").exists()):
            log.info("making the environment of Kaggle's versions in %s", folder)
            _make(folder, constraints, python)
            _check(folder)
            write_text(stamp, wanted)
    return about(folder)


def about(folder: Path) -> Image:
    """The parts of a virtual environment."""
    executable, prefix, site, version = json.loads(
        _run([str(folder / "bin" / "python"), "-I", "-c", ABOUT], "the environment does not start")
    )
    return Image(folder.resolve(), Path(site).resolve(), Path(executable), Path(prefix).resolve(), version)


def _stamp(constraints: Path, python: str) -> str:
    version = _run(
        [python, "-I", "-c", "import sys; print(sys.version, sys.base_prefix)"], f"'{python}' does not start"
    )
    return hashlib.sha256(constraints.read_bytes() + repr((BESIDES, WARMED, version)).encode()).hexdigest()


def _make(folder: Path, constraints: Path, python: str) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    packages = ["-r", str(constraints), *BESIDES]
    why = "the environment of Kaggle's versions could not be made, check the network and the free disk space"
    if subprocess.run([sys.executable, "-m", "uv", "--version"], capture_output=True, check=False).returncode == 0:
        _run([sys.executable, "-m", "uv", "venv", "--quiet", "--python", python, str(folder)], why)
        _run(
            [
                sys.executable,
                "-m",
                "uv",
                "pip",
                "install",
                "--quiet",
                "--python",
                str(folder / "bin" / "python"),
                *packages,
            ],
            why,
        )
    else:
        log.info("uv is not here; pip takes minutes")
        _run([python, "-m", "venv", str(folder)], why)
        _run([str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", *packages], why)


def _check(folder: Path) -> None:
    """Import what a kernel imports, which compiles it too, and make sure that what the image lacks is not there."""
    code = (
        "import importlib, sys\n"
        "from importlib.util import find_spec\n"
        "for name in sys.argv[2].split(','): importlib.import_module(name)\n"
        "print(*(name for name in sys.argv[1].split(',') if find_spec(name)))"
    )
    python = str(folder / "bin" / "python")
    check = [python, "-I", "-W", "ignore", "-c", code, ",".join(MISSING), ",".join(WARMED)]
    found = _run(check, "a package of the environment does not load").split()
    if found:
        raise RehearsalError(
            f"{folder} holds {', '.join(found)}, which Kaggle's image lacks; take it out of constraints.txt"
        )


def _run(command: Sequence[str], why: str) -> str:
    """The output of a command; a break of any kind ends it with all that it has started."""
    process = subprocess.Popen(
        leashed(*command), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
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
