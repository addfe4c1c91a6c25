"""Blends of real (tiny) runs: planes only of folds that held their slide out, resumed where killed, used by inference,
published.
"""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from hubmap_kit import build_id
from hubmap_kit.cli.push import _stage_blend
from hubmap_kit.competition import rle
from hubmap_kit.competition import slides as slide_files
from hubmap_kit.competition.submission import SubmissionWriter
from hubmap_kit.competition.tables import Slide, read_test, read_train
from hubmap_kit.errors import CheckpointError, ConfigError, HubmapError
from hubmap_kit.inference.blend import Blend, Blended, BlendRun, read_blend, runs_among, runs_at, weights_id
from hubmap_kit.inference.ensemble import Ensemble, full_effort, load_ensemble, load_network, run_settings
from hubmap_kit.inference.predict import segment
from hubmap_kit.inference.worker import govern, mean_plane
from hubmap_kit.jobs.blend import blend, distinct_names, small_shape
from hubmap_kit.jobs.predict import predict
from hubmap_kit.kernel.kernels import infer
from hubmap_kit.kernel.mounts import COMPETITION
from hubmap_kit.publish.staging import stage_weights
from hubmap_kit.tiles.scaling import resize_mask, resize_plane
from hubmap_kit.tiles.store import decode_for, open_or_build

CPU = torch.device("cpu")
PLAIN = ["inference.views=none", "inference.tune_speed=false"]
SIDE = 100


def other_weights(run: Path, out: Path, seed: int) -> Path:
    """A copy of a run whose weights are a little off."""
    shutil.copytree(run, out, ignore=shutil.ignore_patterns("last.ckpt"))
    torch.manual_seed(seed)
    for path in out.glob("fold*/model.safetensors"):
        tensors = load_file(path)
        convolutions = [name for name, value in tensors.items() if "conv" in name and value.is_floating_point()]
        save_file(
            tensors | {name: tensors[name] * (1 + 0.3 * torch.randn_like(tensors[name])) for name in convolutions}, path
        )
    return out


@pytest.fixture(scope="module")
def runs(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("blends")
    return [tiny_run, other_weights(tiny_run, folder / "second", 1), other_weights(tiny_run, folder / "third", 2)]


@pytest.fixture(scope="module")
def stores(tiny_run: Path) -> Path:
    return tiny_run.parent / "stores"


@pytest.fixture(scope="module")
def fitted(runs: list[Path], stores: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("fitted") / "blend"
    summary = blend(runs, out, "", PLAIN, "cpu", stores, SIDE)
    assert "Fitted weights:" in summary and all(name in summary for name in ("run", "second", "third", "prostate"))
    return out


def weighed(path: Path, weights: dict[str, list[float]], **others: object) -> Path:
    """Change the weights, and whatever else, of a blend.json."""
    values = json.loads((path / "blend.json").read_text()) | others
    for organ, each in values["organs"].items():
        each["weights"] = weights.get(organ, weights.get("", each["weights"]))
    (path / "blend.json").write_text(json.dumps(values))
    return path


def plane_file(out: Path, name: str, slide_id: str) -> Path:
    (path,) = (out / "planes" / name).rglob(f"{slide_id}.npy")  # exactly one: no other fold has one of it
    return path


def test_every_plane_is_that_of_the_fold_that_held_its_slide_out(fitted: Path, runs: list[Path], stores: Path) -> None:
    with (runs[0] / "folds.csv").open(newline="") as file:
        fold_of = {row["id"]: int(row["fold"]) for row in csv.DictReader(file)}
    settings = run_settings(runs[1], PLAIN)
    slides = read_train(Path(settings.data.folder) / "train.csv")
    store = open_or_build(stores, slides, settings.scale, settings.tiles)
    networks = [Ensemble(settings, [load_network(settings, runs[1] / f"fold{fold}", CPU)], {}, CPU) for fold in (0, 1)]
    differ = 0
    for row, slide in enumerate(slides):
        path, shape = plane_file(fitted, "second", slide.id), small_shape(slide.height, slide.width, SIDE)
        mine, other = fold_of[slide.id], 1 - fold_of[slide.id]
        mine, leaked = (
            resize_plane(networks[fold].plane(store.image(row), organ=slide.organ), shape) for fold in (mine, other)
        )
        kept = np.load(path)
        assert (
            path.parent.name.startswith(f"fold{fold_of[slide.id]}-")
            and kept.dtype == np.uint8
            and max(kept.shape) == SIDE
        )
        np.testing.assert_allclose(kept / 255, mine, atol=0.5 / 255 + 1e-5)
        differ += np.abs(kept / 255 - leaked).max() > 0.02
        (truth,) = (fitted / "planes").glob(f"truth-*/{slide.id}.npy")
        np.testing.assert_array_equal(
            np.load(truth) & 1, resize_mask(decode_for(slide, slide.height, slide.width), shape)
        )
    assert differ == len(slides) == 10


def test_what_is_written_hangs_together(fitted: Path, runs: list[Path]) -> None:
    values, found = json.loads((fitted / "blend.json").read_text()), read_blend(fitted)
    assert [run.name for run in found.runs] == distinct_names(runs) == ["run", "second", "third"]
    assert [path.resolve() for path in runs_at(fitted)] == [run.resolve() for run in runs] and not Path(
        found.runs[1].path
    ).is_absolute()
    with (fitted / "blend.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    columns = [
        "id",
        "organ",
        "data_source",
        "fold",
        "dice run",
        "dice second",
        "dice third",
        "dice equal",
        "dice blend",
    ]
    assert len(rows) == 10 and list(rows[0]) == columns
    for organ, each in values["organs"].items():
        told = np.mean([float(row["dice blend"]) for row in rows if row["organ"] == organ])
        assert (
            each["dice"]["blend"] == pytest.approx(told, abs=1e-5)
            and sum(each["weights"]) == pytest.approx(1)
            and 0 < each["threshold"] < 1
        )
        assert each["used"] == "equal" or each["dice"]["blend"] > each["dice"]["equal"]
    assert sorted(step["run"] for step in values["greedy"]) == ["run", "second", "third"]
    assert np.allclose(np.diag(values["correlation"]), 1) and values["correlation"][0][1] < 1
    page = (fitted / "index.html").read_text()
    assert all(
        word in page
        for word in ("Weights", "How alike the runs are", "One run after the other", "second", "prefers-color-scheme")
    )
    assert "http://" not in page and "https://" not in page


KILLED = """
import os, signal, sys
from pathlib import Path
from hubmap_kit.jobs import blend as blend_planes
from hubmap_kit.jobs.blend import blend

real, written = blend_planes.np.save, []

def save(path, values):
    real(path, values)
    written.append(path)
    if len(written) == 5:
        os.kill(os.getpid(), signal.SIGKILL)  # the fifth plane has only its temporary name

blend_planes.np.save = save
*runs, stores, out = map(Path, sys.argv[1:])
blend(runs, out, "", {plain}, "cpu", stores, {side})
"""


def test_a_killed_blend_goes_on_and_ends_the_same(fitted: Path, runs: list[Path], stores: Path, tmp_path: Path) -> None:
    out = tmp_path / "blend"
    code = KILLED.format(plain=PLAIN, side=SIDE)
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, [*runs, stores, out])], capture_output=True, text=True, check=False
    )
    assert done.returncode == -9, done.stderr
    files = list(out.rglob("*.npy"))
    whole = {path: path.stat().st_mtime_ns for path in files if not path.name.startswith(".")}
    assert len(whole) == 4 and len(files) == 5 and not (out / "blend.json").exists()
    blend(runs, out, "", PLAIN, "cpu", stores, SIDE)
    assert {path: path.stat().st_mtime_ns for path in whole} == whole and not list(out.rglob(".*.npy"))
    assert (out / "blend.csv").read_bytes() == (fitted / "blend.csv").read_bytes()
    ours, theirs = (json.loads((each / "blend.json").read_text()) for each in (out, fitted))
    assert ours["organs"] == theirs["organs"]
    damaged = next(iter(whole))
    damaged.write_bytes(damaged.read_bytes()[:-50])
    blend(runs[:2], out, "", PLAIN, "cpu", stores, SIDE)
    assert np.load(damaged).dtype == np.uint8 and len(read_blend(out).runs) == 2


def test_runs_that_do_not_fit_together_are_refused(runs: list[Path], stores: Path, tmp_path: Path) -> None:
    split = Path(shutil.copytree(runs[1], tmp_path / "split"))
    header, *rows = (split / "folds.csv").read_text().splitlines()
    turned = [row[:-1] + str(1 - int(row[-1])) for row in rows]
    (split / "folds.csv").write_text("\n".join([header, *turned]) + "\n")
    half = Path(shutil.copytree(runs[1], tmp_path / "half"))
    (half / "folds.csv").write_text("\n".join([header, *rows[1:]]) + "\n")
    one, two = (Path(shutil.copytree(runs[number], tmp_path / f"fold{number}only")) for number in (1, 2))
    shutil.rmtree(one / "fold1")
    shutil.rmtree(two / "fold0")
    twin = Path(shutil.copytree(runs[1], tmp_path / "twin"))
    first = rows[0].split(",")[0]
    for given, error, words in (
        ([runs[0]], ConfigError, "1 run is no blend"),
        ([runs[0], runs[0]], ConfigError, "given twice"),
        ([runs[1], twin], ConfigError, "holds the same weights as"),
        ([runs[0], split], CheckpointError, f"slide {first} is in fold"),
        ([runs[0], half], CheckpointError, f"slide {first} is in fold {rows[0][-1]} of .* and not in"),
        ([one, two], CheckpointError, "share no trained fold"),
        ([runs[0], tmp_path], CheckpointError, "is not a run folder"),
    ):
        with pytest.raises(error, match=words) as stop:
            blend(given, tmp_path / "out", "", PLAIN, "cpu", stores, SIDE)
        assert "\n" not in str(stop.value)
    with pytest.raises(ConfigError, match="is a run folder"):
        blend(runs, runs[1], "", PLAIN, "cpu", stores, SIDE)
    assert not (tmp_path / "out").exists()


def test_only_folds_that_all_runs_have_are_used(
    runs: list[Path], stores: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    one = Path(shutil.copytree(runs[1], tmp_path / "one"))
    shutil.rmtree(one / "fold1")
    blend([runs[0], one], tmp_path / "out", "", PLAIN, "cpu", stores, SIDE)
    with (tmp_path / "out" / "blend.csv").open(newline="") as file:
        assert {row["fold"] for row in csv.DictReader(file)} == {"0"}
    assert "only folds [0] are trained in all runs" in caplog.text


@pytest.fixture(scope="module")
def slides(sample_data: Path) -> list[Slide]:
    return read_test(sample_data / "test.csv")[:3]


@pytest.fixture(scope="module")
def team(tiny_run: Path) -> list[Ensemble]:
    return [load_ensemble(tiny_run, CPU, [0], PLAIN), load_ensemble(tiny_run, CPU, [1], PLAIN)]


def made_blend(weights: dict[str, tuple[float, ...]], thresholds: dict[str, float], rescue: bool = False) -> Blend:
    return Blend((BlendRun("a", "a", ""), BlendRun("b", "b", "")), weights, thresholds, rescue)


class Broken(nn.Module):
    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        raise AssertionError("a run without weight was asked")


def test_the_weighted_mean_against_numpy(slides: list[Slide], team: list[Ensemble]) -> None:
    for slide in slides:
        pixels = slide_files.read(slide.path)
        one, two = (each.probability(pixels, slide.um_per_px, None, slide.organ) for each in team)
        blended = Blended(team, made_blend({slide.organ: (0.3, 0.7)}, {slide.organ: 0.42}))
        np.testing.assert_allclose(mean_plane(slide, pixels, blended), 0.3 * one + 0.7 * two, atol=1e-6)
        np.testing.assert_array_equal(
            segment(slide, pixels, blended), mean_plane(slide, pixels, blended) >= np.float32(0.42)
        )
        plain = mean_plane(slide, pixels, team)
        for even in ({slide.organ: (0.5, 0.5)}, {}):  # bit for bit
            assert np.array_equal(mean_plane(slide, pixels, Blended(team, made_blend(even, {}))), plain)
        np.testing.assert_array_equal(
            segment(slide, pixels, Blended(team, made_blend({}, {}))), segment(slide, pixels, team)
        )
        alone = Blended([replace(team[0], networks=[Broken()]), team[1]], made_blend({slide.organ: (0.0, 1.0)}, {}))
        assert np.array_equal(mean_plane(slide, pixels, alone), two)


def test_the_governor_knows_that_a_run_without_weight_costs_nothing(slides: list[Slide], team: list[Ensemble]) -> None:
    efforts = tuple(full_effort(each.experiment.inference, 1) for each in team)
    both = Blended(team, made_blend({slide.organ: (0.3, 0.7) for slide in slides}, {}))
    one = Blended(team, made_blend({slide.organ: (0.0, 1.0) for slide in slides}, {}))
    governors = [govern(slides, each, lambda: 1e6, 1) for each in (team, both, one)]
    costs = [governor._passes[0, governor.ladder.index(efforts)] for governor in governors]
    assert costs[0] == costs[1] == 2 * costs[2] > 0


def test_the_command_line_goes_before_the_blend_and_the_blend_before_the_runs(
    team: list[Ensemble], slides: list[Slide]
) -> None:
    slide, pixels = slides[0], slide_files.read(slides[0].path)
    content = made_blend({}, {slide.organ: 0.42}, rescue=True)
    own = [
        replace(
            each,
            experiment=each.experiment.model_copy(
                update={"inference": each.experiment.inference.model_copy(update={"thresholds": {slide.organ: 0.9}})}
            ),
        )
        for each in team
    ]
    plane = mean_plane(slide, pixels, team)
    np.testing.assert_array_equal(segment(slide, pixels, Blended(own, content)), plane >= np.float32(0.42))
    said = Blended(own, content, [f"inference.thresholds={{{slide.organ}: 0.44}}"])
    np.testing.assert_array_equal(segment(slide, pixels, said), plane >= np.float32(0.44))
    high = Blended(team, made_blend({}, {slide.organ: 0.99}, rescue=True))
    assert segment(slide, pixels, high).any()
    assert not segment(slide, pixels, Blended(team, high.blend, ["inference.postprocess.rescue=false"])).any()


def masks(path: Path) -> dict[str, str]:
    with path.open(newline="") as file:
        return {row["id"]: row["rle"] for row in csv.DictReader(file)}


@pytest.fixture
def uneven(fitted: Path, runs: list[Path], tmp_path: Path) -> Path:
    """The fitted blend with weights that are worth telling apart."""
    out = tmp_path / "uneven"
    out.mkdir()
    shutil.copyfile(fitted / "blend.json", out / "blend.json")
    values = json.loads((out / "blend.json").read_text())
    for run, folder in zip(values["runs"], runs, strict=True):
        run["path"] = str(folder)
    for each in values["organs"].values():
        each["threshold"] = 0.47  # between this network's probabilities
    return weighed(out, {"": [0.7, 0.0, 0.3]}, runs=values["runs"], organs=values["organs"])


def test_a_submission_of_a_blend(uneven: Path, sample_data: Path, tmp_path: Path) -> None:
    predict(
        runs_at(uneven), sample_data / "test.csv", tmp_path / "s.csv", None, PLAIN, "cpu", deadline=1e5, blend=uneven
    )
    content, slides = read_blend(uneven), read_test(sample_data / "test.csv")
    one, _, three = (load_ensemble(run, CPU, None, PLAIN) for run in runs_at(uneven))
    with SubmissionWriter(tmp_path / "plain.csv", [slide.id for slide in slides]) as writer:
        for slide in slides:
            pixels = slide_files.read(slide.path)
            plane = np.float32(0.7) * one.probability(pixels, slide.um_per_px, None, slide.organ)
            plane += np.float32(0.3) * three.probability(pixels, slide.um_per_px, None, slide.organ)
            mask = plane >= np.float32(content.thresholds[slide.organ])
            assert mask.any()  # else it would be rescued
            writer.add(slide.id, rle.encode(mask))
    assert masks(tmp_path / "s.csv") == masks(tmp_path / "plain.csv")


def test_a_blend_finds_its_own_weights_and_no_others(uneven: Path, runs: list[Path], tmp_path: Path) -> None:
    assert runs_among(uneven, [runs[2], runs[1], runs[0]]) == runs
    with pytest.raises(CheckpointError, match="needs the weights of third"):
        runs_among(uneven, runs[:2])
    moved = [Path(shutil.copytree(run, tmp_path / "moved" / str(number))) for number, run in enumerate(runs)]
    assert runs_among(uneven, moved) == moved and weights_id(moved[1]) == weights_id(runs[1]) != weights_id(runs[2])
    values = json.loads((uneven / "blend.json").read_text())
    values["runs"][1]["path"] = str(moved[2])
    weighed(uneven, {}, runs=values["runs"])
    with pytest.raises(CheckpointError, match="holds other weights .* fit it again"):
        runs_at(uneven)
    values["runs"][1]["path"] = "nowhere"
    weighed(uneven, {}, runs=values["runs"])
    with pytest.raises(CheckpointError, match="needs the run second in .*nowhere"):
        runs_at(uneven)


@pytest.mark.parametrize("change", ["weights", "threshold", "organ", "format", "cut", "gone"])
def test_a_bad_blend_is_one_sentence(change: str, uneven: Path) -> None:
    path = uneven / "blend.json"
    values = json.loads(path.read_text())
    kidney = values["organs"]["kidney"]
    if change == "weights":
        kidney["weights"] = [0.7, 0.7, 0.3]
    elif change == "threshold":
        kidney["threshold"] = 1.5
    elif change == "organ":
        values["organs"]["heart"] = kidney
    elif change == "format":
        values["format"] = 99
    path.write_text(json.dumps(values)[: -40 if change == "cut" else None])
    if change == "gone":
        path.unlink()
    with pytest.raises(HubmapError) as stop:
        read_blend(uneven)
    assert (
        str(path) in str(stop.value)
        and "\n" not in str(stop.value)
        and ("hubmap blend" in str(stop.value) or "fit it again" in str(stop.value))
    )


@pytest.fixture
def kaggle(sample_data: Path, tmp_path: Path) -> dict[str, Path]:
    folders = {name: tmp_path / "kaggle" / name for name in ("root", "working", "scratch")}
    for folder in folders.values():
        folder.mkdir(parents=True)
    (folders["root"] / "competitions").mkdir()
    (folders["root"] / "competitions" / COMPETITION).symlink_to(sample_data)
    return folders


def test_a_published_blend_is_used_in_the_kernel(
    uneven: Path, kaggle: dict[str, Path], sample_data: Path, tmp_path: Path
) -> None:
    staged = _stage_blend(uneven, kaggle["root"] / "datasets" / "alice" / "hubmap-kit-weights", False)
    paths = {facts["path"] for facts in build_id.verify(staged).files.values()}
    assert "blend.json" in paths and {"run/config.yaml", "second/config.yaml", "third/fold1/model.safetensors"} <= paths
    text = (staged / "blend.json").read_text()
    assert str(tmp_path) not in text and str(runs_at(uneven)[0]) not in text
    outcome = infer(PLAIN, 8.5, "cpu", **kaggle)
    assert outcome.status == "complete" and outcome.facts["blend"] == ["run", "second", "third"], outcome.sentence
    predict(runs_at(uneven), sample_data / "test.csv", tmp_path / "s.csv", None, PLAIN, "cpu", blend=uneven)
    assert masks(kaggle["working"] / "submission.csv") == masks(tmp_path / "s.csv")


def test_a_kernel_without_all_runs_of_its_blend_takes_the_mean(
    uneven: Path,
    runs: list[Path],
    kaggle: dict[str, Path],
    sample_data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    stage_weights(runs, kaggle["root"] / "weights", ["a", "b", "c"], blend=uneven)
    folder = kaggle["root"] / "weights"
    for path in folder.glob("b__*"):
        path.unlink()
    left = build_id.describe(
        "weights",
        folder,
        {path.name: path.name.replace("__", "/") for path in folder.iterdir() if path.name != build_id.FILE},
    )
    build_id.write(folder, left)
    outcome = infer(PLAIN, 8.5, "cpu", **kaggle)
    assert (
        outcome.status == "complete"
        and "blend" not in outcome.facts
        and "the blend is not used" in capsys.readouterr().err
    )
    predict([runs[0], runs[2]], sample_data / "test.csv", tmp_path / "s.csv", None, PLAIN, "cpu")
    assert masks(kaggle["working"] / "submission.csv") == masks(tmp_path / "s.csv")
