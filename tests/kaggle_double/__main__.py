"""`python -m kaggle_double [OPTION]... -- COMMAND ARGS`: run a command against the double and tell what it left
there.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from .double import Double
from .faults import FAULTS
from .summary import summary

TESTS = Path(__file__).resolve().parents[1]
# For those who reach the double through a script that fixes its command line.
OPTIONS = "KAGGLE_DOUBLE_OPTIONS"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m kaggle_double", description=__doc__, epilog=f"Options are read from ${OPTIONS} as well."
    )
    parser.add_argument(
        "--fault",
        action="append",
        default=[],
        choices=FAULTS,
        metavar="NAME",
        help="switch a fault on; may be repeated",
    )
    parser.add_argument("--list-faults", action="store_true", help="list the faults and stop")
    parser.add_argument(
        "--keep", metavar="FOLDER", help="keep datasets, kernels and submissions there for the next run"
    )
    parser.add_argument("--owner", default="alice", help="name of the account")
    parser.add_argument("--token", action="store_true", help="sign in with an access token instead of name and key")
    parser.add_argument(
        "--no-waits",
        action="store_true",
        help="datasets are ready, kernels ended and submissions scored at the first look",
    )
    parser.add_argument(
        "--pass",
        dest="passed",
        action="append",
        default=[],
        metavar="NAME",
        help="hand this variable on; may be repeated",
    )
    parser.add_argument("command", nargs="*", metavar="COMMAND")
    arguments = parser.parse_args([*shlex.split(os.environ.get(OPTIONS, "")), *sys.argv[1:]])
    if not arguments.list_faults and not arguments.command:
        parser.error("a command to run is missing: ... -- COMMAND ARGS")
    return arguments


def environment(double: Double, folder: str, token: bool, passed: list[str]) -> dict[str, str]:
    """The hermetic environment, with this Python's programs first on PATH and its virtual environment named for the
    scripts.
    """
    values = double.environment(folder, token)
    values["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), values.get("PATH", os.defpath)])
    values["PYTHONPATH"] = str(TESTS)
    values["HUBMAP_VENV"] = os.environ.get("HUBMAP_VENV", sys.prefix)
    return values | {name: os.environ[name] for name in passed if name in os.environ}


def main() -> int:
    """Run the command; its exit code."""
    arguments = _arguments()
    if arguments.list_faults:
        print(*(f"{name:32} {meaning}" for name, meaning in FAULTS.items()), sep="\n")
        return 0
    waits = ("hidden_calls", "polls_until_ready", "polls_queued", "polls_running", "polls_until_scored")
    settings = dict.fromkeys(waits, 0) if arguments.no_waits else {}
    with (
        Double(arguments.fault, arguments.owner, arguments.keep, **settings) as double,
        tempfile.TemporaryDirectory() as folder,
    ):
        code = _run(arguments.command, environment(double, folder, arguments.token, arguments.passed))
        print(f"\n{summary(double)}", flush=True)
    return code


def _run(command: list[str], values: dict[str, str]) -> int:
    try:
        process = subprocess.Popen(command, env=values)
    except OSError as error:
        print(f"error: {command[0]} cannot be run: {error.strerror}", file=sys.stderr)
        return 127
    # Ctrl-C reaches the command as well; how it ends is its own affair. What reaches this process alone is passed on to
    # it.
    handlers = {
        signal.SIGINT: signal.SIG_IGN,
        **dict.fromkeys((signal.SIGTERM, signal.SIGHUP), lambda number, _: process.send_signal(number)),
    }
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        code = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return 128 - code if code < 0 else code


if __name__ == "__main__":
    sys.exit(main())
