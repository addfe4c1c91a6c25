"""Running the kernel under limits: wall clock, memory of the whole process tree, and a look at the disk it fills."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from typing import Any

TICK = 0.2
CORES = 4  # of a Kaggle session
KIB = 1024
PATIENCE = 60.0  # seconds for killed processes to end, such as one that waits for a slow disk
SHARED = "/dev/shm"
HEAD = re.compile(r"[0-9a-f]+-[0-9a-f]+ ")  # the first line of each mapping in smaps


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
        code = _reap().get(kernel.pid)
        seconds = time.monotonic() - began
        peak, disk = max(peak, memory()), max(disk, _used("/kaggle/working"))
        if code is None:
            stopped = "memory" if peak > spec["memory_bytes"] else "time" if seconds > spec["seconds"] else ""
            if stopped:
                code = kill_all().get(kernel.pid, -signal.SIGKILL)
            else:
                time.sleep(TICK)
    kill_all()
    return {"code": code, "seconds": time.monotonic() - began, "peak_bytes": peak, "disk_bytes": disk, "stopped": stopped}


def kill_all() -> dict[int, int]:
    """End every other process of this process namespace and wait until all are gone; their exit codes by number."""
    codes: dict[int, int] = {}
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:  # again and again, for a process may have been about to start another
        try:
            os.kill(-1, signal.SIGKILL)
        except ProcessLookupError:
            break
        codes |= _reap()
        time.sleep(0.005)
    return codes | _reap()


def memory() -> int:
    """Bytes that all processes hold together and that lie in /dev/shm, each shared page once: what cannot be dropped when memory is short.

    Files mapped into memory are left out, as they are where Kaggle's limit counts.
    """
    shared = _used(SHARED)
    return shared + sum(_held(name, bool(shared)) for name in os.listdir("/proc") if name.isdecimal() and name != "1")


def _held(pid: str, shares: bool) -> int:
    """A process's own part; without what it has mapped of /dev/shm, which counts there already."""
    try:
        with open(f"/proc/{pid}/smaps_rollup", encoding="ascii") as file:
            parts = dict(line.split(":", 1) for line in file if line.startswith(("Pss_Anon:", "Pss_Shmem:")))
        if parts:
            held = {name: int(value.split()[0]) for name, value in parts.items()}
            return (sum(held.values()) - (_mapped(pid) if shares and held.get("Pss_Shmem") else 0)) * KIB
        with open(f"/proc/{pid}/status", encoding="utf-8") as file:  # kernels before 5.4 do not split the share
            return sum(int(line.split()[1]) for line in file if line.startswith(("RssAnon:", "RssShmem:"))) * KIB
    except OSError:
        return 0  # gone in the meantime


def _mapped(pid: str) -> int:
    """KiB that a process has mapped of /dev/shm, its share of pages that others have mapped as well."""
    total, inside = 0, False
    with open(f"/proc/{pid}/smaps", encoding="utf-8", errors="replace") as file:
        for line in file:
            if HEAD.match(line):
                inside = f" {SHARED}/" in line
            elif inside and line.startswith("Pss:"):
                total += int(line.split()[1])
    return total


def _used(path: str) -> int:
    facts = os.statvfs(path)
    return (facts.f_blocks - facts.f_bfree) * facts.f_frsize


def _reap() -> dict[int, int]:
    """Collect every process that has ended (this one is their init); their exit codes by number."""
    codes = {}
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return codes
        if pid == 0:
            return codes
        codes[pid] = os.waitstatus_to_exitcode(status)
