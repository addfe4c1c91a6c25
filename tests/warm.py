"""Commands of Python without the seconds that importing libraries takes: a process that has them loaded forks for each
command.

What runs is a process of its own, with the command's arguments, environment and folder, and Python ends it as any
other. Only libraries are loaded before, nothing of the kit, and none that looks at the environment when it is imported.
Not for commands that need another PYTHONPATH, that get signals other than the last one, or whose imports are looked at.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from family import check_gone

PUBLISHING = (
    "requests",
    "kagglesdk",
    "bleach",
    "slugify",
    "dateutil.parser",
    "tqdm",
    "typer",
    "rich",
    "yaml",
    "pydantic",
    "numpy",
)
TRAINING = (
    "torch",
    "torch.utils.data",
    "torch._dynamo",
    "timm",
    "albumentations",
    "segmentation_models_pytorch",
    "pandas",
    "pyarrow.parquet",
    "scipy.ndimage",
    "matplotlib.figure",
    "matplotlib.backends.backend_agg",
    "safetensors.torch",
    "sklearn.model_selection",
    "tifffile",
    "cv2",
    *PUBLISHING,
)


def run(
    command: Sequence[str],
    modules: tuple[str, ...] = PUBLISHING,
    env: Mapping[str, str] | None = None,
    cwd: str | Path | None = None,
    timeout: float = 300,
    kill_when: Callable[[], bool] | None = None,
) -> subprocess.CompletedProcess[str]:
    """As `subprocess.run(command, capture_output=True, text=True, check=False)`; `command` is [sys.executable, -m
    MODULE or -c CODE, ...].

    It and all that it started get a SIGKILL as soon as `kill_when` holds. Fails where a process of it is left ten
    seconds after its last line.
    """
    python, *words = map(str, command)
    environment = dict(os.environ if env is None else env)
    assert python == sys.executable and words[0] in ("-m", "-c")
    assert environment.get("PYTHONPATH") in (None, os.environ.get("PYTHONPATH"))
    ended, told = os.pipe()
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        try:
            asked = json.dumps({"words": words, "environment": environment, "folder": str(cwd or os.getcwd())}).encode()
            server = _server(modules, os.getpid())
            socket.send_fds(server, [len(asked).to_bytes(4, "big")], [out.fileno(), err.fileno(), told])
            server.sendall(asked)
        finally:
            os.close(told)
        with open(ended, encoding="ascii") as lines:
            pid, end, killed = int(lines.readline()), time.monotonic() + timeout, False
            while not select.select([lines], [], [], 0.002 if kill_when else timeout)[0]:
                late = time.monotonic() > end
                if late or (kill_when and not killed and kill_when()):
                    os.killpg(pid, signal.SIGKILL)
                    killed = True
                if late:
                    raise subprocess.TimeoutExpired(list(command), timeout)
            code = int(lines.readline())
        check_gone(pid, max(os.fstat(file.fileno()).st_mtime for file in (out, err)))
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode().replace("\r\n", "\n").replace("\r", "\n"))
    return subprocess.CompletedProcess(list(command), code, *texts)


@cache
def _server(modules: tuple[str, ...], pid: int) -> socket.socket:
    """The line to a process that has the modules loaded; `pid` is this one's: one that was forked from it has none
    yet.
    """
    ours, theirs = socket.socketpair()
    words = [sys.executable, __file__, str(theirs.fileno()), *modules]
    once = {
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        "OMP_WAIT_POLICY": "PASSIVE",
        "NO_ALBUMENTATIONS_UPDATE": "1",
        "HF_HUB_OFFLINE": "1",
    }
    quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    subprocess.Popen(words, env=os.environ | once, pass_fds=[theirs.fileno()], start_new_session=True, **quiet)
    theirs.close()
    return ours


def _serve(line: socket.socket) -> dict[str, Any]:
    """Fork for each command, until the tests have ended; returns, in a forked process, what that one has to do."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        size, places, _, _ = socket.recv_fds(line, 4, 3)
        if not size:
            os._exit(0)
        left, text = int.from_bytes(size, "big"), b""
        while len(text) < left:
            text += line.recv(left - len(text))
        plan = json.loads(text)
        if not os.fork():
            break
        for descriptor in places:
            os.close(descriptor)
    line.close()
    out, err, told = places
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    if pid := os.fork():  # this one waits for the command, and says how it ended
        os.write(told, b"%d\n" % pid)
        asker = select.poll()
        asker.register(told, 0)
        while not (ended := os.waitpid(pid, os.WNOHANG))[0]:
            if asker.poll(10):  # nobody listens any more: the tests were stopped
                os.killpg(pid, signal.SIGKILL)
        os.write(told, b"%d\n" % os.waitstatus_to_exitcode(ended[1]))
        os._exit(0)
    os.setsid()
    for descriptor, place in ((out, 1), (err, 2)):
        os.dup2(descriptor, place)
    for descriptor in (out, err, told):
        os.close(descriptor)
    return plan


def _become(plan: dict[str, Any]) -> None:
    """Be the command: its environment, folder and arguments, and nothing random in common with the next one."""
    os.environ.clear()
    os.environ.update(plan["environment"])
    os.chdir(plan["folder"])
    tempfile.tempdir = None
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed()
    kind, what, *arguments = plan["words"]
    sys.path[0] = os.getcwd() if kind == "-m" else ""
    sys.argv = [kind, *arguments]
    if kind == "-c":
        exec(compile(what, "<string>", "exec"), {"__name__": "__main__", "__builtins__": __builtins__})
    else:
        import runpy

        runpy.run_module(what, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    for _name in sys.argv[2:]:
        with suppress(ImportError):
            import_module(_name)
    import gc

    gc.freeze()  # what all share is never looked through again
    _become(_serve(socket.socket(fileno=int(sys.argv[1]))))
