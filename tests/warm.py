"""Commands of Python without the seconds that importing libraries takes: a process that has them loaded forks for each command.

What runs is a process of its own, with the command's arguments, environment and folder, and Python ends it as any other. Only libraries
are loaded before, nothing of the kit, and none that looks at the environment when it is imported. Not for commands that need another
PYTHONPATH, that get signals other than the last one, or whose imports are looked at.
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

PUBLISHING = ("requests", "kagglesdk", "bleach", "slugify", "dateutil.parser", "tqdm", "typer", "rich", "yaml", "pydantic", "numpy")
TRAINING = (
    "torch", "torch.utils.data", "torch._dynamo", "timm", "albumentations", "segmentation_models_pytorch", "pandas", "pyarrow.parquet", "scipy.ndimage",
    "matplotlib.figure", "matplotlib.backends.backend_agg", "safetensors.torch", "sklearn.model_selection", "tifffile", "cv2", *PUBLISHING,
)  # fmt: skip


def run(
    command: Sequence[str], modules: tuple[str, ...] = PUBLISHING, env: Mapping[str, str] | None = None, cwd: str | Path | None = None,
    timeout: float = 300, kill_when: Callable[[], bool] | None = None,
) -> subprocess.CompletedProcess[str]:  # fmt: skip
    """As `subprocess.run(command, capture_output=True, text=True, check=False)`; `command` is [sys.executable, -m MODULE or -c CODE, ...].

    It and all that it started get a SIGKILL as soon as `kill_when` holds.
    """
    python, *words = map(str, command)
    environment = dict(os.environ if env is None else env)
    assert python == sys.executable and words[0] in ("-m", "-c")
    assert environment.get("PYTHONPATH") in (None, os.environ.get("PYTHONPATH"))
    ended, told = os.pipe()
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        try:
            asked = json.dumps({"words": words, "environment": environment, "folder": str(cwd or os.getcwd())}).encode()
            with _server(modules) as server:
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
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode())
    return subprocess.CompletedProcess(list(command), code, *texts)


def _server(modules: tuple[str, ...]) -> socket.socket:
    """A connection to the process that has the modules loaded."""
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(_started(modules, os.getpid()))
    return connection


@cache
def _started(modules: tuple[str, ...], pid: int) -> str:
    """The address of such a process, which ends with this one; `pid` is this one's: a forked one has none yet."""
    address = f"\0hubmap-warm-{pid}-{time.monotonic_ns()}"  # abstract: no file is left behind
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(address)
    listening.listen(64)
    alive, _lasts = os.pipe()  # its end at this side closes with this process
    words = [sys.executable, __file__, str(listening.fileno()), str(alive), *modules]
    one_thread = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"), "NO_ALBUMENTATIONS_UPDATE": "1", "HF_HUB_OFFLINE": "1"}
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", **one_thread}
    quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    subprocess.Popen(words, env=environment, pass_fds=(listening.fileno(), alive), start_new_session=True, **quiet)
    listening.close()
    os.close(alive)
    return address


def _serve(listening: socket.socket, alive: int) -> dict[str, object]:
    """Answer until the tests have ended; returns, in a forked process, what that one has to do."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        ready, _, _ = select.select([listening, alive], [], [])
        if alive in ready:
            os._exit(0)
        connection, _ = listening.accept()
        if not os.fork():
            break
        connection.close()
    size, (out, err, told), _, _ = socket.recv_fds(connection, 4, 3)
    with connection, connection.makefile("rb") as asked:
        plan = json.loads(asked.read(int.from_bytes(size, "big")))
    listening.close()
    os.close(alive)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    if pid := os.fork():  # this one waits for the command, and says how it ended
        os.write(told, b"%d\n" % pid)
        os.write(told, b"%d\n" % os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        os._exit(0)
    os.setsid()
    for descriptor, place in ((out, 1), (err, 2)):
        os.dup2(descriptor, place)
    for descriptor in (out, err, told):
        os.close(descriptor)
    return plan


def _become(plan: dict[str, object]) -> None:
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
        exec(compile(what, "<string>", "exec"), {"__name__": "__main__", "__builtins__": __builtins__})  # noqa: S102  (it is the command)
    else:
        import runpy

        runpy.run_module(what, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    for _name in sys.argv[3:]:
        with suppress(ImportError):
            import_module(_name)
    import gc

    gc.freeze()  # what all share is never looked through again
    _become(_serve(socket.socket(fileno=int(sys.argv[1])), int(sys.argv[2])))
