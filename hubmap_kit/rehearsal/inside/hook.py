"""Loaded by every Python process of the session before anything else: notes each use of the network, and plays the
shims.

It is no part of the kernel: the sandbox puts it behind the image's packages as a .pth file.
"""

from __future__ import annotations

import json
import os
import sys
from types import FrameType, ModuleType
from typing import Any

NOTES = "/rehearsal/notes"  # the watcher's socket: what it has been told cannot be taken back
CHARACTERS = 300  # of a host, and of a line
EVENTS = {
    "socket.connect": 1,
    "socket.sendto": 1,
    "socket.sendmsg": 1,
    "socket.getaddrinfo": 0,
    "socket.gethostbyname": 0,
    "socket.gethostbyaddr": 0,
}
QUIET = (
    "socket",
    "ssl",
    "http",
    "urllib",
    "urllib3",
    "requests",
    "httpx",
    "httpcore",
    "anyio",
    "asyncio",
    "importlib",
    "rehearsal_hook",
)


def _host(event: str, arguments: tuple[Any, ...]) -> str | None:
    """Where a socket call goes, or None when it stays inside the session."""
    where = arguments[EVENTS[event]] if len(arguments) > EVENTS[event] else None
    if isinstance(where, tuple) and where:
        host, port = where[0], where[1] if len(where) > 1 else ""
    else:
        host, port = where, ""
    if event == "socket.getaddrinfo" and len(arguments) > 1:
        port = arguments[1]
    if isinstance(host, bytes):
        host = host.decode("utf-8", "replace")
    if (
        not isinstance(host, str)
        or host in ("", "localhost", "::1", "0.0.0.0", "::", "kaggle")
        or host.startswith(("127.", "/", "\0"))
    ):
        return None  # nothing, this session itself, or a socket that is a file
    return f"{host}:{port}" if port not in ("", None) else host


def _line() -> str:
    """The nearest line of code above the network libraries."""
    frame: FrameType | None = sys._getframe(2)
    last = "?"
    while frame is not None:
        name = str(frame.f_globals.get("__name__", "")).partition(".")[0]
        last = f"{frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_name}"
        if name not in QUIET:
            return last
        frame = frame.f_back
    return last


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if event not in EVENTS:
        return
    host = _host(event, arguments)
    if host is None:
        return
    import _socket  # the one that every use of the network has loaded already

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

                spec.loader.exec_module = then  # type: ignore[method-assign]
            return spec

    sys.meta_path.insert(0, Finder())


sys.addaudithook(_audit)
if os.environ.get("HUBMAP_REHEARSAL_SHIM"):
    import rehearsal_shims

    _wanted, _action = rehearsal_shims.SHIMS[os.environ["HUBMAP_REHEARSAL_SHIM"]]
    _after_import(_wanted, _action)
