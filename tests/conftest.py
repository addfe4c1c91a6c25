"""What every test shares: the real tissue beside the project, and the switches that keep tests off the network."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import hubmap_kit  # noqa: F401  (sets NO_ALBUMENTATIONS_UPDATE and HF_HUB_OFFLINE before any test imports the libraries)

SHARED_DATA = Path(os.environ.get("HUBMAP_SHARED_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with real tissue (hubmap-mini, hubmap-2022, glas, stain-references, weights)."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"real tissue is not at {SHARED_DATA}; set HUBMAP_SHARED_DATA to the folder that holds hubmap-mini/ and glas/")
    return SHARED_DATA
