"""The rooms import one way only, and nothing on the way to --help is heavy."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import hubmap_kit

PACKAGE = Path(hubmap_kit.__file__).parent
# A room may import rooms of lower rank, and itself. Training validates with inference's windows, so it stands above it.
RANK = {
    room: rank
    for rank, rooms in enumerate(
        (
            "errors files progress processes config",
            "build_id experiment competition",
            "sample",
            "tiles augment models",
            "inference",
            "training",
            "report",
            "jobs",
            "kernel publish",
            "rehearsal",
            "cli",
            "__main__",
        )
    )
    for room in rooms.split()
}


def _imports(path: Path) -> set[str]:
    """Rooms of the package that a module imports, wherever the import stands."""
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names = (
                [f"{node.module}.{alias.name}" for alias in node.names]
                if node.module == "hubmap_kit"
                else [node.module]
            )
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        rooms |= {name.split(".")[1] for name in names if name.startswith("hubmap_kit.")}
    return rooms - {"__version__"}


MODULES = [path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_room_imports_only_rooms_below_it(path: Path) -> None:
    room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    assert room in RANK, f"{room} has no place in the order of rooms"
    for other in _imports(path) - {room}:
        assert RANK[other] < RANK[room], f"{path.name} in {room} imports {other}"


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["config", "baseline"]])
def test_help_does_not_import_torch(arguments: list[str]) -> None:
    code = (
        "import sys, hubmap_kit.__main__ as m\n"
        f"try: m.main({arguments!r})\n"
        "except SystemExit as stop: assert not stop.code, stop.code\n"
        "heavy = {'torch', 'cv2', 'numpy', 'pandas', 'matplotlib', 'albumentations'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
