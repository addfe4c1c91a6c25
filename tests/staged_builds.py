"""Staged datasets that Kaggle would take, and that nothing here ever installs or loads."""

from __future__ import annotations

from pathlib import Path

from hubmap_kit import build_id
from hubmap_kit.publish.root import commit, repository


def stage(folder: Path, content: bytes, sha: str | None = "of the checkout") -> str:
    """A code dataset that Kaggle would take; its wheel is never installed here."""
    folder.mkdir(parents=True)
    (folder / "hubmap_kit-0.1.0-py3-none-any.whl").write_bytes(content)
    build = build_id.describe("code", folder, git_sha=commit(repository()).sha if sha == "of the checkout" else sha)
    build_id.write(folder, build)
    return build.build_id


def stage_weights(folder: Path, content: bytes) -> str:
    """A weights dataset that Kaggle would take and no network would."""
    folder.mkdir(parents=True)
    (folder / "mini__config.yaml").write_bytes(content)
    build = build_id.describe("weights", folder, {"mini__config.yaml": "mini/config.yaml"})
    build_id.write(folder, build)
    return build.build_id
