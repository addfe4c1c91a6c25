"""From a kernel's script in the repository to the one file that Kaggle runs: settings stamped in, the common start-up
put in.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hubmap_kit.errors import PublishError

BOOTSTRAP = "bootstrap"  # the module that `from bootstrap import start` names


@dataclass(frozen=True)
class _Edit:
    """Replace the bytes `start:end` of the UTF-8 text."""

    start: int
    end: int
    text: str


def constants_of(script: str, name: str) -> dict[str, object]:
    """The top-level constants of a script: every `NAME = literal` in capitals.

    `name` is what errors call the script.
    """
    return {key: ast.literal_eval(node) for key, node in _literals(_parse(script, name)).items()}


def bake(script: str, bootstrap: str, constants: Mapping[str, object], name: str) -> str:
    """The script with `constants` set and the bootstrap inside it, as one file; both arguments are Python source.

    The right-hand side of each constant's `NAME = literal` is replaced, whatever follows on its line stays. The
    bootstrap's imports take the place of the line that imports it, without those that the script has already; its
    functions come after the constants. Raises PublishError when a constant or the import is missing, when both define a
    name, or when no valid Python comes out.
    """
    tree, common = _parse(script, name), _parse(bootstrap, f"{BOOTSTRAP}.py")
    _check_clashes(tree, common, name)
    offsets = _line_offsets(script)
    edits = [_stamp(tree, offsets, key, value, name) for key, value in constants.items()]
    edits += _inserted(tree, common, bootstrap, script, offsets, name)
    data = script.encode()
    for edit in sorted(edits, key=lambda edit: edit.start, reverse=True):
        data = data[: edit.start] + edit.text.encode() + data[edit.end :]
    _parse(data.decode(), f"the rendered {name}")
    return data.decode()


def _parse(source: str, name: str) -> ast.Module:
    try:
        tree = ast.parse(source)
        compile(tree, name, "exec", dont_inherit=True)
    except (SyntaxError, ValueError) as error:
        line = f", line {error.lineno}" if isinstance(error, SyntaxError) and error.lineno else ""
        words = error.msg if isinstance(error, SyntaxError) else str(error)
        raise PublishError(f"{name}{line} is not valid Python ({words}); mend the script in kernels/") from error
    return tree


def _literals(tree: ast.Module) -> dict[str, ast.expr]:
    found: dict[str, ast.expr] = {}
    for node in tree.body:
        if not isinstance(node, ast.Assign | ast.AnnAssign) or node.value is None:
            continue
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        name = targets[0]
        if len(targets) == 1 and isinstance(name, ast.Name) and name.id.isupper() and _is_literal(node.value):
            found[name.id] = node.value
    return found


def _is_literal(node: ast.expr) -> bool:
    try:
        ast.literal_eval(node)
    except ValueError:
        return False
    return True


def _stamp(tree: ast.Module, offsets: list[int], key: str, value: object, name: str) -> _Edit:
    node = _literals(tree).get(key)
    if node is None:
        raise PublishError(
            f"{name} has no constant {key} to set; expected a line '{key} = ...' with a plain value at its top level"
        )
    return _Edit(*_span(node, offsets), repr(value))


def _inserted(
    tree: ast.Module, common: ast.Module, bootstrap: str, script: str, offsets: list[int], name: str
) -> list[_Edit]:
    line = next((node for node in tree.body if isinstance(node, ast.ImportFrom) and node.module == BOOTSTRAP), None)
    if line is None:
        raise PublishError(
            f"{name} lacks the line 'from {BOOTSTRAP} import start' that brings the common start-up; put it after the"
            " docstring"
        )
    known = {ast.unparse(node) for node in tree.body if _is_import(node)}
    wanted = [node for node in _leading_imports(common) if ast.unparse(node) not in known]
    future = [ast.unparse(node) for node in wanted if _is_future(node)]
    imports = "\n".join(ast.unparse(node) for node in wanted if not _is_future(node))
    edits = [_Edit(*_span(line, offsets), imports)]
    if future:
        first = next(node for node in tree.body if not _is_docstring(node))
        edits.append(_Edit(offsets[first.lineno - 1], offsets[first.lineno - 1], "\n".join(future) + "\n\n"))
    place = offsets[_first_action(tree, script) - 1]
    return [*edits, _Edit(place, place, _code(common, bootstrap) + "\n\n\n")]


def _code(common: ast.Module, bootstrap: str) -> str:
    """The bootstrap without its docstring and leading imports, comments kept."""
    top = [node for node in common.body[:1] if _is_docstring(node)] + _leading_imports(common)
    lines = bootstrap.splitlines()[top[-1].end_lineno if top else 0 :]
    return "\n".join(lines).strip("\n")


def _leading_imports(tree: ast.Module) -> list[ast.stmt]:
    body = [node for node in tree.body if not _is_docstring(node)]
    count = next((index for index, node in enumerate(body) if not _is_import(node)), len(body))
    return body[:count]


def _first_action(tree: ast.Module, script: str) -> int:
    """The line of the first statement that is neither docstring, import nor constant, comments above it included;
    1-based.
    """
    plain = set(map(id, _literals(tree).values()))
    actions = [
        node
        for node in tree.body
        if not (_is_docstring(node) or _is_import(node) or id(getattr(node, "value", None)) in plain)
    ]
    lines = script.splitlines()
    number = actions[0].lineno if actions else len(lines) + 1
    while number > 1 and lines[number - 2].startswith("#"):
        number -= 1
    return number


def _check_clashes(tree: ast.Module, common: ast.Module, name: str) -> None:
    both = sorted(_defined(tree) & _defined(common))
    if both:
        raise PublishError(f"{name} and {BOOTSTRAP}.py both define {', '.join(both)}; rename one, they become one file")


def _defined(tree: ast.Module) -> set[str]:
    names: set[str] = set()
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            names |= {
                part.id for part in ast.walk(node) if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store)
            }
    return names


def _is_import(node: ast.stmt) -> bool:
    return isinstance(node, (ast.Import, ast.ImportFrom))


def _is_future(node: ast.stmt) -> bool:
    return isinstance(node, ast.ImportFrom) and node.module == "__future__"


def _is_docstring(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def _line_offsets(source: str) -> list[int]:
    """Byte offset of the start of every line, and of the end."""
    offsets = [0]
    for line in source.split("\n"):
        offsets.append(offsets[-1] + len(line.encode()) + 1)
    return offsets


def _span(node: Any, offsets: list[int]) -> tuple[int, int]:
    # The ast module counts columns in bytes of UTF-8.
    return offsets[node.lineno - 1] + node.col_offset, offsets[node.end_lineno - 1] + node.end_col_offset
