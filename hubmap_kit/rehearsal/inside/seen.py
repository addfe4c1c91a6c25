"""What a kernel's Python sees of its session, as JSON: run by the watcher, confined as the kernel will be, before the
kernel is.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
from importlib.util import find_spec

REMOUNT_BIND, NEW_USERS = 32 | 4096, 0x10000000
libc = ctypes.CDLL(None, use_errno=True)


def answer(result: int) -> str:
    """The name of a call's error, or nothing where it was carried out."""
    return os.strerror(ctypes.get_errno()) if result else ""


def unreadable(paths: list[str]) -> list[str]:
    """The first file or folder that this user may not read, if there is one."""
    for folder in paths:
        places = [
            folder,
            *(os.path.join(above, name) for above, below, names in os.walk(folder) for name in (*below, *names)),
        ]
        closed = [
            path
            for path in places
            if not os.path.islink(path) and not os.access(path, os.R_OK | (os.X_OK if os.path.isdir(path) else 0))
        ]
        if closed:
            return closed[:1]
    return []


def main() -> None:
    """Arguments: the modules that must be missing, and what must be readable with all that is below, both as JSON."""
    missing, readable = (json.loads(text) for text in sys.argv[1:])
    with open("/proc/self/status", encoding="utf-8") as file:
        status = dict(line.split(":", 1) for line in file)
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
        mounts = [(fields[4], fields[5].split(",")) for fields in map(str.split, file)]
    facts = {
        "modules": [name for name in missing if find_spec(name)],
        "unreadable": unreadable(readable),
        "writable": [point for point, options in mounts if "ro" not in options],
        "capabilities": sorted({status[name].strip() for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")}),
        "no_new_privileges": status["NoNewPrivs"].strip() == "1",
        "filtered": status["Seccomp"].strip() == "2",
        "remount": answer(libc.mount(b"none", b"/kaggle/input", None, ctypes.c_ulong(REMOUNT_BIND), None)),
        "user_namespace": answer(libc.unshare(NEW_USERS)),
        "processes": sorted(int(name) for name in os.listdir("/proc") if name.isdecimal()),
    }
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
