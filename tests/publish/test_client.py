"""The Kaggle client on kernels, quota and submissions, called in a process of its own against a double."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hubmap_kit.files import write_json

Kaggle = Callable[..., Any]
REF = "alice/hubmap-infer"
PROLOGUE = """
import json, logging, sys
from dataclasses import asdict
from pathlib import Path
from hubmap_kit.errors import PublishError
from hubmap_kit.publish.client import Kaggle
logging.basicConfig(level=logging.WARNING)
kernel, into, ref = Path("kernel"), Path("output"), "alice/hubmap-infer"
with Kaggle(pause_s=0.05) as kaggle:
    try:
"""


def ask(cli: Any, code: str) -> Any:
    """Run code with a signed-in client; the value of its last expression's `say(...)`, or the sentence of its
    PublishError.
    """
    lines = "".join(f"        {line}\n" for line in code.strip().splitlines())
    end = "    except PublishError as error:\n        print(json.dumps({'error': str(error)}))\n"
    done = cli.run("-c", f"say = lambda value: print(json.dumps(value, default=str))\n{PROLOGUE}{lines}{end}")
    assert done.code == 0, done.err
    return json.loads(done.out.splitlines()[-1])


@pytest.fixture
def kernel(tmp_path: Path) -> Callable[..., None]:
    """Write kernel/ with its metadata."""

    def made(**facts: Any) -> None:
        (tmp_path / "kernel").mkdir(exist_ok=True)
        (tmp_path / "kernel" / "infer.py").write_text("print('hello')\n")
        values = {
            "id": REF,
            "title": "hubmap-infer",
            "code_file": "infer.py",
            "language": "python",
            "kernel_type": "script",
            "is_private": True,
            "enable_internet": False,
            "machine_shape": "NvidiaTeslaT4",
            "competition_sources": ["hubmap-organ-segmentation"],
        }
        write_json(tmp_path / "kernel" / "kernel-metadata.json", values | facts)

    return made


def test_a_kernel_from_push_to_submission(kaggle: Kaggle, kernel: Callable[..., None], tmp_path: Path) -> None:
    kernel()
    with kaggle(polls_queued=0, polls_running=1, polls_until_scored=1, gpu_used_h=1.5) as cli:
        cli.double.kernel_log("hubmap-infer", ["first line", "last line"])
        cli.double.kernel_output(
            "hubmap-infer", {"submission.csv": b"id,rle\n", "logs/a.txt": b"x" * 3_000_000, "other.bin": b"no"}
        )
        code = """
pushed = kaggle.save_kernel(kernel, timeout_s=600)
states = [kaggle.kernel_status(ref).status for _ in range(4)]
paths = kaggle.kernel_output(ref, into, r"(csv|txt)$")
number = kaggle.submit_code("hubmap-organ-segmentation", ref, pushed.version, "submission.csv", "first")
scores = [asdict(kaggle.submission(number)) for _ in range(3)]
say({"pushed": asdict(pushed), "states": states, "log": kaggle.kernel_log(ref), "paths": paths, "scores": scores,
     "quota": asdict(kaggle.quota()), "limits": kaggle.submission_limits("hubmap-organ-segmentation")})
"""
        said = ask(cli, code)
        assert said["pushed"] == {"ref": REF, "url": said["pushed"]["url"], "version": 1, "lacking": ""}
        assert said["states"][0] == "RUNNING"
        assert said["states"][-1] == "COMPLETE"
        assert said["log"].split("\n")[:2] == ["first line", "last line"]
        assert said["paths"] == ["output/logs/a.txt", "output/submission.csv"]
        assert (tmp_path / "output" / "logs" / "a.txt").read_bytes() == b"x" * 3_000_000
        assert not (tmp_path / "output" / "other.bin").exists()
        assert said["scores"][0]["status"] == "PENDING"
        assert said["scores"][-1] == {
            "status": "COMPLETE",
            "public_score": 0.61234,
            "private_score": 0.59876,
            "error": "",
            "said": "COMPLETE",
        }
        assert (said["quota"]["gpu_used_h"], said["quota"]["gpu_total_h"]) == (1.5, 30.0)
        assert said["limits"] == {"today": 1, "total": 1, "left": 4}
        asked = next(request.body for request in cli.double.requests if request.name == "SaveKernel")
        assert (asked["sessionTimeoutSeconds"], asked.get("kernelExecutionType")) == (600, None)


def test_status_log_and_output_are_those_of_the_version_that_is_asked_for(
    kaggle: Kaggle, kernel: Callable[..., None], tmp_path: Path
) -> None:
    kernel()
    with kaggle(polls_queued=0, polls_running=0) as cli:
        cli.double.kernel_log("hubmap-infer", ["of the first"])
        cli.double.kernel_output("hubmap-infer", {"a.txt": b"first"})
        ask(cli, "kaggle.save_kernel(kernel); say(kaggle.kernel_status(ref).status)")
        cli.double.faults = ("kernel_fails",)
        cli.double.kernel_log("hubmap-infer", ["of the second"])
        cli.double.kernel_output("hubmap-infer", {"a.txt": b"second"})
        code = """
kaggle.save_kernel(kernel)
states = {n: kaggle.kernel_status(ref, n).status for n in (1, 2, None)}
logs = {n: kaggle.kernel_log(ref, n) for n in (1, 2, None)}
kaggle.kernel_output(ref, into, version=1)
say({"states": states, "logs": logs, "newest": kaggle.kernel(ref).version,
     "none": kaggle.kernel("alice/hubmap-absent").version})
"""
        said = ask(cli, code)
        assert said["states"] == {"1": "COMPLETE", "2": "ERROR", "null": "ERROR"}
        assert {key: log.strip() for key, log in said["logs"].items()} == {
            "1": "of the first",
            "2": "of the second",
            "null": "of the second",
        }
        assert (tmp_path / "output" / "a.txt").read_bytes() == b"first"
        assert (said["newest"], said["none"]) == (2, 0)


def test_signing_in_asks_the_server_once_and_the_import_of_the_package_never(kaggle: Kaggle) -> None:
    with kaggle(token=True) as cli:
        assert ask(cli, "say(kaggle.owner)") == "alice"
        assert cli.double.called == ["IntrospectToken"]


def test_an_upload_whose_progress_is_not_told_is_asked_about_again(kaggle: Kaggle, staged: Path) -> None:
    """The time-out is shortened; without one, the client would wait for ever."""
    with kaggle("upload_dropped", "probe_silent_once", "probe_503_once") as cli:
        facts = {"id": "alice/hubmap-kit-pretrained", "title": "hubmap-kit-pretrained", "licenses": [{"name": "other"}]}
        write_json(staged / "dataset-metadata.json", facts)
        said = ask(
            cli,
            "from hubmap_kit.publish import api\napi.TIMEOUT = (5,"
            " 1)\nkaggle.create_dataset(Path('staged'))\nsay('made')",
        )
        assert said == "made"
        held = cli.held("alice/hubmap-kit-pretrained")
        assert held == {
            path.name: path.read_bytes() for path in staged.iterdir() if path.name != "dataset-metadata.json"
        }


def test_no_traceback_shows_an_address(kaggle: Kaggle) -> None:
    """Addresses of uploads and downloads are signed: whoever has one needs no credentials."""
    with kaggle() as cli:
        code = """
import traceback, requests
from hubmap_kit.publish.answers import sentences
texts = []
for make in (
    lambda: requests.get("http://127.0.0.1:9/storage?signature=secret", proxies={"http": None}, timeout=1),
    lambda: (_ for _ in ()).throw(ValueError("bad: http://localhost/upload?signature=secret")),
    lambda: kaggle.api.read("x", lambda: requests.get("http://localhost/nowhere?signature=secret").raise_for_status()),
):
    try:
        with sentences("a download"):
            make()
    except PublishError as error:
        texts.append("".join(traceback.format_exception(error)).replace("Traceback", "Trace"))
say(texts)
"""
        said = ask(cli, code)
        assert len(said) == 3 and all("in sentences" in text for text in said)
        assert not any("secret" in text for text in said), said


@pytest.mark.parametrize(
    ("fault", "facts", "sentence"),
    [
        ("kernel_push_error", {}, "Kaggle did not take kernel alice/hubmap-infer ("),
        (
            "gpu_limit",
            {},
            "Kaggle did not take kernel alice/hubmap-infer (Maximum batch GPU session count of 2 reached",
        ),
        ("", {"title": "HuBMAP infer now"}, "leads to the address 'hubmap-infer-now', not to 'hubmap-infer'"),
        (
            "",
            {"code_file": "absent.py"},
            "the kaggle package failed at the push of kernel alice/hubmap-infer (ValueError: Source file not found",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) and len(value) < 30 else "",
)
def test_a_kernel_that_kaggle_does_not_take_is_an_error(
    kaggle: Kaggle, kernel: Callable[..., None], fault: str, facts: dict[str, Any], sentence: str
) -> None:
    kernel(**facts)
    with kaggle(*filter(None, [fault])) as cli:
        assert sentence in ask(cli, "say(asdict(kaggle.save_kernel(kernel)))")["error"]


@pytest.mark.parametrize(
    ("fault", "facts", "lacking"),
    [
        ("invalid_model_source", {"model_sources": ["bob/net/pyTorch/base/1"]}, "model source bob/net/pyTorch/base/1"),
        ("invalid_competition_source", {}, "competition source hubmap-organ-segmentation"),
        ("", {"dataset_sources": ["alice/not-there"]}, "dataset source alice/not-there"),
    ],
)
def test_a_kernel_that_is_saved_without_a_source_says_so(
    kaggle: Kaggle, kernel: Callable[..., None], fault: str, facts: dict[str, Any], lacking: str
) -> None:
    kernel(**facts)
    with kaggle(*filter(None, [fault])) as cli:
        said = ask(cli, "say(asdict(kaggle.save_kernel(kernel)))")
        assert (said["version"], said["lacking"]) == (1, lacking)


def test_an_output_cannot_leave_its_folder(kaggle: Kaggle, kernel: Callable[..., None], tmp_path: Path) -> None:
    kernel()
    with kaggle() as cli:
        cli.double.kernel_output("hubmap-infer", {"../escaped.txt": b"x"})
        said = ask(
            cli,
            "kaggle.save_kernel(kernel)\n[kaggle.kernel_status(ref) for _ in range(4)]\nsay(kaggle.kernel_output(ref,"
            " into))",
        )
        assert "leads out of output" in said["error"]
        assert not (tmp_path / "escaped.txt").exists()


def test_what_is_not_there_is_said(kaggle: Kaggle) -> None:
    with kaggle() as cli:
        assert ask(cli, "say(kaggle.dataset('hubmap-kit-absent'))") is None
        assert (
            "the status of kernel alice/hubmap-absent (HTTP 40"
            in ask(cli, "say(kaggle.kernel_status('alice/hubmap-absent'))")["error"]
        )
        assert (
            "BUILD_ID.json of hubmap-kit-absent (HTTP 40"
            in ask(cli, "kaggle.download_file('hubmap-kit-absent', 'BUILD_ID.json', into)")["error"]
        )
