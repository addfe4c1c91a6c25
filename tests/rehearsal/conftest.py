"""What tests of the rehearsal share."""

from __future__ import annotations

import os
import sys
import sysconfig
from pathlib import Path

import pytest

from hubmap_kit.rehearsal.image import Image


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Image:
    """An environment without any package: the interpreter of the tests alone."""
    folder = tmp_path_factory.mktemp("bare")
    return Image(
        folder,
        folder,
        Path(os.path.realpath(sys._base_executable)),
        Path(sys.base_prefix).resolve(),
        sysconfig.get_python_version(),
    )
