"""The sandbox, by what a script inside it can and cannot do."""

from __future__ import annotations

import json
import os
import signal
import ssl
import stat
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import hostile
import pytest
from namespaces import needs_namespaces

import hubmap_kit
from hubmap_kit.errors import RehearsalError
from hubmap_kit.rehearsal.image import Image
from hubmap_kit.rehearsal.judge import Expected, judge
from hubmap_kit.rehearsal.sandbox import CANARY, SECRETS, Limits, Outcome, Session, run_session

ROOT = Path(hubmap_kit.__file__).resolve().parents[1]
MIB = 1 << 20


pytestmark = needs_namespaces


def play(image: Image, folder: Path, script: str, hidden: tuple[Path, ...] = (ROOT,), **limits: float) -> Outcome:
    """Run a script in a session with one input file."""
    data = folder / "data"
    data.mkdir(parents=True, exist_ok=True)
    (data / "a.txt").write_text("a")
    path = folder / "kernel.py"
    path.write_text(textwrap.dedent(script))
    inputs = ((data, "/kaggle/input/datasets/me/one"), (data / "a.txt", "/kaggle/input/two/b.txt"))
    return run_session(Session(path, inputs, Limits(**limits), hidden), image, folder / "session")


def facts(outcome: Outcome) -> dict[str, object]:
    """What the script printed as its last line."""
    text = outcome.log.read_text()
    assert outcome.code == 0, text
    return json.loads(text.splitlines()[-1])


WRITTEN = ("/kaggle/input/x", "/kaggle/input/datasets/me/one/x", "/kaggle/input/two/b.txt", "/usr/x")


def test_a_session_sees_kaggles_folders_and_nothing_of_the_machine(
    bare: Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = f"""
        import json, os, socket, ssl, sys
        def attempt(action):
            try: action()
            except OSError as error: return error.errno
            return "done"
        print(json.dumps({{
            "repository": os.path.lexists({str(ROOT)!r}), "tests": os.path.lexists({str(tmp_path)!r}),
            "cwd": os.getcwd(), "prefix": sys.prefix,
            "read": open("/kaggle/input/datasets/me/one/a.txt").read() + open("/kaggle/input/two/b.txt").read(),
            "inputs": sorted(os.listdir("/kaggle/input")),
            "write": [attempt(lambda: open(path, "w")) for path in {WRITTEN!r}],
            "interfaces": [name for _, name in socket.if_nameindex()],
            "processes": [name for name in os.listdir("/proc") if name.isdecimal()],
            "users": open("/etc/passwd").read().count("\\n"), "names": open("/etc/resolv.conf").read(),
            "run_type": os.environ["KAGGLE_KERNEL_RUN_TYPE"], "secrets": [os.environ[name] for name in {SECRETS!r}],
            "tls": os.listdir("/etc/ssl") if os.path.isdir("/etc/ssl") else [],
            "tls_keys": os.path.lexists("/etc/pki/tls/private"),
            "certificates": len(ssl.create_default_context().get_ca_certs()),
            "home": os.environ["HOME"],
            "foreign": sorted(set(os.environ) & {{"HUBMAP_HOST_SECRET"}}), "path": sys.path,
        }}))
    """
    monkeypatch.setenv("HUBMAP_HOST_SECRET", "x")
    outcome = play(bare, tmp_path, script)
    seen = facts(outcome)
    assert not seen["repository"]
    assert not seen["tests"]
    assert (seen["cwd"], seen["prefix"], seen["read"], seen["home"]) == ("/kaggle/working", "/opt/venv", "aa", "/root")
    assert seen["inputs"] == ["datasets", "two"]
    assert set(seen["write"]) <= {
        13,
        30,
    }  # EACCES where root started the session and the file is not the kernel's; EROFS
    assert seen["interfaces"] == ["lo"]
    assert len(seen["processes"]) == 2  # the script, and the one that waits for it
    assert seen["users"] == 2
    assert seen["names"].startswith("nameserver 192.0.2.1\n")
    assert (seen["run_type"], seen["foreign"]) == ("Batch", [])
    assert seen["secrets"] == [CANARY] * len(SECRETS)
    assert str(ROOT) not in " ".join(seen["path"])
    assert set(seen["tls"]) <= {"certs", "cert.pem", "openssl.cnf"}
    assert not seen["tls_keys"]
    assert seen["certificates"] == len(ssl.create_default_context().get_ca_certs())
    proof = outcome.probes
    assert proof["interfaces"] == ["lo"]
    assert "connected" not in proof["connect"]
    assert proof["lookup"] != "resolved"
    assert {
        str(ROOT),
        str(Path.home() / ".kaggle"),
        str(Path.home() / ".ssh"),
        "/root/.kaggle",
        "/etc/ssl/private",
    } <= set(proof["absent"])
    assert proof["writable"] == []
    assert proof["working_bytes"] == 20 << 30
    assert (proof["capabilities"], proof["no_new_privileges"], proof["filtered"]) == (["0000000000000000"], True, True)
    assert proof["read_only"] == dict.fromkeys(
        ("/kaggle/input", "/kaggle/input/datasets/me/one", "/kaggle/input/two/b.txt"), "Read-only file system"
    )


def test_the_output_comes_out_and_a_former_one_goes(bare: Image, tmp_path: Path) -> None:
    first = play(bare, tmp_path, "import os; os.makedirs('a/b'); open('a/b/c.txt', 'w').write('c'); print('hello')")
    assert (first.working / "a/b/c.txt").read_text() == "c"
    assert first.log.read_text() == "hello\n"
    script = (
        "import os, sys; print(os.listdir('.'), os.listdir('/tmp'), file=sys.stderr); open('d.txt', 'w').close();"
        " sys.exit(3)"
    )
    (first.log.parent / ".session-of-a-killed-one").mkdir()
    second = play(bare, tmp_path, script)
    assert second.code == 3
    assert second.log.read_text() == "[] []\n"
    assert [path.name for path in second.working.iterdir()] == ["d.txt"]
    assert not [path for path in second.log.parent.iterdir() if path.name.startswith(".session")]


def test_a_full_disk_is_a_real_one_and_scratch_is_not_part_of_it(bare: Image, tmp_path: Path) -> None:
    script = f"""
        import json, os
        for folder in ("/tmp", "/kaggle/tmp"):
            open(folder + "/big", "wb").write(bytes({4 * MIB}))
        try:
            open("/kaggle/working/big", "wb", buffering=0).write(bytes({MIB}))
            open("/kaggle/working/more", "wb").write(bytes({4 * MIB}))
            number = 0
        except OSError as error: number = error.errno
        print(json.dumps({{"errno": number, "written": os.path.getsize("/kaggle/working/big")}}))
    """
    outcome = play(bare, tmp_path, script, disk_gib=2 * MIB / 2**30)
    assert facts(outcome) == {"errno": 28, "written": MIB}  # ENOSPC
    assert outcome.disk_bytes == 2 * MIB
    assert (outcome.working / "big").stat().st_size == MIB


def test_memory_is_that_of_the_whole_tree(bare: Image, tmp_path: Path) -> None:
    script = """
        import subprocess, sys, time
        hold = "import sys, time; block = bytearray(b'x') * (40 << 20); print(len(block), flush=True); time.sleep(60)"
        children = [subprocess.Popen([sys.executable, "-c", hold]) for _ in range(3)]
        [child.wait() for child in children]
    """
    outcome = play(bare, tmp_path, script, memory_gib=100 / 1024)
    assert outcome.stopped == "memory"
    assert outcome.code < 0
    assert outcome.peak_bytes > 100 * MIB


def test_memory_that_processes_share_counts_once_and_mapped_files_do_not_count(bare: Image, tmp_path: Path) -> None:
    script = """
        import mmap, os, time
        block = bytearray(b"x") * (40 << 20)
        children = []
        for _ in range(3):
            child = os.fork()
            if child == 0:
                time.sleep(1)
                os._exit(0)
            children.append(child)
        [os.waitpid(child, 0) for child in children]
        for path in ("/tmp/store", "/kaggle/working/store"):
            with open(path, "wb") as file:
                for _ in range(10): file.write(b"x" * (8 << 20))
            with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as store:
                assert all(store[at] == ord("x") for at in range(0, len(store), 4096))
                time.sleep(0.5)
    """
    outcome = play(bare, tmp_path, script, memory_gib=100 / 1024)
    assert (outcome.stopped, outcome.code) == ("", 0), outcome.log.read_text()
    assert 40 * MIB < outcome.peak_bytes < 100 * MIB


def test_shared_memory_counts_once_and_is_limited(bare: Image, tmp_path: Path) -> None:
    script = """
        import mmap, os, time
        with open("/dev/shm/unmapped", "wb") as file: file.write(b"x" * (40 << 20))
        with open("/dev/shm/mapped", "w+b") as file:
            file.truncate(40 << 20)
            block = mmap.mmap(file.fileno(), 0)
        os.unlink("/dev/shm/mapped")
        block.write(b"x" * (40 << 20))
        facts = os.statvfs("/dev/shm")
        print(facts.f_blocks * facts.f_frsize, flush=True)
        for _ in range(2):
            if os.fork() == 0:
                assert all(block[at] == ord("x") for at in range(0, len(block), 4096))
                time.sleep(1)
                os._exit(0)
        os.wait(), os.wait()
    """
    outcome = play(bare, tmp_path, script, memory_gib=160 / 1024)
    assert (outcome.stopped, outcome.code, outcome.log.read_text()) == ("", 0, f"{160 * MIB}\n")
    assert 80 * MIB < outcome.peak_bytes < 120 * MIB
    small = play(bare, tmp_path, script, memory_gib=60 / 1024)
    # Either the watch sees it first, or a page that is not to be had ends the process.
    assert small.stopped == "memory" or small.code == -signal.SIGBUS


def test_memory_that_no_process_shows_counts(bare: Image, tmp_path: Path) -> None:
    script = """
        import mmap, os, time
        file = os.memfd_create("hidden")
        os.write(file, bytes(40 << 20))
        block = mmap.mmap(file, 40 << 20)
        assert not any(block[at] for at in range(0, len(block), 4096))
        time.sleep(1)
        os.write(file, bytes({more} << 20))
        time.sleep(2)
    """
    enough = play(bare, tmp_path, script.format(more=1), memory_gib=80 / 1024)
    assert (enough.stopped, enough.code) == ("", 0), enough.log.read_text()
    assert 40 * MIB < enough.peak_bytes < 80 * MIB
    assert play(bare, tmp_path, script.format(more=60), memory_gib=80 / 1024).stopped == "memory"


def test_a_session_past_its_time_is_ended_with_all_its_processes(bare: Image, tmp_path: Path) -> None:
    odd = "3600.0625"  # names the process below
    script = f"""
        import signal, subprocess, time
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        subprocess.Popen(["sleep", "{odd}"], start_new_session=True)
        open("begun.txt", "w").close()
        time.sleep(600)
    """
    outcome = play(bare, tmp_path, script, minutes=1 / 60)
    assert outcome.stopped == "time"
    assert outcome.code == -9
    assert (outcome.working / "begun.txt").is_file()
    assert odd not in _command_lines()


MARKER = "HUBMAP END infer complete build_id=b utc=2026-01-01T00:00:00Z"
EXPECTED = Expected("infer", "b", ("complete",), (), ())


def test_what_is_left_after_the_end_fails_the_session(bare: Image, tmp_path: Path) -> None:
    """A process that stays, a kernel that stays itself, and a process that takes its time, but ends."""
    odd, late = "3600.03125", "3.0625"
    scripts = (
        f"import subprocess; subprocess.Popen(['sleep', '{odd}'], start_new_session=True); print('{MARKER}')",
        # Behind a progress bar, and in two pieces.
        (
            "import os, signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); os.write(1,"
            f" b'50%|##\\r{MARKER[:20]}'); os.write(1, b'{MARKER[20:]}\\n'); time.sleep(600)"
        ),
        f"import subprocess; subprocess.Popen(['sleep', '{late}'], start_new_session=True); print('{MARKER}')",
        f"import subprocess; subprocess.Popen(['sleep', '{odd}']); raise SystemExit(3)",
    )
    with ThreadPoolExecutor() as pool:
        outcomes = list(
            pool.map(lambda number: play(bare, tmp_path / f"{number}", scripts[number]), range(len(scripts)))
        )
    assert [(each.code, each.stopped) for each in outcomes] == [(0, ""), (-9, "left"), (0, ""), (3, "")]
    assert [each.left for each in outcomes] == [
        (f"sleep {odd}",),
        ("/opt/venv/bin/python -u /kaggle/src/script.py",),
        (),
        (f"sleep {odd}",),
    ]
    assert all(10 <= outcomes[number].seconds < 60 for number in (0, 1, 3))
    problems = [
        [problem for problem in judge(each, Limits(), EXPECTED).problems if "kernel.json" not in problem]
        for each in outcomes
    ]
    sentence = "1 process was still running 10 s after the end marker or the kernel's exit, and the session was ended: "
    assert problems[:3] == [
        [f"{sentence}sleep {odd}"],
        [f"{sentence}/opt/venv/bin/python -u /kaggle/src/script.py"],
        [],
    ]
    assert f"{sentence}sleep {odd}" in problems[3]
    assert odd not in _command_lines()


def _command_lines() -> str:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found.append(path.read_bytes().decode(errors="replace"))
        except OSError:
            continue
    return "\n".join(found)


def test_every_use_of_the_network_is_noted_even_a_swallowed_one(bare: Image, tmp_path: Path) -> None:
    script = """
        import socket, subprocess, sys, urllib.request
        try: urllib.request.urlopen("http://www.example.org/new", timeout=1)
        except OSError: pass
        one = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        try: one.sendto(b"x", ("198.51.100.7", 53))
        except OSError: pass
        code = "import socket\\ntry: socket.create_connection(('203.0.113.9', 443), 1)\\nexcept OSError: pass"
        subprocess.run([sys.executable, "-c", code], check=True)
    """
    outcome = play(bare, tmp_path, script)
    assert outcome.code == 0, outcome.log.read_text()
    hosts = {note["host"]: note["line"] for note in outcome.network}
    assert hosts["www.example.org:80"] == "/kaggle/src/script.py:3 in <module>"
    assert hosts["198.51.100.7:53"] == "/kaggle/src/script.py:6 in <module>"
    assert "203.0.113.9:443" in hosts
    assert outcome.lost_packets > 0


def test_programs_that_are_not_python_are_caught_by_their_packets(bare: Image, tmp_path: Path) -> None:
    script = "import subprocess; subprocess.run(['bash', '-c', 'echo x > /dev/tcp/{}/80'], stderr=subprocess.DEVNULL)"
    for address in ("192.0.2.77", *(["2001:db8::1"] if Path("/proc/net/snmp6").exists() else [])):
        outcome = play(bare, tmp_path, script.format(address))
        assert outcome.network == ()
        assert outcome.lost_packets > 0, address


def test_talk_within_the_session_is_no_use_of_the_network(bare: Image, tmp_path: Path) -> None:
    script = """
        import socket, threading
        server = socket.create_server(("127.0.0.1", 0))
        thread = threading.Thread(target=lambda: server.accept()[0].sendall(b"hello"))
        thread.start()
        one = socket.create_connection(("localhost", server.getsockname()[1]))
        print(one.recv(5)); thread.join()
        socket.getaddrinfo(socket.gethostname(), 80)
        pair = socket.socketpair(); pair[0].sendall(b"x")
    """
    outcome = play(bare, tmp_path, script)
    assert outcome.log.read_text() == "b'hello'\n"
    assert (outcome.network, outcome.lost_packets) == ((), 0)


def test_what_a_kernel_installs_is_gone_in_the_next_session(bare: Image, tmp_path: Path) -> None:
    script = """
        import importlib.util, json, site
        before = importlib.util.find_spec("extra") is not None
        open(site.getsitepackages()[0] + "/extra.py", "w").write("x = 1")
        importlib.invalidate_caches()
        import extra
        print(json.dumps([before, extra.x]))
    """
    assert facts(play(bare, tmp_path, script)) == [False, 1]
    assert facts(play(bare, tmp_path, script)) == [False, 1]


def test_an_environment_with_what_kaggle_lacks_is_refused(bare: Image, tmp_path: Path) -> None:
    packages = tmp_path / "packages"
    (packages / "ttach").mkdir(parents=True)
    (packages / "ttach" / "__init__.py").touch()
    image = Image(packages, bare.executable, bare.base_prefix, bare.version)
    with pytest.raises(RehearsalError, match="already has ttach, which Kaggle's image lacks"):
        play(image, tmp_path, "open('ran.txt', 'w')")
    assert not (tmp_path / "session" / "working").exists()


def test_a_folder_of_the_machine_that_shows_through_is_refused(bare: Image, tmp_path: Path) -> None:
    with pytest.raises(RehearsalError, match="/usr/bin can be seen inside the sandbox"):
        play(bare, tmp_path, "pass", hidden=(Path("/usr/bin").resolve(),))


def test_credentials_of_this_machine_are_proven_absent(
    bare: Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, elsewhere = tmp_path / "home", tmp_path / "elsewhere"
    for folder in (home / ".kaggle", home / ".ssh", elsewhere):
        folder.mkdir(parents=True)
        (folder / "secret").write_text("secret")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("KAGGLE_CONFIG_DIR", str(elsewhere))
    outcome = play(
        bare, tmp_path, f"import os; print([path for path in {[str(home), str(elsewhere)]!r} if os.path.lexists(path)])"
    )
    assert outcome.log.read_text() == "[]\n"
    assert {str(home / ".kaggle"), str(home / ".ssh"), str(elsewhere)} <= set(outcome.probes["absent"])
    monkeypatch.setenv("KAGGLE_CONFIG_DIR", "/usr/share")
    with pytest.raises(RehearsalError, match="/usr/share can be seen inside the sandbox"):
        play(bare, tmp_path, "pass")


# ---------------------------------------------------------------- a hostile kernel


@pytest.fixture
def attacked(bare: Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Outcome:
    """A session of the hostile kernel, on a machine with a file, a variable and a key that it must not get."""
    data = tmp_path / "data"
    data.mkdir()
    (data / "a.txt").write_text("a")
    (tmp_path / "canary.txt").write_text("canary")
    (data / "plan.json").write_text(hostile.plan(tmp_path / "canary.txt", data / "a.txt"))
    monkeypatch.setenv("HUBMAP_HOST_SECRET", hostile.SECRET)
    hostile.plant_key()
    session = Session(Path(hostile.__file__), ((data, "/kaggle/input/one"),), hidden=(ROOT,))
    return run_session(session, bare, tmp_path / "session")


def test_a_hostile_kernel_gets_nothing(attacked: Outcome, tmp_path: Path) -> None:
    assert (attacked.code, attacked.stopped, attacked.left) == (0, "", ())
    assert hostile.unexpected(attacked.log.read_text()) == []
    assert ((tmp_path / "data/a.txt").read_text(), (tmp_path / "canary.txt").read_text()) == ("a", "canary")
    assert sorted(path.name for path in (tmp_path / "session").iterdir()) == ["kernel.log", "working"]

    # Its uses of the network stand in the record, before what it has forged, and nothing in there can play with a
    # terminal.
    assert [note["host"] for note in attacked.network][:3] == [
        "203.0.113.77:4443",
        "203.0.113.77:4443",
        "swallowed.example.org:80",
    ]
    assert "a?FAIL forged" in [note["host"] for note in attacked.network]
    assert "".join(text for note in attacked.network for text in note.values()).isprintable()
    assert len(attacked.network) == 100
    assert attacked.lost_packets > 0

    # Its output: files and folders alone, whose owner is the one who asked, without rights that run something as that
    # one.
    found = [path for path in attacked.working.rglob("*")]
    assert {stat.S_IFMT(path.lstat().st_mode) for path in found} == {stat.S_IFDIR, stat.S_IFREG}
    assert all(path.lstat().st_uid == os.getuid() and not path.lstat().st_mode & 0o6022 for path in found)
    names = {str(path.relative_to(attacked.working)) for path in found}
    assert {"setuid", "...", "folder", "folder/good.txt", "folder/199", "closed/file"} <= names
    assert not names & {
        "absolute",
        "folder/relative",
        "etc",
        "proc",
        "inner",
        "chain",
        "pipe",
        "socket",
        "null",
        "hard",
        "sparse",
    }
    assert all(str(path).isprintable() for path in names)
    left = attacked.copy_error
    assert left.startswith("not all of the output can be kept: 'a\\nPASS forged' has a name that cannot be printed, ")
    assert f"absolute is a link to {tmp_path}/canary.txt" in left
    assert judge(attacked, Limits(), EXPECTED).problems.count(left) == 1


@pytest.mark.parametrize(
    ("script", "limits", "stopped", "sentence"),
    [
        (
            "import os\nwhile True: os.write(1, b'y' * 65535 + b'\\n')",
            {},
            "log",
            "log full: the kernel printed more than 64 MiB and was ended",
        ),
        # A file without a name is in no folder, and one that is only mapped in no list of descriptors either.
        (
            "import os\nfile = open('/tmp/x', 'wb')\nos.unlink('/tmp/x')\nwhile True: file.write(bytes(1 << 20))",
            {"scratch_gib": 0.25},
            "scratch",
            "disk full: the disk of /tmp and /kaggle/tmp lost ",
        ),
        (
            (
                "import mmap, os\nfile = open('/kaggle/tmp/x', 'w+b')\nfile.truncate(1 << 34)\nblock ="
                " mmap.mmap(file.fileno(), 1 << 34)\nfile.close()\nos.unlink('/tmp/x')\nfor at in range(0, 1 << 34,"
                " 4096): block[at] = 1"
            ),
            {"scratch_gib": 0.25},
            "scratch",
            "disk full: the disk of /tmp and /kaggle/tmp lost ",
        ),
        (
            "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
            {},
            "processes",
            "too many processes: ",
        ),
        (
            (
                "import threading, time\nwhile True:\n    try: threading.Thread(target=time.sleep,"
                " args=(600,)).start()\n    except RuntimeError: pass"
            ),
            {},
            "processes",
            "too many processes: ",
        ),
    ],
    ids=["log", "disk", "mapped", "processes", "threads"],
)
def test_what_takes_too_much_is_stopped(
    bare: Image, tmp_path: Path, script: str, limits: dict[str, float], stopped: str, sentence: str
) -> None:
    outcome = play(bare, tmp_path, script, minutes=3.0, **limits)
    assert (outcome.stopped, outcome.code) == (stopped, -9)
    assert judge(outcome, Limits(), EXPECTED).problems[0].startswith(sentence)
    assert outcome.log.stat().st_size <= 64 * MIB
    assert sorted(path.name for path in outcome.log.parent.iterdir()) == ["kernel.log", "working"]


def test_what_a_kernel_may_write_to_is_full_some_time(bare: Image, tmp_path: Path) -> None:
    """Files of no bytes fill a file system in memory as well, and so do names of one file."""
    script = """
        import json, os
        def filled(folder):
            os.mkdir(folder)
            try:
                open(folder + "/first", "w").close()
                for number in range(300_000): os.link(folder + "/first", f"{folder}/{number}")
            except OSError as error: return error.errno
        print(json.dumps(filled("/opt/venv/x")))
    """
    assert facts(play(bare, tmp_path, script)) == 28  # ENOSPC


def test_what_the_watcher_takes_back_and_counts(tmp_path: Path) -> None:
    """Processors, which need no right to be taken, and files on the machine's disk, which `test_what_takes_too_much`
    has no time for.
    """
    code = f"""
        import json, os, sys
        from pathlib import Path
        sys.path.insert(0, {str(ROOT / "hubmap_kit/rehearsal/inside")!r})
        import confine, watch
        watch.SCRATCH, watch.SCRATCH_FILES = {str(tmp_path)!r}, 50
        scratch = watch.Scratch(1 << 40)
        for number in range(200): Path({str(tmp_path)!r}, f"{{number}}").touch()
        confine.cores = lambda: {{min(os.sched_getaffinity(0))}}
        watch.hold_to_cores([str(os.getpid())])
        print(json.dumps([len(os.sched_getaffinity(0)), scratch.full()]))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False)
    cores, full = json.loads(done.stdout)
    assert cores == 1
    assert full.endswith(
        "files came to the disk of /tmp and /kaggle/tmp, more than the 50 that a session may make here"
    )


def test_what_an_honest_kernel_does_still_works(bare: Image, tmp_path: Path) -> None:
    """Workers of each kind, shared memory, descriptors sent to others, servers, programs, streams by name, links, its
    own home.
    """
    script = """
        import array, json, multiprocessing, os, socket, subprocess, sys, tempfile
        from multiprocessing import shared_memory

        def double(number): return 2 * number

        def taken(line):
            _, descriptors, _, _ = socket.recv_fds(line, 1, 1)
            return os.read(descriptors[0], 9).decode()

        if __name__ == "__main__":
            found = {}
            for kind in ("fork", "spawn", "forkserver"):
                with multiprocessing.get_context(kind).Pool(2) as pool: found[kind] = pool.map(double, range(3))
            block = shared_memory.SharedMemory(create=True, size=1 << 20)
            other = shared_memory.SharedMemory(block.name)
            block.buf[5] = 7
            found["shared"] = other.buf[5]
            other.close(), block.close(), block.unlink()
            ours, theirs = socket.socketpair()
            reader, writer = os.pipe()
            os.write(writer, b"sent")
            socket.send_fds(ours, [b"x"], [reader])
            found["descriptor"] = taken(theirs)
            os.symlink("/kaggle/input/two", "/kaggle/tmp/link")
            found["link"] = open("/kaggle/tmp/link/b.txt").read()
            words = ["sh", "-c", "id -u; echo told > /dev/stderr"]
            found["user"] = subprocess.run(words, capture_output=True, text=True).stdout.split()
            os.makedirs(os.path.expanduser("~/.cache/x"))
            with open("/dev/stdout", "w") as file: print("by name", file=file)
            with tempfile.NamedTemporaryFile() as file: found["temporary"] = file.name.startswith("/tmp/")
            os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
            print(json.dumps(found))
    """
    outcome = play(bare, tmp_path, script)
    doubled = [0, 2, 4]
    assert facts(outcome) == {
        "fork": doubled,
        "spawn": doubled,
        "forkserver": doubled,
        "shared": 7,
        "descriptor": "sent",
        "link": "a",
        "user": ["0"],
        "temporary": True,
    }
    assert "by name\n" in outcome.log.read_text()


@pytest.mark.parametrize("closed", ["data/closed.txt", "data/folder", "kernel.py"])
def test_what_the_kernels_user_may_not_read_is_named(closed: str, bare: Image, tmp_path: Path) -> None:
    (tmp_path / "data/folder").mkdir(parents=True)
    for name in ("data/closed.txt", "kernel.py"):
        (tmp_path / name).touch()
    (tmp_path / closed).chmod(0)
    inside, above = (
        ("/kaggle/src/script.py", closed) if closed == "kernel.py" else (f"/kaggle/input/one{closed[4:]}", "data")
    )
    session = Session(tmp_path / "kernel.py", ((tmp_path / "data", "/kaggle/input/one"),))
    with pytest.raises(
        RehearsalError,
        match=rf"{inside} cannot be read by the kernel's user.*: chmod -R a\+rX {tmp_path / above}, and umask 022",
    ):
        run_session(session, bare, tmp_path / "session")
