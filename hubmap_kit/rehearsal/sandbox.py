"""One kernel session on this machine: private namespaces, Kaggle's folders, no network, limits; nothing needs root.

`inside/` makes the namespaces and runs in them, the kernel in further ones without any right. Folders, variables and
limits are those that Kaggle's pages and its users report; none of them was measured on Kaggle by this project. Memory
is that of the processes and of /dev/shm, which may fill all of it. /kaggle/working lies in memory, so that it is full
when Kaggle's would be: the machine needs memory for the output as well. /tmp and /kaggle/tmp lie on the machine's disk,
for a tile store there may be larger than memory; a user without rights cannot limit a folder on a disk, so the watcher
looks at the disk itself.
"""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

from hubmap_kit.errors import RehearsalError
from hubmap_kit.files import write_json
from hubmap_kit.progress import bar
from hubmap_kit.rehearsal.image import MISSING, Image

INSIDE = Path(__file__).with_name("inside")
GIB = 1 << 30
SESSION_PREFIX = ".session-"  # a session's own folder; one that was killed leaves it behind
LONG_PATH = 1000  # bytes; Linux takes 4095, and each name in a path costs time
SHOWN = 60  # characters of the log's last line beside the progress bar
CANARY = "canary-7f3a91c4e2"  # the value of every variable that holds a secret on Kaggle; nothing may repeat it
SECRETS = ("KAGGLE_USER_SECRETS_TOKEN", "KAGGLE_API_V1_TOKEN", "KAGGLE_DATA_PROXY_TOKEN")
PASSED = ("OMP_NUM_THREADS", "LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES")  # facts of this machine, not of the kernel
# Credentials and keys of a machine and its user: in a home folder, where a variable says, or in the system.
PRIVATE_IN_HOME = (".kaggle", ".ssh", ".config", ".netrc", ".aws", ".git-credentials")
PRIVATE_BY_VARIABLE = ("KAGGLE_CONFIG_DIR", "XDG_CONFIG_HOME")
PRIVATE_IN_SYSTEM = ("/etc/ssl/private", "/etc/pki/tls/private", "/etc/shadow", "/etc/ssh")
# Settings that forbid user namespaces: the value that does, and one that does not.
SWITCHES = {
    "/proc/sys/kernel/unprivileged_userns_clone": ("0", "kernel.unprivileged_userns_clone=1"),
    "/proc/sys/kernel/apparmor_restrict_unprivileged_userns": ("1", "kernel.apparmor_restrict_unprivileged_userns=0"),
    "/proc/sys/user/max_user_namespaces": ("0", "user.max_user_namespaces=15000"),
}


@dataclass(frozen=True)
class Limits:
    """Minutes of wall clock, GiB of memory of all processes, GiB in /kaggle/working, GiB in /tmp."""

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
    shim: str = ""  # a fault of `inside.hook` to inject


@dataclass(frozen=True)
class Outcome:
    """How a session ended; `inside.watch` reports it.

    `stopped` says which limit ended it ("" for none, "left" where it went on after its end marker); `why` is a sentence
    about a limit that `Limits` does not hold. `left` are the command lines of processes that were still there 10 s
    after the end. `network` has one note (host, line) for each attempt.
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


def check_machine() -> None:
    """Raise RehearsalError, with what to do, where this machine cannot make the namespaces."""
    done = subprocess.run(
        _inside(Path(sys.executable)),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        cwd=INSIDE.parent,
        env=_outer_environment(),
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


def run_session(session: Session, image: Image, folder: Path, title: str = "kernel") -> Outcome:
    """Run `session` in `folder`, which gets kernel.log and working/; what an earlier session left there goes first.

    Raises RehearsalError when the sandbox cannot be built or is not closed; a kernel that fails is an Outcome.
    """
    folder.mkdir(parents=True, exist_ok=True)
    log, working = folder / "kernel.log", folder / "working"
    for path in (working, log, *folder.glob(f"{SESSION_PREFIX}*")):
        remove_tree(path)
    private = Path(tempfile.mkdtemp(prefix=SESSION_PREFIX, dir=folder)).resolve()
    try:
        for part in ("root", "scratch", "out"):
            (private / part).mkdir()
        write_json(private / "spec.json", _spec(session, image, private, log.resolve()))
        done = _wait(_start(image, private / "spec.json"), log, title, private / "report.json")
        (private / "out").rename(working)
    finally:
        remove_tree(private)
    done |= {"network": tuple(done["network"]), "left": tuple(done["left"])}
    return Outcome(log=log, working=working, **done)


def remove_tree(path: Path) -> None:
    """Remove a file or folder, also one that nests deeper than Python can follow or is closed to its owner."""
    if not path.is_dir() or path.is_symlink():
        path.unlink(missing_ok=True)
        return
    made, folders = (path / f".{secrets.token_hex(8)}-{number}" for number in count()), [path]
    while folders:
        os.chmod(folders[-1], 0o700)
        below = []
        for entry in Path(folders[-1]).iterdir():
            if entry.is_dir() and not entry.is_symlink():
                below.append(entry)
            else:
                entry.unlink()
        if not below:
            folders.pop().rmdir()
        for folder in below:
            os.chmod(folder, 0o700)
            folders.append(folder.rename(next(made)) if len(os.fsencode(folder)) > LONG_PATH else folder)


def _kernel_environment(shim: str) -> dict[str, str]:
    """Kaggle's variables (as users report them), with a worthless value for each secret."""
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


def _outer_environment() -> dict[str, str]:
    """The variables of what runs around the kernel: none of this process's own, which may hold tokens."""
    passed = {name: os.environ[name] for name in PASSED if name in os.environ}
    return {"PATH": "/usr/local/bin:/usr/bin:/bin", "LANG": "C.UTF-8", **passed}


def _spec(session: Session, image: Image, private: Path, log: Path) -> dict[str, Any]:
    """What `inside` is told of the session."""
    limits = session.limits
    binds = [
        [str(image.site_packages), "/opt/image"],
        [str(session.script.resolve()), "/kaggle/src/script.py"],
        [str(INSIDE / "hook.py"), "/opt/hook/rehearsal_hook.py"],
    ]
    if not image.base_prefix.is_relative_to("/usr"):
        binds.append([str(image.base_prefix), str(image.base_prefix)])
    return {
        "parent": os.getpid(),
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
            f"/opt/venv/lib/python{image.version}/site-packages/rehearsal.pth": (
                "/opt/hook\nimport rehearsal_hook\nimport site; site.addsitedir('/opt/image')\n"
            ),
        },
        "links": [[str(image.executable), "/opt/venv/bin/python"], ["python", "/opt/venv/bin/python3"]],
        "python": "/opt/venv/bin/python",
        "argv": ["/opt/venv/bin/python", "-u", "/kaggle/src/script.py"],
        "env": _kernel_environment(session.shim),
        "missing": list(MISSING),
        "absent": sorted(_absent_paths(session.hidden)),
        "seconds": limits.minutes * 60,
        "memory_bytes": int(limits.memory_gib * GIB),
        "disk_bytes": int(limits.disk_gib * GIB),
        "scratch_bytes": int(limits.scratch_gib * GIB),
    }


def _absent_paths(hidden: tuple[Path, ...]) -> set[str]:
    """What a kernel may not see, whether it exists or not: `hidden`, and credentials and keys."""
    homes = {Path.home(), Path("/root")}  # the second is the home that a kernel sees
    paths = [*hidden, *(home / name for home in homes for name in PRIVATE_IN_HOME), *map(Path, PRIVATE_IN_SYSTEM)]
    paths += [Path(os.environ[name]) for name in PRIVATE_BY_VARIABLE if os.environ.get(name)]
    return {way(path) for path in map(str, paths) for way in (os.path.abspath, os.path.realpath)}


def _inside(python: Path) -> list[str]:
    """The command that runs `inside/`; its name is relative, for everybody can read a command line."""
    return [str(python), "-I", "-B", INSIDE.name]


def _start(image: Image, spec: Path) -> subprocess.Popen[str]:
    """Start the session, which ends with this process: so do the watcher, and process 1 of the kernel's namespace."""
    with open(spec, encoding="utf-8") as file:
        # In a session of its own, so that Ctrl-C reaches this process alone, which then ends all the others.
        return subprocess.Popen(
            _inside(image.executable),
            stdin=file,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=INSIDE.parent,
            env=_outer_environment(),
            start_new_session=True,
        )


def _wait(process: subprocess.Popen[str], log: Path, title: str, report: Path) -> dict[str, Any]:
    """Show the log's last line until the session ends; an interruption takes the session down with it."""
    log.touch()
    try:
        with bar(None, title, "line") as progress, open(log, encoding="utf-8", errors="replace") as file:
            while process.poll() is None:
                time.sleep(0.1)
                if lines := file.read().splitlines():
                    last = "".join(one for one in lines[-1].strip() if one.isprintable())
                    progress.set_postfix_str(last[:SHOWN], refresh=False)
                progress.update(len(lines))
    finally:
        process.kill()
        said = (process.communicate()[0] or "").strip().splitlines()
    done: dict[str, Any] = json.loads(report.read_text() or "{}") if report.is_file() else {}
    if "setup_error" in done or "code" not in done:
        reason = done.get("setup_error") or (said or [f"exit code {process.returncode}"])[-1]
        raise RehearsalError(f"the rehearsal's sandbox could not be set up: {reason}; nothing was rehearsed")
    return done
