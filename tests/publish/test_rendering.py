"""Rendered kernels: what is stamped in, what they are pushed with, what is refused."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kaggle_double import Double
from staged_builds import stage

from hubmap_kit import build_id
from hubmap_kit.__main__ import main
from hubmap_kit.errors import PublishError
from hubmap_kit.publish.metadata import Sources, kernel_metadata, read_metadata
from hubmap_kit.publish.root import repository
from hubmap_kit.publish.script import bake, constants_of

ROOT = repository()
SCRIPTS = {name: (ROOT / "kernels" / name / f"{name}.py").read_text() for name in ("train", "infer", "tiles")}
BOOTSTRAP = (ROOT / "kernels" / "bootstrap.py").read_text()


def rendered(out: Path, *words: str) -> dict[str, str]:
    """The scripts of a rendering in this process, by kernel."""
    stage(out / "code", b"wheel") if not (out / "code").exists() else None
    with pytest.raises(SystemExit) as stop:
        main(["kernels", *words, "--owner", "bob", "--out", str(out / "k"), "--staged", str(out / "code")])
    assert stop.value.code == 0
    return {path.stem: path.read_text() for path in sorted((out / "k").glob("*/*.py"))}


def test_every_kernel_becomes_one_short_script_that_stands_alone(tmp_path: Path) -> None:
    scripts = rendered(tmp_path)
    assert set(scripts) == {"train", "infer", "tiles"}
    for name, text in scripts.items():
        assert len(text.splitlines()) <= 140
        modules = {node.module for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom)}
        assert "bootstrap" not in modules and text.count("__future__") <= 1
        space: dict[str, object] = {"__name__": "looked_at"}
        exec(compile(text, name, "exec"), space)
        assert callable(space["start"])
        assert space["BUILD_ID"] == build_id.read(tmp_path / "code").build_id
        # What nobody chose is as the repository says.
        for key, value in constants_of(SCRIPTS[name], name).items():
            assert key == "BUILD_ID" or space[key] == value


def test_rendering_writes_metadata_for_the_account_and_leaves_nothing_old(tmp_path: Path) -> None:
    rendered(tmp_path)
    for name in ("train", "infer", "tiles"):
        (tmp_path / "k" / name / "left-over.py").write_text("x = 1\n")
    digest = "sha256:" + "ab" * 32
    rendered(tmp_path, "infer", "--attach", "kernel:train", "--attach", "carol/more-runs", "--image", digest)
    assert sorted(path.name for path in (tmp_path / "k" / "infer").iterdir()) == ["infer.py", "kernel-metadata.json"]
    values = read_metadata(tmp_path / "k" / "infer")
    assert values["dataset_sources"] == ["bob/hubmap-kit-code", "bob/hubmap-kit-weights", "carol/more-runs"]
    assert values["kernel_sources"] == ["bob/hubmap-train"]
    assert values["docker_image"].endswith("@" + digest)
    assert (values["enable_internet"], values["is_private"], values["enable_gpu"]) == (False, True, True)
    rendered(tmp_path, "infer", "--attach-only", "kernel:train")
    values = read_metadata(tmp_path / "k" / "infer")
    assert (values["dataset_sources"], values["kernel_sources"]) == (["bob/hubmap-kit-code"], ["bob/hubmap-train"])
    tiles = read_metadata(tmp_path / "k" / "tiles")
    assert tiles["enable_gpu"] is False and "machine_shape" not in tiles and tiles["enable_internet"] is False


def test_a_training_from_encoder_weights_gets_them_attached(tmp_path: Path) -> None:
    rendered(tmp_path, "train", "--set", "model.encoder_weights=encoder.safetensors", "--accelerator", "p100")
    values = read_metadata(tmp_path / "k" / "train")
    assert values["dataset_sources"] == ["bob/hubmap-kit-code", "bob/hubmap-kit-pretrained"]
    assert values["machine_shape"] == "NvidiaTeslaP100"


WRONG = {
    "unknown kernel": (["trains"], "did you mean 'train'"),
    "unknown accelerator": (["train", "--accelerator", "v100"], "t4x2, p100, cpu"),
    "a setting that is none": (["train", "--set", "training.epoch=3"], "epochs"),
    "a file as experiment": (["train", "--config", "mine.yaml"], "hubmap_kit/configs"),
    "folds of a kernel without": (["infer", "--folds", "0"], "--folds means nothing to infer"),
    "folds in words": (["train", "--folds", "all"], "numbers such as 0,2"),
    "training settings for infer": (["infer", "--set", "training.lr=1"], "means nothing to infer"),
    "resume of a kernel that cannot": (["tiles", "--resume"], "--resume means nothing to tiles"),
    "a fold that is none": (["train", "--folds", "0,5"], "fold 5 was asked for, but data.n_folds is 5"),
    "a fold below zero": (["train", "--folds", "-1"], "fold -1 was asked for"),
    "a fold of fewer": (
        ["train", "--folds", "3", "--set", "data.n_folds=3"],
        "fold 3 was asked for, but data.n_folds is 3",
    ),
    "hours beyond the competition": (["infer", "--hours", "9"], "at most 8.75 of the 9 hours"),
    "hours without a margin": (["train", "--hours", "12"], "at most 11.75 of the 12 hours"),
    "hours below zero": (["train", "--hours", "-1"], "at most 11.75 of the 12 hours"),
    "inputs twice": (["infer", "--attach", "tiles", "--attach-only", "weights"], "give one of the two"),
    "attached to all": (["--attach", "weights"], "meant for one kernel"),
    "attached nonsense": (["infer", "--attach", "wheights"], "owner/slug"),
    "half an image": (["train", "--image", "sha256:12"], "64 hex digits"),
    "another kernel than the one to run": (["train", "--run", "infer"], "--run is 'infer'"),
    "follow nothing": (["train", "infer", "--follow"], "name it"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_rendering_is_one_sentence_and_changes_nothing(
    name: str, tmp_path: Path, capsys, monkeypatch, record_property
) -> None:
    words, said = WRONG[name]
    with Double(("network_down",)) as double:
        for key, value in double.environment(tmp_path / "environment").items():
            monkeypatch.setenv(key, value)
    stage(tmp_path / "code", b"wheel")
    with pytest.raises(SystemExit) as stop:
        main(["kernels", *words, "--owner", "bob", "--out", str(tmp_path / "k"), "--staged", str(tmp_path / "code")])
    last = capsys.readouterr().err.strip().splitlines()[-1]
    record_property("exit code", stop.value.code)
    record_property("sentence", last)
    assert stop.value.code == 1 and last.startswith("error: ") and said in last
    assert not (tmp_path / "k").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"is_private": False}, "private"),
        ({"enable_internet": True}, "internet"),
        ({"enable_internet": "false"}, "true or false"),
        ({"title": "hubmap infer 2"}, "hubmap-infer"),
        ({"title": None}, "title"),
        ({"kernel_type": "notebook"}, "script"),
        ({"code_file": "other.py"}, "infer.py"),
    ],
)
def test_a_template_that_kaggle_would_take_wrongly_is_refused(change: dict[str, object], said: str) -> None:
    template = read_metadata(ROOT / "kernels" / "infer") | change
    with pytest.raises(PublishError, match=said):
        kernel_metadata("infer", template, Sources("alice", "t4x2"))


@pytest.mark.parametrize(
    ("asked", "written"), [({}, False), ({"enable_internet": False}, False), ({"enable_internet": True}, True)]
)
def test_internet_is_always_written_because_the_client_takes_its_absence_for_yes(
    asked: dict[str, bool], written: bool
) -> None:
    template = read_metadata(ROOT / "kernels" / "train")
    del template["enable_internet"]
    assert kernel_metadata("train", template | asked, Sources("alice", "t4x2"))["enable_internet"] is written


LITERALS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@settings(deadline=None, max_examples=60)
@given(st.dictionaries(st.sampled_from(["CONFIG", "FOLDS", "OVERRIDES", "SESSION_HOURS"]), LITERALS), LITERALS)
def test_any_plain_value_survives_the_rendering(chosen: dict[str, object], old: object) -> None:
    """The old value may be anything too, on many lines, with characters of several bytes before it and a comment after
    it.
    """
    folds, rest = (
        f'FOLDS = [\n    "ü",  # é\n    {old!r},\n]  # kept',
        f'CONFIG = "Ä", {old!r}; SESSION_HOURS = 1  # 𝔸 = 2',
    )
    script = f'"""Ä."""\nfrom bootstrap import start\n{folds}\n{rest}\nOVERRIDES = []\n'
    text = bake(script, BOOTSTRAP, chosen, "script.py")
    space: dict[str, object] = {"__name__": "looked_at"}
    exec(compile(text, "script.py", "exec"), space)
    before: dict[str, object] = {}
    exec(compile(script.replace("from bootstrap import start", ""), "script.py", "exec"), before)
    for key in ("CONFIG", "FOLDS", "OVERRIDES", "SESSION_HOURS"):
        assert space[key] == (chosen[key] if key in chosen else before[key])
    assert "# kept\n" in text and "# 𝔸 = 2\n" in text


@pytest.mark.parametrize(
    ("script", "constants", "said"),
    [
        ("from bootstrap import start\nA = 1\n", {"B": 2}, "no constant B"),
        ("from bootstrap import start\nA = len('x')\n", {"A": 2}, "no constant A"),
        ("from bootstrap import start\nif True:\n    A = 1\n", {"A": 2}, "no constant A"),
        ("A = 1\n", {"A": 2}, "from bootstrap import start"),
        ("from bootstrap import start\nA = (\n", {"A": 2}, "line 2 is not valid Python"),
        ("from bootstrap import start\nA = 1\ndef find(): pass\n", {"A": 2}, "both define find"),
    ],
)
def test_a_script_that_cannot_be_rendered_is_named(script: str, constants: dict[str, object], said: str) -> None:
    with pytest.raises(PublishError, match=said):
        bake(script, BOOTSTRAP, constants, "script.py")
