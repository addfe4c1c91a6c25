"""Running a program without any right over its session: namespaces of its own, no capability, fewer system calls,
bounded processes.

A session has two layers. The watcher is process 1 of the outer one, builds the file system there, and has all
capabilities over it, none over the machine. A program runs in the inner one: its user namespace owns nothing that the
watcher has mounted, so Linux keeps these mounts read-only and in place; its process namespace shows neither the watcher
nor the watcher's files. Process 1 there only waits for others to end. Where root starts the session, the program is
another user of the machine than root.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import platform
import re
import resource
import select
import signal
import struct
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filesystem
from filesystem import SetupError

# Flags of clone(2).
NEW_MOUNTS, NEW_UTS, NEW_IPC = 0x20000, 0x4000000, 0x8000000
NEW_USERS, NEW_PROCESSES, NEW_NETWORK = 0x10000000, 0x20000000, 0x40000000
OUTER = NEW_MOUNTS | NEW_UTS | NEW_IPC | NEW_USERS | NEW_PROCESSES | NEW_NETWORK
INNER = NEW_MOUNTS | NEW_USERS | NEW_PROCESSES
# The program's user and group where root starts the session: not nobody (65534), whom other programs use as well.
KERNEL_UID = 65533
CORES = 4  # of a Kaggle session
TASKS = 1024  # processes and threads at once: the watcher ends a session that has more; Linux refuses twice as many
PIPE_BYTES, NEWS = 1 << 20, 3

# Options of prctl(2).
SET_DEATH_SIGNAL, SET_DUMPABLE, SET_SECCOMP, DROP_BOUND = 1, 4, 22, 24
SET_SECUREBITS, SET_NO_NEW_PRIVILEGES, AMBIENT = 28, 38, 47
SECUREBITS = 0b11101111  # no rights for user 0, none kept or raised when the user changes; each for good
CAPABILITIES_V3 = 0x20080522

MACHINES = tuple(filesystem.PIVOT_ROOT)  # each pair of numbers below is of these
AUDITED = (0xC000003E, 0xC00000B7)
# Refused: what gives rights back in a namespace, what looks into other processes, what namespaces do not hold back
# (keys, file handles), memory that no process shows (shmget), a whole disk in one call (fallocate; libc writes
# instead), and interfaces that bypass this list or are known for their faults.
REFUSED = {
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": tuple(filesystem.PIVOT_ROOT.values()),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "mount_setattr": (442, 442),
    "unshare": (272, 97),
    "setns": (308, 268),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "keyctl": (250, 219),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    "shmget": (29, 194),
    "fallocate": (285, 47),
}
CLONE, SOCKET = (56, 220), (41, 198)
X32 = 0x40000000  # system calls of the x32 ABI begin here on x86_64
JOIN_SESSION_KEYRING = 1
# AF_UNIX, AF_INET, AF_INET6, AF_NETLINK: the others are not bound to a network namespace; AF_VSOCK talks to the host of
# a virtual machine.
FAMILIES = (1, 2, 10, 16)
EPERM, ENOSYS, EOPNOTSUPP, EAFNOSUPPORT = 1, 38, 95, 97

Write = Callable[[bytes], Any]
Lines = Mapping[int, Callable[[], Any]]
_libc = ctypes.PyDLL(None, use_errno=True)  # keeps the interpreter's lock: no other thread may run during `clone`


@dataclass
class Program:
    """A running program: what it prints goes to `write`.

    `pid` is process 1 of its namespace as this process sees it; `code` is the exit code once there is one. Each
    function of `lines` is called when its descriptor has something to read.
    """

    pid: int
    printed: int
    news: int
    write: Write
    lines: Lines
    code: int | None = None

    def follow(self, seconds: float) -> bool:
        """Pass on what comes for some seconds; returns whether all its processes are gone.

        Raises SetupError when it could not be started.
        """
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            for ready in select.select([self.news, self.printed, *self.lines], [], [], left)[0]:
                if ready in self.lines:
                    self.lines[ready]()
                elif ready == self.printed:
                    self.write(os.read(self.printed, PIPE_BYTES))
                elif not self._read_news():
                    self._end()
                    return True
        return False

    def kill(self) -> None:
        """End every process but the watcher, and pass on what is still on its way.

        All get the signal at once: process 1 of the namespace would need its turn among thousands to pass it on.
        """
        os.kill(-1, signal.SIGKILL)
        self._end()

    def _read_news(self) -> bytes:
        text = os.read(self.news, PIPE_BYTES)
        for line in text.splitlines():
            news = json.loads(line)
            if "error" in news:
                raise SetupError(news["error"])
            self.code = news["code"]
        return text

    def _end(self) -> None:
        os.waitpid(self.pid, 0)  # which returns when its namespace is empty
        while self._read_news():
            pass
        while data := os.read(self.printed, PIPE_BYTES):
            self.write(data)
        for read in self.lines.values():
            read()
        os.close(self.printed)
        os.close(self.news)


def machine() -> int:
    """Which of the two numbers of a system call is this machine's. Raises SetupError where neither is."""
    if platform.machine() not in MACHINES:
        raise SetupError(
            f"no sandbox is known for the processor {platform.machine()}; use one of {', '.join(MACHINES)}"
        )
    return MACHINES.index(platform.machine())


def end_with(parent: int) -> None:
    """End this process with its parent, even by SIGKILL; one that is gone already ends it now."""
    _prctl(SET_DEATH_SIGNAL, signal.SIGKILL)
    if os.getppid() != parent:
        raise SetupError("its parent is gone already")


def clone(flags: int, *maps: tuple[str, str]) -> int:
    """As fork(2), with new namespaces; the child ends with its parent.

    The first of `maps` (users, groups) that the machine allows is taken. Returns the child's number, and 0 in the
    child. Raises SetupError where the machine refuses.
    """
    reader, writer = os.pipe()
    pid = _libc.syscall(ctypes.c_long(CLONE[machine()]), ctypes.c_ulong(flags | signal.SIGCHLD), None, None, None, None)
    if pid < 0:
        raise SetupError(f"new namespaces: {os.strerror(ctypes.get_errno())}")
    if pid == 0:
        os.close(writer)
        _prctl(SET_DEATH_SIGNAL, signal.SIGKILL)
        if not os.read(reader, 1):  # the parent was gone before the call above, or could not map the users
            os._exit(1)
        os.close(reader)
        return 0
    os.close(reader)
    try:
        for users, groups in maps:
            with suppress(PermissionError):
                _map(pid, users, groups)
                os.write(writer, b"x")
                return pid
        raise SetupError(f"mapping the user: {os.strerror(EPERM)}")
    finally:
        os.close(writer)


def outer_maps() -> list[tuple[str, str]]:
    """Root stays 0 and the kernel's user is 1 where that is allowed; otherwise whoever starts this is 0, alone."""
    user, group = os.geteuid(), os.getegid()
    both = [(f"0 {user} 1\n1 {KERNEL_UID} 1", f"0 {group} 1\n1 {KERNEL_UID} 1")] if user == 0 else []
    return [*both, (f"0 {user} 1", f"0 {group} 1")]


def program_user() -> int:
    """A program's user in the outer namespace: the kernel's own (1), or the watcher's (0) where there is none."""
    return len(Path("/proc/self/uid_map").read_text().splitlines()) - 1


def start(argv: Sequence[str], environment: Mapping[str, str], folder: str, write: Write, lines: Lines) -> Program:
    """Run a program in an inner layer of its own, as its user 0 without any right. For the watcher alone."""
    output, printed = os.pipe()
    news, told = os.pipe()
    with suppress(OSError):  # room for what is printed while the watcher looks elsewhere
        fcntl.fcntl(printed, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
    user = program_user()
    os.fchown(printed, user, user)
    os.fchmod(printed, 0o200)  # /dev/stdout can be opened, and what was printed cannot be taken out again
    pid = clone(INNER, (f"0 {user} 1", f"0 {user} 1"))
    if pid == 0:
        _run_as_init(argv, environment, folder, printed, told)
    os.close(printed)
    os.close(told)
    return Program(pid, output, news, write, lines)


def _run_as_init(argv: Sequence[str], environment: Mapping[str, str], folder: str, printed: int, told: int) -> None:
    """Be process 1 of the inner layer: start the program, reap every process, end when none is left. Never returns."""
    try:
        _prepare_process(printed, told)
        pid = os.fork()
        if pid == 0:
            _exec_confined(argv, environment, folder)
        _drop_rights()
        while True:
            ended, status = os.wait()
            if ended == pid:
                os.write(NEWS, json.dumps({"code": os.waitstatus_to_exitcode(status)}).encode() + b"\n")
    except ChildProcessError:
        os._exit(0)
    except BaseException as error:
        os.write(NEWS, json.dumps({"error": str(error)}).encode() + b"\n")
        os._exit(1)


def _prepare_process(printed: int, told: int) -> None:
    """What still needs rights: descriptors, limits, a /proc of this namespace, no further user namespaces, no keys."""
    for number, source in enumerate((os.open("/dev/null", os.O_RDONLY), printed, printed)):
        os.dup2(source, number)
    os.dup2(told, NEWS, inheritable=False)
    os.closerange(NEWS + 1, 1024)
    for number in (signal.SIGINT, signal.SIGPIPE, signal.SIGXFSZ):  # Python's own handlers
        signal.signal(number, signal.SIG_DFL)
    os.sched_setaffinity(0, cores())
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    linux = tuple(map(int, re.findall(r"\d+", platform.release())[:2]))
    most = resource.getrlimit(resource.RLIMIT_NPROC)[1]
    # Before Linux 5.14 this limit also counted what the user runs elsewhere; it never holds for the machine's root.
    if linux >= (5, 14) and (most == resource.RLIM_INFINITY or most > 2 * TASKS):
        resource.setrlimit(resource.RLIMIT_NPROC, (2 * TASKS, 2 * TASKS))
    if linux >= (6, 14):  # before, this was the setting of the whole machine
        Path("/proc/sys/kernel/pid_max").write_text(str(2 * TASKS))
    Path("/proc/self/oom_score_adj").write_text("1000")  # where memory runs out all the same, this is what goes
    Path("/proc/sys/user/max_user_namespaces").write_text("0")
    _libc.syscall(ctypes.c_long(REFUSED["keyctl"][machine()]), ctypes.c_long(JOIN_SESSION_KEYRING), None)
    # Read-only: to the machine's root, settings of the machine are files in it, which need no capability.
    flags = filesystem.NOSUID | filesystem.NODEV | filesystem.NOEXEC | filesystem.RDONLY
    filesystem.mount("proc", "/proc", "proc", flags)


def _exec_confined(argv: Sequence[str], environment: Mapping[str, str], folder: str) -> None:
    os.setsid()
    os.setresgid(0, 0, 0)
    os.setresuid(0, 0, 0)
    _drop_rights()
    os.chdir(folder)
    os.execve(argv[0], list(argv), dict(environment))


def cores() -> set[int]:
    """The processors of a session."""
    return set(sorted(os.sched_getaffinity(0))[:CORES])


def _drop_rights() -> None:
    """No capability in any set, none to be had by exec, no look into this process, and the filter of system calls."""
    number = 0
    while _libc.prctl(DROP_BOUND, ctypes.c_ulong(number), 0, 0, 0) == 0:
        number += 1
    _prctl(AMBIENT, 4)
    _prctl(SET_SECUREBITS, SECUREBITS)
    header, empty = struct.pack("Ii", CAPABILITIES_V3, 0), bytes(24)
    if _libc.capset(header, empty):
        raise SetupError(f"dropping capabilities: {os.strerror(ctypes.get_errno())}")
    _prctl(SET_NO_NEW_PRIVILEGES, 1)
    code = _call_filter(machine())
    lines = ctypes.create_string_buffer(code)
    program = ctypes.create_string_buffer(struct.pack("HxxxxxxQ", len(code) // 8, ctypes.addressof(lines)))
    _prctl(SET_SECCOMP, 2, ctypes.addressof(program))
    _prctl(SET_DUMPABLE, 0)  # until exec


def _call_filter(which: int) -> bytes:
    """A program for seccomp: refused calls answer EPERM, other socket families EAFNOSUPPORT, other ABIs ENOSYS."""
    load, equal, at_least, answer, allow, refuse = 0x20, 0x15, 0x35, 0x06, 0x7FFF0000, 0x00050000
    lines = [(load, 0, 0, 4), (equal, 1, 0, AUDITED[which]), (answer, 0, 0, refuse | ENOSYS), (load, 0, 0, 0)]
    if MACHINES[which] == "x86_64":
        lines += [(at_least, 0, 1, X32), (answer, 0, 0, refuse | ENOSYS)]
    for name, numbers in REFUSED.items():
        error = EOPNOTSUPP if name == "fallocate" else EPERM
        lines += [(equal, 0, 1, numbers[which]), (answer, 0, 0, refuse | error)]
    lines += [(equal, 1, 0, SOCKET[which]), (answer, 0, 0, allow), (load, 0, 0, 16)]  # the first argument
    for family in FAMILIES:
        lines += [(equal, 0, 1, family), (answer, 0, 0, allow)]
    return b"".join(struct.pack("HBBI", *line) for line in [*lines, (answer, 0, 0, refuse | EAFNOSUPPORT)])


def _map(pid: int, users: str, groups: str) -> None:
    if "\n" not in groups:  # what the machine asks of an ordinary account
        Path(f"/proc/{pid}/setgroups").write_text("deny")
    Path(f"/proc/{pid}/uid_map").write_text(users)
    Path(f"/proc/{pid}/gid_map").write_text(groups)


def _prctl(*arguments: int) -> None:
    numbers = [ctypes.c_ulong(number) for number in (*arguments, 0, 0, 0, 0)[:5]]
    if _libc.prctl(*numbers):
        raise SetupError(f"prctl {arguments[0]}: {os.strerror(ctypes.get_errno())}")
