"""Figures into docs/benchmarks.md: one section a benchmark, between markers, the rest of the file left as it is."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from pathlib import Path

from benchmarks.machine import machine, versions
from benchmarks.measure import Comparison, to_markdown
from hubmap_kit.files import write_text

START = "# Benchmarks\n"


def section(name: str, comparisons: Sequence[Comparison], quick: bool) -> str:
    """The text of a section: command, machine, versions, table."""
    facts = [
        f"`scripts/bench.sh {name}{' --quick' if quick else ''}`, {datetime.date.today().isoformat()}",
        "",
        machine() + "<br>",
        versions(),
        "",
        to_markdown(comparisons).rstrip(),
    ]
    return "\n".join(facts) + "\n"


def replace(path: Path, name: str, text: str) -> None:
    """Put `text` between the markers of section `name`; a file or section that is not there yet is made.

    Raises ValueError for half a marker.
    """
    old = path.read_text(encoding="utf-8") if path.is_file() else START
    begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->\n"
    if (begin in old) != (end in old):
        raise ValueError(
            f"{path} holds only one of the lines '{begin.strip()}' and '{end.strip()}'; put the other back, or take it"
            " away too"
        )
    if begin not in old:
        old = f"{old.rstrip()}\n\n## {name}\n\n{begin}{end}"
    head, _, rest = old.partition(begin)
    _, _, tail = rest.partition(end)
    write_text(path, f"{head}{begin}{text}{end}{tail}")
