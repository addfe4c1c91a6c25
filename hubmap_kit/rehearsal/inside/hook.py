"""What runs in the kernel's own Python: notes on each use of the network, and the faults that a rehearsal injects.

Every Python process of the session imports this first, from a .pth file behind the image's packages. Run as a program
it prints, as JSON, what a kernel would see of its session. Standard library only.
"""

from __future__ import annotations

import json
import os
import sys
from types import FrameType, ModuleType, SimpleNamespace
from typing import Any

NOTES = "/rehearsal/notes"  # the watcher's socket: what it has been told cannot be taken back
CHARACTERS = 300  # of a host, and of a line
# Audit events of Python, and the position of the address among their arguments.
EVENTS = {
    "socket.connect": 1,
    "socket.sendto": 1,
    "socket.sendmsg": 1,
    "socket.getaddrinfo": 0,
    "socket.gethostbyname": 0,
    "socket.gethostbyaddr": 0,
}
NETWORK_MODULES = "socket ssl http urllib urllib3 requests httpx httpcore anyio asyncio importlib rehearsal_hook"
# The processors that the CUDA 12.8 build of torch 2.11 holds code for: the P100's sm_60 is not among them.
ARCHITECTURES = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"]
CHECKPOINTS, LOOK_S, DAY_S = "/kaggle/working/*/fold*/last.ckpt", 0.05, 86400.0
REMOUNT_BIND, NEW_USERS = 32 | 4096, 0x10000000


def _host(event: str, arguments: tuple[Any, ...]) -> str | None:
    """Where a socket call goes, or None when it stays inside the session."""
    where = arguments[EVENTS[event]] if len(arguments) > EVENTS[event] else None
    host, port = (*where, "")[:2] if isinstance(where, tuple) and where else (where, "")
    if event == "socket.getaddrinfo" and len(arguments) > 1:
        port = arguments[1]
    if isinstance(host, bytes):
        host = host.decode("utf-8", "replace")
    if not isinstance(host, str) or host in ("", "localhost", "::1", "0.0.0.0", "::", "kaggle"):
        return None
    if host.startswith(("127.", "/", "\0")):  # this machine, or a socket that is a file
        return None
    return f"{host}:{port}" if port not in ("", None) else host


def _line() -> str:
    """The nearest line of code above the network libraries."""
    frame: FrameType | None = sys._getframe(2)
    last = "?"
    while frame is not None:
        name = str(frame.f_globals.get("__name__", "")).partition(".")[0]
        last = f"{frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_name}"
        if name not in NETWORK_MODULES.split():
            return last
        frame = frame.f_back
    return last


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if event not in EVENTS:
        return
    host = _host(event, arguments)
    if host is None:
        return
    import _socket  # every use of the network has loaded it already

    note = json.dumps({"event": event, "host": host[:CHARACTERS], "line": _line()[:CHARACTERS]})
    try:
        line = _socket.socket(_socket.AF_UNIX, _socket.SOCK_DGRAM)
        line.sendto(note.encode(), NOTES)
        line.close()
    except OSError:
        pass  # a hook that raises would change what it watches; packets without a route are counted anyway


def _after_import(wanted: str, action: Any) -> None:
    """Call `action(module)` once `wanted` has been imported."""
    import importlib.abc
    import importlib.util

    if wanted in sys.modules:
        action(sys.modules[wanted])
        return

    class Finder(importlib.abc.MetaPathFinder):
        def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> Any:
            if name != wanted:
                return None
            sys.meta_path.remove(self)
            spec = importlib.util.find_spec(name)
            if spec is not None and spec.loader is not None:
                execute = spec.loader.exec_module

                def then(module: ModuleType) -> None:
                    execute(module)
                    action(module)

                spec.loader.exec_module = then  # type: ignore[method-assign]  # the way to run code after an import
            return spec

    sys.meta_path.insert(0, Finder())


def p100(torch: ModuleType) -> None:
    """A P100 beside a torch that was not built for it: it is found, and every operation on it fails."""

    def refuse(*_: Any, **__: Any) -> Any:
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device")

    def refuse_on_cuda(make: Any) -> Any:
        def made(*arguments: Any, **options: Any) -> Any:
            return refuse() if str(options.get("device") or "").startswith("cuda") else make(*arguments, **options)

        return made

    card = SimpleNamespace(
        name="Tesla P100-PCIE-16GB", major=6, minor=0, total_memory=16 << 30, multi_processor_count=56
    )
    answers = {
        "is_available": True,
        "device_count": 1,
        "get_device_capability": (card.major, card.minor),
        "get_device_name": card.name,
        "get_device_properties": card,
        "get_arch_list": ARCHITECTURES,
        "current_device": 0,
        "is_initialized": True,
    }
    for name, value in answers.items():
        setattr(torch.cuda, name, lambda *_, _value=value, **__: _value)
    torch.cuda.init = torch.cuda._lazy_init = refuse
    for name in ("zeros", "ones", "rand", "randn", "tensor", "full", "empty", "arange", "eye"):
        setattr(torch, name, refuse_on_cuda(getattr(torch, name)))


def network(_: ModuleType) -> None:
    """A library that looks for a newer version of itself and ignores that nobody answers."""
    from contextlib import suppress
    from urllib.request import urlopen

    with suppress(OSError):
        urlopen("http://updates.example.org/latest", timeout=2)


def no_waiting(time: ModuleType) -> None:
    """Waiting takes no time, for a kernel that waits for a mount that never comes."""
    time.sleep = lambda _: None  # type: ignore[attr-defined]  # a module takes any attribute


def leap(time: ModuleType) -> None:
    """The clock leaps a day ahead once a training has its first checkpoint, as if the session's time were over."""
    from glob import glob

    real, seen = time.monotonic, {"leapt": False, "looked": 0.0}

    def monotonic() -> float:
        now = real()
        if not seen["leapt"] and now - seen["looked"] > LOOK_S:
            seen.update(looked=now, leapt=bool(glob(CHECKPOINTS)))
        return now + (DAY_S if seen["leapt"] else 0.0)

    time.monotonic = monotonic  # type: ignore[attr-defined]  # a module takes any attribute


# What HUBMAP_REHEARSAL_SHIM may name: the module to wait for, and what to do to it.
SHIMS = {
    "leap": ("time", leap),
    "no-waiting": ("time", no_waiting),
    "p100": ("torch", p100),
    "network": ("hubmap_kit", network),
}


def _first_unreadable(paths: list[str]) -> list[str]:
    """The first file or folder in or below `paths` that this user may not read, if there is one."""
    for top in paths:
        below = (os.path.join(at, name) for at, folders, files in os.walk(top) for name in (*folders, *files))
        for path in (top, *below):
            needed = os.R_OK | (os.X_OK if os.path.isdir(path) else 0)
            if not os.path.islink(path) and not os.access(path, needed):
                return [path]
    return []


def session_facts(missing: list[str], readable: list[str]) -> dict[str, Any]:
    """What this Python sees of its session: modules of `missing` that are there, what of `readable` it cannot read,
    its rights, and whether it can change mounts or namespaces (the error's name; "" where it can).
    """
    import ctypes
    from importlib.util import find_spec

    libc = ctypes.CDLL(None, use_errno=True)

    def answer(result: int) -> str:
        return os.strerror(ctypes.get_errno()) if result else ""

    with open("/proc/self/status", encoding="utf-8") as file:
        status = {name: value.strip() for name, value in (line.split(":", 1) for line in file)}
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
        mounts = [(fields[4], fields[5].split(",")) for fields in map(str.split, file)]
    return {
        "modules": [name for name in missing if find_spec(name)],
        "unreadable": _first_unreadable(readable),
        "writable": [point for point, options in mounts if "ro" not in options],
        "capabilities": sorted({status[name] for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")}),
        "no_new_privileges": status["NoNewPrivs"] == "1",
        "filtered": status["Seccomp"] == "2",
        "remount": answer(libc.mount(b"none", b"/kaggle/input", None, ctypes.c_ulong(REMOUNT_BIND), None)),
        "user_namespace": answer(libc.unshare(NEW_USERS)),
        "processes": sorted(int(name) for name in os.listdir("/proc") if name.isdecimal()),
    }


if __name__ == "__main__":
    print(json.dumps(session_facts(*map(json.loads, sys.argv[1:]))))
else:
    sys.addaudithook(_audit)
    if os.environ.get("HUBMAP_REHEARSAL_SHIM"):
        _after_import(*SHIMS[os.environ["HUBMAP_REHEARSAL_SHIM"]])
