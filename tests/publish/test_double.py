"""The double of Kaggle under the real, unmodified `kaggle` command line."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import warm
from kaggle_double import Double
from kaggle_double.server import KEY, METHODS

CODE, TRAIN = "alice/hubmap-kit-code", "alice/hubmap-train"
COMPETITION = "hubmap-organ-segmentation"
SCRIPT = 'from bootstrap import start\nBUILD_ID = "abc-123"\nstart("infer", BUILD_ID, None)\n'


class Cli:
    """`python -m kaggle` against one double."""

    def __init__(self, folder: Path, faults: tuple[str, ...] = (), token: bool = False, **settings: Any) -> None:
        self.double = Double(faults=faults, **settings)
        self.folder, self.token = folder, token

    def __call__(self, *words: str | Path) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "kaggle", *map(str, words)]
        environment = self.double.environment(self.folder / "environment", self.token)
        return warm.run(command, env=environment, cwd=self.folder, timeout=60)

    def dataset(self, **files: str) -> Path:
        """A staged dataset folder."""
        folder = self.folder / "dataset"
        folder.mkdir(exist_ok=True)
        facts = {"id": CODE, "title": "hubmap-kit-code", "licenses": [{"name": "apache-2.0"}]}
        for name, text in {
            "dataset-metadata.json": json.dumps(facts),
            "BUILD_ID.json": '{"build_id": "abc-123"}',
            **files,
        }.items():
            (folder / name).write_text(text)
        return folder

    def kernel(self, **facts: Any) -> Path:
        """A rendered kernel folder."""
        folder = self.folder / "kernel"
        folder.mkdir(exist_ok=True)
        (folder / "train.py").write_text(SCRIPT)
        fixed = {
            "id": TRAIN,
            "title": "hubmap-train",
            "code_file": "train.py",
            "language": "python",
            "kernel_type": "script",
        }
        (folder / "kernel-metadata.json").write_text(
            json.dumps({**fixed, "enable_gpu": True, "enable_internet": False, **facts})
        )
        return folder


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Cli]]:
    """Start doubles; at the end, none of them was left by a request or answered what kagglesdk does not know."""
    running: list[Double] = []

    def make(*faults: str, **settings: Any) -> Cli:
        cli = Cli(tmp_path, faults, **settings)
        running.append(cli.double.__enter__())
        return cli

    yield make
    for double in running:
        double.__exit__(None, None, None)
    assert [(double.escapes, double.mistakes) for double in running] == [([], [])] * len(running)


def test_a_dataset_goes_from_nothing_to_its_second_version(start: Callable[..., Cli], tmp_path: Path) -> None:
    kaggle = start(hidden_calls=0)
    folder = kaggle.dataset(**{f"wheel{number:02}.whl": f"bytes of {number}" for number in range(22)})
    created = kaggle("datasets", "create", "-q", "-p", folder)
    assert created.returncode == 0 and created.stdout.startswith("Your private Dataset is being created.")
    dataset = kaggle.double.state.datasets[CODE]
    assert (dataset.title, dataset.licence, dataset.private) == ("hubmap-kit-code", "apache-2.0", True)
    assert kaggle.double.state.read(CODE, "wheel07.whl") == b"bytes of 7"
    assert [file.name for file in dataset.versions[0].files] == sorted(
        path.name for path in folder.iterdir() if "metadata" not in path.name
    )

    seen = json.loads(kaggle("datasets", "status", CODE, "--format", "json").stdout)
    assert seen == {"status": "individual_blobs_compressed", "current_version_number": 1}
    assert kaggle("datasets", "status", CODE).stdout == "ready"
    listed = kaggle("datasets", "files", CODE, "-v")
    assert (
        "Next Page Token = 20" in listed.stdout
        and listed.stdout.count(".whl") == 19
        and "BUILD_ID.json,23," in listed.stdout
    )

    again = kaggle("datasets", "create", "-q", "-p", folder)
    assert again.returncode == 0 and again.stdout.startswith("Dataset creation error: The requested ")
    kaggle.dataset(**{"BUILD_ID.json": '{"build_id": "new"}'})
    version = kaggle("datasets", "version", "-q", "-m", "second", "-p", folder)
    assert version.returncode == 0 and version.stdout.startswith("Dataset version is being created.")
    dataset.versions[1].polls = 2  # as if its processing had been watched to its end
    dataset.status = "READY"
    assert kaggle("datasets", "download", CODE, "-f", "BUILD_ID.json", "-p", tmp_path / "got", "-q").returncode == 0
    assert json.loads((tmp_path / "got" / "BUILD_ID.json").read_text()) == {"build_id": "new"}
    assert not any("Authorization" in request.headers for request in kaggle.double.requests)


def test_a_kernel_is_pushed_followed_and_submitted(start: Callable[..., Cli], tmp_path: Path) -> None:
    kaggle = start(token=True, polls_queued=0, polls_running=0)
    refused = kaggle(
        "kernels", "push", "-p", kaggle.kernel(dataset_sources=[CODE], competition_sources=[COMPETITION, "no-such"])
    )
    assert refused.returncode == 0 and "Kernel version 1 successfully pushed" in refused.stdout
    assert f"not valid dataset sources and could not be added to the kernel: ['{CODE}']" in refused.stdout
    assert "not valid competition sources and could not be added to the kernel: ['no-such']" in refused.stdout

    pushed = kaggle(
        "kernels",
        "push",
        "-p",
        kaggle.kernel(competition_sources=[COMPETITION], machine_shape="NvidiaTeslaP100"),
        "-t",
        "600",
    )
    assert "Kernel version 2 successfully pushed" in pushed.stdout and "not valid" not in pushed.stdout
    version = kaggle.double.state.kernels[TRAIN].versions[1]
    assert (version.asked["machineShape"], version.accelerator, version.asked["sessionTimeoutSeconds"]) == (
        "NvidiaTeslaP100",
        "NvidiaTeslaT4",
        600,
    )
    assert (version.text, version.internet, version.sources["competitions"]) == (SCRIPT, False, [COMPETITION])

    third = kaggle("kernels", "push", "-p", kaggle.kernel())
    assert (third.returncode, third.stdout) == (0, "Kernel push error: Maximum batch GPU session count of 2 reached.\n")
    early = kaggle("competitions", "submit", COMPETITION, "-k", TRAIN, "-v", "2", "-f", "submission.csv", "-m", "first")
    assert early.returncode == 1 and not kaggle.double.state.submissions
    assert kaggle("kernels", "status", TRAIN).stdout == f'{TRAIN} has status "KernelWorkerStatus.COMPLETE"\n'

    events = json.loads(kaggle("kernels", "logs", TRAIN).stdout)
    assert (
        events[-1]["data"].startswith("HUBMAP END infer complete build_id=abc-123 utc=")
        and events[-1]["stream_name"] == "stdout"
    )
    assert kaggle("kernels", "logs", "-f", TRAIN).stdout == "".join(event["data"] for event in events)
    assert kaggle("kernels", "output", TRAIN, "-p", tmp_path / "out", "-q").returncode == 0
    assert json.loads((tmp_path / "out" / "kernel.json").read_text())["build_id"] == "abc-123"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "hubmap-train.log",
        "kernel.json",
        "submission.csv",
    ]

    submitted = kaggle(
        "competitions", "submit", COMPETITION, "-k", TRAIN, "-v", "2", "-f", "submission.csv", "-m", "first"
    )
    assert submitted.returncode == 0 and "4 submissions remaining today.\nSuccessfully submitted" in submitted.stdout
    quota = json.loads(kaggle("quota", "--format", "json").stdout)
    assert quota[0] | {"refreshAt": ""} == {
        "resource": "GPU",
        "used": "1.00h",
        "remaining": "29.00h",
        "total": "30.00h",
        "refreshAt": "",
    }


# The client before 2.2.5 makes a dataset without the refused files and calls that a success.
SILENT = importlib.metadata.version("kaggle") == "2.2.4"
UPLOAD_REFUSED = (0, "Your private Dataset is being created.", "") if SILENT else (1, "", "Upload unsuccessful: ")
AUTH = "Authentication required"
FAILURES = [
    # faults, command, exit code, words on stdout, words on stderr, requests
    ("no_credentials", ("datasets", "status", CODE), 1, AUTH, "", []),
    ("wrong_token", ("datasets", "status", CODE), 1, AUTH, "", ["GetDatasetStatus"]),
    ("create_error", ("datasets", "create", "-q", "-p", "dataset"), 0, "Dataset creation error: ", "", None),
    ("upload_refused", ("datasets", "create", "-q", "-p", "dataset"), *UPLOAD_REFUSED, None),
    (
        "",
        ("datasets", "version", "-q", "-m", "x", "-p", "dataset"),
        1,
        "",
        "Not found",
        ["StartBlobUpload", "PUT /upload", "CreateDatasetVersion"],
    ),
    ("server_500", ("datasets", "status", CODE), 1, "", "Internal Server Error", ["GetDatasetStatus"]),
    ("rate_limited_429", ("quota",), 1, "", "Too Many Requests", ["GetAcceleratorQuotaStatistics"]),
    ("network_down", ("datasets", "status", CODE), 1, "", "Connection refused", []),
    ("kernel_push_error", ("kernels", "push", "-p", "kernel"), 0, "Kernel push error: ", "", ["SaveKernel"]),
    ("invalid_model_source", ("kernels", "push", "-p", "kernel"), 0, "successfully pushed", "", ["SaveKernel"]),
    ("", ("competitions", "submit", COMPETITION, "-k", TRAIN, "-m", "x"), 1, "", "version number", []),
    ("", ("kernels", "status", TRAIN), 1, "", "Permission 'kernels.get' was denied", ["GetKernelSessionStatus"]),
]


@pytest.mark.parametrize(
    ("fault", "command", "code", "out", "err", "called"),
    FAILURES,
    ids=[f"{row[0]}-{'-'.join(row[1][:2])}" for row in FAILURES],
)
def test_failures_look_as_documented(
    start: Callable[..., Cli],
    fault: str,
    command: tuple[str, ...],
    code: int,
    out: str,
    err: str,
    called: list[str] | None,
) -> None:
    kaggle = start(*filter(None, [fault]))
    kaggle.dataset()
    kaggle.kernel(model_sources=["google/bert/pyTorch/base/1"])
    done = kaggle(*command)
    assert done.returncode == code, done
    assert out in done.stdout and err in done.stderr, done
    if called is not None:
        assert kaggle.double.called == called
    if fault == "upload_refused":
        assert [dataset.versions[0].files for dataset in kaggle.double.state.datasets.values()] == (
            [[]] if SILENT else []
        )
    if fault == "invalid_model_source":
        assert "not valid" not in done.stdout and kaggle.double.state.kernels[TRAIN].versions[0].sources["models"] == []


def test_a_failed_kernel_is_told_with_exit_code_0(start: Callable[..., Cli]) -> None:
    kaggle = start("kernel_fails", polls_queued=0, polls_running=0)
    METHODS["kernels.KernelsApiService/SaveKernel"](
        kaggle.double.world, {"slug": TRAIN, "newTitle": "hubmap-train", "text": SCRIPT}
    )
    done = kaggle("kernels", "status", TRAIN)
    assert done.returncode == 0 and "KernelWorkerStatus.ERROR" in done.stdout and 'Failure message: "' in done.stdout


def test_an_upload_that_breaks_off_is_taken_up_again(start: Callable[..., Cli]) -> None:
    kaggle = start("upload_dropped")
    text = "0123456789" * 300_000
    done = kaggle("datasets", "create", "-p", kaggle.dataset(big=text))
    assert done.returncode == 0 and "Your private Dataset is being created." in done.stdout, done
    assert kaggle.double.state.read(CODE, "big") == text.encode()
    assert kaggle.double.called.count("PUT /upload") == 4


def test_a_command_sees_what_the_one_before_it_left(tmp_path: Path) -> None:
    kaggle = Cli(tmp_path)
    double = [sys.executable, "-m", "kaggle_double", "--no-waits", "--fault", "missing_file", "--"]
    environment = {
        "KAGGLE_DOUBLE_OPTIONS": f"--keep '{tmp_path / 'kept'}'",
        "KAGGLE_KEY": "a real one",
        "PATH": "/usr/bin:/bin",
    }
    environment["PYTHONPATH"] = str(Path(__file__).parents[1])

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*double, *words], env=environment, capture_output=True, text=True, timeout=60, check=False
        )

    created = run("kaggle", "datasets", "create", "-q", "-p", str(kaggle.dataset(**{"a.whl": "x", "b.whl": "y"})))
    assert created.returncode == 0 and "this run: requests 8, files uploaded 3 (25 bytes)" in created.stdout
    looked = run("sh", "-c", f'kaggle datasets status {CODE}; test "$KAGGLE_KEY" = "{KEY}" && exit 7')
    assert looked.returncode == 7 and looked.stdout.startswith("ready") and "files uploaded 0" in looked.stdout
    assert (
        f"dataset {CODE}: private, apache-2.0, ready" in looked.stdout
        and "b.whl" in looked.stdout
        and "a.whl" not in looked.stdout
    )
