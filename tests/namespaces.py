"""Whether this machine lets the rehearsal's sandbox make its namespaces; tests that need it are skipped with the reason
where not.

Asked of util-linux, not of the sandbox itself: one that is broken must fail its tests, not skip them.
"""

from __future__ import annotations

import shutil
import subprocess

import pytest


def _forbidden() -> str:
    if not shutil.which("unshare"):
        return "unshare of util-linux is not here"
    command = ["unshare", "--user", "--map-root-user", "--mount", "--pid", "--net", "--ipc", "--uts", "--fork", "true"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stderr.strip()


_REASON = _forbidden()
needs_namespaces = pytest.mark.skipif(bool(_REASON), reason=_REASON or "namespaces work")
