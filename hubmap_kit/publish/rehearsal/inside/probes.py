"""Proof, before the kernel starts, that the session is closed: no network, no way to the machine's files, inputs read-only."""

from __future__ import annotations

import fcntl
import os
import socket
import struct
import subprocess
from typing import Any

from mounts import SetupError, points

IFF_UP, SIOCGIFFLAGS, SIOCSIFFLAGS = 1, 0x8913, 0x8914
ELSEWHERE = ("192.0.2.1", 443), ("1.1.1.1", 443)  # an address that is nobody's, and one that answers wherever there is a network
NAME = "www.kaggle.com"
# Mounts that a session may write to; /proc guards itself, and what is mounted on single files of /dev are devices.
WRITABLE = frozenset({"/", "/proc", "/dev", "/dev/shm", "/kaggle/working", "/kaggle/tmp", "/tmp", "/rehearsal"})


def loopback_up() -> None:
    """Bring up `lo`: processes of one session talk to each other over it, on Kaggle as here."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
        (flags,) = struct.unpack_from("h", fcntl.ioctl(one, SIOCGIFFLAGS, struct.pack("16sh14x", b"lo", 0)), 16)
        fcntl.ioctl(one, SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", flags | IFF_UP))


def prove(spec: dict[str, Any]) -> dict[str, Any]:
    """Try what must not work; return the facts, or raise SetupError for the first thing that did."""
    facts = {
        "interfaces": [name for _, name in socket.if_nameindex()],
        "connect": [_connect(address) for address in ELSEWHERE],
        "lookup": _lookup(NAME),
        "read_only": {path: _write(path) for path in ("/kaggle/input", *spec["read_only"])},
        "writable": [path for path, options in points().items() if "ro" not in options and not _own(path)],
        "absent": [path for path in spec["absent"] if not os.path.lexists(path)],
        "modules": _modules(spec),
        "working_bytes": _room("/kaggle/working"),
    }
    if facts["interfaces"] != ["lo"]:
        raise SetupError(f"the sandbox has the network interfaces {facts['interfaces']} where only lo was expected")
    if "connected" in facts["connect"] or facts["lookup"] == "resolved":
        raise SetupError("the network can be reached from inside the sandbox")
    open_ = [path for path, answer in facts["read_only"].items() if answer == "written"]
    if open_:
        raise SetupError(f"{open_[0]} can be written to inside the sandbox")
    if facts["writable"]:
        raise SetupError(f"the mount at {facts['writable'][0]} is not read-only inside the sandbox")
    seen = sorted(set(spec["absent"]) - set(facts["absent"]))
    if seen:
        raise SetupError(f"{seen[0]} can be seen inside the sandbox")
    if facts["modules"]:
        raise SetupError(f"the sandbox's Python already has {', '.join(facts['modules'])}, which Kaggle's image lacks")
    return facts


def lost_packets() -> int:
    """How often anything in this session, in any language, wanted to send where no route leads (IPv4)."""
    with open("/proc/net/snmp", encoding="ascii") as file:
        names, values = (line.split() for line in file if line.startswith("Ip:"))
    return int(dict(zip(names, values))["OutNoRoutes"])


def _connect(address: tuple[str, int]) -> str:
    with socket.socket() as one:
        one.settimeout(3)
        try:
            one.connect(address)
        except OSError as error:
            return error.strerror or type(error).__name__
    return "connected"


def _lookup(name: str) -> str:
    try:
        socket.getaddrinfo(name, 443)
    except OSError as error:
        return error.strerror or type(error).__name__
    return "resolved"


def _write(folder: str) -> str:
    path = os.path.join(folder, ".probe") if os.path.isdir(folder) else folder
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_APPEND | (os.O_CREAT if path != folder else 0)))
    except OSError as error:
        return error.strerror or type(error).__name__
    return "written"


def _modules(spec: dict[str, Any]) -> list[str]:
    """Which of the modules that must be missing the kernel's Python would find."""
    code = "import sys; from importlib.util import find_spec; print(*(name for name in sys.argv[1:] if find_spec(name)))"
    done = subprocess.run([spec["python"], "-c", code, *spec["missing"]], env=spec["env"], cwd="/tmp", capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise SetupError(f"Python does not start inside the sandbox ({last})")
    return done.stdout.split()


def _own(path: str) -> bool:
    return path in WRITABLE or path.startswith("/dev/") and not os.path.isdir(path)


def _room(path: str) -> int:
    facts = os.statvfs(path)
    return facts.f_blocks * facts.f_frsize
