"""The double of Kaggle asked through kagglesdk in this process: the requests of the command line without the second
that each of its runs takes.
"""

from __future__ import annotations

import gzip
import io
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import requests
from kaggle_double import FAULTS, Double, answers
from kaggle_double.server import KEY, METHODS, TOKEN
from kagglesdk.blobs.types.blob_api_service import ApiStartBlobUploadRequest
from kagglesdk.competitions.types import competition_api_service as competition_types
from kagglesdk.datasets.types import dataset_api_service as dataset_types
from kagglesdk.kaggle_client import KaggleClient
from kagglesdk.kaggle_env import KaggleEnv
from kagglesdk.kernels.types import kernels_api_service as kernel_types

CODE, TRAIN = "alice/hubmap-kit-code", "alice/hubmap-train"
COMPETITION = "hubmap-organ-segmentation"
SCRIPT = 'from bootstrap import start\nBUILD_ID = "abc-123"\nstart("infer", BUILD_ID, None)\n'


@pytest.fixture
def ask(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., SimpleNamespace]]:
    """Start a double and sign in to it."""
    running: list[Double] = []

    def make(*faults: str, token: bool = False, **settings: Any) -> SimpleNamespace:
        double = Double(faults=faults, **settings)
        running.append(double.__enter__())
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{double.server.server_port}")
        monkeypatch.setenv("no_proxy", "")
        monkeypatch.delenv("KAGGLE_API_TOKEN", raising=False)
        words = {"api_token": TOKEN} if token else {"username": "alice", "password": KEY}
        client = KaggleClient(env=KaggleEnv.LOCAL, **words)
        return SimpleNamespace(
            double=double,
            datasets=client.datasets.dataset_api_client,
            kernels=client.kernels.kernels_api_client,
            blobs=client.blobs.blob_api_client,
            competitions=client.competitions.competition_api_client,
        )

    yield make
    for double in running:
        double.__exit__(None, None, None)
    assert [(double.escapes, double.mistakes) for double in running] == [([], [])] * len(running)


def filled(kind: type, **values: Any) -> Any:
    """A request of kagglesdk with its fields set."""
    request = kind()
    for name, value in values.items():
        setattr(request, name, value)
    return request


def upload(kaggle: SimpleNamespace, name: str, content: bytes) -> dataset_types.ApiDatasetNewFile:
    """Upload one file; what a dataset's request says of it."""
    begun = kaggle.blobs.start_blob_upload(filled(ApiStartBlobUploadRequest, name=name, content_length=len(content)))
    assert requests.put(begun.create_url, data=content, timeout=10).status_code == 200
    return filled(dataset_types.ApiDatasetNewFile, token=begun.token)


def create(kaggle: SimpleNamespace, **files: bytes) -> None:
    """A new dataset; files are named without their suffix .json."""
    new = [upload(kaggle, f"{name}.json", content) for name, content in files.items()]
    request = filled(
        dataset_types.ApiCreateDatasetRequest,
        slug="hubmap-kit-code",
        title="hubmap-kit-code",
        license_name="other",
        files=new,
    )
    assert kaggle.datasets.create_dataset(request).status == "ok"


def update(kaggle: SimpleNamespace, **files: bytes) -> Any:
    """A new version; the server's answer."""
    new = [upload(kaggle, f"{name}.json", content) for name, content in files.items()]
    body = filled(dataset_types.ApiCreateDatasetVersionRequestBody, version_notes="next", files=new)
    request = filled(
        dataset_types.ApiCreateDatasetVersionRequest, owner_slug="alice", dataset_slug="hubmap-kit-code", body=body
    )
    return kaggle.datasets.create_dataset_version(request)


def look(kaggle: SimpleNamespace) -> tuple[str, int, str]:
    """Status, version number and content of BUILD_ID.json, or the HTTP status of the refusal that came instead."""
    names = {"owner_slug": "alice", "dataset_slug": "hubmap-kit-code"}
    try:
        status = kaggle.datasets.get_dataset_status(
            filled(dataset_types.ApiGetDatasetStatusRequest, **names)
        ).status.name.lower()
        number = kaggle.datasets.get_dataset(filled(dataset_types.ApiGetDatasetRequest, **names)).current_version_number
        got = kaggle.datasets.download_dataset(
            filled(dataset_types.ApiDownloadDatasetRequest, file_name="BUILD_ID.json", **names)
        )
    except requests.HTTPError as error:
        return str(error.response.status_code), 0, ""
    return status, number, got.text


WORKING = "individual_blobs_compressed"
DATASET_FAULTS = [
    ("", [(WORKING, 1, "old"), ("ready", 2, "new"), ("ready", 2, "new")]),
    ("dataset_failed", [(WORKING, 1, "old"), ("failed", 1, "old")]),
    ("never_ready", [(WORKING, 1, "old")] * 4),
    ("version_never_moves", [(WORKING, 1, "old"), ("ready", 1, "old"), ("ready", 1, "old")]),
    ("ready_too_early", [("ready", 1, "old"), ("ready", 1, "old"), (WORKING, 1, "old"), ("ready", 2, "new")]),
    (
        "stale_build_id",
        [(WORKING, 1, "old"), ("ready", 2, "old"), ("ready", 2, "old"), ("ready", 2, "old"), ("ready", 2, "old")],
    ),
    ("stale_build_id_briefly", [(WORKING, 1, "old"), ("ready", 2, "old"), ("ready", 2, "old"), ("ready", 2, "new")]),
]


@pytest.mark.parametrize(("fault", "expected"), DATASET_FAULTS, ids=[row[0] or "none" for row in DATASET_FAULTS])
def test_a_new_version_arrives_as_the_fault_says(
    ask: Callable[..., SimpleNamespace], fault: str, expected: list[tuple[str, int, str]]
) -> None:
    kaggle = ask(hidden_calls=0)
    create(kaggle, BUILD_ID=b"old")
    assert [look(kaggle) for _ in range(2)] == [(WORKING, 1, "old"), ("ready", 1, "old")]
    kaggle.double.faults = filter(None, [fault])
    assert update(kaggle, BUILD_ID=b"new").status == "ok"
    assert [look(kaggle) for _ in expected] == expected


def test_a_created_dataset_stays_hidden_for_a_while_or_for_ever(ask: Callable[..., SimpleNamespace]) -> None:
    kaggle = ask(hidden_calls=3, polls_until_ready=0)
    create(kaggle, BUILD_ID=b"one", other=b"two")
    assert [look(kaggle)[0] for _ in range(4)] == ["403", "403", "403", "ready"]
    kaggle.double.faults = ["pending_403_forever"]
    assert [look(kaggle)[0] for _ in range(2)] == ["403", "403"]
    kaggle.double.faults = ["version_error"]
    assert update(kaggle, BUILD_ID=b"three").status == "error" and len(kaggle.double.state.datasets[CODE].versions) == 1
    kaggle.double.faults = ["server_503_briefly"]
    assert [look(kaggle)[0] for _ in range(3)] == ["503", "503", "ready"]
    kaggle.double.faults = ["rate_limited_briefly"]
    assert [look(kaggle)[0] for _ in range(3)] == ["429", "429", "ready"]
    kaggle.double.faults = ["file_zipped"]
    request = filled(
        dataset_types.ApiDownloadDatasetRequest,
        owner_slug="alice",
        dataset_slug="hubmap-kit-code",
        file_name="BUILD_ID.json",
    )
    got = kaggle.datasets.download_dataset(request)
    assert (
        got.url.split("?")[0].endswith("/BUILD_ID.json.zip")
        and zipfile.ZipFile(io.BytesIO(got.content)).read("BUILD_ID.json") == b"one"
    )


def test_archives_are_unpacked_and_wheels_are_not(ask: Callable[..., SimpleNamespace], tmp_path: Path) -> None:
    (tmp_path / "tree" / "deep").mkdir(parents=True)
    (tmp_path / "tree" / "deep" / "x.txt").write_text("x")
    packed = {
        kind: Path(shutil.make_archive(str(tmp_path / kind), kind, tmp_path / "tree"))
        for kind in ("zip", "tar", "gztar")
    }
    kaggle = ask(hidden_calls=0)
    names = {
        "one.zip": packed["zip"],
        "two.tar": packed["tar"],
        "three.tar.gz": packed["gztar"],
        "kit.whl": packed["zip"],
    }
    new = [upload(kaggle, name, path.read_bytes()) for name, path in names.items()]
    new += [upload(kaggle, "rows.csv.gz", gzip.compress(b"rows")), upload(kaggle, "broken.zip", b"no archive")]
    kaggle.datasets.create_dataset(
        filled(dataset_types.ApiCreateDatasetRequest, slug="hubmap-kit-code", title="hubmap-kit-code", files=new)
    )
    files = [file.name for file in kaggle.double.state.datasets[CODE].versions[0].files]
    assert files == ["broken.zip", "kit.whl", "one/deep/x.txt", "rows.csv", "three/deep/x.txt", "two/deep/x.txt"]
    assert (
        kaggle.double.state.read(CODE, "rows.csv") == b"rows"
        and kaggle.double.state.read(CODE, "kit.whl") == packed["zip"].read_bytes()
    )


def test_an_upload_goes_on_where_it_broke_off(ask: Callable[..., SimpleNamespace]) -> None:
    kaggle = ask("upload_dropped", hidden_calls=0)
    begun = kaggle.blobs.start_blob_upload(filled(ApiStartBlobUploadRequest, name="a", content_length=10))

    def put(content: bytes, span: str | None = None) -> requests.Response:
        return requests.put(
            begun.create_url, data=content, headers={"Content-Range": f"bytes {span}"} if span else {}, timeout=10
        )

    with pytest.raises(requests.ConnectionError):
        put(b"0123456789")
    probe = put(b"", "*/10")
    assert (probe.status_code, probe.headers["Range"]) == (308, "bytes=0-4")
    assert put(b"789", "7-9/10").status_code == 400
    assert put(b"56789", "5-9/10").status_code == 200 and put(b"", "*/10").status_code == 200
    assert (
        kaggle.double.state.blobs[begun.token].sha256
        == "84d89877f0d4041efb6bf91a16f0248f2fd573e6af05c19f96bedb9f882f7882"
    )
    assert requests.put("http://localhost/upload/none", data=b"", timeout=10).status_code == 404


def push(kaggle: SimpleNamespace, slug: str = "hubmap-train", **values: Any) -> Any:
    """Save a kernel; the server's answer."""
    values = {
        "slug": f"alice/{slug}",
        "new_title": slug,
        "text": SCRIPT,
        "language": "python",
        "kernel_type": "script",
        "enable_gpu": False,
    } | values
    return kaggle.kernels.save_kernel(filled(kernel_types.ApiSaveKernelRequest, **values))


def state(kaggle: SimpleNamespace, slug: str = "hubmap-train") -> str:
    """A kernel's status."""
    request = filled(kernel_types.ApiGetKernelSessionStatusRequest, user_name="alice", kernel_slug=slug)
    return kaggle.kernels.get_kernel_session_status(request).status.name


def test_sources_that_do_not_exist_are_left_out(ask: Callable[..., SimpleNamespace]) -> None:
    kaggle = ask(public_datasets=("bob/public",), hidden_calls=0)
    create(kaggle, BUILD_ID=b"one")
    asked = {
        "dataset_data_sources": [CODE, f"{CODE}/1", "bob/public", "bob/none"],
        "kernel_data_sources": [TRAIN],
        "competition_data_sources": [COMPETITION],
        "model_data_sources": ["google/bert/pyTorch/base/1"],
    }
    first = push(kaggle, **asked)
    assert (first.invalid_dataset_sources, first.invalid_kernel_sources, first.invalid_competition_sources) == (
        ["bob/none"],
        [TRAIN],
        [],
    )
    assert push(kaggle, **asked).invalid_kernel_sources == []  # it exists now: a kernel can attach its own last output
    assert kaggle.double.state.kernels[TRAIN].versions[0].sources["datasets"] == [CODE, f"{CODE}/1", "bob/public"]
    kaggle.double.faults = ["invalid_model_source", "invalid_kernel_source", "invalid_competition_source"]
    last = push(kaggle, **asked)
    assert (last.invalid_model_sources, last.invalid_kernel_sources) == (["google/bert/pyTorch/base/1"], [TRAIN])
    assert last.invalid_competition_sources == [COMPETITION]
    kaggle.double.faults = ["invalid_dataset_source"]
    assert push(kaggle, dataset_data_sources=[CODE]).invalid_dataset_sources == [CODE]
    with pytest.raises(requests.HTTPError) as caught:
        push(kaggle, "hubmap-kit-code")
    assert caught.value.response.status_code == 409
    assert push(kaggle, "hubmap-other", new_title="Quite Another").url.endswith("/alice/quite-another")


KERNEL_FAULTS = [
    ("", ["QUEUED", "RUNNING", "COMPLETE"], "HUBMAP END infer complete build_id=abc-123"),
    ("kernel_fails", ["QUEUED", "RUNNING", "ERROR"], "HUBMAP END infer failed build_id=abc-123"),
    ("kernel_completes_failed", ["QUEUED", "RUNNING", "COMPLETE"], "HUBMAP END infer failed build_id=abc-123"),
    ("kernel_stopped", ["QUEUED", "RUNNING", "COMPLETE"], "HUBMAP END infer stopped build_id=abc-123"),
    ("kernel_stale_build_id", ["QUEUED", "RUNNING", "COMPLETE"], "HUBMAP END infer complete build_id=0123456789ab"),
    ("kernel_completes_without_marker", ["QUEUED", "RUNNING", "COMPLETE"], None),
    ("kernel_cancelled", ["QUEUED", "RUNNING", "CANCEL_ACKNOWLEDGED"], None),
    ("kernel_never_ends", ["QUEUED", "RUNNING", "RUNNING"], None),
]


@pytest.mark.parametrize(
    ("fault", "statuses", "marker"), KERNEL_FAULTS, ids=[row[0] or "none" for row in KERNEL_FAULTS]
)
def test_a_kernel_ends_as_the_fault_says(
    ask: Callable[..., SimpleNamespace], fault: str, statuses: list[str], marker: str | None
) -> None:
    kaggle = ask(*filter(None, [fault]))
    push(kaggle)
    assert [state(kaggle) for _ in statuses] == statuses
    request = filled(kernel_types.ApiListKernelSessionOutputRequest, user_name="alice", kernel_slug="hubmap-train")
    text = kaggle.kernels.list_kernel_session_output(request).log or ""
    assert (marker in text) if marker else ("HUBMAP END" not in text)


def test_gpu_sessions_and_quota_run_out(ask: Callable[..., SimpleNamespace]) -> None:
    kaggle = ask()
    gpu = {"machine_shape": "NvidiaTeslaT4"}
    assert [bool(push(kaggle, f"kernel-{number}", **gpu).error) for number in range(3)] == [False, False, True]
    assert not push(kaggle, "without-gpu").error
    for _ in range(3):
        state(kaggle, "kernel-0")
    assert not push(kaggle, "kernel-2", **gpu).error  # one has ended
    kaggle.double.faults = ["gpu_limit_briefly"]
    for number in (1, 1, 1, 2, 2, 2):
        state(kaggle, f"kernel-{number}")
    assert [bool(push(kaggle, "kernel-4", **gpu).error) for _ in range(3)] == [True, True, False]
    kaggle.double.faults = ["gpu_limit"]
    assert [bool(push(kaggle, "kernel-5", **gpu).error) for _ in range(3)] == [True, True, True]
    kaggle.double.faults = ["quota_used_up"]
    assert "quota" in push(kaggle, "kernel-3", **gpu).error and not push(kaggle, "without-gpu").error


def test_submissions_are_counted_and_scored(ask: Callable[..., SimpleNamespace]) -> None:
    kaggle = ask(daily_limit=2, polls_queued=0, polls_running=0, token=True)
    push(kaggle)
    push(kaggle, enable_internet=True)
    state(kaggle)

    def submit(version: int = 1, file: str | None = "submission.csv", competition: str = COMPETITION) -> int:
        values = {
            "competition_name": competition,
            "kernel_owner": "alice",
            "kernel_slug": "hubmap-train",
            "kernel_version": version,
        }
        request = filled(
            competition_types.ApiCreateCodeSubmissionRequest, file_name=file, submission_description="x", **values
        )
        try:
            return kaggle.competitions.create_code_submission(request).ref
        except requests.HTTPError as error:
            return error.response.status_code

    assert [submit(1), submit(2), submit(3), submit(1, competition="titanic")] == [
        400,
        400,
        404,
        404,
    ]  # not ended; internet; absent; absent
    kaggle.double.state.kernels[TRAIN].versions[0].status = "COMPLETE"
    assert [submit(file=None), submit(file="other.csv")] == [400, 400]
    kaggle.double.faults = ["submission_refused"]
    assert submit() == 400
    kaggle.double.faults = []
    ref = submit()
    looks = [
        kaggle.competitions.get_submission(filled(competition_types.ApiGetSubmissionRequest, ref=ref)) for _ in range(2)
    ]
    assert [(look.status.name, look.public_score) for look in looks] == [("PENDING", ""), ("COMPLETE", "0.61234")]
    kaggle.double.faults = ["submission_error"]
    bad = submit()
    failed = [
        kaggle.competitions.get_submission(filled(competition_types.ApiGetSubmissionRequest, ref=bad)) for _ in range(2)
    ][1]
    assert failed.status.name == "ERROR" and "Scoring Error" in failed.error_description
    limits = kaggle.competitions.get_submission_limits(
        filled(competition_types.ApiGetSubmissionLimitsRequest, competition_name=COMPETITION)
    )
    assert (limits.num_today, limits.num_allowed_now, submit()) == (2, 0, 400)


def test_what_is_kept_comes_back_as_it_was(ask: Callable[..., SimpleNamespace], tmp_path: Path) -> None:
    kaggle = ask(keep=tmp_path)
    create(kaggle, BUILD_ID=b"one")
    push(kaggle, machine_shape="NvidiaTeslaT4")
    with Double(keep=tmp_path) as again:
        assert (
            again.state.datasets == kaggle.double.state.datasets and again.state.read(CODE, "BUILD_ID.json") == b"one"
        )
        assert again.state.kernels[TRAIN].versions[0].status == "COMPLETE"  # sessions end between two doubles
        again.state.kernels[TRAIN].versions[0].status = "QUEUED"
        assert again.state.kernels == kaggle.double.state.kernels


def test_what_would_leave_is_stopped_and_noted(tmp_path: Path) -> None:
    with Double() as double:
        proxies = dict.fromkeys(("http", "https"), f"http://127.0.0.1:{double.server.server_port}")
        with pytest.raises(requests.ConnectionError):
            requests.get("https://api.kaggle.com/v1/x", proxies=proxies, timeout=10)
        assert requests.get("http://example.com/y", proxies=proxies, timeout=10).status_code == 502
    assert double.escapes == ["CONNECT api.kaggle.com:443", "GET http://example.com/y"]
    assert set(double.environment(tmp_path)) - {"LANG"} == {
        "PATH",
        "HOME",
        "TMPDIR",
        "KAGGLE_CONFIG_DIR",
        "KAGGLE_API_ENVIRONMENT",
        "http_proxy",
        "HTTP_PROXY",
        "https_proxy",
        "HTTPS_PROXY",
        "KAGGLE_USERNAME",
        "KAGGLE_KEY",
    }


def test_an_answer_that_kagglesdk_does_not_know_is_a_mistake(
    ask: Callable[..., SimpleNamespace], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert set(METHODS) <= set(answers.types())
    with pytest.raises(answers.UnknownAnswer, match="ApiDataset.number"):
        answers.parse_answer("datasets.DatasetApiService/GetDataset", {"number": 1})
    with pytest.raises(answers.UnknownAnswer, match="files.size"):
        answers.parse_answer(
            "datasets.DatasetApiService/ListDatasetFiles",
            {"datasetFiles": [{"name": "a", "size": 1}]} | {"files.size": 1},
        )
    with pytest.raises(answers.UnknownAnswer, match="cannot read"):
        answers.parse_answer("datasets.DatasetApiService/GetDatasetStatus", {"status": "done"})
    kaggle = ask()
    monkeypatch.setitem(
        METHODS, "kernels.KernelsApiService/GetAcceleratorQuotaStatistics", lambda world, body: {"hours": 3}
    )
    with pytest.raises(requests.HTTPError, match="mistake of the double"):
        kaggle.kernels.get_accelerator_quota_statistics()
    assert len(kaggle.double.mistakes) == 1
    kaggle.double.mistakes.clear()


def test_unknown_faults_are_refused_and_known_ones_listed() -> None:
    with pytest.raises(ValueError, match="no such fault: gone"):
        Double(faults=["gone"])
    words, folder = [sys.executable, "-m", "kaggle_double", "--list-faults"], Path(__file__).parents[1]
    listed = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=True)
    assert [line.split()[0] for line in listed.stdout.splitlines()] == list(FAULTS)
