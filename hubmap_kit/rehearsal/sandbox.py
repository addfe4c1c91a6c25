"""One kernel session on this machine: private namespaces, Kaggle's folders, no network, limits; nothing of it needs
root.

`inside/` makes the namespaces and runs in them, the kernel in further ones without any right. Folders, variables and
limits are those that Kaggle's pages and its users report; none of them was measured on Kaggle by this project. Memory
is that of the processes and of /dev/shm, which may fill all of it. /kaggle/working lies in memory here, so that it has
the size of Kaggle's and is full when that is: a machine needs room for the output as well. /tmp and /kaggle/tmp lie on
the machine's disk, for a tile store may lie there that is larger than memory; a user without rights cannot give a
folder on a disk a size, so the disk itself is watched.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from hubmap_kit.errors import RehearsalError
from hubmap_kit.files import write_json
from hubmap_kit.progress import bar
from hubmap_kit.rehearsal.image import MISSING, Image
from hubmap_kit.rehearsal.inputs import TEMPORARY, remove
from hubmap_kit.rehearsal.leash import leashed

INSIDE = Path(__file__).with_name("inside")
GIB = 1 << 30
SPEC = "spec.json"
SHOWN = 60  # characters of the log's last line beside the progress bar
CANARY = "canary-7f3a91c4e2"  # the value of every variable that holds a secret on Kaggle; it may never be seen again
SECRETS = ("KAGGLE_USER_SECRETS_TOKEN", "KAGGLE_API_V1_TOKEN", "KAGGLE_DATA_PROXY_TOKEN")
PASSED = ("OMP_NUM_THREADS", "LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES")  # facts of this machine, not of the kernel
# What a machine keeps of its owner's: credentials and keys, in the home folder or where a variable says.
PRIVATE = (".kaggle", ".ssh", ".config", ".netrc", ".aws", ".git-credentials")
FOLDERS = ("KAGGLE_CONFIG_DIR", "XDG_CONFIG_HOME")
SYSTEM = ("/etc/ssl/private", "/etc/pki/tls/private", "/etc/shadow", "/etc/ssh")
SWITCHES = {
    "/proc/sys/kernel/unprivileged_userns_clone": ("0", "kernel.unprivileged_userns_clone=1"),
    "/proc/sys/kernel/apparmor_restrict_unprivileged_userns": ("1", "kernel.apparmor_restrict_unprivileged_userns=0"),
    "/proc/sys/user/max_user_namespaces": ("0", "user.max_user_namespaces=15000"),
}


@dataclass(frozen=True)
class Limits:
    """What a session may take: minutes of wall clock, GiB of memory of all its processes, GiB in /kaggle/working, GiB
    in /tmp.
    """

    minutes: float = 540.0
    memory_gib: float = 29.0
    disk_gib: float = 20.0
    scratch_gib: float = 60.0


@dataclass(frozen=True)
class Session:
    """A script, and what is mounted for it: pairs of a file or folder and its place below /kaggle/input."""

    script: Path
    inputs: tuple[tuple[Path, str], ...]
    limits: Limits = Limits()
    hidden: tuple[Path, ...] = ()  # folders of this machine that must not be seen inside
    shim: str = ""


@dataclass(frozen=True)
class Outcome:
    """How a session ended.

    `stopped` says which limit ended it ("" for none), `why` tells of one that `Limits` does not hold; "left": it went
    on after its end marker. `left` are the command lines of processes that did. `network` has one note (host, line) for
    each attempt.
    """

    code: int
    seconds: float
    peak_bytes: int
    disk_bytes: int
    stopped: str
    log: Path
    working: Path
    network: tuple[Mapping[str, Any], ...] = ()
    lost_packets: int = 0
    copy_error: str = ""
    why: str = ""
    left: tuple[str, ...] = ()
    probes: Mapping[str, Any] = field(default_factory=dict)


def amount(count: float) -> str:
    """A number of bytes for a person."""
    for unit, size in (("GiB", GIB / 10), ("MiB", 1 << 20)):
        if count >= size:
            return f"{count / (GIB if unit == 'GiB' else 1 << 20):.2f} {unit}"
    return f"{count / 1024:.0f} KiB"


def check_machine() -> None:
    """Raise RehearsalError, with what to do, where this machine cannot make the namespaces."""
    done = subprocess.run(
        _inside(Path(sys.executable)),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        cwd=INSIDE.parent,
        env=_outside(),
    )
    if done.returncode == 0:
        return
    for switch, (bad, cure) in SWITCHES.items():
        path = Path(switch)
        if path.is_file() and path.read_text().strip() == bad:
            raise RehearsalError(
                f"{switch} is {bad}, which forbids the user namespaces that a rehearsal runs in; allow them: sudo"
                f" sysctl {cure}"
            )
    said = (done.stderr.strip().splitlines() or ["no reason"])[-1]
    raise RehearsalError(
        f"this machine refuses the user namespaces that a rehearsal runs in ({said}); in a container allow them "
        "(docker run --security-opt seccomp=unconfined), or rehearse on another Linux machine"
    )


def private_places() -> tuple[Path, ...]:
    """Credentials and keys of this machine and of its user, whether they are there or not: none may be seen by a
    kernel.
    """
    homes = {Path.home(), Path("/root")}  # the second is the home that a kernel sees
    places = [home / name for home in sorted(homes) for name in PRIVATE] + [Path(name) for name in SYSTEM]
    return (*places, *(Path(os.environ[name]) for name in FOLDERS if os.environ.get(name)))


def run(session: Session, image: Image, folder: Path, title: str = "kernel") -> Outcome:
    """Run `session` in `folder`, which gets kernel.log and working/; what an earlier session left there goes first.

    Raises RehearsalError when the sandbox cannot be built or is not closed; a kernel that fails is an Outcome.
    """
    check_machine()
    folder.mkdir(parents=True, exist_ok=True)
    for path in (folder / "working", folder / "kernel.log", *folder.glob(f"{TEMPORARY}*")):
        remove(path)
    private = Path(tempfile.mkdtemp(prefix=TEMPORARY, dir=folder)).resolve()
    try:
        for part in ("root", "scratch", "out"):
            (private / part).mkdir()
        write_json(private / SPEC, _spec(session, image, private, (folder / "kernel.log").resolve()))
        done = _wait(_start(image, private), folder / "kernel.log", title, private / "report.json")
        (private / "out").rename(folder / "working")
    finally:
        remove(private)
    return _outcome(done, folder)


def environment(shim: str = "") -> dict[str, str]:
    """The environment of a kernel: Kaggle's names (as users report them), a worthless value for each secret."""
    own = {
        "PATH": "/opt/venv/bin:/usr/local/bin:/usr/bin:/bin",
        "HOME": "/root",
        "LANG": "C.UTF-8",
        "MPLBACKEND": "agg",
        "KAGGLE_KERNEL_RUN_TYPE": "Batch",
        "KAGGLE_DOCKER_IMAGE": "rehearsal",
        "KAGGLE_URL_BASE": "https://www.kaggle.com",
        **{name: CANARY for name in SECRETS},
        **{name: os.environ[name] for name in PASSED if name in os.environ},
    }
    return own | ({"HUBMAP_REHEARSAL_SHIM": shim} if shim else {})


def _spec(session: Session, image: Image, private: Path, log: Path) -> dict[str, Any]:
    site = f"/opt/venv/lib/python{image.version}/site-packages"
    binds = [[str(image.site_packages), "/opt/image"], [str(session.script.resolve()), "/kaggle/src/script.py"]]
    binds += [
        [str(INSIDE / f"{name}.py"), f"/opt/hook/rehearsal_{name}.py"]
        for name in ("hook", "seen", *(["shims"] if session.shim else []))
    ]
    if not image.base_prefix.is_relative_to("/usr"):
        binds.append([str(image.base_prefix), str(image.base_prefix)])
    return {
        "root": str(private / "root"),
        "scratch": str(private / "scratch"),
        "out": str(private / "out"),
        "log": str(log),
        "report": str(private / "report.json"),
        "binds": binds,
        "inputs": [[str(source.resolve()), target] for source, target in session.inputs],
        "read_only": [target for _, target in session.inputs],
        "files": {
            "/opt/venv/pyvenv.cfg": f"home = {image.executable.parent}\ninclude-system-site-packages = false\n",
            # The hook first, so that it watches what the image's own packages do when they are imported.
            f"{site}/rehearsal.pth": "/opt/hook\nimport rehearsal_hook\nimport site; site.addsitedir('/opt/image')\n",
        },
        "links": [[str(image.executable), "/opt/venv/bin/python"], ["python", "/opt/venv/bin/python3"]],
        "python": "/opt/venv/bin/python",
        "argv": ["/opt/venv/bin/python", "-u", "/kaggle/src/script.py"],
        "env": environment(session.shim),
        "missing": list(MISSING),
        "absent": sorted(
            {
                str(way(path))
                for path in (*session.hidden, *private_places())
                for way in (os.path.abspath, os.path.realpath)
            }
        ),
        "seconds": session.limits.minutes * 60,
        "memory_bytes": int(session.limits.memory_gib * GIB),
        "disk_bytes": int(session.limits.disk_gib * GIB),
        "scratch_bytes": int(session.limits.scratch_gib * GIB),
    }


def _inside(python: Path) -> list[str]:
    """The command that runs `inside/`, whose name is relative, for everybody can read a command line.

    This process, the one that waits for the watcher, the watcher, process 1 of the kernel's namespace: each ends with
    the one before it, and the last takes all others along.
    """
    return leashed(str(python), "-I", "-B", INSIDE.name)


def _outside() -> dict[str, str]:
    """The environment of what runs around the kernel: nothing of its own of this process's, which may hold tokens."""
    return {
        "PATH": "/usr/local/bin:/usr/bin:/bin",
        "LANG": "C.UTF-8",
        **{name: os.environ[name] for name in PASSED if name in os.environ},
    }


def _start(image: Image, private: Path) -> subprocess.Popen[str]:
    with open(private / SPEC, encoding="utf-8") as spec:
        # A session of its own: Ctrl-C reaches this process alone, which then ends all the others.
        return subprocess.Popen(
            _inside(image.executable),
            stdin=spec,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=INSIDE.parent,
            env=_outside(),
            start_new_session=True,
        )


def _wait(process: subprocess.Popen[str], log: Path, title: str, report: Path) -> dict[str, Any]:
    """Show the log's last line until the session ends; a break of any kind takes the session down with it."""
    try:
        with bar(None, title, "line") as progress, _Tail(log) as tail:
            while process.poll() is None:
                time.sleep(0.1)
                lines = tail.read()
                progress.set_postfix_str(tail.last[:SHOWN], refresh=False)
                progress.update(lines)
    finally:
        process.kill()
        said = (process.communicate()[0] or "").strip().splitlines()
    done = json.loads(report.read_text() or "{}") if report.is_file() else {}
    if "setup_error" in done or "code" not in done:
        reason = done.get("setup_error") or (said or [f"exit code {process.returncode}"])[-1]
        raise RehearsalError(f"the rehearsal's sandbox could not be set up: {reason}; nothing was rehearsed")
    return done


class _Tail:
    """A log that is still written: how many lines came since the last look, and the last of them."""

    def __init__(self, path: Path) -> None:
        self.path, self.last = path, ""
        path.touch()

    def __enter__(self) -> Self:
        self._file = open(self.path, encoding="utf-8", errors="replace")
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def read(self) -> int:
        """The number of new lines."""
        new = self._file.read().splitlines()
        self.last = "".join(one for one in new[-1].strip() if one.isprintable()) if new else self.last
        return len(new)


def _outcome(done: dict[str, Any], folder: Path) -> Outcome:
    return Outcome(
        code=done["code"],
        seconds=done["seconds"],
        peak_bytes=done["peak_bytes"],
        disk_bytes=done["disk_bytes"],
        stopped=done["stopped"],
        log=folder / "kernel.log",
        working=folder / "working",
        network=tuple(done["network"]),
        lost_packets=done["lost_packets"],
        copy_error=done["copy_error"],
        why=done["why"],
        left=tuple(done["left"]),
        probes=done["probes"],
    )
