"""The line of facts tells names of variables, never what is in them."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hubmap_kit.jobs.preflight import describe
from hubmap_kit.kernel.accelerator import facts_line

SECRET = st.text("abcdefghijklmnopqrstuvwxyz0123456789", min_size=24, max_size=40)


@given(SECRET, st.sampled_from(["KAGGLE_API_V1_TOKEN", "KAGGLE_USER_SECRETS_TOKEN", "KAGGLE_KEY", "KAGGLE_X"]))
def test_no_value_leaks(secret: str, name: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(name, secret)
        line = facts_line(Path("/tmp"))
        assert name in line and secret not in line and "\n" not in line


def test_what_it_tells(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KAGGLE_DOCKER_IMAGE", "gcr.io/kaggle-images/python@sha256:2757e0c7")
    line = facts_line(tmp_path)
    for part in (
        "@sha256:2757e0c7",
        f"python {platform.python_version()}",
        f"torch {torch.__version__}",
        "cpus ",
        "GiB",
        "KAGGLE_DOCKER_IMAGE",
    ):
        assert part in line
    for name in [name for name in os.environ if name.startswith("KAGGLE_")]:
        monkeypatch.delenv(name)
    assert "image none" in facts_line(tmp_path) and "variables none" in facts_line(tmp_path)


def test_the_environment_of_a_run_names_its_bundle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HUBMAP_BUILD_ID", "0123-abc")
    monkeypatch.setenv("KAGGLE_KEY", "verysecretvalue")
    facts = describe(torch.device("cpu"))
    assert facts["build_id"] == "0123-abc" and "verysecretvalue" not in str(facts)
    monkeypatch.delenv("HUBMAP_BUILD_ID")
    assert describe(torch.device("cpu"))["build_id"] is None
