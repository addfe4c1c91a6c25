"""How much memory a call takes beyond what was there before it."""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak_memory(call: Callable[[], object]) -> int:
    """Largest number of bytes beyond the present that Python and NumPy hold during `call` (tracemalloc; torch and
    OpenCV are not seen).
    """
    call()  # tables that are made once and kept are not the call's
    gc.collect()
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        call()
        return tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()


def peak_rss(module: str, function: str, *arguments: object, returned: bool = False) -> int | None:
    """Largest growth of a fresh process's resident memory in bytes during a call; None where the system does not tell
    (not Linux).

    `module.function(*arguments)` runs in a process of its own and returns the call to be measured, with everything
    loaded and its input made. `arguments` are plain values. glibc keeps freed blocks as it sees fit, so two processes
    that do the same differ by tens of megabytes; with `returned` it gives every large block back at once, and the
    figure is what was held at the same time.
    """
    if not CLEAR.exists():
        return None
    # This package's own parent is first on the path: the child finds the same modules.
    path = os.pathsep.join([str(Path(__file__).resolve().parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "benchmarks.memory", module, function, json.dumps(arguments)]
    habits = {"MALLOC_MMAP_THRESHOLD_": "65536"} if returned else {}
    done = subprocess.run(
        command,
        env={**os.environ, **habits, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    if done.returncode:
        raise RuntimeError(
            f"{module}.{function}{arguments} failed: {(done.stderr.strip().splitlines() or ['no output'])[-1]}"
        )
    return int(done.stdout.split()[-1])


def resident() -> int:
    """Resident memory of this process in bytes (Linux)."""
    return _field("VmRSS")


def _field(name: str) -> int:
    line = next(line for line in STATUS.read_text(encoding="ascii").splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


def _measure(module: str, function: str, arguments: list[object]) -> int:
    from benchmarks.measure import one_thread

    one_thread()
    call = getattr(importlib.import_module(module), function)(*arguments)
    gc.collect()
    # Free memory that the allocator kept would be taken without growth, and hide what the call needs.
    ctypes.CDLL(None).malloc_trim(0)
    before = resident()
    CLEAR.write_text("5", encoding="ascii")  # forget the peak so far
    kept = call()
    peak = _field("VmHWM")
    del kept
    return max(0, peak - before)


if __name__ == "__main__":
    sys.stdout.write(f"{_measure(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]))}\n")
