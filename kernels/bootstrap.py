"""What every kernel does before it can import the kit: find the published bundle, check it, install it.

Rendering puts it into the script.
"""

import contextlib
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

INPUT, WORKING, WAIT_S, UTC = "/kaggle/input", "/kaggle/working", 60, "%Y-%m-%dT%H:%M:%SZ"


def start(kernel, build_id, job):
    """Run a kernel from its first log line to its last; `job` takes the library's kernel module; (status, sentence,
    more facts) is its end.
    """
    print(f"HUBMAP START {kernel} build_id={build_id} utc={time.strftime(UTC, time.gmtime())}", flush=True)
    began = time.monotonic()
    try:
        status, sentence, *more = job(install(*find(build_id)))
    except BaseException as error:
        status, sentence, more = "failed", " ".join(str(error).split()) or type(error).__name__, ()
        if not isinstance(error, SystemExit):
            sys.excepthook(*sys.exc_info())
    facts = {
        "kernel": kernel,
        "status": status,
        "build_id": build_id,
        "seconds": round(time.monotonic() - began, 1),
        "sentence": sentence,
    }
    facts |= dict(*more)
    with contextlib.suppress(OSError):  # a full disk must not cost the marker
        Path(WORKING, "kernel.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    print("error:" if status == "failed" else f"{status}:", sentence, file=sys.stderr, flush=True)
    share = f" failed={facts['failed_slides']}/{facts['slides']}" if "failed_slides" in facts else ""
    print(
        f"HUBMAP END {kernel} {status} build_id={build_id} utc={time.strftime(UTC, time.gmtime())}{share}", flush=True
    )
    if (
        "get_ipython" in globals()
    ):  # in a notebook the process belongs to Jupyter, and Kaggle calls a run whose process ends a crash
        return
    # At once: a worker or a thread that somebody left behind would burn the week's GPU hours until the session's limit.
    os._exit(1 if status == "failed" else 0)


def find(build_id):
    """Folder and BUILD_ID.json of the one mounted code bundle.

    A new dataset version may be mounted a little after the start.
    """
    for left in range(WAIT_S, -1, -5):
        marked = [path for depth in range(1, 5) for path in Path(INPUT).glob("*/" * depth + "BUILD_ID.json")]
        tables = [(path.parent, read(path)) for path in marked]
        found = {table.get("build_id"): (folder, table) for folder, table in tables if table.get("kind") == "code"}
        if list(found) == [build_id]:
            return found[build_id]
        time.sleep(min(left, 5))
    print(
        "mounted:",
        *sorted(str(path) for depth in (1, 2, 3) for path in Path(INPUT).glob("*/" * depth))[:60],
        sep="\n  ",
        file=sys.stderr,
    )
    why = (
        "the dataset's new version has not propagated"
        if len(found) == 1
        else "exactly one dataset of kind code must be attached"
    )
    sys.exit(
        f"{INPUT} holds the code bundles {list(found)}, expected {build_id!r} alone: {why}; run this again, or push"
        " code and kernel again"
    )


def read(path):
    """A BUILD_ID.json; nothing where it is still being mounted, or is something else of that name."""
    with contextlib.suppress(OSError, ValueError, TypeError):
        return dict(json.loads(path.read_text(encoding="utf-8")))
    return {}


def install(folder, table):
    """Check the bundle file by file, install its wheels without any index into a private folder, and import the kit.

    Returns the library's kernel module, imported out of that folder.
    """
    for name, facts in table["files"].items():
        if not (folder / name).is_file() or hashlib.sha256((folder / name).read_bytes()).hexdigest() != facts["sha256"]:
            sys.exit(
                f"{folder / name} is missing or is not the file that BUILD_ID.json lists; push the code dataset again"
            )
    target, wheels = (
        tempfile.mkdtemp(prefix="hubmap-kit-"),
        [str(folder / name) for name in table["files"] if name.endswith(".whl")],
    )
    pip = [
        sys.executable,
        "-m",
        "pip",
        "--isolated",
        "install",
        "--quiet",
        "--no-index",
        "--no-deps",
        "--find-links",
        str(folder),
    ]
    if subprocess.run([*pip, "--target", target, *wheels], check=False).returncode:
        sys.exit(f"pip could not install the wheels of {folder}; its own lines above say why")
    sys.path.insert(0, target)
    os.environ["HUBMAP_BUILD_ID"] = table["build_id"]
    from hubmap_kit.kernel import kernels as kernel

    return kernel
