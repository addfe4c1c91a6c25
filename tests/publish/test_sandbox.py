"""The sandbox, by what a script inside it can and cannot do."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import textwrap
import time
from pathlib import Path

import pytest

import hubmap_kit
from hubmap_kit.errors import RehearsalError
from hubmap_kit.publish.rehearsal.image import Image
from hubmap_kit.publish.rehearsal.sandbox import CANARY, SECRETS, Limits, Outcome, Session, check_machine, run

ROOT = Path(hubmap_kit.__file__).resolve().parents[1]
MIB = 1 << 20


def _forbidden() -> str:
    try:
        check_machine()
    except RehearsalError as error:
        return str(error)
    return ""


pytestmark = pytest.mark.skipif(bool(_forbidden()), reason=_forbidden() or "namespaces work")


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Image:
    """An environment without any package: the interpreter of the tests alone."""
    folder = tmp_path_factory.mktemp("bare")
    return Image(folder, folder, Path(os.path.realpath(sys._base_executable)), Path(sys.base_prefix).resolve(), sysconfig.get_python_version())


def play(image: Image, folder: Path, script: str, hidden: tuple[Path, ...] = (ROOT,), **limits: float) -> Outcome:
    """Run a script in a session with one input file."""
    data = folder / "data"
    data.mkdir(parents=True, exist_ok=True)
    (data / "a.txt").write_text("a")
    path = folder / "kernel.py"
    path.write_text(textwrap.dedent(script))
    inputs = ((data, "/kaggle/input/datasets/me/one"), (data / "a.txt", "/kaggle/input/two/b.txt"))
    return run(Session(path, inputs, Limits(**limits), hidden), image, folder / "session")


def facts(outcome: Outcome) -> dict[str, object]:
    """What the script printed as its last line."""
    text = outcome.log.read_text()
    assert outcome.code == 0, text
    return json.loads(text.splitlines()[-1])


def test_a_session_sees_kaggles_folders_and_nothing_of_the_machine(bare: Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = f"""
        import json, os, socket, sys
        def attempt(action):
            try: action()
            except OSError as error: return error.errno
            return "done"
        print(json.dumps({{
            "repository": os.path.lexists({str(ROOT)!r}), "tests": os.path.lexists({str(tmp_path)!r}), "cwd": os.getcwd(), "prefix": sys.prefix,
            "read": open("/kaggle/input/datasets/me/one/a.txt").read() + open("/kaggle/input/two/b.txt").read(),
            "inputs": sorted(os.listdir("/kaggle/input")),
            "write": [attempt(lambda: open(path, "w")) for path in ("/kaggle/input/x", "/kaggle/input/datasets/me/one/x", "/kaggle/input/two/b.txt", "/usr/x")],
            "interfaces": [name for _, name in socket.if_nameindex()],
            "processes": [name for name in os.listdir("/proc") if name.isdecimal()],
            "users": open("/etc/passwd").read().count("\\n"), "names": open("/etc/resolv.conf").read(),
            "run_type": os.environ["KAGGLE_KERNEL_RUN_TYPE"], "secret": os.environ["KAGGLE_USER_SECRETS_TOKEN"], "home": os.environ["HOME"],
            "strangers": sorted(set(os.environ) & {{"HUBMAP_STRANGER"}}), "path": sys.path,
        }}))
    """
    monkeypatch.setenv("HUBMAP_STRANGER", "x")
    seen = facts(play(bare, tmp_path, script))
    assert not seen["repository"]
    assert not seen["tests"]
    assert (seen["cwd"], seen["prefix"], seen["read"], seen["home"]) == ("/kaggle/working", "/opt/venv", "aa", "/root")
    assert seen["inputs"] == ["datasets", "two"]
    assert seen["write"] == [30, 30, 30, 30]  # EROFS
    assert seen["interfaces"] == ["lo"]
    assert len(seen["processes"]) == 2  # the supervisor and the script
    assert seen["users"] == 2
    assert seen["names"].startswith("nameserver 192.0.2.1\n")
    assert (seen["run_type"], seen["secret"], seen["strangers"]) == ("Batch", CANARY, [])
    assert str(ROOT) not in " ".join(seen["path"])


def test_the_proof_is_kept(bare: Image, tmp_path: Path) -> None:
    proof = play(bare, tmp_path, "pass").probes
    assert proof["interfaces"] == ["lo"]
    assert "connected" not in proof["connect"]
    assert proof["lookup"] != "resolved"
    assert proof["absent"] == [str(ROOT)]
    assert proof["working_bytes"] == 20 << 30
    assert proof["read_only"] == dict.fromkeys(("/kaggle/input", "/kaggle/input/datasets/me/one", "/kaggle/input/two/b.txt"), "Read-only file system")


def test_the_output_comes_out_and_a_former_one_goes(bare: Image, tmp_path: Path) -> None:
    first = play(bare, tmp_path, "import os; os.makedirs('a/b'); open('a/b/c.txt', 'w').write('c'); print('hello')")
    assert (first.working / "a/b/c.txt").read_text() == "c"
    assert first.log.read_text() == "hello\n"
    second = play(bare, tmp_path, "import os, sys; print(os.listdir('.'), os.listdir('/tmp'), file=sys.stderr); open('d.txt', 'w').close(); sys.exit(3)")
    assert second.code == 3
    assert second.log.read_text() == "[] []\n"
    assert [path.name for path in second.working.iterdir()] == ["d.txt"]
    assert not [path for path in second.log.parent.iterdir() if path.name.startswith(".session")]


def test_a_full_disk_is_a_real_one_and_scratch_is_not_part_of_it(bare: Image, tmp_path: Path) -> None:
    script = f"""
        import json, os
        for folder in ("/tmp", "/kaggle/tmp"):
            open(folder + "/big", "wb").write(bytes({4 * MIB}))
        try: open("/kaggle/working/big", "wb", buffering=0).write(bytes({MIB})); open("/kaggle/working/more", "wb").write(bytes({4 * MIB})); number = 0
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


def test_memory_that_processes_share_counts_once(bare: Image, tmp_path: Path) -> None:
    script = """
        import os, time
        block = bytearray(b"x") * (40 << 20)
        children = []
        for _ in range(3):
            child = os.fork()
            if child == 0:
                time.sleep(1)
                os._exit(0)
            children.append(child)
        [os.waitpid(child, 0) for child in children]
    """
    outcome = play(bare, tmp_path, script, memory_gib=100 / 1024)
    assert (outcome.stopped, outcome.code) == ("", 0)
    assert 40 * MIB < outcome.peak_bytes < 100 * MIB


def test_files_mapped_into_memory_do_not_count(bare: Image, tmp_path: Path) -> None:
    script = """
        import mmap, time
        with open("/tmp/store", "wb") as file:
            for _ in range(10): file.write(b"x" * (8 << 20))
        with open("/tmp/store", "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as store:
            assert all(store[at] == ord("x") for at in range(0, len(store), 4096))
            time.sleep(1)
    """
    outcome = play(bare, tmp_path, script, memory_gib=60 / 1024)
    assert (outcome.stopped, outcome.code) == ("", 0), outcome.log.read_text()


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


def test_what_a_kernel_leaves_running_ends_with_it(bare: Image, tmp_path: Path) -> None:
    odd = "3600.03125"
    outcome = play(bare, tmp_path, f"import subprocess; subprocess.Popen(['sleep', '{odd}'], start_new_session=True)")
    assert outcome.code == 0
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
    script = "import subprocess; subprocess.run(['bash', '-c', 'echo x > /dev/tcp/192.0.2.77/80'], stderr=subprocess.DEVNULL)"
    outcome = play(bare, tmp_path, script)
    assert outcome.network == ()
    assert outcome.lost_packets > 0


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
    image = Image(packages, packages, bare.executable, bare.base_prefix, bare.version)
    with pytest.raises(RehearsalError, match="already has ttach, which Kaggle's image lacks"):
        play(image, tmp_path, "open('ran.txt', 'w')")
    assert not (tmp_path / "session" / "working").exists()


def test_a_folder_of_the_machine_that_shows_through_is_refused(bare: Image, tmp_path: Path) -> None:
    with pytest.raises(RehearsalError, match="/usr/bin can be seen inside the sandbox"):
        play(bare, tmp_path, "pass", hidden=(Path("/usr/bin").resolve(),))


def test_the_secrets_are_worthless_here_and_named_as_on_kaggle(bare: Image, tmp_path: Path) -> None:
    outcome = play(bare, tmp_path, f"import os; print([os.environ[name] for name in {SECRETS!r}])")
    assert outcome.log.read_text().strip() == str([CANARY] * len(SECRETS))


PLAY = """
import sys
from pathlib import Path
sys.path[:0] = [{root!r}]
from hubmap_kit.publish.rehearsal.image import Image
from hubmap_kit.publish.rehearsal.sandbox import Session, run
image = Image(*(Path(part) for part in {parts!r}), {version!r})
print(run(Session(Path({script!r}), ()), image, Path({folder!r})).code)
"""


def player(image: Image, script: Path, folder: Path) -> list[str]:
    """A command that runs a script in a session, for tests that need another process."""
    parts = [str(part) for part in (image.folder, image.site_packages, image.executable, image.base_prefix)]
    return [sys.executable, "-c", PLAY.format(root=str(ROOT), parts=parts, version=image.version, script=str(script), folder=str(folder))]


def test_it_needs_no_root(bare: Image, tmp_path: Path) -> None:
    script = tmp_path / "kernel.py"
    script.write_text("open('done.txt', 'w').write('done')")
    # Another user number than 0, and no capability at all: what an ordinary account has.
    as_user = ["unshare", "--user", "--map-user=1000", "--map-group=1000"]
    seen = subprocess.run([*as_user, sys.executable, "-c", "import os; print(os.getuid())"], capture_output=True, text=True, check=False)
    if seen.stdout.strip() != "1000":
        pytest.skip(f"this unshare cannot play an ordinary account: {seen.stderr.strip()}")
    done = subprocess.run([*as_user, *player(bare, script, tmp_path / "session")], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "0", done.stderr
    assert (tmp_path / "session" / "working" / "done.txt").read_text() == "done"


def test_stopping_it_takes_every_process_along(bare: Image, tmp_path: Path) -> None:
    odd = "3600.015625"
    script = tmp_path / "kernel.py"
    script.write_text(f"import subprocess\nchild = subprocess.Popen(['sleep', '{odd}'], start_new_session=True)\nprint('begun', flush=True)\nchild.wait()")
    process = subprocess.Popen(player(bare, script, tmp_path / "session"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    log = tmp_path / "session" / "kernel.log"
    while process.poll() is None and not (log.is_file() and "begun" in log.read_text()):
        time.sleep(0.05)
    assert odd in _command_lines()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert err.rstrip().endswith("KeyboardInterrupt")
    assert odd not in _command_lines()
    assert [path.name for path in log.parent.iterdir()] == ["kernel.log"]


def test_a_machine_that_forbids_namespaces_gets_a_sentence(tmp_path: Path) -> None:
    # A user namespace has a limit of its own on further ones: with it at 0 the refusal is the real one.
    command = f"echo 0 > /proc/sys/user/max_user_namespaces && exec {sys.executable} -m hubmap_kit rehearse --out {tmp_path / 'out'}"
    done = subprocess.run(["unshare", "--user", "--map-root-user", "sh", "-c", command], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1] == (
        "error: /proc/sys/user/max_user_namespaces is 0, which forbids the user namespaces that a rehearsal runs in; "
        "allow them: sudo sysctl user.max_user_namespaces=15000"
    )
    assert not (tmp_path / "out").exists()


def test_a_machine_without_unshare_gets_a_sentence(tmp_path: Path) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("sh", "git"):
        found = shutil.which(name)
        if found:
            (programs / name).symlink_to(found)
    command = [sys.executable, "-m", "hubmap_kit", "rehearse", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={"PATH": str(programs)}, cwd=ROOT)
    assert done.returncode == 1
    assert "error: 'unshare' is not on the PATH" in done.stderr
