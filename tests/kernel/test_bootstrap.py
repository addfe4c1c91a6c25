"""The part of a kernel that runs before the kit is there: real files, real pip, in a process of its own where it ends
one.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

import hubmap_kit
from hubmap_kit import build_id
from hubmap_kit.publish.script import bake

KERNELS = Path(hubmap_kit.__file__).parents[1] / "kernels"
# A stand-in for the kit's wheel: it is imported although the real kit is installed, and tells where it came from.
STAND_IN = """
import os
def infer(overrides, hours, accelerator, weights):
    said = f"{os.environ['HUBMAP_BUILD_ID']} {__file__} {overrides} {hours} {accelerator}"
    return "complete", said, {"weights": [weights]}
def tiles(config, overrides):
    raise MemoryError("no memory")
def train(config, folds, overrides, hours, accelerator, resume):
    import atexit, threading, time
    threading.Thread(target=time.sleep, args=(300,)).start()
    atexit.register(time.sleep, 300)
    return "degraded", "most failed", {"slides": 5000, "failed_slides": 4998}
"""


@pytest.fixture
def bootstrap(tmp_path: Path) -> ModuleType:
    """The module, looking at folders of the test and not waiting."""
    spec = importlib.util.spec_from_file_location("bootstrap_under_test", KERNELS / "bootstrap.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.INPUT, module.WORKING, module.WAIT_S = str(tmp_path / "input"), str(tmp_path / "working"), 0
    return module


def wheel(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in {
            "hubmap_kit/__init__.py": "",
            "hubmap_kit/runtime/__init__.py": "",
            "hubmap_kit/kernel/kernels.py": STAND_IN,
            "hubmap_kit-9.dist-info/METADATA": (
                "Metadata-Version: 2.1\nName: hubmap-kit\nVersion: 9\nRequires-Dist: no-such-package\n"
            ),
            "hubmap_kit-9.dist-info/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
            "hubmap_kit-9.dist-info/RECORD": "",
        }.items():
            archive.writestr(name, text)


def bundle(folder: Path, note: str = "") -> str:
    """A code dataset with one wheel; returns its build id."""
    folder.mkdir(parents=True)
    wheel(folder / "hubmap_kit-9-py3-none-any.whl")
    (folder / "pins.txt").write_text(note)
    build = build_id.describe("code", folder, git_sha="0123456789abcdef")
    build_id.write(folder, build)
    return build.build_id


LAYOUTS = ("datasets/alice/hubmap-kit-code", "hubmap-kit-code", "deep/er/and/deeper")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_it_finds_the_bundle_in_every_layout(layout: str, bootstrap: ModuleType, tmp_path: Path) -> None:
    wanted = bundle(tmp_path / "input" / layout)
    other = tmp_path / "input" / "datasets" / "alice" / "weights"
    other.mkdir(parents=True)
    (other / "model.ckpt").write_text("w")
    build_id.write(other, build_id.describe("weights", other))
    (tmp_path / "input" / "strange").mkdir()
    (tmp_path / "input" / "strange" / "BUILD_ID.json").write_text("{}")
    folder, table = bootstrap.find(wanted)
    assert folder == tmp_path / "input" / layout and table["build_id"] == wanted


def test_the_same_bundle_under_two_paths_is_one(bootstrap: ModuleType, tmp_path: Path) -> None:
    wanted = bundle(tmp_path / "input" / LAYOUTS[0])
    shutil.copytree(tmp_path / "input" / LAYOUTS[0], tmp_path / "input" / LAYOUTS[1])
    assert bootstrap.find(wanted)[1]["build_id"] == wanted


def test_a_stale_a_missing_and_a_second_bundle_are_refused(
    bootstrap: ModuleType, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match=r"holds the code bundles \[\], expected 'x' alone"):
        bootstrap.find("x")
    old = bundle(tmp_path / "input" / "a")
    with pytest.raises(SystemExit, match=f"{old}.*new version has not propagated; run this again"):
        bootstrap.find("new")
    new = bundle(tmp_path / "input" / "b", "newer")
    with pytest.raises(SystemExit, match="exactly one dataset of kind code"):
        bootstrap.find(new)
    assert str(tmp_path / "input" / "b") in capfd.readouterr().err


def test_it_waits_for_the_new_version(bootstrap: ModuleType, tmp_path: Path) -> None:
    folder, waited = tmp_path / "input" / "a", []
    bundle(folder)
    bundle(tmp_path / "next", "newer")
    wanted = build_id.read(tmp_path / "next").build_id

    def sleep(seconds: float) -> None:
        waited.append(seconds)
        if len(waited) == 3:
            shutil.rmtree(folder)
            shutil.copytree(tmp_path / "next", folder)

    bootstrap.WAIT_S, bootstrap.time = 60, SimpleNamespace(sleep=sleep)
    assert bootstrap.find(wanted)[1]["build_id"] == wanted
    waited.clear()
    with pytest.raises(SystemExit):
        bootstrap.find("never")
    assert sum(waited) == 60


@pytest.mark.parametrize("damage", ["changed", "missing"])
def test_a_damaged_bundle_never_reaches_pip(
    damage: str, bootstrap: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = bundle(tmp_path / "input" / "a")
    path = tmp_path / "input" / "a" / "hubmap_kit-9-py3-none-any.whl"
    path.write_bytes(path.read_bytes()[:-1]) if damage == "changed" else path.unlink()
    monkeypatch.setattr(bootstrap.subprocess, "run", lambda *_, **__: pytest.fail("pip was called"))
    with pytest.raises(
        SystemExit, match=r"hubmap_kit-9-py3-none-any\.whl is missing or is not the file that BUILD_ID\.json lists"
    ):
        bootstrap.install(*bootstrap.find(wanted))


def rendered(name: str, tmp_path: Path, build: str) -> Path:
    """A kernel's script as it is pushed, but for the two folders."""
    text = bake(
        (KERNELS / name / f"{name}.py").read_text(),
        (KERNELS / "bootstrap.py").read_text(),
        {"BUILD_ID": build},
        f"{name}.py",
    )
    for folder in ("input", "working"):
        assert text.count(f'"/kaggle/{folder}"') == 1
        text = text.replace(f'"/kaggle/{folder}"', repr(str(tmp_path / folder)))
    path = tmp_path / f"{name}.py"
    assert text.count('"/kaggle') == 0 and text.count(", 60, ") == 1
    path.write_text(text.replace(", 60, ", ", 0, "))
    (tmp_path / "working").mkdir(exist_ok=True)
    return path


def run(
    script: Path, tmp_path: Path, timeout: float | None = None
) -> tuple[subprocess.CompletedProcess[str], dict[str, object]]:
    # A machine's own settings of pip: nothing would be installed.
    environment = {**os.environ, "TMPDIR": str(tmp_path / "tmp"), "PIP_DRY_RUN": "1", "PIP_REQUIRE_VIRTUALENV": "1"}
    (tmp_path / "tmp").mkdir(exist_ok=True)
    done = subprocess.run(
        [sys.executable, str(script)],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env=environment,
        timeout=timeout,
    )
    return done, json.loads((tmp_path / "working" / "kernel.json").read_text())


def test_a_rendered_script_installs_the_bundle_and_calls_it(tmp_path: Path) -> None:
    wanted = bundle(tmp_path / "input" / LAYOUTS[0])
    done, facts = run(rendered("infer", tmp_path, wanted), tmp_path)
    first, *_, last = done.stdout.splitlines()
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(rf"HUBMAP START infer build_id={wanted} utc=\d{{4}}-\d\d-\d\dT\d\d:\d\d:\d\dZ", first)
    assert re.fullmatch(rf"HUBMAP END infer complete build_id={wanted} utc=\d{{4}}-\d\d-\d\dT\d\d:\d\d:\d\dZ", last)
    assert (facts["kernel"], facts["status"], facts["build_id"]) == ("infer", "complete", wanted)
    assert facts["weights"] == [""]
    assert facts["sentence"] == f"{wanted} {facts['sentence'].split()[1]} [] 8.5 t4x2"
    # The bundle's own kit ran, not the installed one, and the output folder holds nothing but kernel.json.
    assert str(facts["sentence"]).split()[1].startswith(str(tmp_path / "tmp"))
    assert os.listdir(tmp_path / "working") == ["kernel.json"]


def test_a_crash_and_a_refusal_end_with_the_marker_too(tmp_path: Path) -> None:
    wanted = bundle(tmp_path / "input" / LAYOUTS[0])
    crashed, facts = run(rendered("tiles", tmp_path, wanted), tmp_path)
    assert crashed.returncode == 1 and facts["status"] == "failed" and facts["sentence"] == "no memory"
    assert "MemoryError" in crashed.stderr and "error: no memory" in crashed.stderr
    refused, facts = run(rendered("train", tmp_path, "other"), tmp_path)
    assert refused.returncode == 1 and "Traceback" not in refused.stderr and "error: " in refused.stderr
    assert facts["status"] == "failed" and wanted in str(facts["sentence"])
    for done, kernel in ((crashed, "tiles"), (refused, "train")):
        assert done.stdout.splitlines()[-1].startswith(f"HUBMAP END {kernel} failed build_id=")


def test_after_its_marker_a_kernel_leaves_at_once_whatever_still_runs(tmp_path: Path) -> None:
    wanted = bundle(tmp_path / "input" / LAYOUTS[0])
    done, facts = run(rendered("train", tmp_path, wanted), tmp_path, timeout=60)
    assert done.returncode == 0 and facts["status"] == "degraded" and facts["failed_slides"] == 4998
    last = done.stdout.splitlines()[-1]
    assert re.fullmatch(rf"HUBMAP END train degraded build_id={wanted} utc=\S+ failed=4998/5000", last)


@pytest.mark.parametrize("name", ["train", "infer", "tiles"])
def test_scripts_stay_short_and_need_only_the_standard_library(name: str, tmp_path: Path) -> None:
    text = rendered(name, tmp_path, "b").read_text()
    assert len(text.splitlines()) <= 140
    imported = set(re.findall(r"^\s*(?:import|from) (\w+)", text, re.MULTILINE)) - {"hubmap_kit"}
    assert imported and imported <= sys.stdlib_module_names
    metadata = json.loads((KERNELS / name / "kernel-metadata.json").read_text())
    assert (
        metadata["code_file"] == f"{name}.py"
        and metadata["is_private"] is True
        and metadata["enable_internet"] is False
    )
