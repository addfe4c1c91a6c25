"""The notebook: papermill really executes it, in a kernel of its own."""

from __future__ import annotations

import ast
import base64
import hashlib
import json
import shutil
import sys
from pathlib import Path

import pandas as pd
import pytest
from tiny import TINY

from hubmap_kit.errors import CheckpointError, ConfigError, HubmapError
from hubmap_kit.jobs.notebook import notebook, shipped_notebook

pytest.importorskip("papermill")
pytest.importorskip("ipykernel")
SETTINGS = (*TINY, "training.samples_per_epoch=8", "training.epochs=1", "inference.views=none", "augment.pipeline=none")
PNG = b"\x89PNG\r\n\x1a\n"


def code_cells(path: Path) -> list[dict]:
    return [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]


def text_of(cells: list[dict]) -> str:
    return "".join("".join(output.get("text", "")) for cell in cells for output in cell["outputs"])


def pictures(cells: list[dict]) -> list[bytes]:
    outputs = [output.get("data", {}) for cell in cells for output in cell["outputs"]]
    return [base64.b64decode("".join(data["image/png"])) for data in outputs if "image/png" in data]


def test_the_shipped_notebook_is_clean_and_has_one_parameters_cell() -> None:
    cells = code_cells(shipped_notebook())
    assert [cell["metadata"].get("tags", []) == ["parameters"] for cell in cells] == [True] + [False] * (len(cells) - 1)
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in cells)
    assigned = ast.parse("".join(cells[0]["source"])).body
    values = {node.targets[0].id: ast.literal_eval(node.value) for node in assigned}  # type: ignore[attr-defined]
    assert values.keys() == {"config", "data", "out", "overrides", "folds", "device", "stores", "resume"}


def test_it_trains_reports_and_leaves_the_executed_copy(sample_data: Path, tmp_path: Path) -> None:
    before, out = hashlib.sha256(shipped_notebook().read_bytes()).hexdigest(), tmp_path / "run"
    copy = notebook("baseline", out, str(sample_data), SETTINGS, [0], "cpu")
    assert copy == out / "notebook.ipynb" and not list(tmp_path.glob("*.ipynb"))
    assert hashlib.sha256(shipped_notebook().read_bytes()).hexdigest() == before
    cells = code_cells(copy)
    assert all(cell["execution_count"] for cell in cells)
    assert not any(output["output_type"] == "error" for cell in cells for output in cell["outputs"])
    # What it shows is what lies in the run: its pictures byte by byte, the log of the epoch, the Dice of the table.
    drawn = [(out / name).read_bytes() for name in ("curves.png", "thresholds.png")]
    drawn += [path.read_bytes() for path in (out / "overlays").glob("*.png")]
    assert sorted(map(len, pictures(cells))) == sorted(map(len, drawn)) and set(pictures(cells)) == set(drawn)
    assert all(each.startswith(PNG) for each in drawn) and len(drawn) > 2
    scored = pd.read_csv(out / "oof.csv")
    assert set(scored["fold"]) == {0} and f"{scored['dice'].mean():.4f}" in text_of(cells)
    assert "fold 0 epoch 1/1: train loss" in text_of(cells)
    with pytest.raises(CheckpointError, match="already holds a run; add --resume"):
        notebook("baseline", out, str(sample_data), SETTINGS, [0], "cpu")
    assert code_cells(copy) == cells


def test_an_error_in_it_is_one_sentence_and_the_half_stays(sample_data: Path, tmp_path: Path) -> None:
    data, out = tmp_path / "data", tmp_path / "run"
    shutil.copytree(sample_data, data)
    broken = next((data / "train_images").iterdir())
    broken.write_bytes(broken.read_bytes()[:200])
    with pytest.raises(HubmapError, match=r"^the notebook stopped in its cell \d+: ") as raised:
        notebook("baseline", out, str(data), SETTINGS, [0], "cpu")
    sentence = str(raised.value)
    assert "\n" not in sentence and broken.name in sentence and "Traceback" not in sentence
    copy = out / "notebook.ipynb"
    assert sentence.endswith(f"what it had executed is in {copy}")
    cells = code_cells(copy)
    errors = [output for cell in cells for output in cell["outputs"] if output["output_type"] == "error"]
    assert len(errors) == 1 and "tiles:" in text_of(cells)  # the experiment was shown before
    assert cells[-1]["execution_count"] is None


def test_wrong_settings_start_nothing(sample_data: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="training.lr is -1"):
        notebook("baseline", tmp_path / "run", str(sample_data), ["training.lr=-1"])
    with pytest.raises(ConfigError, match="device 'nowhere'"):
        notebook("baseline", tmp_path / "run", str(sample_data), device="nowhere")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("missing", ["papermill", "ipykernel"])
def test_without_papermill_one_sentence(missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(HubmapError, match=rf"^{missing}.*pip install 'hubmap-kit\[notebook\]'"):
        notebook("baseline", tmp_path / "run")
