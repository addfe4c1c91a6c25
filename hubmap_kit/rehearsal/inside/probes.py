"""Proof, before the kernel starts, that the session is closed: no network, no way to the machine's files, inputs
read-only.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import struct
from typing import Any

import confine
from mounts import SetupError

IFF_UP, SIOCGIFFLAGS, SIOCSIFFLAGS = 1, 0x8913, 0x8914
ELSEWHERE = (
    ("192.0.2.1", 443),
    ("1.1.1.1", 443),
)  # an address that is nobody's, and one that answers wherever there is a network
NAME = "www.kaggle.com"
# Mounts that a kernel may write to, each with a limit; what is mounted on single files of /dev are devices. The
# watcher's own /proc lies below the kernel's, and nobody can take that one away.
WRITABLE = frozenset({"/proc", "/dev/shm", "/kaggle/working", "/kaggle/tmp", "/tmp", "/opt/venv", "/root"})
SEEN, PATIENCE = "/opt/hook/rehearsal_seen.py", 120.0


def loopback_up() -> None:
    """Bring up `lo`: processes of one session talk to each other over it, on Kaggle as here."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
        (flags,) = struct.unpack_from("h", fcntl.ioctl(one, SIOCGIFFLAGS, struct.pack("16sh14x", b"lo", 0)), 16)
        fcntl.ioctl(one, SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", flags | IFF_UP))


def prove(spec: dict[str, Any]) -> dict[str, Any]:
    """Try what must not work; return the facts, or raise SetupError for the first thing that did."""
    seen = _seen(spec)
    facts = {
        "interfaces": [name for _, name in socket.if_nameindex()],
        "connect": [_connect(address) for address in ELSEWHERE],
        "lookup": _lookup(NAME),
        "read_only": {path: _write(path) for path in ("/kaggle/input", *spec["read_only"])},
        "absent": [path for path in spec["absent"] if not os.path.lexists(path)],
        "working_bytes": _room("/kaggle/working"),
        **seen,
        "writable": [path for path in seen["writable"] if not _own(path)],
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
    hidden = sorted(set(spec["absent"]) - set(facts["absent"]))
    if hidden:
        raise SetupError(f"{hidden[0]} can be seen inside the sandbox")
    if facts["modules"]:
        raise SetupError(f"the sandbox's Python already has {', '.join(facts['modules'])}, which Kaggle's image lacks")
    _without_rights(facts, spec)
    return facts


def _without_rights(facts: dict[str, Any], spec: dict[str, Any]) -> None:
    """Raise SetupError for a right that a kernel would have, or an input that it would need one for."""
    if (
        [int(number, 16) for number in facts["capabilities"]] != [0]
        or not facts["no_new_privileges"]
        or not facts["filtered"]
    ):
        raise SetupError("a program inside the sandbox keeps capabilities, or could get new ones")
    if not facts["remount"] or not facts["user_namespace"]:
        raise SetupError(
            f"a program inside the sandbox can {'make namespaces' if facts['remount'] else 'change mounts'}"
        )
    if len(facts["processes"]) != 2:
        raise SetupError("a program inside the sandbox sees processes that are not its own")
    for path in facts["unreadable"]:
        mounts = [*spec["inputs"], *spec["binds"]]
        above = next((source for source, target in mounts if path == target or path.startswith(f"{target}/")), path)
        other = f" (the user {confine.STRANGER}, since root started the session)" if confine.program_user() else ""
        cure = f"chmod -R a+rX {above}, and umask 022 where it is made anew"
        raise SetupError(f"{path} cannot be read by the kernel's user{other}; allow everybody to read it: {cure}")


def _seen(spec: dict[str, Any]) -> dict[str, Any]:
    """What the kernel's Python says of the session."""
    words, text = (json.dumps(spec["missing"]), json.dumps([*spec["read_only"], spec["argv"][-1]])), bytearray()
    python = confine.start([spec["python"], SEEN, *words], spec["env"], "/tmp", text.extend, {})
    if not python.follow(PATIENCE):
        python.kill()
    lines = text.decode(errors="replace").strip().splitlines() or ["no output"]
    if python.code != 0:
        raise SetupError(f"Python does not start inside the sandbox ({lines[-1]})")
    facts: dict[str, Any] = json.loads(lines[-1])
    return facts


def lost_packets() -> int:
    """How often anything in this session, in any language, wanted to send where no route leads."""
    with open("/proc/net/snmp", encoding="ascii") as file:
        names, values = (line.split() for line in file if line.startswith("Ip:"))
    lost = int(dict(zip(names, values, strict=True))["OutNoRoutes"])
    if os.path.exists("/proc/net/snmp6"):  # not where IPv6 is switched off
        with open("/proc/net/snmp6", encoding="ascii") as file:
            lost += next(int(line.split()[1]) for line in file if line.startswith("Ip6OutNoRoutes"))
    return lost


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


def _own(path: str) -> bool:
    return path in WRITABLE or (path.startswith("/dev/") and not os.path.isdir(path))


def _room(path: str) -> int:
    facts = os.statvfs(path)
    return facts.f_blocks * facts.f_frsize
