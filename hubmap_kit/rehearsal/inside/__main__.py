"""Builds the session, proves that it is closed, runs the kernel, and carries its output out.

Process 1 of the session's outer layer.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from contextlib import suppress
from typing import Any

import confine
import mounts
import output
import probes
import watch

MIB = 1 << 20
ROOT_BYTES, VENV_BYTES, HOME_BYTES = (
    16 * MIB,
    2048 * MIB,
    2048 * MIB,
)  # the mount points; what the kernel installs; its caches
# What programs look up in /etc; of TLS the certificates that everybody may read. Accounts, keys and name servers stay
# outside.
ETC = (
    "alternatives",
    "ld.so.cache",
    "ld.so.conf",
    "ld.so.conf.d",
    "localtime",
    "fonts",
    "mime.types",
    "os-release",
    "crypto-policies",
    "ssl/certs",
    "ssl/cert.pem",
    "ssl/openssl.cnf",
    "pki/tls/certs",
    "pki/tls/cert.pem",
    "pki/tls/openssl.cnf",
    "pki/ca-trust/extracted",
)
OWN_ETC = {
    "passwd": "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n",
    "group": "root:x:0:\nnogroup:x:65534:\n",
    "hosts": "127.0.0.1 localhost kaggle\n::1 localhost\n",
    "nsswitch.conf": "passwd: files\ngroup: files\nhosts: files dns\n",
    # A name server that nobody has: a lookup by any program counts as a packet without a route.
    "resolv.conf": "nameserver 192.0.2.1\noptions timeout:1 attempts:1\n",
}


def main() -> None:
    """`python inside <SPEC.json`: the specification is `sandbox.Session`'s; the report goes to the file that it names.

    This process waits for the watcher. Without a specification it only tries whether the machine allows a session.
    """
    text = sys.stdin.read()
    try:
        watcher = confine.clone(confine.OUTER, *confine.outer_maps())
        if watcher:
            sys.exit(abs(os.waitstatus_to_exitcode(os.waitpid(watcher, 0)[1])))
        mounts.mount("none", "/", None, mounts.REC | mounts.PRIVATE)
    except mounts.SetupError as error:
        sys.exit(str(error))
    if text:
        _session(json.loads(text))


def _session(spec: dict[str, Any]) -> None:
    os.umask(0o022)
    with suppress(PermissionError):  # an ordinary account's groups stay, but no file of theirs is in sight
        os.setgroups([])
    log = os.open(spec["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    report = os.open(spec["report"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    working = os.open(spec["out"], os.O_RDONLY | os.O_DIRECTORY)  # of the machine, and of no mount that the kernel has
    try:
        notes = _build(spec)
        probes.loopback_up()
        socket.sethostname("kaggle")
        facts = probes.prove(spec)
        before = probes.lost_packets()
        done = {
            "probes": facts,
            **watch.run(spec, watch.Log(log), watch.Notes(notes)),
            "lost_packets": probes.lost_packets() - before,
        }
        done["copy_error"] = output.carry_out("/kaggle/working", working, spec["disk_bytes"])
    except (mounts.SetupError, OSError) as error:
        done = {"setup_error": str(error)}
    with open(report, "w", encoding="ascii") as file:
        json.dump(done, file)


def _build(spec: dict[str, Any]) -> socket.socket:
    """Make the session's file system and enter it; returns the socket to which the hook of each Python process sends
    its notes.
    """
    root, user = spec["root"], confine.program_user()
    mounts.tmpfs(root, ROOT_BYTES)
    for name in sorted(os.listdir("/")):
        _system(root, name)
    mounts.tmpfs(f"{root}/root", HOME_BYTES, user)
    mounts.tmpfs(f"{root}/opt/venv", VENV_BYTES, user)
    for source, target in spec["binds"]:
        mounts.bind(source, root + target)
    _etc(root)
    os.makedirs(f"{root}/proc")
    mounts.mount("proc", f"{root}/proc", "proc", mounts.NOSUID | mounts.NODEV | mounts.NOEXEC)
    mounts.bind("/sys", f"{root}/sys")
    mounts.devices(root, spec["memory_bytes"], user)
    mounts.tmpfs(f"{root}/kaggle/input", ROOT_BYTES)
    for source, target in spec["inputs"]:
        mounts.bind(source, root + target)
    mounts.read_only(f"{root}/kaggle/input")
    mounts.tmpfs(f"{root}/kaggle/working", spec["disk_bytes"], user)
    os.chown(spec["scratch"], user, user)
    os.chmod(spec["scratch"], 0o1777)
    for target in ("/kaggle/tmp", "/tmp"):
        mounts.bind(spec["scratch"], root + target, writable=True)
    _environment(root, spec, user)
    notes = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    os.makedirs(f"{root}/rehearsal")
    os.chdir(f"{root}/rehearsal")  # a socket's name may have no more than 107 bytes
    notes.bind("notes")
    os.chmod("notes", 0o666)
    mounts.read_only(root, below=False)
    mounts.enter(root)
    return notes


def _system(root: str, name: str) -> None:
    """Programs and libraries of the machine: /usr, and the folders beside it, which most systems keep as links into
    it.
    """
    if name not in ("usr", "bin", "sbin", "nix") and not name.startswith("lib"):
        return
    if os.path.islink(f"/{name}"):
        os.symlink(os.readlink(f"/{name}"), f"{root}/{name}")
    elif os.path.isdir(f"/{name}"):
        mounts.bind(f"/{name}", f"{root}/{name}")


def _etc(root: str) -> None:
    os.makedirs(f"{root}/etc", exist_ok=True)
    for name in ETC:
        if os.path.exists(f"/etc/{name}"):
            mounts.bind(os.path.realpath(f"/etc/{name}"), f"{root}/etc/{name}")
    for name, text in OWN_ETC.items():
        with open(f"{root}/etc/{name}", "w", encoding="utf-8") as file:
            file.write(text)


def _environment(root: str, spec: dict[str, Any], user: int) -> None:
    """The kernel's virtual environment: empty and writable, with the image's packages behind it, so that nothing
    outlasts the session.
    """
    for path, text in spec["files"].items():
        os.makedirs(os.path.dirname(root + path), exist_ok=True)
        with open(root + path, "w", encoding="utf-8") as file:
            file.write(text)
    for target, link in spec["links"]:
        os.makedirs(os.path.dirname(root + link), exist_ok=True)
        os.symlink(target, root + link)
    for folder, folders, files in os.walk(f"{root}/opt/venv"):
        for name in (".", *folders, *files):
            os.chown(os.path.join(folder, name), user, user, follow_symlinks=False)


if __name__ == "__main__":
    main()
