"""Running the kernel under limits, and keeping the records that it cannot reach: its log, its uses of the network, what
it left over.

Each limit is one that a hostile kernel meets as well. What no limit of its own covers (memory of the machine's kernel,
files without a name) shows in how much memory and disk the machine has left, and ends the session, too.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import threading
import time
from contextlib import suppress
from typing import Any

import confine
from mounts import SetupError

TICK, LOOK = 0.05, 0.2  # seconds between two checks of the limits, and between two looks at the memory
SHARE = 0.2  # of the time goes into such looks, at most
KIB, MIB, GIB = 1024, 1 << 20, 1 << 30
LOG_BYTES = 64 * MIB
NOTES, NOTE_BYTES, NOTE_CHARACTERS = 100, 4096, 300
GRACE = 10.0  # seconds after the end marker, or after the kernel's own end, for all its processes to be gone
MARKER, MARKER_BYTES = re.compile(rb"HUBMAP END \S+ \w+ build_id="), 256
SCRATCH_FILES = 1_000_000
DISK_PART = 0.8  # of what the machine's disk had left
LEFT_BYTES = 512 * MIB  # of the machine's memory: below it, something else would soon be killed
COMMAND_BYTES = 300
SHARED, WORKING, SCRATCH = "/dev/shm", "/kaggle/working", "/tmp"
HEAD = re.compile(r"[0-9a-f]+-[0-9a-f]+ ")  # the first line of each mapping in smaps


class Log:
    """The kernel's log, a file that the kernel has not open."""

    def __init__(self, file: int) -> None:
        self.file, self.size, self.end, self.ended = file, 0, b"", 0.0

    def write(self, data: bytes) -> None:
        """Append what fits, and note when the end marker comes."""
        kept = data[: LOG_BYTES - self.size]
        self.size += len(kept)
        while kept:
            kept = kept[os.write(self.file, kept) :]
        self.end += data
        if not self.ended and MARKER.search(self.end):
            self.ended = time.monotonic()
        self.end = self.end[-MARKER_BYTES:]


class Notes:
    """What the hooks of the session's Python processes say of the network.

    Nothing takes a note back; a forged one adds to the others.
    """

    def __init__(self, line: socket.socket) -> None:
        self.line, self.found = line, dict[tuple[str, ...], dict[str, str]]()

    def read(self) -> None:
        """Take in what has come."""
        for _ in range(1000):  # and no more at once: the kernel could go on for ever
            try:
                data = self.line.recv(NOTE_BYTES, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return
            with suppress(ValueError, RecursionError):
                self._take(json.loads(data))

    def _take(self, note: Any) -> None:
        if (
            isinstance(note, dict)
            and all(isinstance(note.get(name), str) for name in ("event", "host", "line"))
            and len(self.found) < NOTES
        ):
            text = {name: printable(note[name][:NOTE_CHARACTERS]) for name in ("event", "host", "line")}
            self.found.setdefault(tuple(text.values()), text)


class Scratch:
    """The room that the session may still take on the machine's disk: what has a name there, what has lost its name,
    whatever holds it.
    """

    def __init__(self, limit: int) -> None:
        facts = os.statvfs(SCRATCH)
        self.free, self.files = facts.f_bavail * facts.f_frsize, facts.f_favail
        self.limit = min(limit, int(self.free * DISK_PART))
        self.most = min(SCRATCH_FILES, int(self.files * DISK_PART))

    def full(self) -> str:
        """What is too much, or nothing. What others write to that disk at the same time counts as the session's."""
        facts = os.statvfs(SCRATCH)
        taken, files = self.free - facts.f_bavail * facts.f_frsize, self.files - facts.f_favail
        if taken > self.limit:
            lost, most = f"{taken / GIB:.2f} GiB", f"{self.limit / GIB:.2f} GiB"
            return f"the disk of /tmp and /kaggle/tmp lost {lost}, more than the {most} that a session may take here"
        if self.most and files > self.most:
            return (
                f"{files} files came to the disk of /tmp and /kaggle/tmp, more than the {self.most} that a session may"
                " make here"
            )
        return ""


class Meter(threading.Thread):
    """Measures memory, and keeps tasks on the session's processors.

    Apart from all else, for a look at a process waits for that process.
    """

    def __init__(self, waiter: int) -> None:
        super().__init__(daemon=True)
        self.waiter, self.peak = waiter, 0

    def run(self) -> None:
        """Go on until the watcher ends."""
        while True:
            began, pids = time.monotonic(), processes(self.waiter)
            hold_to_cores(pids)
            self.peak = max(self.peak, memory(pids))
            time.sleep(max(LOOK, (time.monotonic() - began) * (1 / SHARE - 1)))


def run(spec: dict[str, Any], log: Log, notes: Notes) -> dict[str, Any]:
    """Run the kernel to its end or to a limit.

    Returns its exit code, seconds, peaks, what stopped it and why, and what it left over.
    """
    scratch, began = Scratch(spec["scratch_bytes"]), time.monotonic()
    kernel = confine.start(spec["argv"], spec["env"], WORKING, log.write, {notes.line.fileno(): notes.read})
    meter = Meter(kernel.pid)
    meter.start()
    disk, ended, stopped, why, left = 0, 0.0, "", "", list[str]()
    while not kernel.follow(TICK):
        disk, now = max(disk, used(WORKING)), time.monotonic()
        ended = ended or log.ended or (now if kernel.code is not None else 0.0)
        if ended and now - ended > GRACE:
            left = command_lines(processes(kernel.pid))
        if left:
            stopped = "left" if kernel.code is None else ""
        elif meter.is_alive():
            stopped, why = _limit(spec, now - began, kernel.pid, meter.peak, log, scratch)
        else:
            raise SetupError("the memory of the session can no longer be measured")
        if stopped or left:
            kernel.kill()
            break
    return {
        "code": -signal.SIGKILL if kernel.code is None else kernel.code,
        "seconds": time.monotonic() - began,
        "peak_bytes": meter.peak,
        "disk_bytes": max(disk, used(WORKING)),
        "stopped": stopped,
        "why": why,
        "left": left,
        "network": list(notes.found.values()),
    }


def _limit(spec: dict[str, Any], seconds: float, waiter: int, peak: int, log: Log, scratch: Scratch) -> tuple[str, str]:
    """Which limit was met, with a sentence where whoever set it cannot say more than this one."""
    if (tasks := _tasks(waiter)) > confine.TASKS:
        return (
            "processes",
            f"too many processes: {tasks} with their threads ran at once, more than {confine.TASKS}, and were ended",
        )
    if full := scratch.full():
        return "scratch", f"disk full: {full}, and the session was ended"
    if (free := memory_left()) < LEFT_BYTES:
        return "machine", f"this machine ran out of memory: {free // MIB} MiB were left, and the session was ended"
    if log.size >= LOG_BYTES:
        return "log", f"log full: the kernel printed more than {LOG_BYTES // MIB} MiB and was ended"
    return "memory" if peak > spec["memory_bytes"] else "time" if seconds > spec["seconds"] else "", ""


def _tasks(waiter: int) -> int:
    """The session's processes and threads."""
    count = 0
    for pid in processes(waiter):
        with suppress(OSError):
            count += os.stat(f"/proc/{pid}/task").st_nlink - 2
    return count


def processes(waiter: int) -> list[str]:
    """The session's processes; not this one, nor `waiter`, which is process 1 of the kernel's namespace."""
    return [name for name in os.listdir("/proc") if name.isdecimal() and int(name) not in (1, waiter)]


def command_lines(pids: list[str]) -> list[str]:
    """What the processes that still run are, in words that can be printed."""
    found = []
    for pid in pids:
        with suppress(OSError):
            with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
                name, _, rest = file.read().partition(" (")[2].rpartition(") ")
            with open(f"/proc/{pid}/cmdline", "rb") as file:
                words = file.read(COMMAND_BYTES).replace(b"\0", b" ").decode(errors="replace").strip()
            if rest[0] not in "ZX":  # dead, and only not yet collected
                found.append(printable(words or name))
    return found


def hold_to_cores(pids: list[str]) -> None:
    """Take back more processors than a session has: a program needs no right to give them to itself."""
    allowed = confine.cores()
    for pid in pids:
        with suppress(OSError):
            for task in os.listdir(f"/proc/{pid}/task"):
                if not os.sched_getaffinity(int(task)) <= allowed:
                    os.sched_setaffinity(int(task), allowed)


def memory(pids: list[str]) -> int:
    """Bytes that all processes hold together and that lie in /dev/shm, each shared page once: what cannot be dropped
    when memory is short.

    Files mapped into memory are left out, as they are where Kaggle's limit counts, and so is /kaggle/working, a disk
    there.
    """
    unnamed = _unnamed(pids)
    return used(SHARED) + sum(unnamed.values()) + sum(_held(pid, unnamed) for pid in pids)


def _unnamed(pids: list[str]) -> dict[int, int]:
    """Files in memory that no folder shows (memfd_create), by number: their bytes, which no process need have
    mapped.
    """
    found, mine = {}, os.memfd_create("")
    device = os.fstat(mine).st_dev
    os.close(mine)
    for pid in pids:
        with suppress(OSError):
            for name in os.listdir(f"/proc/{pid}/fd"):
                with suppress(OSError):
                    facts = os.stat(f"/proc/{pid}/fd/{name}")
                    if facts.st_dev == device:
                        found[facts.st_ino] = facts.st_blocks * 512
    return found


def _held(pid: str, unnamed: dict[int, int]) -> int:
    """A process's own part; without what it has mapped of files that count already, or not at all."""
    try:
        with open(f"/proc/{pid}/smaps_rollup", encoding="ascii") as file:
            parts = dict(line.split(":", 1) for line in file if line.startswith(("Pss_Anon:", "Pss_Shmem:")))
        if parts:
            held = {name: int(value.split()[0]) for name, value in parts.items()}
            return (sum(held.values()) - (_mapped(pid, unnamed) if held.get("Pss_Shmem") else 0)) * KIB
        with open(f"/proc/{pid}/status", encoding="utf-8") as file:  # kernels before 5.4 do not split the share
            return sum(int(line.split()[1]) for line in file if line.startswith(("RssAnon:", "RssShmem:"))) * KIB
    except OSError:
        return 0  # gone in the meantime


def _mapped(pid: str, unnamed: dict[int, int]) -> int:
    """KiB that a process has mapped of such files, its share of pages that others have mapped as well."""
    total, inside = 0, False
    with open(f"/proc/{pid}/smaps", encoding="utf-8", errors="replace") as file:
        for line in file:
            if HEAD.match(line):
                *_, number, path = [*line.split(maxsplit=5), ""][:6]
                inside = path.startswith((f"{SHARED}/", f"{WORKING}/")) or (
                    path.startswith("/memfd:") and int(number) in unnamed
                )
            elif inside and line.startswith("Pss:"):
                total += int(line.split()[1])
    return total


def printable(text: str) -> str:
    """What can break no line and play with no terminal."""
    return "".join(one if one.isprintable() else "?" for one in text)


def memory_left() -> int:
    """Bytes that the machine can still give to anybody."""
    with open("/proc/meminfo", encoding="ascii") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("MemAvailable:")) * KIB


def used(path: str) -> int:
    """Bytes of a file system in memory that are taken."""
    facts = os.statvfs(path)
    return (facts.f_blocks - facts.f_bfree) * facts.f_frsize
