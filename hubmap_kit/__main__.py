"""The entry point of `hubmap` and `python -m hubmap_kit`: runs a verb, and tells its errors in one line."""

from __future__ import annotations

import io
import logging
import sys
from typing import Any

import click

from hubmap_kit.cli.options import INTERRUPTED
from hubmap_kit.cli.registry import app
from hubmap_kit.errors import LESS_MEMORY, HubmapError
from hubmap_kit.processes import leave

# What to do after Ctrl-C, for verbs that keep what is done.
GO_ON = {
    **dict.fromkeys(("train", "notebook"), "; it goes on with --resume"),
    **dict.fromkeys(("tiles", "tune", "blend", "external"), "; the same command goes on"),
}

PUSH_PACKAGES = ("kaggle", "kagglesdk", "packaging", "requests", "six", "urllib3")  # of the extra "push"


def main(arguments: list[str] | None = None) -> None:
    """Entry point.

    What a user can act on becomes one line and exit code 1; -v, anywhere on the line, shows its traceback too.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    flags = [word for word in words if word in ("-v", "--verbose")]
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a kernel's log may hold what a console in cp1252 cannot show
    try:
        result: Any = app([*flags, *(word for word in words if word not in flags)], standalone_mode=False)
    except HubmapError as error:
        _fail(str(error), error)
    except OSError as error:
        _fail(
            f"{error.filename or 'a file'}: {error.strerror or error}; check the path, its permissions and the free"
            " disk space",
            error,
        )
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in PUSH_PACKAGES:
            raise
        _fail(
            f"{error.name}, which everything about Kaggle needs, is not installed; run scripts/push.sh, which installs"
            " it, or: pip install -e '.[push]'",
            error,
        )
    except RuntimeError as error:
        if "out of memory" not in str(error):
            raise
        _fail(f"the device ran out of memory; {LESS_MEMORY}", error)
    except click.exceptions.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    if result == INTERRUPTED:
        _fail("stopped" + GO_ON.get(words[0] if words else "", ""), None, INTERRUPTED)
    sys.exit(result if isinstance(result, int) else 0)


def _fail(sentence: str, error: BaseException | None, code: int = 1) -> None:
    if error is not None and logging.getLogger("hubmap_kit").isEnabledFor(logging.DEBUG):
        logging.getLogger("hubmap_kit").error("", exc_info=error)
    print(f"error: {sentence}", file=sys.stderr)
    sys.exit(code)


def command() -> None:
    """The program `hubmap`: `main`, and then the process ends at once."""
    try:
        main()
    except SystemExit as stop:
        leave(stop.code if isinstance(stop.code, int) else 1)  # `main` gives nothing but numbers


if __name__ == "__main__":
    command()
