"""The kernels' own functions, on folders that look like Kaggle's but lie elsewhere."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from clocks import Countdown
from safetensors.torch import save_file
from tiny import TINY

from hubmap_kit import experiment
from hubmap_kit.competition.checker import check_submission
from hubmap_kit.competition.tables import read_train
from hubmap_kit.models.build import build
from hubmap_kit.runtime import build_id, kernel, mounts
from hubmap_kit.runtime.infer_job import predict
from hubmap_kit.runtime.kernel import infer, run_name, tiles, train
from hubmap_kit.runtime.mounts import COMPETITION
from hubmap_kit.runtime.train_job import train as train_job
from hubmap_kit.tiles.convert import fingerprint
from hubmap_kit.training.clock import OutOfTime

TABLES = ("metrics.csv", "oof.csv", "thresholds.json")


@pytest.fixture
def kaggle(tmp_path: Path, sample_data: Path) -> dict[str, Path]:
    """Input with the competition attached, an empty working folder, and a scratch folder that the test can look into."""
    folders = {"root": tmp_path / "input", "working": tmp_path / "working", "scratch": tmp_path / "scratch"}
    for folder in folders.values():
        folder.mkdir()
    (folders["root"] / "competitions").mkdir()
    (folders["root"] / "competitions" / COMPETITION).symlink_to(sample_data)
    return folders


def attach(kaggle: dict[str, Path], source: Path, slug: str, name: str) -> Path:
    """Mount `source` as the folder `name` of another kernel's output, without leave to write."""
    target = kaggle["root"] / "notebooks" / "alice" / slug / name
    shutil.copytree(source, target)
    for path in [*target.rglob("*"), target]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    return target


def publish(kaggle: dict[str, Path], kind: str, **files: Path) -> None:
    folder = kaggle["root"] / "datasets" / "alice" / f"hubmap-kit-{kind}"
    folder.mkdir(parents=True)
    for flat, source in files.items():
        shutil.copyfile(source, folder / flat)
    build_id.write(folder, build_id.describe(kind, folder, {flat: flat.replace("__", "/") for flat in files}))


def publish_run(kaggle: dict[str, Path], run: Path, name: str) -> None:
    files = [run / "config.yaml", run / "thresholds.json", *run.glob("fold*/model.safetensors")]
    publish(kaggle, "weights", **{f"{name}__{path.relative_to(run)}".replace("/", "__"): path for path in files})


def test_tiles_are_cut_once_and_used_where_they_are_attached(kaggle: dict[str, Path], sample_data: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    cut = tiles("baseline", TINY, kaggle["root"], tmp_path / "elsewhere", kaggle["scratch"])
    settings = experiment.load("baseline", TINY, str(sample_data))
    mark = fingerprint(read_train(sample_data / "train.csv"), settings.scale)
    store = tmp_path / "elsewhere" / "stores" / mark
    assert cut.status == "complete" and str(store) in cut.sentence
    # Another grid than the one that was kept: its table has to be made beside the mount.
    mounted = attach(kaggle, tmp_path / "elsewhere" / "stores", "hubmap-make-tiles", "stores") / mark
    network = tmp_path / "start.safetensors"
    save_file({key: value.contiguous() for key, value in build(settings.model).encoder.model.state_dict().items()}, network)
    publish(kaggle, "pretrained", **{"start.safetensors": network})
    changes = [*TINY, "training.epochs=1", "tiles.size=96", "model.encoder_weights=start.pth"]
    done = train("baseline", [1], changes, 11.5, "cpu", **kaggle)
    assert done.status == "complete", done.sentence
    used = kaggle["scratch"] / "stores" / mark
    assert (used / "images.u8").resolve() == mounted / "images.u8" and (used / "tiles-96-0.parquet").is_file()
    assert sorted(path.name for path in mounted.iterdir()) == sorted(path.name for path in store.iterdir())
    # Nothing but the run becomes output, and it remembers which weights it began with.
    assert [path.name for path in kaggle["working"].iterdir()] == ["baseline"]
    kept = experiment.read(kaggle["working"] / "baseline" / "config.yaml")
    assert kept.model.encoder_weights.endswith("start.safetensors") and Path(kept.model.encoder_weights).is_file()
    assert (kaggle["working"] / "baseline" / "fold1" / "model.safetensors").is_file()


def test_a_stopped_training_goes_on_in_the_next_session(kaggle: dict[str, Path], sample_data: Path, tiny_run: Path, tmp_path: Path) -> None:
    settings = experiment.load("baseline", TINY, str(sample_data))
    with pytest.raises(OutOfTime):
        train_job(settings, tmp_path / "former" / "baseline", device="cpu", clock=Countdown(8))
    attach(kaggle, tmp_path / "former" / "baseline", "hubmap-train", "baseline")
    stopped = train("baseline", [], TINY, 1e-9, "cpu", **kaggle)
    assert stopped.status == "stopped" and "fold 0 after epoch 1 of 2" in stopped.sentence
    shutil.rmtree(kaggle["working"] / "baseline")
    done = train("baseline", [], TINY, 11.5, "cpu", **kaggle)
    assert done.status == "complete" and "2 folds done" in done.sentence
    for name in TABLES:
        assert (kaggle["working"] / "baseline" / name).read_bytes() == (tiny_run / name).read_bytes(), name


def test_a_complete_attached_run_is_kept_as_it_is(kaggle: dict[str, Path], tiny_run: Path) -> None:
    attach(kaggle, tiny_run, "hubmap-train", "baseline")
    assert train("baseline", [], TINY, 11.5, "cpu", **kaggle).status == "complete"
    for name in (*TABLES, "fold0/model.safetensors", "fold1/model.safetensors", "fold0/last.ckpt"):
        assert (kaggle["working"] / "baseline" / name).read_bytes() == (tiny_run / name).read_bytes(), name
    failed = train("baseline", [], [*TINY, "training.lr=0.5"], 11.5, "cpu", kaggle["root"], kaggle["scratch"])
    assert failed.status == "failed" and "training.lr" in failed.sentence


def test_infer_gives_what_predict_gives(kaggle: dict[str, Path], sample_data: Path, tiny_run: Path, tmp_path: Path) -> None:
    publish_run(kaggle, tiny_run, "mini")
    attach(kaggle, tiny_run, "hubmap-train", "baseline")
    done = infer(["inference.views=none"], 8.5, "cpu", **kaggle)
    assert done.status == "complete", done.sentence
    predict([tiny_run], sample_data / "test.csv", tmp_path / "expected.csv", overrides=["inference.views=none"], device="cpu")
    assert (kaggle["working"] / "submission.csv").read_bytes() == (tmp_path / "expected.csv").read_bytes()
    assert {"submission.csv"} <= {path.name for path in kaggle["working"].iterdir()} <= {"submission.csv", "governor.csv"}


def test_infer_takes_the_weights_that_it_was_rendered_for_and_no_others(
    kaggle: dict[str, Path], sample_data: Path, tiny_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mounts, "WAIT_S", 0.0)
    publish_run(kaggle, tiny_run, "mini")
    held = build_id.read(kaggle["root"] / "datasets" / "alice" / "hubmap-kit-weights").build_id
    stale = infer(["inference.views=none"], 8.5, "cpu", **kaggle, weights="weights-000000000000")
    assert stale.status == "failed" and f"holds the weights {held}, expected build weights-000000000000" in stale.sentence
    report = check_submission(kaggle["working"] / "submission.csv", sample_data / "test.csv")
    assert report.rows == report.empty
    done = infer(["inference.views=none"], 8.5, "cpu", **kaggle, weights=held)
    assert (done.status, done.facts) == ("complete", {"weights": [held]}), done.sentence


@pytest.mark.parametrize("fault", ["no run", "no time", "damaged run", "bad setting"])
def test_whatever_fails_there_is_a_complete_file(fault: str, kaggle: dict[str, Path], sample_data: Path, tiny_run: Path) -> None:
    if fault != "no run":
        publish_run(kaggle, tiny_run, "mini")
    if fault == "damaged run":
        path = next((kaggle["root"] / "datasets").rglob("*fold0__model.safetensors"))
        path.write_bytes(path.read_bytes()[:-1])
    hours, overrides = (1e-9 if fault == "no time" else 8.5), (["inference.windw=1"] if fault == "bad setting" else [])
    outcome = infer(overrides, hours, "cpu", **kaggle)
    expected = {"no run": "no trained run", "no time": "no time left", "damaged run": "fold0__model", "bad setting": "windw"}
    assert outcome.status == "failed" and expected[fault] in outcome.sentence
    report = check_submission(kaggle["working"] / "submission.csv", sample_data / "test.csv")
    assert report.rows == report.empty == len((sample_data / "test.csv").read_text().splitlines()) - 1


def test_an_unexpected_fault_is_an_outcome_too(kaggle: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(kaggle["working"])
    kaggle["working"].write_text("a file where the folder should be")
    outcome = tiles("baseline", TINY, kaggle["root"], kaggle["working"], kaggle["scratch"])
    assert outcome.status == "failed" and "Error" in outcome.sentence.split(":")[0] and "Traceback" in capsys.readouterr().err
    assert train("nonesuch", [], (), 1, "cpu", kaggle["root"], kaggle["scratch"]).sentence.startswith("no experiment 'nonesuch'")


def test_a_resume_that_finds_nothing_does_not_begin_anew(kaggle: dict[str, Path]) -> None:
    outcome = train("baseline", [], TINY, 11.5, "cpu", **kaggle, resume=True)
    assert outcome.status == "failed" and "no attached output holds a begun run 'baseline'" in outcome.sentence
    assert not list(kaggle["working"].iterdir())


def test_inference_needs_no_training_table(kaggle: dict[str, Path], sample_data: Path, tiny_run: Path) -> None:
    publish_run(kaggle, tiny_run, "mini")
    mounted = kaggle["root"] / "competitions" / COMPETITION
    mounted.unlink()
    mounted.mkdir()
    for name in ("test.csv", "test_images"):
        (mounted / name).symlink_to(sample_data / name)
    assert infer(["inference.views=none"], 8.5, "cpu", **kaggle).status == "complete"


def test_runs_are_called_what_a_folder_can_be_called() -> None:
    assert run_name("baseline") == "baseline" and run_name("../a b/é") == "a-b" and run_name("...") == "run"
    assert kernel.INPUT == Path("/kaggle/input") and kernel.WORKING == Path("/kaggle/working")
