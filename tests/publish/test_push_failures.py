"""`hubmap push` when Kaggle or the folder is not as it must be: exit code 1, one sentence, nothing half-made.

Each is a row of a table.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from kaggle_double.server import TOKEN

from hubmap_kit import build_id
from hubmap_kit.files import write_json

Kaggle = Callable[..., Any]
Record = Callable[[str, Any], None]
REF = "alice/hubmap-kit-pretrained"
SHORT = ("--poll", "0.05", "--timeout", "0.001")  # seconds, minutes
AT_ONCE = {"hidden_calls": 0, "polls_until_ready": 0}  # the first look after an upload shows what every later one would
SIGN_IN = ("no_credentials", "wrong_token", "network_down", "server_500", "rate_limited_429")

# Faults of the double, whether it holds an older build before, and what the sentence says.
AT_KAGGLE = [
    (
        "no_credentials",
        False,
        (
            r"no Kaggle credentials were found .* make a token at https://www.kaggle.com/settings/api and set"
            r" KAGGLE_API_TOKEN"
        ),
    ),
    ("wrong_token", False, r"Kaggle does not accept the credentials \(HTTP 401.* make a token at"),
    ("network_down", False, r"Kaggle could not be reached .* check the network"),
    ("server_500", False, r"\(HTTP 500.*the fault is on its side, wait"),
    ("rate_limited_429", False, r"no more requests for now .*HTTP 429.*wait 1 s, then run this again"),
    ("upload_refused", False, r"the upload of \S+ was refused \(HTTP 403.* nothing was published, run this again"),
    ("upload_refused", True, r"the upload of \S+ was refused \(HTTP 403.* nothing was published, run this again"),
    ("create_error", False, r"did not take the dataset of \S+ \(Incompatible Dataset Type\); mend that"),
    (
        "version_error",
        True,
        r"did not take the new version of \S+ \(The dataset version could not be created\); mend that",
    ),
    (
        "pending_403_forever",
        False,
        r"still being created \(Kaggle answers 400, 403 or 404.* run this again, it goes on waiting",
    ),
    ("never_ready", False, r"it is still individual_blobs_compressed; .*run this again"),
    (
        "dataset_failed",
        False,
        r"ended as 'failed' on Kaggle; https://www.kaggle.com/datasets/alice/hubmap-kit-pretrained may say why",
    ),
    (
        "version_never_moves",
        True,
        (
            r"is ready as version 1, but a download still gives build pretrained-\w+ instead of pretrained-\w+; .*run"
            r" this again"
        ),
    ),
    (
        "stale_build_id",
        True,
        r"a download still gives build pretrained-\w+ instead of pretrained-\w+; .*run this again",
    ),
    ("missing_file", True, r"is ready as version 2, but lacks encoder.safetensors; .*upload it anew"),
]


def record(record_property: Record, done: Any) -> None:
    """Make the failure a row of the table."""
    record_property("exit code", done.code)
    record_property("sentence", f"error: {done.sentence}")


@pytest.mark.parametrize(
    ("fault", "seeded", "sentence"),
    AT_KAGGLE,
    ids=[f"{fault}{'-held' if seeded else ''}" for fault, seeded, _ in AT_KAGGLE],
)
def test_a_failure_at_kaggle(
    kaggle: Kaggle, staged: Path, hold: Any, fault: str, seeded: bool, sentence: str, record_property: Record
) -> None:
    with kaggle(fault, **AT_ONCE) as cli:
        if seeded:
            hold(cli.double)
        done = cli.push(staged, *SHORT)
        assert done.code == 1, done.err
        assert re.search(sentence, done.sentence), done.sentence
        if fault in SIGN_IN:
            assert not cli.written()
        if fault.endswith(("_refused", "_error")):
            # No dataset without its files, no version beside the older one.
            assert len(cli.double.state.datasets) == seeded
            assert all(len(dataset.versions) == 1 for dataset in cli.double.state.datasets.values())
    record(record_property, done)


def test_a_fault_during_the_wait_is_named_when_the_time_is_over(
    kaggle: Kaggle, staged: Path, hold: Any, record_property: Record
) -> None:
    with kaggle(polls_until_ready=10_000) as cli:
        hold(cli.double)
        process = cli.start(
            "-m", "hubmap_kit", "push", "pretrained", "--staged", staged, "--poll", "0.05", "--timeout", "0.04"
        )
        cli.until(lambda: "CreateDatasetVersion" in cli.double.called)
        cli.double.faults = ("server_500",)
        done = cli.end(process)
        assert done.code == 1
        words = r"could not be looked at \(Kaggle failed at .*HTTP 500.*wait some minutes, then run this again"
        assert re.search(words, done.sentence), done.sentence
    record(record_property, done)


def test_a_refused_access_token_is_not_passed_over_for_the_key(kaggle: Kaggle, staged: Path) -> None:
    with kaggle("wrong_token", token=True, extra={"KAGGLE_USERNAME": "alice", "KAGGLE_KEY": "another"}) as cli:
        done = cli.push(staged, *SHORT)
        assert done.code == 1
        assert "does not accept the token in KAGGLE_API_TOKEN" in done.sentence
        assert set(cli.double.called) == {"IntrospectToken"}


def test_a_token_with_a_line_break_is_refused_and_not_shown(kaggle: Kaggle, staged: Path) -> None:
    with kaggle(token=True, extra={"KAGGLE_API_TOKEN": "KGAT_secret\n"}) as cli:
        done = cli.push(staged, *SHORT)
        assert done.code == 1 and "the token in KAGGLE_API_TOKEN holds a blank or a line break" in done.sentence
        assert "KGAT_secret" not in done.out + done.err


def test_a_mistyped_environment_does_not_lead_to_the_real_kaggle(kaggle: Kaggle, staged: Path) -> None:
    with kaggle(extra={"KAGGLE_API_ENVIRONMENT": "TEST"}) as cli:
        done = cli.push(staged, *SHORT)
        assert done.code == 1
        assert done.sentence.startswith("KAGGLE_API_ENVIRONMENT is 'TEST'; ")


def test_verbose_output_holds_no_credentials(kaggle: Kaggle, staged: Path) -> None:
    with kaggle("create_error", extra={"VERBOSE": "1"}) as cli:
        done = cli.push(staged, *SHORT, "-v")  # Cli.end looks for them
        assert done.code == 1
        assert "Traceback" in done.err
        assert "Authorization" not in done.out + done.err


def _archive(folder: Path) -> None:
    (folder / "more.tar.gz").write_bytes(b"x")


def _many(folder: Path) -> None:
    for number in range(50):
        (folder / f"{number}.txt").write_text("x")


def _public(folder: Path) -> None:
    write_json(folder / "dataset-metadata.json", {"id": REF, "title": "hubmap-kit-pretrained", "isPrivate": False})


def _altered(folder: Path) -> None:
    path = folder / "head.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")


def _nested(folder: Path) -> None:
    (folder / "inner").mkdir()


def _empty(folder: Path) -> None:
    (folder / "nothing.txt").touch()


def _other_kind(folder: Path) -> None:
    build_id.write(folder, build_id.describe("weights", folder))


def _absent(folder: Path) -> None:
    shutil.rmtree(folder)


IN_THE_FOLDER = [
    (_archive, r"more.tar.gz is an archive, which Kaggle unpacks"),
    (_many, r"holds 53 files where Kaggle takes 50"),
    (_public, r"dataset-metadata.json asks for a public dataset; the kit publishes private ones only"),
    (_altered, r"head.safetensors has the sha256 \w+\.\.\. where BUILD_ID.json says"),
    (_nested, r"inner is not a file; .* a dataset must be flat"),
    (_empty, r"nothing.txt is empty"),
    (_other_kind, r"holds weights, expected pretrained; push it with 'hubmap push weights'"),
    (_absent, r"is no folder; stage it with 'hubmap push pretrained' without --staged"),
]


@pytest.mark.parametrize(
    ("spoil", "sentence"), IN_THE_FOLDER, ids=[spoil.__name__.strip("_") for spoil, _ in IN_THE_FOLDER]
)
def test_a_folder_that_kaggle_would_change_is_refused(
    kaggle: Kaggle, staged: Path, spoil: Callable[[Path], None], sentence: str, record_property: Record
) -> None:
    spoil(staged)
    with kaggle() as cli:
        done = cli.push(staged, *SHORT)
        assert done.code == 1
        assert re.search(sentence, done.sentence), done.sentence
        assert not cli.double.called
    record(record_property, done)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            ["wieghts"],
            "'wieghts' is no dataset of the kit; expected code, weights, tiles, pretrained; did you mean 'weights'?",
        ),
        (["weights"], "'hubmap push weights' needs --run, at least once"),
        (["code", "--run", "x"], "--run goes with 'hubmap push weights'"),
    ],
)
def test_options_that_do_not_belong_together(kaggle: Kaggle, words: list[str], sentence: str) -> None:
    with kaggle() as cli:
        done = cli("push", *words)
        assert done.code == 1
        assert done.sentence.startswith(sentence)


def test_an_access_token_in_the_place_of_the_key_is_used_as_a_token(kaggle: Kaggle, staged: Path) -> None:
    with kaggle("no_credentials") as cli:
        file = Path(cli.environment["KAGGLE_CONFIG_DIR"]) / "kaggle.json"
        file.write_text(json.dumps({"username": "alice", "key": TOKEN}))
        file.chmod(0o600)
        done = cli.push(staged, "-v", "--poll", "0.05", "--timeout", "1")
        assert done.code == 0 and "alice/hubmap-kit-pretrained: created" in done.out, done.err
        assert f"the key in {file} is an access token and is used as one" in done.err
        file.write_text(json.dumps({"username": "alice", "key": "KGAT_revoked"}))
        done = cli.push(staged, *SHORT)
        assert (
            done.code == 1
            and f"does not accept the token in {file}" in done.sentence
            and "KGAT_revoked" not in done.out + done.err
        )
