"""One registry of verbs: the groups of `hubmap --help`, a new verb, the version, completion."""

from __future__ import annotations

import re

import pytest
import typer
from typer.testing import CliRunner

import hubmap_kit
from hubmap_kit.__main__ import main
from hubmap_kit.cli.registry import GROUPS, app, build


def _sections(text: str) -> dict[str, list[str]]:
    """Heading -> the verbs under it."""
    found: dict[str, list[str]] = {}
    for heading, body in re.findall(r"^(\w+):\n((?:  .*\n?)+)", text, re.M):
        found[heading] = re.findall(r"^  ([a-z][\w-]*)", body, re.M)
    return found


def test_help_lists_every_verb_once_under_its_group() -> None:
    sections = _sections(CliRunner().invoke(app, ["--help"]).output)
    assert [heading for heading in sections if heading != "Options"] == list(GROUPS)
    assert {group: len(sections[group]) for group in GROUPS} == {group: len(verbs) for group, verbs in GROUPS.items()}
    verbs = [verb for group in GROUPS for verb in sections[group]]
    assert len(set(verbs)) == len(verbs) == len(typer.main.get_command(app).commands)  # type: ignore[attr-defined]


def test_a_new_verb_is_one_function_and_one_line_in_the_registry() -> None:
    def count_slides(number: int) -> None:
        """Count slides."""
        typer.echo(f"{number} slides")

    program = build({**GROUPS, "study": (*GROUPS["study"], count_slides)})
    assert "count-slides" in _sections(CliRunner().invoke(program, ["--help"]).output)["study"]
    assert CliRunner().invoke(program, ["count-slides", "3"]).output == "3 slides\n"


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"hubmap {hubmap_kit.__version__}\n"


def test_a_shell_completes_verbs() -> None:
    found = CliRunner().invoke(
        app,
        [],
        prog_name="hubmap",
        env={"_HUBMAP_COMPLETE": "complete_bash", "COMP_WORDS": "hubmap tune", "COMP_CWORD": "1"},
    )
    assert set(found.output.split()) == {"tune", "tune-thresholds"}
