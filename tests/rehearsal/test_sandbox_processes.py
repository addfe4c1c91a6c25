"""The sandbox as a process among others: who starts it, what is mounted there, what ends it, and machines that cannot
run it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import hostile
import pytest
from namespaces import needs_namespaces

import hubmap_kit
from hubmap_kit.rehearsal.image import Image

ROOT = Path(hubmap_kit.__file__).resolve().parents[1]


pytestmark = needs_namespaces


def _command_lines() -> str:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found.append(path.read_bytes().decode(errors="replace"))
        except OSError:
            continue
    return "\n".join(found)


def _below(pid: int) -> list[int]:
    """A process's children, theirs, and so on."""
    children = [int(word) for path in Path(f"/proc/{pid}/task").glob("*/children") for word in path.read_text().split()]
    return children + [other for child in children for other in _below(child)]


PLAY = """
import sys
from pathlib import Path
sys.path[:0] = [{root!r}]
from hubmap_kit.rehearsal.image import Image
from hubmap_kit.rehearsal.sandbox import Session, run_session
image = Image(*(Path(part) for part in {parts!r}), {version!r})
inputs = [(Path(source), "/kaggle/input/one") for source in {inputs!r}]
print(run_session(Session(Path({script!r}), tuple(inputs)), image, Path({folder!r})).code)
"""


def player(image: Image, script: Path, folder: Path, *inputs: Path) -> list[str]:
    """A command that runs a script in a session, for tests that need another process."""
    parts = [str(part) for part in (image.site_packages, image.executable, image.base_prefix)]
    words = {
        "root": str(ROOT),
        "version": image.version,
        "script": str(script),
        "folder": str(folder),
        "inputs": [str(path) for path in inputs],
    }
    return [sys.executable, "-c", PLAY.format(parts=parts, **words)]


def test_what_is_mounted_below_an_input_is_read_only_too(bare: Image, tmp_path: Path) -> None:
    data, script = tmp_path / "data", tmp_path / "kernel.py"
    (data / "a disk").mkdir(parents=True)
    script.write_text(
        "import os; print(os.listdir('/kaggle/input/one/a disk')); open('/kaggle/input/one/a disk/x', 'w')"
    )
    mount = f"mount -t tmpfs -o noexec none '{data}/a disk' && touch '{data}/a disk/there' && exec \"$@\""
    command = [
        "unshare",
        "--user",
        "--map-root-user",
        "--mount",
        "sh",
        "-c",
        mount,
        "sh",
        *player(bare, script, tmp_path / "session", data),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "1", done.stderr
    log = (tmp_path / "session" / "kernel.log").read_text()
    assert log.startswith("['there']\n")
    assert "Read-only file system" in log


def test_it_needs_no_root_and_holds_without_it(bare: Image, tmp_path: Path) -> None:
    """The kernel and the watcher are one user of the machine then; what keeps the kernel in is all the more what it
    cannot do.
    """
    data, secret = tmp_path / "data", {"HUBMAP_HOST_SECRET": hostile.SECRET}
    data.mkdir()
    (data / "a.txt").write_text("a")
    (tmp_path / "canary.txt").write_text("canary")
    (data / "plan.json").write_text(hostile.plan(tmp_path / "canary.txt", data / "a.txt"))
    # Another user number than 0, and no capability at all: what an ordinary account has.
    as_user = ["unshare", "--user", "--map-user=1000", "--map-group=1000"]
    seen = subprocess.run(
        [*as_user, sys.executable, "-c", "import os; print(os.getuid())"], capture_output=True, text=True, check=False
    )
    if seen.stdout.strip() != "1000":
        pytest.skip(f"this unshare cannot play an ordinary account: {seen.stderr.strip()}")
    command = [*as_user, *player(bare, Path(hostile.__file__), tmp_path / "session", data)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | secret)
    assert done.stdout.strip() == "0", done.stderr
    assert hostile.unexpected((tmp_path / "session/kernel.log").read_text()) == []
    assert ((data / "a.txt").read_text(), (tmp_path / "canary.txt").read_text()) == ("a", "canary")
    assert (tmp_path / "session/working/folder/good.txt").read_text() == "good"
    assert sorted(path.name for path in (tmp_path / "session").iterdir()) == ["kernel.log", "working"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_stopping_it_takes_every_process_along(bare: Image, tmp_path: Path, number: signal.Signals) -> None:
    odd = f"3600.0{number.value:03}15625"
    script = tmp_path / "kernel.py"
    start = f"subprocess.Popen(['sleep', '{odd}'], start_new_session=True)"
    script.write_text(
        f"import signal, subprocess\nsignal.signal(15, signal.SIG_IGN)\nchild = {start}\nprint('begun',"
        " flush=True)\nchild.wait()"
    )
    command, secret = player(bare, script, tmp_path / "session"), {"HUBMAP_HOST_SECRET": hostile.SECRET}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | secret
    )
    log = tmp_path / "session" / "kernel.log"
    while process.poll() is None and not (log.is_file() and "begun" in log.read_text()):
        time.sleep(0.05)
    assert odd in _command_lines()
    around = [
        pid for pid in _below(process.pid) if Path(f"/proc/{pid}/cmdline").read_bytes().endswith(b"\0-I\0-B\0inside\0")
    ]
    assert len(around) == 3  # what waits for the watcher, the watcher, process 1 of the kernel's namespace
    assert not any(hostile.SECRET.encode() in Path(f"/proc/{pid}/environ").read_bytes() for pid in around)
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == -number
    end = time.monotonic() + 30  # the kernel of the machine ends what nobody is left to wait for
    while number != signal.SIGINT and odd in _command_lines() and time.monotonic() < end:
        time.sleep(0.02)
    assert odd not in _command_lines()
    if number == signal.SIGINT:
        assert [path.name for path in log.parent.iterdir()] == ["kernel.log"]


def test_a_machine_that_forbids_namespaces_gets_a_sentence(tmp_path: Path) -> None:
    # A user namespace has a limit of its own on further ones: with it at 0 the refusal is the real one.
    command = (
        f"echo 0 > /proc/sys/user/max_user_namespaces && exec {sys.executable} -m hubmap_kit rehearse --out"
        f" {tmp_path / 'out'}"
    )
    done = subprocess.run(
        ["unshare", "--user", "--map-root-user", "sh", "-c", command],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1] == (
        "error: /proc/sys/user/max_user_namespaces is 0, which forbids the user namespaces that a rehearsal runs in; "
        "allow them: sudo sysctl user.max_user_namespaces=15000"
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGKILL])  # one that is answered, one that cannot be
def test_stopping_it_while_the_environment_is_made_leaves_nothing_either(
    tmp_path: Path, number: signal.Signals
) -> None:
    odd, python = f"3600.1{number.value:03}15625", tmp_path / "python"
    python.write_text(f"#!/bin/sh\nexec sleep {odd}\n")
    python.chmod(0o755)
    command = [sys.executable, "-m", "hubmap_kit", "rehearse", "--python", str(python), "--out", str(tmp_path / "out")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    while process.poll() is None and f"sleep\0{odd}" not in _command_lines():
        time.sleep(0.2)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == (-number if number == signal.SIGKILL else 130), err
    end = time.monotonic() + 30
    while odd in _command_lines() and time.monotonic() < end:
        time.sleep(0.02)
    assert odd not in _command_lines()
