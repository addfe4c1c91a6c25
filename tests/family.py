"""What a command leaves behind: no process of its session may outlive its last word by more than ten seconds."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

GONE_S = 10.0  # a promise of the kit, not a measure of its speed


def members(session: int) -> list[int]:
    """The processes of a session that still run; `session` is the number of the process that opened it."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, own = path.read_text(encoding="utf-8").rpartition(")")[2].split()[:4]
        except OSError:
            continue  # gone in the meantime
        if int(own) == session and state not in "ZX":
            found.append(int(path.parent.name))
    return found


def check_gone(session: int, last_word: float | None = None) -> None:
    """Fail where any process of the session is left ten seconds after `last_word` (of `time.time`; now by default)."""
    end = (last_word or time.time()) + GONE_S
    while left := members(session):
        if time.time() > end:
            pytest.fail(f"left of session {session} after its last word: {[_command(pid) for pid in left]}")
        time.sleep(0.02)


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return f"{pid}, gone now"
