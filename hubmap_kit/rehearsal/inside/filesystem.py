"""The file system of a Kaggle session: built in a private mount namespace on a tmpfs, entered with pivot_root, and its
output copied out at the end.

The root is read-only. Whatever can be written to is a mount of its own with a limit in bytes and in files.
"""

from __future__ import annotations

import ctypes
import os
import platform
import re
import shutil
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any

RDONLY, NOSUID, NODEV, NOEXEC, REMOUNT, BIND, REC, PRIVATE = 1, 2, 4, 8, 32, 4096, 16384, 1 << 18
DETACH = 2
# A user namespace may not lift these from a bind mount, so a remount must repeat them.
KEPT_FLAGS = {
    "nosuid": NOSUID,
    "nodev": NODEV,
    "noexec": NOEXEC,
    "noatime": 1024,
    "nodiratime": 2048,
    "relatime": 1 << 21,
}
PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
MIB = 1 << 20
INODES = 200_000  # of each file system in memory: an empty file costs about 1 KiB of memory as well
ROOT_BYTES = 16 * MIB  # the mount points
VENV_BYTES = HOME_BYTES = 2048 * MIB  # what the kernel installs; its caches
DEVICES = ("null", "zero", "full", "random", "urandom", "tty")
# What programs look up in /etc, and the public certificates of TLS. Accounts, keys and name servers stay outside.
ETC = """
    alternatives crypto-policies fonts ld.so.cache ld.so.conf ld.so.conf.d localtime mime.types os-release
    ssl/certs ssl/cert.pem ssl/openssl.cnf
    pki/tls/certs pki/tls/cert.pem pki/tls/openssl.cnf pki/ca-trust/extracted
"""
OWN_ETC = {
    "passwd": "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n",
    "group": "root:x:0:\nnogroup:x:65534:\n",
    "hosts": "127.0.0.1 localhost kaggle\n::1 localhost\n",
    "nsswitch.conf": "passwd: files\ngroup: files\nhosts: files dns\n",
    # This address belongs to nobody: a lookup by any program counts as a packet without a route.
    "resolv.conf": "nameserver 192.0.2.1\noptions timeout:1 attempts:1\n",
}
DEPTH = 100  # levels of folders that are copied out
SHOWN = 5  # entries that are named among those left behind
FILE_TYPES = {
    stat.S_IFLNK: "a link",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
_libc = ctypes.CDLL(None, use_errno=True)


class SetupError(Exception):
    """The sandbox cannot be built here; the text is one sentence."""


def build(spec: dict[str, Any], user: int) -> None:
    """Make the session's file system at `spec["root"]` and enter it; `user` owns what the kernel may write to."""
    root = spec["root"]
    _tmpfs(root, ROOT_BYTES)
    for name in sorted(os.listdir("/")):
        _share_system_folder(root, name)
    _tmpfs(f"{root}/root", HOME_BYTES, user)
    _tmpfs(f"{root}/opt/venv", VENV_BYTES, user)
    for source, target in spec["binds"]:
        _bind(source, root + target)
    for name in ETC.split():
        if os.path.exists(f"/etc/{name}"):
            _bind(os.path.realpath(f"/etc/{name}"), f"{root}/etc/{name}")
    _write_files(root, {f"/etc/{name}": text for name, text in OWN_ETC.items()})
    os.makedirs(f"{root}/proc")
    mount("proc", f"{root}/proc", "proc", NOSUID | NODEV | NOEXEC)
    _bind("/sys", f"{root}/sys")
    _make_devices(f"{root}/dev", spec["memory_bytes"], user)
    _tmpfs(f"{root}/kaggle/input", ROOT_BYTES)
    for source, target in spec["inputs"]:
        _bind(source, root + target)
    _remount_read_only(f"{root}/kaggle/input")
    _tmpfs(f"{root}/kaggle/working", spec["disk_bytes"], user)
    os.chown(spec["scratch"], user, user)
    os.chmod(spec["scratch"], 0o1777)
    for target in ("/kaggle/tmp", "/tmp"):
        _bind(spec["scratch"], root + target, writable=True)
    # The kernel's virtual environment is empty and writable, with the image's packages behind it: what a kernel
    # installs is gone in the next session.
    _write_files(root, spec["files"])
    _symlink(root, spec["links"])
    for folder, folders, files in os.walk(f"{root}/opt/venv"):
        for name in (".", *folders, *files):
            os.chown(os.path.join(folder, name), user, user, follow_symlinks=False)
    os.makedirs(f"{root}/rehearsal")


def enter(root: str) -> None:
    """Make `root`, now read-only, the root folder and detach the old one: only what was bound can still be seen."""
    _remount_read_only(root, recursive=False)
    os.chdir(root)
    # The old root comes to lie over the new one, and is then unmounted.
    if _libc.syscall(ctypes.c_long(PIVOT_ROOT[platform.machine()]), b".", b"."):
        raise SetupError(f"the system refused pivot_root ({os.strerror(ctypes.get_errno())})")
    if _libc.umount2(b".", DETACH):
        raise SetupError(f"the system refused to unmount the old root ({os.strerror(ctypes.get_errno())})")
    os.chdir("/")


def mount(source: str, target: str, kind: str | None, flags: int = 0, options: str = "") -> None:
    """The system call of this name; raises SetupError with what was refused."""
    arguments = [None if text is None else os.fsencode(text) for text in (source, target, kind)]
    if _libc.mount(*arguments, ctypes.c_ulong(flags), os.fsencode(options) if options else None):
        problem = os.strerror(ctypes.get_errno())
        raise SetupError(f"the system refused to mount {kind or source} at {target} ({problem})")


def _tmpfs(target: str, size: int, owner: int = 0, mode: str = "755") -> None:
    """Mount a file system in memory of at most `size` bytes; the mount point is made."""
    os.makedirs(target, exist_ok=True)
    options = f"size={size},nr_inodes={INODES},mode={mode},uid={owner},gid={owner}"
    mount("tmpfs", target, "tmpfs", NOSUID | NODEV, options)


def _bind(source: str, target: str, writable: bool = False) -> None:
    """Show the file or folder `source` at `target` as well; the mount point is made."""
    if os.path.isdir(source):
        os.makedirs(target, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        Path(target).touch()
    mount(source, target, None, BIND | REC)
    if not writable:
        _remount_read_only(target)


def _remount_read_only(target: str, recursive: bool = True) -> None:
    """Each mount below `target` has a flag of its own, so each is remounted."""
    target = os.path.realpath(target)
    for point, options in _mount_points().items():
        if point == target or (recursive and point.startswith(f"{target}/")):
            kept = sum(flag for name, flag in KEPT_FLAGS.items() if name in options)
            mount("none", point, None, REMOUNT | BIND | RDONLY | kept)


def _mount_points() -> dict[str, frozenset[str]]:
    """Every reachable mount with its options; of several on one folder the last, which hides the others."""
    found = {}
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
        for line in file:
            fields = line.split(" ")
            # Linux writes blanks and the like as three octal digits.
            point = re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), fields[4])
            found[point] = frozenset(fields[5].split(","))
    return found


def _share_system_folder(root: str, name: str) -> None:
    """Bind programs and libraries of the machine: /usr, and the folders beside it, often links into it."""
    if name not in ("usr", "bin", "sbin", "nix") and not name.startswith("lib"):
        return
    if os.path.islink(f"/{name}"):
        os.symlink(os.readlink(f"/{name}"), f"{root}/{name}")
    elif os.path.isdir(f"/{name}"):
        _bind(f"/{name}", f"{root}/{name}")


def _make_devices(folder: str, shared_bytes: int, owner: int) -> None:
    """A /dev with the harmless devices, the graphics cards, and `shared_bytes` of shared memory."""
    _tmpfs(folder, MIB)
    cards = [name for name in os.listdir("/dev") if name.startswith("nvidia")]
    for name in (*DEVICES, *cards):
        if os.path.exists(f"/dev/{name}"):
            _bind(f"/dev/{name}", f"{folder}/{name}", writable=True)
    os.symlink("/proc/self/fd", f"{folder}/fd")
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        os.symlink(f"/proc/self/fd/{number}", f"{folder}/{name}")
    _tmpfs(f"{folder}/shm", shared_bytes, owner, "1777")
    _remount_read_only(folder, recursive=False)


def _write_files(root: str, files: dict[str, str]) -> None:
    for path, text in files.items():
        os.makedirs(os.path.dirname(root + path), exist_ok=True)
        with open(root + path, "w", encoding="utf-8") as file:
            file.write(text)


def _symlink(root: str, links: Iterable[tuple[str, str]]) -> None:
    for target, link in links:
        os.makedirs(os.path.dirname(root + link), exist_ok=True)
        os.symlink(target, root + link)


def copy_output(source: str, target: int, size: int) -> str:
    """Copy at most `size` bytes of files and folders from `source` into the open folder `target`.

    Nothing that leads elsewhere is copied, no link is followed, and no rights or owners are kept. Returns what was left
    behind and why, or "".
    """
    refused, problem = list[str](), ""
    folder = os.open(source, os.O_RDONLY | os.O_DIRECTORY)
    try:
        _copy_folder(folder, target, size, refused)
    except OSError as error:
        problem = f"the output could not be copied out ({error})"
    finally:
        os.close(folder)
    more = f" and {len(refused) - SHOWN} more" if len(refused) > SHOWN else ""
    left = f"not all of the output can be kept: {', '.join(refused[:SHOWN])}{more}" if refused else ""
    return "; ".join(text for text in (problem, left) if text)


def _copy_folder(source: int, target: int, size: int, refused: list[str], above: str = "", depth: int = 0) -> int:
    """Copy one open folder into another; returns the bytes of `size` that are left, appends to `refused`."""
    for name in sorted(os.listdir(source)):
        path, facts = f"{above}{name}", os.stat(name, dir_fd=source, follow_symlinks=False)
        kind = stat.S_IFMT(facts.st_mode)
        if not name.isprintable():  # it could break a line of the report or send codes to a terminal
            refused.append(f"{path!a} has a name that cannot be printed")
        elif kind == stat.S_IFDIR and depth < DEPTH:
            os.mkdir(name, dir_fd=target)
            flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
            inner, made = (os.open(name, flags, dir_fd=folder) for folder in (source, target))
            try:
                size = _copy_folder(inner, made, size, refused, f"{path}/", depth + 1)
            finally:
                os.close(inner)
                os.close(made)
        elif kind == stat.S_IFDIR:
            refused.append(f"a folder lies deeper than {DEPTH} others")
        elif kind != stat.S_IFREG:
            leads = f" to {ascii(os.readlink(name, dir_fd=source))[1:-1]}" if kind == stat.S_IFLNK else ""
            refused.append(f"{path} is {FILE_TYPES.get(kind, 'no file')}{leads}")
        # A copy fills holes and repeats hard links, so what fitted inside need not fit outside.
        elif facts.st_size > size:
            refused.append(f"{path} is more than what fits, {facts.st_size} bytes")
        else:
            size -= facts.st_size
            read = os.open(name, os.O_RDONLY | os.O_NOFOLLOW, dir_fd=source)
            written = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644, dir_fd=target)
            with open(read, "rb") as one, open(written, "wb") as two:
                shutil.copyfileobj(one, two, MIB)
    return size
