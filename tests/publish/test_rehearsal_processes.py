"""The sandbox as a process among others: who starts it, what is mounted there, what ends it, and machines that cannot run it."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from namespaces import needs_namespaces

import hubmap_kit
from hubmap_kit.publish.rehearsal.image import Image

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


PLAY = """
import sys
from pathlib import Path
sys.path[:0] = [{root!r}]
from hubmap_kit.publish.rehearsal.image import Image
from hubmap_kit.publish.rehearsal.sandbox import Session, run
image = Image(*(Path(part) for part in {parts!r}), {version!r})
inputs = [(Path(source), "/kaggle/input/one") for source in {inputs!r}]
print(run(Session(Path({script!r}), tuple(inputs)), image, Path({folder!r})).code)
"""


def player(image: Image, script: Path, folder: Path, *inputs: Path) -> list[str]:
    """A command that runs a script in a session, for tests that need another process."""
    parts = [str(part) for part in (image.folder, image.site_packages, image.executable, image.base_prefix)]
    words = {"root": str(ROOT), "version": image.version, "script": str(script), "folder": str(folder), "inputs": [str(path) for path in inputs]}
    return [sys.executable, "-c", PLAY.format(parts=parts, **words)]


def test_what_is_mounted_below_an_input_is_read_only_too(bare: Image, tmp_path: Path) -> None:
    data, script = tmp_path / "data", tmp_path / "kernel.py"
    (data / "a disk").mkdir(parents=True)
    script.write_text("import os; print(os.listdir('/kaggle/input/one/a disk')); open('/kaggle/input/one/a disk/x', 'w')")
    mount = f"mount -t tmpfs -o noexec none '{data}/a disk' && touch '{data}/a disk/there' && exec \"$@\""
    command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", mount, "sh", *player(bare, script, tmp_path / "session", data)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "1", done.stderr
    log = (tmp_path / "session" / "kernel.log").read_text()
    assert log.startswith("['there']\n")
    assert "Read-only file system" in log


def test_ending_all_processes_waits_for_their_end() -> None:
    inside = ROOT / "hubmap_kit/publish/rehearsal/inside"
    code = f"""
        import json, os, subprocess, sys, time
        sys.path.insert(0, {str(inside)!r})
        import watch
        for _ in range(20):
            subprocess.Popen(["sh", "-c", "sleep 3600 & sleep 3600"], start_new_session=True)
        time.sleep(0.2)
        codes = watch.kill_all()
        print(json.dumps([[name for name in os.listdir("/proc") if name.isdecimal()], sorted(set(codes.values())), len(codes) >= 20]))
    """
    command = ["unshare", "--user", "--map-root-user", "--pid", "--fork", "--mount-proc", sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert json.loads(done.stdout) == [["1"], [-9], True], done.stderr


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


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_stopping_it_takes_every_process_along(bare: Image, tmp_path: Path, number: signal.Signals) -> None:
    odd = f"3600.0{number.value:03}15625"
    script = tmp_path / "kernel.py"
    start = f"subprocess.Popen(['sleep', '{odd}'], start_new_session=True)"
    script.write_text(f"import signal, subprocess\nsignal.signal(15, signal.SIG_IGN)\nchild = {start}\nprint('begun', flush=True)\nchild.wait()")
    process = subprocess.Popen(player(bare, script, tmp_path / "session"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    log = tmp_path / "session" / "kernel.log"
    while process.poll() is None and not (log.is_file() and "begun" in log.read_text()):
        time.sleep(0.05)
    assert odd in _command_lines()
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
