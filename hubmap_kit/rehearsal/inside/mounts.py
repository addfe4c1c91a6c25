"""The file system of a Kaggle session, built in a private mount namespace on a tmpfs and entered with pivot_root.

Its root is read-only; what can be written to is a mount of its own, with a limit in bytes and in files.
"""

from __future__ import annotations

import ctypes
import os
import platform
import re
from pathlib import Path

RDONLY, NOSUID, NODEV, NOEXEC, REMOUNT, BIND, REC, PRIVATE = 1, 2, 4, 8, 32, 4096, 16384, 1 << 18
DETACH = 2
# A user namespace may not lift these from a bind mount, so a remount must repeat them.
FLAGS = {"nosuid": NOSUID, "nodev": NODEV, "noexec": NOEXEC, "noatime": 1024, "nodiratime": 2048, "relatime": 1 << 21}
PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
INODES = 200_000  # of each file system in memory: an empty file costs memory as well, about 1 KiB
NODES = ("null", "zero", "full", "random", "urandom", "tty")
_libc = ctypes.CDLL(None, use_errno=True)


class SetupError(Exception):
    """The sandbox cannot be built here; the text is one sentence."""


def mount(source: str, target: str, kind: str | None, flags: int = 0, options: str = "") -> None:
    """The system call of this name; raises SetupError with what was refused."""
    arguments = [None if text is None else os.fsencode(text) for text in (source, target, kind)]
    if _libc.mount(*arguments, ctypes.c_ulong(flags), os.fsencode(options) if options else None):
        problem = os.strerror(ctypes.get_errno())
        raise SetupError(f"the system refused to mount {kind or source} at {target} ({problem})")


def tmpfs(target: str, size: int, owner: int = 0, mode: str = "755") -> None:
    """A file system in memory of at most `size` bytes, the user `owner`'s, made with its mount point."""
    os.makedirs(target, exist_ok=True)
    mount(
        "tmpfs", target, "tmpfs", NOSUID | NODEV, f"size={size},nr_inodes={INODES},mode={mode},uid={owner},gid={owner}"
    )


def bind(source: str, target: str, writable: bool = False) -> None:
    """Show the file or folder `source` at `target` as well, read-only unless `writable`; the mount point is made."""
    if os.path.isdir(source):
        os.makedirs(target, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        Path(target).touch()
    mount(source, target, None, BIND | REC)
    if not writable:
        read_only(target)


def read_only(target: str, below: bool = True) -> None:
    """Turn the mount at `target` read-only, and every mount below it, for each has a flag of its own."""
    target = os.path.realpath(target)
    for point, options in points().items():
        if point == target or (below and point.startswith(f"{target}/")):
            kept = sum(flag for name, flag in FLAGS.items() if name in options)
            mount("none", point, None, REMOUNT | BIND | RDONLY | kept)


def points() -> dict[str, frozenset[str]]:
    """Every mount that this process can reach, with its options; of several on one folder the last, which hides the
    others.
    """
    found = {}
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
        for line in file:
            fields = line.split(" ")
            found[_unescaped(fields[4])] = frozenset(fields[5].split(","))
    return found


def _unescaped(text: str) -> str:
    """The kernel writes blanks and the like as three octal digits."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)


def devices(root: str, shared_bytes: int, owner: int) -> None:
    """A /dev with the harmless devices, `owner`'s shared memory of at most `shared_bytes`, and the graphics cards if
    there are any.
    """
    folder = f"{root}/dev"
    tmpfs(folder, 1 << 20)
    cards = [name for name in os.listdir("/dev") if name.startswith("nvidia")]
    for name in (*NODES, *cards):
        if os.path.exists(f"/dev/{name}"):
            bind(f"/dev/{name}", f"{folder}/{name}", writable=True)
    for name, target in (
        ("fd", "/proc/self/fd"),
        ("stdin", "/proc/self/fd/0"),
        ("stdout", "/proc/self/fd/1"),
        ("stderr", "/proc/self/fd/2"),
    ):
        os.symlink(target, f"{folder}/{name}")
    tmpfs(f"{folder}/shm", shared_bytes, owner, "1777")
    read_only(folder, below=False)


def enter(root: str) -> None:
    """Make `root` the root folder and let go of the old one, so that nothing of the machine is left but what was
    bound.
    """
    os.chdir(root)
    if _libc.syscall(
        ctypes.c_long(PIVOT_ROOT[platform.machine()]), b".", b"."
    ):  # the old root comes to lie over the new one
        raise SetupError(f"the system refused pivot_root ({os.strerror(ctypes.get_errno())})")
    if _libc.umount2(b".", DETACH):
        raise SetupError(f"the system refused to unmount the old root ({os.strerror(ctypes.get_errno())})")
    os.chdir("/")
