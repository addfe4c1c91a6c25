"""BUILD_ID.json: the table of a dataset, its check, and the logical tree."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hubmap_kit import build_id
from hubmap_kit.build_id import FILE, describe, read, unfold, verify, write
from hubmap_kit.errors import KernelError

PARTS = st.text("abcXYZ019._-", min_size=1, max_size=8).filter(lambda text: text not in (".", ".."))
# Logical paths of a tree: no path is the folder of another, no two travel under one name, none takes a name that is
# reserved.
TREES = st.dictionaries(
    st.lists(PARTS, min_size=1, max_size=3).map("/".join), st.binary(max_size=40), max_size=6
).filter(
    lambda tree: (
        not any(other.startswith(f"{path}/") for path in tree for other in tree)
        and len({path.replace("/", "__") for path in tree}) == len(tree)
    )
)


def fill(folder: Path, tree: dict[str, bytes]) -> dict[str, str]:
    """Write a tree flat, and return flat name -> logical path."""
    folder.mkdir()
    for path, content in tree.items():
        (folder / path.replace("/", "__")).write_bytes(content)
    return {path.replace("/", "__"): path for path in tree}


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    folder = tmp_path / "weights"
    paths = fill(
        folder, {"mini/fold0/model.safetensors": b"first", "mini/config.yaml": b"name: mini\n", "notes.md": b"plain"}
    )
    write(folder, describe("weights", folder, paths))
    return folder


@settings(max_examples=40, deadline=None)
@given(tree=TREES, kind=st.sampled_from(build_id.KINDS), dirty=st.booleans())
def test_a_tree_comes_back_from_its_flat_folder(tree: dict[str, bytes], kind: str, dirty: bool) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder, into = Path(temporary) / "flat", Path(temporary) / "tree"
        sha = "0123456789abcdef" * 2 + "01234567" if kind == "code" else None
        build = describe(kind, folder, fill(folder, tree), sha, dirty)
        write(folder, build)
        assert read(folder) == verify(folder) == verify(folder, build.build_id) == build
        into.mkdir()
        assert unfold(folder, into) == unfold(folder, into) == into
        found = {path.relative_to(into).as_posix(): path.read_bytes() for path in into.rglob("*") if path.is_file()}
        assert found == tree
        assert {name: facts["sha256"] for name, facts in build.files.items()} == {
            path.replace("/", "__"): hashlib.sha256(content).hexdigest() for path, content in tree.items()
        }


def test_the_id_depends_on_bytes_names_and_commit_and_on_nothing_else(weights: Path, tmp_path: Path) -> None:
    paths = {name: facts["path"] for name, facts in read(weights).files.items()}
    first = describe("weights", weights, paths)
    assert first.build_id.startswith("weights-") and len(first.build_id) == len("weights-") + 12
    for path in weights.iterdir():
        os.utime(path, (1, 1))
    (weights / "dataset-metadata.json").write_text("{}")  # added when it is pushed; does not travel as data
    assert describe("weights", weights, paths) == first
    code = describe("code", weights, paths, "a" * 40)
    assert code.build_id == f"{'a' * 12}-{first.build_id.removeprefix('weights-')}"
    assert describe("code", weights, paths, "a" * 40, dirty=True).build_id == f"{code.build_id}-dirty"
    (weights / "notes.md").rename(weights / "notes2.md")
    renamed = describe("weights", weights, paths)
    assert renamed.build_id != first.build_id
    (weights / "notes2.md").write_bytes(b"other")
    assert describe("weights", weights, paths).build_id not in (first.build_id, renamed.build_id)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda folder: (folder / "notes.md").write_bytes(b"plaim"), "notes.md has the sha256"),
        (
            lambda folder: (folder / "mini__config.yaml").write_bytes(b"name"),
            "mini__config.yaml has 4 bytes where BUILD_ID.json says 11",
        ),
        (lambda folder: (folder / "notes.md").unlink(), "notes.md is missing"),
        (lambda folder: (folder / "more.txt").write_text("x"), "more.txt is not listed"),
        # A file that the server took for an archive arrives as a folder.
        (lambda folder: ((folder / "notes.md").unlink(), (folder / "notes.md").mkdir()), "notes.md is not a file"),
    ],
)
def test_verify_names_the_file_that_differs(weights: Path, change: object, words: str) -> None:
    verify(weights)
    change(weights)  # type: ignore[operator]
    with pytest.raises(KernelError) as error:
        verify(weights)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_verify_wants_the_build_that_it_was_made_for(weights: Path) -> None:
    with pytest.raises(KernelError, match=f"holds build {read(weights).build_id}, expected weights-000000000000"):
        verify(weights, "weights-000000000000")


def test_an_id_that_is_not_its_tables_is_refused(weights: Path) -> None:
    table = json.loads((weights / FILE).read_text())
    (weights / FILE).write_text(json.dumps({**table, "build_id": "weights-000000000000"}))
    with pytest.raises(KernelError, match="its own table does not give"):
        verify(weights, "weights-000000000000")


@pytest.mark.parametrize(
    "path", ["../evil", "/etc/evil", "a/../../evil", "a//b", "a/./b", "", "..", "a\\b", "a/", "a\0b", "a\nb"]
)
def test_no_path_leaves_its_folder(weights: Path, tmp_path: Path, path: str) -> None:
    table = json.loads((weights / FILE).read_text())
    table["files"]["notes.md"]["path"] = path
    (weights / FILE).write_text(json.dumps(table))
    into = tmp_path / "deep" / "into"
    for reader in (read, verify, lambda folder: unfold(folder, into)):
        with pytest.raises(KernelError):
            reader(weights)
    assert not into.exists() and not (tmp_path / "evil").exists()


@settings(max_examples=60, deadline=None)
@given(
    value=st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=5),
        lambda inner: (
            st.lists(inner)
            | st.dictionaries(
                st.sampled_from(
                    ["kind", "build_id", "git_sha", "dirty", "hubmap_kit", "files", "path", "sha256", "bytes"]
                ),
                inner,
            )
        ),
        max_leaves=12,
    )
)
def test_any_other_json_is_one_sentence(value: object) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        (Path(temporary) / FILE).write_text(json.dumps(value))
        with pytest.raises(KernelError) as error:
            read(Path(temporary))
        assert FILE in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("content", [None, b"", b"{", b"\xff\xfe", b"[]"])
def test_a_missing_or_broken_table_is_one_sentence(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / FILE).write_bytes(content)
    with pytest.raises(KernelError, match=FILE):
        read(tmp_path)


def test_unfold_copies_nothing_and_overwrites_no_file(weights: Path, tmp_path: Path) -> None:
    tree = unfold(weights, tmp_path / "tree")
    assert (tree / "mini/config.yaml").is_symlink() and (tree / "mini/config.yaml").samefile(
        weights / "mini__config.yaml"
    )
    (tree / "notes.md").unlink()
    (tree / "notes.md").write_text("my own")
    with pytest.raises(KernelError, match="in the way"):
        unfold(weights, tree)
    assert (tree / "notes.md").read_text() == "my own"
    (weights / "notes.md").unlink()
    with pytest.raises(KernelError, match="notes.md is missing"):
        unfold(weights, tmp_path / "other")


def test_a_file_that_is_also_a_folder_is_refused(tmp_path: Path) -> None:
    paths = fill(tmp_path / "flat", {"a": b"1"})
    (tmp_path / "flat" / "a__b").write_bytes(b"2")
    with pytest.raises(KernelError, match="'a' as a file and as a folder"):
        describe("weights", tmp_path / "flat", {**paths, "a__b": "a/b"})


def test_it_is_light_enough_to_run_before_anything_else_in_a_kernel() -> None:
    code = (
        "import sys, hubmap_kit.build_id; print({'torch', 'numpy', 'pandas', 'hubmap_kit.publish'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
