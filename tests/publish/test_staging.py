"""Staged datasets: what travels, what never does, and that a kernel can read it; their metadata against the real
client's own checks.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny import TINY

from hubmap_kit import experiment
from hubmap_kit.build_id import KINDS, read, unfold, verify
from hubmap_kit.competition.tables import read_train
from hubmap_kit.errors import HubmapError, PublishError, StoreError, WeightsError
from hubmap_kit.files import write_yaml
from hubmap_kit.inference.ensemble import load_ensemble
from hubmap_kit.models.build import build
from hubmap_kit.publish.metadata import check, dataset_metadata, dataset_slug, write_metadata
from hubmap_kit.publish.staging import stage_pretrained, stage_tiles, stage_weights
from hubmap_kit.tiles.store import TileStore, open_or_build

LOCAL = ("data.folder=/home/somebody/secret/hubmap", "model.encoder_weights=/home/somebody/weights/b1.pth")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two folds with everything that training leaves, its weights random."""
    run = tmp_path_factory.mktemp("runs") / "mini"
    made = experiment.load("baseline", [*TINY, *LOCAL])
    write_yaml(run / "config.yaml", experiment.dump(made))
    for fold in (0, 1):
        torch.manual_seed(fold)
        folder = run / f"fold{fold}"
        folder.mkdir()
        save_file(
            {name: value.clone() for name, value in build(made.model, pretrained=False).state_dict().items()},
            folder / "model.safetensors",
        )
        for name in ("last.ckpt", "oof_counts.parquet"):
            (folder / name).write_text(name)
        epochs = [f"{fold},{epoch + 1}" for epoch in range(made.training.epochs)]
        (folder / "metrics.csv").write_text("\n".join(["fold,epoch", *epochs]) + "\n")
    (run / "thresholds.json").write_text('{"kidney": 0.4}')
    (run / "overlays").mkdir()
    for name in (
        "oof.csv",
        "folds.csv",
        "metrics.csv",
        "environment.json",
        "curves.png",
        "overlays/kidney.png",
        "old.pth",
        ".oof.1.tmp.csv",
    ):
        (run / name).write_text(name)
    return run


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "mini"))


def test_only_what_inference_needs_of_a_run_travels(run: Path, tmp_path: Path) -> None:
    folder = stage_weights([run], tmp_path / "out" / "weights")
    build_id = verify(folder)
    tables = {
        f"mini/{name}"
        for name in ("config.yaml", "thresholds.json", "oof.csv", "folds.csv", "metrics.csv", "environment.json")
    }
    assert {facts["path"] for facts in build_id.files.values()} == tables | {
        f"mini/fold{fold}/model.safetensors" for fold in (0, 1)
    }
    assert {path.name for path in folder.iterdir()} == {"BUILD_ID.json", *build_id.files}
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["weights"]  # nothing is left of the building


def test_a_staged_run_predicts_what_the_run_predicts(run: Path, tmp_path: Path) -> None:
    tree = unfold(stage_weights([run], tmp_path / "weights", ["renamed"]), tmp_path / "tree")
    picture = np.random.default_rng(0).integers(0, 256, (96, 80, 3), np.uint8)
    here, there = (load_ensemble(folder, torch.device("cpu")) for folder in (run, tree / "renamed"))
    assert there.thresholds == here.thresholds == {"kidney": 0.4}
    # The last digit depends on which form of the network was found to be the fastest.
    np.testing.assert_allclose(there.plane(picture), here.plane(picture), atol=1e-5)


def test_no_path_of_this_machine_is_published(run: Path, tmp_path: Path) -> None:
    folder = stage_weights([run], tmp_path / "weights")
    assert not [path.name for path in folder.iterdir() if b"somebody" in path.read_bytes()]
    staged, own = experiment.read(folder / "mini__config.yaml"), experiment.read(run / "config.yaml")
    assert (staged.data.folder, staged.model.encoder_weights) == ("hubmap", "b1.pth")
    changed = {"data": staged.data, "model": staged.model}
    assert own.model_copy(update=changed) == staged
    assert own.model.model_copy(update={"encoder_weights": "b1.pth"}) == staged.model


def test_the_same_runs_give_the_same_build_id_and_replace_the_former_ones(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "weights"
    first = read(stage_weights([run], out))
    for path in run.rglob("*"):
        os.utime(path, (1, 1))
    assert read(stage_weights([run], out)) == first
    other = Path(shutil.copytree(run, tmp_path / "other"))
    (other / "thresholds.json").write_text('{"kidney": 0.5}')
    both = verify(stage_weights([run, other], out))
    assert both.build_id != first.build_id and {facts["path"].split("/")[0] for facts in both.files.values()} == {
        "mini",
        "other",
    }
    with pytest.raises(HubmapError):
        stage_weights([tmp_path], out)
    assert verify(out) == both  # a failure leaves what was staged before
    assert verify(stage_weights([run], out)) == first


def test_what_is_staged_does_not_change_with_the_run(run: Path, tmp_path: Path) -> None:
    """Big files are linked, not copied: a training that goes on must not reach through the link."""
    big = {"encoder": torch.zeros(400_000)}
    save_file(big, run / "fold0" / "model.safetensors")
    folder = stage_weights([run], tmp_path / "weights")
    save_file({"encoder": torch.ones(400_000)}, run / "fold0" / ".new.safetensors")
    os.replace(run / "fold0" / ".new.safetensors", run / "fold0" / "model.safetensors")  # how the kit writes
    (run / "thresholds.json").write_text("{}")
    verify(folder)
    assert torch.equal(load_file(folder / "mini__fold0__model.safetensors")["encoder"], big["encoder"])


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (
            lambda run: (run / "fold1/oof_counts.parquet").unlink(),
            "fold 1 is trained, its held-out slides are not predicted",
        ),
        (lambda run: (run / "fold1/metrics.csv").write_text("fold,epoch\n1,1\n"), "fold 1 after epoch 1 of 2"),
        (
            lambda run: ((run / "fold2").mkdir(), (run / "fold2/last.ckpt").touch()),
            "fold 2 with a metrics.csv that cannot be read",
        ),
        (lambda run: (run / "config.yaml").unlink(), "is not a run folder"),
        (lambda run: [shutil.rmtree(run / f"fold{fold}") for fold in (0, 1)], "holds no trained fold"),
        (
            lambda run: cut(run / "fold0/model.safetensors"),
            "fold0/model.safetensors is missing or no undamaged safetensors",
        ),
    ],
)
def test_a_run_that_is_not_whole_is_refused(
    run: Path, tmp_path: Path, spoil: Callable[[Path], object], words: str
) -> None:
    spoil(run)
    with pytest.raises(HubmapError, match=words) as error:
        stage_weights([run], tmp_path / "out" / "weights")
    assert "\n" not in str(error.value) and not list(tmp_path.glob("out/*"))


def test_an_unfinished_run_travels_when_that_is_asked_for(run: Path, tmp_path: Path) -> None:
    (run / "fold1/oof_counts.parquet").unlink()
    (run / "fold2").mkdir()
    (run / "fold2/last.ckpt").touch()
    files = read(stage_weights([run], tmp_path / "weights", allow_unfinished=True)).files
    assert [name for name in files if "fold" in name and name.endswith("safetensors")] == [
        f"mini__fold{fold}__model.safetensors" for fold in (0, 1)
    ]


def test_two_runs_never_share_a_name(run: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(run, tmp_path / "elsewhere" / "mini"))
    with pytest.raises(PublishError, match="would both be 'mini'"):
        stage_weights([run, other], tmp_path / "weights")
    stage_weights([run, other], tmp_path / "weights", ["mini", "mini2"])
    for names, words in (
        (["a"], "1 names were given for 2 runs"),
        (["../a", "b"], "'..' cannot be a name"),
        (["a b", "c"], "'a b' cannot be"),
    ):
        with pytest.raises(PublishError, match=words):
            stage_weights([run, other], tmp_path / "weights", names)
    with pytest.raises(PublishError, match="nothing was given"):
        stage_weights([], tmp_path / "weights")


def test_more_runs_than_a_dataset_holds_are_refused(run: Path, tmp_path: Path) -> None:
    assert len(read(stage_weights([run] * 6, tmp_path / "weights", list("abcdef"))).files) == 48
    with pytest.raises(PublishError, match="56 files where Kaggle takes 50"):
        stage_weights([run] * 7, tmp_path / "weights", list("abcdefg"))


@pytest.fixture(scope="module")
def store(sample_data: Path, tmp_path_factory: pytest.TempPathFactory) -> TileStore:
    made = experiment.load("baseline", TINY)
    return open_or_build(
        tmp_path_factory.mktemp("stores"), read_train(sample_data / "train.csv"), made.scale, made.tiles
    )


def test_a_staged_store_is_found_by_its_fingerprint_and_gives_the_same_tiles(
    store: TileStore, sample_data: Path, tmp_path: Path
) -> None:
    moved = Path(shutil.copytree(store.folder, tmp_path / "my tiles"))
    (moved / ".left.1.tmp").touch()
    tree = unfold(stage_tiles([moved], tmp_path / "tiles"), tmp_path / "tree")
    made = experiment.load("baseline", TINY)
    found = open_or_build(tree, read_train(sample_data / "train.csv"), made.scale, made.tiles)
    assert (
        found.folder == tree / store.folder.name and (found.folder / "images.u8").is_symlink()
    )  # read in place, not built again
    for row in found.tiles.itertuples():
        for ours, theirs in zip(
            found.crop(row.slide, row.row, row.col, row.size),
            store.crop(row.slide, row.row, row.col, row.size),
            strict=True,
        ):
            assert np.array_equal(ours, theirs)
    assert found.tiles.equals(store.tiles)
    assert read(tmp_path / "tiles") == read(stage_tiles([store.folder], tmp_path / "again"))


def test_a_store_without_a_table_of_tiles_is_staged_as_it_is(store: TileStore, tmp_path: Path) -> None:
    bare = Path(shutil.copytree(store.folder, tmp_path / "bare", ignore=shutil.ignore_patterns("tiles-*")))
    folder = stage_tiles([bare], tmp_path / "tiles")
    assert len(verify(folder).files) == 4 and not list(bare.glob("tiles-*"))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda folder: (folder / "store.json").unlink(), "is not a finished tile store"),
        (lambda folder: (folder / "store.json").write_text("[]"), "is not a finished tile store"),
        (lambda folder: cut(folder / "images.u8"), "bytes where the table says"),
        (lambda folder: (folder / "masks.bits").unlink(), "masks.bits does not exist"),
        (lambda folder: (folder / "slides.parquet").write_text("x"), "missing or damaged"),
    ],
)
def test_a_store_that_is_not_whole_is_refused(
    store: TileStore, tmp_path: Path, spoil: Callable[[Path], object], words: str
) -> None:
    copy = Path(shutil.copytree(store.folder, tmp_path / "copy"))
    spoil(copy)
    with pytest.raises((StoreError, PublishError), match=words):
        stage_tiles([copy], tmp_path / "out" / "tiles")
    assert not list(tmp_path.glob("out/*"))


def test_one_store_twice_is_refused(store: TileStore, tmp_path: Path) -> None:
    with pytest.raises(PublishError, match="one is enough"):
        stage_tiles([store.folder, store.folder], tmp_path / "tiles")


def test_pretrained_weights_travel_as_safetensors(tmp_path: Path) -> None:
    shared = torch.arange(6.0).reshape(2, 3)
    tensors = {
        "a": shared,
        "b": shared,
        "transposed": shared.T,
        "half": torch.ones(2, dtype=torch.float16),
        "count": torch.tensor(3),
    }
    torch.save({"state_dict": tensors, "epoch": 3}, tmp_path / "b1-533bc792.pth")
    torch.save(tensors, tmp_path / "resnet.bin")
    save_file({"a": torch.ones(3)}, tmp_path / "plain.safetensors")
    files = [tmp_path / name for name in ("b1-533bc792.pth", "resnet.bin", "plain.safetensors")]
    folder = stage_pretrained(files, tmp_path / "out")
    build_id = verify(folder)
    assert sorted(build_id.files) == ["b1-533bc792.safetensors", "plain.safetensors", "resnet.safetensors"]
    for name in ("b1-533bc792", "resnet"):
        found = load_file(folder / f"{name}.safetensors")
        assert found.keys() == tensors.keys()
        assert all(torch.equal(found[key], value) and found[key].dtype == value.dtype for key, value in tensors.items())
    assert (folder / "plain.safetensors").read_bytes() == (tmp_path / "plain.safetensors").read_bytes()
    assert read(stage_pretrained(files[::-1], tmp_path / "out")) == build_id


def test_weights_that_could_run_code_or_are_none_are_refused(tmp_path: Path) -> None:
    torch.save({"network": torch.nn.Linear(1, 1)}, tmp_path / "code.pth")
    (tmp_path / "text.pt").write_text("no weights")
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{}")
    (tmp_path / "model.onnx").write_text("")
    for name, kind in (
        ("code.pth", WeightsError),
        ("text.pt", WeightsError),
        ("cut.safetensors", PublishError),
        ("model.onnx", PublishError),
    ):
        with pytest.raises(kind, match=name):
            stage_pretrained([tmp_path / name], tmp_path / "out")
    save_file({"a": torch.ones(3)}, tmp_path / "text.safetensors")
    torch.save({"a": torch.ones(3)}, tmp_path / "text.pt")
    with pytest.raises(PublishError, match="both travel as text.safetensors"):
        stage_pretrained([tmp_path / "text.pt", tmp_path / "text.safetensors"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Callable[[dict[str, object]], str | None]:
    """The real Kaggle client's words about a new dataset's metadata; None when it would go on to the network."""
    patch = pytest.MonkeyPatch()
    folder = tmp_path_factory.mktemp("kaggle")
    for key in [key for key in os.environ if key.upper().startswith("KAGGLE") or key.lower().endswith("_proxy")]:
        patch.delenv(key)
    # No request may leave: the client speaks plain HTTP to a proxy that does not exist.
    account = {
        "KAGGLE_API_ENVIRONMENT": "LOCALHOST",
        "KAGGLE_CONFIG_DIR": str(folder),
        "KAGGLE_USERNAME": "alice",
        "KAGGLE_KEY": "dummy",
    }
    for key, value in {**account, "http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}.items():
        patch.setenv(key, value)
    from kaggle.api.kaggle_api_extended import KaggleApi
    from requests.exceptions import ConnectionError as Unreachable

    api = KaggleApi()
    api.authenticate()

    def ask(values: dict[str, object]) -> str | None:
        (folder / "dataset-metadata.json").write_text(json.dumps(values))
        try:
            api.dataset_create_new(str(folder))
        except Unreachable:
            return None
        except ValueError as error:
            return str(error)
        raise AssertionError("the client neither refused nor went to the network")

    yield ask
    patch.undo()


@pytest.mark.parametrize("kind", KINDS)
def test_the_real_client_takes_every_kinds_metadata(
    kind: str, client: Callable[[dict[str, object]], str | None], tmp_path: Path
) -> None:
    values = json.loads(write_metadata(tmp_path, kind, "alice").read_text())
    assert values["id"] == f"alice/hubmap-kit-{kind}" and dataset_slug(kind) == f"hubmap-kit-{kind}"
    assert values["isPrivate"] is True and values == dataset_metadata(kind, "alice")
    assert client(values) is None


@settings(max_examples=40, deadline=None)
@given(
    name=st.integers(4, 52),
    title=st.integers(4, 52),
    subtitle=st.none() | st.integers(18, 82),
    licenses=st.lists(st.sampled_from(["other", "apache-2.0"]), min_size=0, max_size=2),
)
def test_metadata_is_refused_where_the_real_client_refuses_it(
    client: Callable[[dict[str, object]], str | None], name: int, title: int, subtitle: int | None, licenses: list[str]
) -> None:
    values: dict[str, object] = {
        "id": f"alice/{'s' * name}",
        "title": "t" * title,
        "licenses": [{"name": licence} for licence in licenses],
    }
    if subtitle is not None:
        values["subtitle"] = "u" * subtitle
    try:
        check(values, Path("dataset-metadata.json"))
        ours = None
    except PublishError as error:
        ours = str(error)
    assert (ours is None) == (client(values) is None)


def test_metadata_that_only_the_server_would_refuse_is_refused_here(tmp_path: Path) -> None:
    good = {"id": "OWNER/hubmap-kit-code", "title": "hubmap-kit-code", "licenses": [{"name": "other"}]}
    template = tmp_path / "code" / "dataset-metadata.json"
    template.parent.mkdir()

    def attempt(owner: str = "alice", **changes: object) -> str:
        template.write_text(json.dumps({**good, **changes}))
        with pytest.raises(PublishError) as error:
            dataset_metadata("code", owner, tmp_path)
        return str(error.value)

    assert "expected exactly one of CC0-1.0" in attempt(licenses=[{"name": "MIT"}])
    assert "slug 'Hubmap_Kit'" in attempt(id="OWNER/Hubmap_Kit")
    assert "expected 'OWNER/<slug>'" in attempt(id="realperson/hubmap-kit-code")
    assert "unknown key 'isPrivate'" in attempt(isPrivate=False)
    assert "'a/b' is no name of a Kaggle account" in attempt(owner="a/b")
    template.write_text("{")
    with pytest.raises(PublishError, match="is not valid JSON"):
        dataset_metadata("code", "alice", tmp_path)
    with pytest.raises(PublishError, match="did you mean 'tiles'"):
        dataset_metadata("tile", "alice", tmp_path)
    with pytest.raises(PublishError, match="does not exist"):
        dataset_metadata("tiles", "alice", tmp_path)
