"""Running the kernel under limits, with records out of its reach: its log, its network use, the processes it leaves.

A hostile kernel meets the same limits. What none of them covers (memory of the machine's own kernel, files without a
name) shows in the memory and disk that the machine has left, and ends the session, too.
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
from filesystem import SetupError

CHECK_SECONDS, MEASURE_SECONDS = 0.05, 0.2  # between two checks of the limits, and two measurements of the memory
MEASURE_SHARE = 0.2  # of the time goes into measuring, at most
KIB, MIB, GIB = 1024, 1 << 20, 1 << 30
LOG_BYTES = 64 * MIB
NOTES, NOTE_BYTES, NOTE_CHARACTERS = 100, 4096, 300
NOTE_FIELDS = ("event", "host", "line")
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
    """What the hooks say of the network: no note can be taken back, and a forged one only adds to the others."""

    def __init__(self, line: socket.socket) -> None:
        self.line, self.found = line, dict[tuple[str, ...], dict[str, str]]()

    def read(self) -> None:
        """Take in what has come."""
        for _ in range(1000):  # no more at once: the kernel could go on for ever
            try:
                data = self.line.recv(NOTE_BYTES, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return
            with suppress(ValueError, RecursionError):
                self._take(json.loads(data))

    def _take(self, note: Any) -> None:
        if not isinstance(note, dict) or not all(isinstance(note.get(name), str) for name in NOTE_FIELDS):
            return
        if len(self.found) < NOTES:
            text = {name: printable(note[name][:NOTE_CHARACTERS]) for name in NOTE_FIELDS}
            self.found.setdefault(tuple(text.values()), text)


class Scratch:
    """What the session takes of the machine's disk, in files with and without a name."""

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
            where = "the disk of /tmp and /kaggle/tmp"
            return f"{files} files came to {where}, more than the {self.most} that a session may make here"
        return ""


class Meter(threading.Thread):
    """Measures memory, and keeps tasks on the session's processors; a thread, for a look at a process may block."""

    def __init__(self, waiter: int) -> None:
        super().__init__(daemon=True)
        self.waiter, self.peak = waiter, 0

    def run(self) -> None:
        """Go on until the watcher ends."""
        while True:
            began, pids = time.monotonic(), process_ids(self.waiter)
            hold_to_cores(pids)
            self.peak = max(self.peak, memory(pids))
            time.sleep(max(MEASURE_SECONDS, (time.monotonic() - began) * (1 / MEASURE_SHARE - 1)))


def run_kernel(spec: dict[str, Any], log: Log, notes: Notes) -> dict[str, Any]:
    """Run the kernel to its end or to a limit; returns the part of `sandbox.Outcome` that this side knows."""
    scratch, began = Scratch(spec["scratch_bytes"]), time.monotonic()
    kernel = confine.start(spec["argv"], spec["env"], WORKING, log.write, {notes.line.fileno(): notes.read})
    meter = Meter(kernel.pid)
    meter.start()
    disk, ended, stopped, why, left = 0, 0.0, "", "", list[str]()
    while not kernel.follow(CHECK_SECONDS):
        disk, now = max(disk, used(WORKING)), time.monotonic()
        ended = ended or log.ended or (now if kernel.code is not None else 0.0)
        if ended and now - ended > GRACE:
            left = command_lines(process_ids(kernel.pid))
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
    """Which limit was met ("" for none), with a sentence where it is none of `sandbox.Limits`."""
    if (tasks := _tasks(waiter)) > confine.TASKS:
        ran = f"{tasks} with their threads ran at once, more than {confine.TASKS}"
        return "processes", f"too many processes: {ran}, and were ended"
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
    for pid in process_ids(waiter):
        with suppress(OSError):
            count += os.stat(f"/proc/{pid}/task").st_nlink - 2
    return count


def process_ids(waiter: int) -> list[str]:
    """The session's processes but this one and `waiter`, process 1 of the kernel's namespace."""
    return [name for name in os.listdir("/proc") if name.isdecimal() and int(name) not in (1, waiter)]


def command_lines(pids: list[str]) -> list[str]:
    """The command lines of those processes that still run, printable."""
    found = []
    for pid in pids:
        with suppress(OSError):
            with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
                name, _, rest = file.read().partition(" (")[2].rpartition(") ")
            with open(f"/proc/{pid}/cmdline", "rb") as file:
                words = file.read(COMMAND_BYTES).replace(b"\0", b" ").decode(errors="replace").strip()
            if rest[0] not in "ZX":  # dead, but not yet reaped
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
    """Bytes of memory that cannot be dropped: all processes' and /dev/shm, each shared page once.

    Files mapped into memory do not count, as they do not for Kaggle's limit, nor does /kaggle/working, a disk there.
    """
    unnamed = _unnamed(pids)
    return used(SHARED) + sum(unnamed.values()) + sum(_held(pid, unnamed) for pid in pids)


def _unnamed(pids: list[str]) -> dict[int, int]:
    """Bytes of the files in memory that no folder shows (memfd_create), by number, whether mapped or not."""
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
    """A process's own share, without what it has mapped of files that count already or not at all."""
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
    """KiB of such files that a process has mapped: its share of pages that others have mapped as well."""
    total, inside = 0, False
    with open(f"/proc/{pid}/smaps", encoding="utf-8", errors="replace") as file:
        for line in file:
            if HEAD.match(line):
                *_, number, path = [*line.split(maxsplit=5), ""][:6]
                memfd = path.startswith("/memfd:") and int(number) in unnamed
                inside = memfd or path.startswith((f"{SHARED}/", f"{WORKING}/"))
            elif inside and line.startswith("Pss:"):
                total += int(line.split()[1])
    return total


def printable(text: str) -> str:
    """Text that can neither break a line nor send codes to a terminal."""
    return "".join(one if one.isprintable() else "?" for one in text)


def memory_left() -> int:
    """Bytes that the machine can still give to anybody."""
    with open("/proc/meminfo", encoding="ascii") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("MemAvailable:")) * KIB


def capacity(path: str) -> int:
    """Bytes of a file system."""
    facts = os.statvfs(path)
    return facts.f_blocks * facts.f_frsize


def used(path: str) -> int:
    """Bytes of a file system that are taken."""
    facts = os.statvfs(path)
    return (facts.f_blocks - facts.f_bfree) * facts.f_frsize
