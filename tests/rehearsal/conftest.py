"""What tests of the rehearsal share."""

from __future__ import annotations

import os
import sys
import sysconfig
from pathlib import Path

import pytest

from hubmap_kit.rehearsal.hidden import HiddenSet, make_hidden
from hubmap_kit.rehearsal.image import Image


@pytest.fixture(scope="session")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Image:
    """An environment without any package: the interpreter of the tests alone."""
    interpreter = Path(os.path.realpath(sys._base_executable))
    version = sysconfig.get_python_version()
    return Image(tmp_path_factory.mktemp("bare"), interpreter, Path(sys.base_prefix).resolve(), version)


@pytest.fixture(scope="session")
def hidden(tmp_path_factory: pytest.TempPathFactory) -> HiddenSet:
    """Twelve small slides with every fault."""
    return make_hidden(tmp_path_factory.mktemp("hidden"), slides=12, largest=600)
