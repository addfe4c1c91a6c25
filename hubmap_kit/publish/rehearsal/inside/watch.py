"""Running the kernel under limits: wall clock, memory of the whole process tree, and a look at the disk it fills."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from typing import Any

TICK = 0.2
CORES = 4  # of a Kaggle session
KIB = 1024


def run(spec: dict[str, Any], log: int) -> dict[str, Any]:
    """Run the kernel to its end or to a limit; `log` is an open file for its output. Returns code, seconds, peaks and what stopped it."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])
    began = time.monotonic()
    kernel = subprocess.Popen(
        spec["argv"], env=spec["env"], cwd="/kaggle/working", stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
    )
    peak = disk = 0
    stopped, code = "", None
    while code is None:
        code = _reap(kernel.pid)
        seconds = time.monotonic() - began
        peak, disk = max(peak, memory()), max(disk, _used("/kaggle/working"))
        if not stopped and code is None:
            stopped = "memory" if peak > spec["memory_bytes"] else "time" if seconds > spec["seconds"] else ""
            if stopped:
                kill_all()
        if code is None:
            time.sleep(TICK)
    kill_all()
    return {"code": code, "seconds": time.monotonic() - began, "peak_bytes": peak, "disk_bytes": disk, "stopped": stopped}


def kill_all() -> None:
    """End every other process of this process namespace, and wait until all are gone."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(-1, signal.SIGKILL)


def memory() -> int:
    """Bytes that all processes hold together, each shared page once: what cannot be dropped when memory is short.

    Files mapped into memory are left out, as they are where Kaggle's limit counts.
    """
    return sum(_held(name) for name in os.listdir("/proc") if name.isdecimal() and name != "1")


def _held(pid: str) -> int:
    try:
        with open(f"/proc/{pid}/smaps_rollup", encoding="ascii") as file:
            parts = dict(line.split(":", 1) for line in file if line.startswith(("Pss_Anon:", "Pss_Shmem:")))
        if parts:
            return sum(int(value.split()[0]) for value in parts.values()) * KIB
        with open(f"/proc/{pid}/status", encoding="utf-8") as file:  # kernels before 5.4 do not split the share
            return sum(int(line.split()[1]) for line in file if line.startswith(("RssAnon:", "RssShmem:"))) * KIB
    except OSError:
        return 0  # gone in the meantime


def _used(path: str) -> int:
    facts = os.statvfs(path)
    return (facts.f_blocks - facts.f_bfree) * facts.f_frsize


def _reap(wanted: int) -> int | None:
    """Collect every process that has ended (this one is their init); the exit code of `wanted` once it is among them."""
    code = None
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return code
        if pid == 0:
            return code
        if pid == wanted:
            code = os.waitstatus_to_exitcode(status)
