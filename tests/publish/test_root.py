"""What git is asked, when it does not answer."""

from __future__ import annotations

from pathlib import Path

import pytest

from hubmap_kit.errors import PublishError
from hubmap_kit.publish import root


def test_a_git_that_hangs_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "git").write_text("#!/bin/sh\nexec sleep 100\n")
    (tmp_path / "git").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(root, "_GIT_S", 0.1)
    with pytest.raises(PublishError, match=r"'git ls-files' did not end in 0 s in .*; see what holds it up"):
        root.commit(root.repository())
