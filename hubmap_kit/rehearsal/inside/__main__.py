"""`python inside <SPEC.json` builds a session, proves that it is closed, runs the kernel, and copies its output out.

Standard library only: the kit is not installed in the session. Modules here import each other by their bare names.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import struct
import sys
from contextlib import suppress
from typing import Any

import confine
import filesystem
import watch
from filesystem import SetupError

IFF_UP, SIOCGIFFLAGS, SIOCSIFFLAGS = 1, 0x8913, 0x8914
UNREACHABLE = (("192.0.2.1", 443), ("1.1.1.1", 443))  # nobody's address, and one that answers wherever a network is
HOST = "www.kaggle.com"
# Mounts that a kernel may write to, each with a limit; mounts on single files of /dev are devices. The watcher's own
# /proc lies below the kernel's, which nobody can unmount.
WRITABLE = frozenset({"/proc", "/dev/shm", "/kaggle/working", "/kaggle/tmp", "/tmp", "/opt/venv", "/root"})
HOOK, HOOK_SECONDS = "/opt/hook/rehearsal_hook.py", 120.0


def main() -> None:
    """Clone the watcher, which becomes process 1 of the session's outer namespaces, and wait for it.

    The specification on stdin is made by `sandbox`; the report goes to the file that it names. Without one this only
    tries whether the machine allows a session.
    """
    spec = json.loads(sys.stdin.read() or "{}")
    try:
        if spec:
            confine.end_with(spec["parent"])
        watcher = confine.clone(confine.OUTER, *confine.outer_maps())
        if watcher:
            sys.exit(abs(os.waitstatus_to_exitcode(os.waitpid(watcher, 0)[1])))
        filesystem.mount("none", "/", None, filesystem.REC | filesystem.PRIVATE)
    except SetupError as error:
        sys.exit(str(error))
    if spec:
        _run_session(spec)


def _run_session(spec: dict[str, Any]) -> None:
    os.umask(0o022)
    with suppress(PermissionError):  # an ordinary account keeps its groups, but none of their files is in sight
        os.setgroups([])
    # Opened before the machine's files are gone, and out of the kernel's reach.
    log = os.open(spec["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    report = os.open(spec["report"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    working = os.open(spec["out"], os.O_RDONLY | os.O_DIRECTORY)
    try:
        filesystem.build(spec, confine.program_user())
        notes = _note_socket(f"{spec['root']}/rehearsal")
        filesystem.enter(spec["root"])
        _bring_loopback_up()
        socket.sethostname("kaggle")
        probes = _prove_closed(spec)
        before = _lost_packets()
        done = {"probes": probes, **watch.run_kernel(spec, watch.Log(log), watch.Notes(notes))}
        done["lost_packets"] = _lost_packets() - before
        done["copy_error"] = filesystem.copy_output("/kaggle/working", working, spec["disk_bytes"])
    except (SetupError, OSError) as error:
        done = {"setup_error": str(error)}
    with open(report, "w", encoding="ascii") as file:
        json.dump(done, file)


def _note_socket(folder: str) -> socket.socket:
    """Where the hook of each Python process sends its notes."""
    notes = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    os.chdir(folder)  # the name of a socket is limited to 107 bytes
    notes.bind("notes")
    os.chmod("notes", 0o666)
    return notes


def _bring_loopback_up() -> None:
    """Processes of one session talk to each other over `lo`, on Kaggle as here."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
        (flags,) = struct.unpack_from("h", fcntl.ioctl(one, SIOCGIFFLAGS, struct.pack("16sh14x", b"lo", 0)), 16)
        fcntl.ioctl(one, SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", flags | IFF_UP))


def _prove_closed(spec: dict[str, Any]) -> dict[str, Any]:
    """Try what must not work; returns the facts, or raises SetupError for the first thing that did."""
    seen = _seen_by_kernel(spec)
    facts = {
        "interfaces": [name for _, name in socket.if_nameindex()],
        "connect": [_connect(address) for address in UNREACHABLE],
        "lookup": _attempt(lambda: socket.getaddrinfo(HOST, 443), "resolved"),
        "read_only": {path: _write(path) for path in ("/kaggle/input", *spec["read_only"])},
        "absent": [path for path in spec["absent"] if not os.path.lexists(path)],
        "working_bytes": watch.capacity("/kaggle/working"),
        **seen,
        "writable": [path for path in seen["writable"] if not _may_be_writable(path)],
    }
    if facts["interfaces"] != ["lo"]:
        raise SetupError(f"the sandbox has the network interfaces {facts['interfaces']} where only lo was expected")
    if "connected" in facts["connect"] or facts["lookup"] == "resolved":
        raise SetupError("the network can be reached from inside the sandbox")
    if written := [path for path, answer in facts["read_only"].items() if answer == "written"]:
        raise SetupError(f"{written[0]} can be written to inside the sandbox")
    if facts["writable"]:
        raise SetupError(f"the mount at {facts['writable'][0]} is not read-only inside the sandbox")
    if visible := sorted(set(spec["absent"]) - set(facts["absent"])):
        raise SetupError(f"{visible[0]} can be seen inside the sandbox")
    if facts["modules"]:
        raise SetupError(f"the sandbox's Python already has {', '.join(facts['modules'])}, which Kaggle's image lacks")
    _prove_without_rights(facts, spec)
    return facts


def _prove_without_rights(facts: dict[str, Any], spec: dict[str, Any]) -> None:
    """Raise SetupError for a right that a kernel would have, or an input that it could not read without one."""
    capabilities = {int(number, 16) for number in facts["capabilities"]}
    if capabilities != {0} or not facts["no_new_privileges"] or not facts["filtered"]:
        raise SetupError("a program inside the sandbox keeps capabilities, or could get new ones")
    for fact, act in (("remount", "change mounts"), ("user_namespace", "make namespaces")):
        if not facts[fact]:
            raise SetupError(f"a program inside the sandbox can {act}")
    if len(facts["processes"]) != 2:
        raise SetupError("a program inside the sandbox sees processes that are not its own")
    for path in facts["unreadable"]:
        mounts = [*spec["inputs"], *spec["binds"]]
        above = next((source for source, target in mounts if path == target or path.startswith(f"{target}/")), path)
        other = f" (the user {confine.KERNEL_UID}, since root started the session)" if confine.program_user() else ""
        cure = f"chmod -R a+rX {above}, and umask 022 where it is made anew"
        raise SetupError(f"{path} cannot be read by the kernel's user{other}; allow everybody to read it: {cure}")


def _seen_by_kernel(spec: dict[str, Any]) -> dict[str, Any]:
    """What the kernel's Python, confined as the kernel will be, sees of the session."""
    words, text = (json.dumps(spec["missing"]), json.dumps([*spec["read_only"], spec["argv"][-1]])), bytearray()
    python = confine.start([spec["python"], HOOK, *words], spec["env"], "/tmp", text.extend, {})
    if not python.follow(HOOK_SECONDS):
        python.kill()
    lines = text.decode(errors="replace").strip().splitlines() or ["no output"]
    if python.code != 0:
        raise SetupError(f"Python does not start inside the sandbox ({lines[-1]})")
    facts: dict[str, Any] = json.loads(lines[-1])
    return facts


def _lost_packets() -> int:
    """How often any program of this session, in any language, tried to send where no route leads."""
    with open("/proc/net/snmp", encoding="ascii") as file:
        names, values = (line.split() for line in file if line.startswith("Ip:"))
    lost = int(dict(zip(names, values, strict=True))["OutNoRoutes"])
    if os.path.exists("/proc/net/snmp6"):  # missing where IPv6 is switched off
        with open("/proc/net/snmp6", encoding="ascii") as file:
            lost += next(int(line.split()[1]) for line in file if line.startswith("Ip6OutNoRoutes"))
    return lost


def _attempt(action: Any, success: str) -> str:
    """`success`, or why the system refused."""
    try:
        action()
    except OSError as error:
        return error.strerror or type(error).__name__
    return success


def _connect(address: tuple[str, int]) -> str:
    with socket.socket() as one:
        one.settimeout(3)
        return _attempt(lambda: one.connect(address), "connected")


def _write(path: str) -> str:
    target, create = (os.path.join(path, ".probe"), os.O_CREAT) if os.path.isdir(path) else (path, 0)
    return _attempt(lambda: os.close(os.open(target, os.O_WRONLY | os.O_APPEND | create)), "written")


def _may_be_writable(path: str) -> bool:
    return path in WRITABLE or (path.startswith("/dev/") and not os.path.isdir(path))


if __name__ == "__main__":
    main()
