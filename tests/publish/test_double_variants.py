"""Answers that Kaggle may give and the double usually does not: what the verbs make of each, with the real client, in
one process for all.

Each case is a row of CASES: steps of a command, the variants that are on, its exit code, what it says, and what Kaggle
holds more than before. As a script, this file plays the cases whose names it is given and prints what happened; the
tests compare.
"""

from __future__ import annotations

import functools
import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import traceback
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).resolve().parents[1]
PLACES = "--out {tmp}/kernels --staged {tmp}/staged/code --every 0.01"
TRAIN, FOLLOW, INFER = (
    f"kernels --run train {PLACES}",
    f"kernels train --follow {PLACES}",
    f"kernels --run infer {PLACES}",
)
SUBMIT = "submit --rendered {tmp}/kernels --ledger {tmp}/ledger.csv --every 0.01 -m hello --version 1"
REFRESH = "submit --ledger {tmp}/ledger.csv --refresh --every 0.01"
PUSH = "push pretrained --staged {tmp}/pretrained --poll 0.01 --timeout 0.05"  # seconds, minutes


@dataclass(frozen=True)
class Step:
    """A command, the variants and faults that are on while it runs, and what must come of it.

    `says`: words that its output holds. `saved`, `handed_in` and `versions` are the kernel versions, submissions and
    dataset versions that Kaggle has more after it. `unsure`: a push of a kernel is noted whose fate is not known.
    `ledger`: the status of the last row. `aged`: before it, everything noted was noted an hour earlier.
    """

    words: str
    faults: str = ""
    code: int = 0
    says: tuple[str, ...] = ()
    saved: int = 0
    handed_in: int = 0
    versions: int = 0
    unsure: bool = False
    ledger: str = ""
    aged: bool = False


@dataclass(frozen=True)
class Case:
    """Steps against one double.

    `held`: it has an older build of the pretrained dataset. `ran`: version 1 of the infer kernel has ended.
    """

    steps: tuple[Step, ...]
    held: bool = False
    ran: bool = False
    settings: dict[str, Any] = field(default_factory=dict)


def _taken_unsaid(variant: str) -> Case:
    """A kernel is saved, and the answer does not say so; while Kaggle does not show it either, nothing is pushed
    again.
    """
    return Case(
        (
            Step(TRAIN, variant, saved=1, says=("pushed alice/hubmap-train version 1", "was not there before")),
            Step(
                TRAIN,
                f"{variant} kernel_old_number",
                1,
                ("kernel alice/hubmap-train may have been saved all the same",),
                saved=1,
                unsure=True,
            ),
        )
    )


def _lost_submission(variant: str) -> Case:
    """A submission is taken, and the answer does not say so; while the list does not show it either, it is not told as
    refused.
    """
    return Case(
        (
            Step(
                SUBMIT,
                variant,
                handed_in=1,
                says=("Kaggle's list has it as submission 500001", "public 0.61234"),
                ledger="COMPLETE",
            ),
            Step(
                SUBMIT,
                f"{variant} submissions_403",
                1,
                ("may have been taken all the same", "--refresh"),
                handed_in=1,
                ledger="ASKED",
            ),
        ),
        ran=True,
    )


def _harmless(*words: str, says: tuple[str, ...] = ()) -> dict[str, Case]:
    """Variants under which a kernel is pushed and followed as ever."""
    done = (*says, "alice/hubmap-train: complete")
    return {
        name: Case((Step(f"{TRAIN} --follow", name, says=done, saved=1), Step(FOLLOW, name, says=done[-1:])))
        for name in words
    }


def _pushed(*words: str, held: bool = True, says: tuple[str, ...] = ()) -> dict[str, Case]:
    """Variants under which a dataset goes up once, and not a second time."""
    action = "versioned, " if held else "created, "
    return {
        name: Case((Step(PUSH, name, says=(action, *says), versions=1), Step(PUSH, name, says=("unchanged, ",))), held)
        for name in words
    }


def _handed_in(*words: str) -> dict[str, Case]:
    """Variants under which a submission is made and scored as ever."""
    return {
        name: Case((Step(SUBMIT, name, says=("public 0.61234",), handed_in=1, ledger="COMPLETE"),), ran=True)
        for name in words
    }


UNKNOWN_BUILD = Case(
    (
        Step(PUSH, "{name}", 1, ("not known which build it holds; nothing was uploaded", "--force")),
        Step(TRAIN, "{name}", 1, ("whether Kaggle serves build", "--force")),
        Step(f"{TRAIN} --force", "{name}", saved=1),
        Step(f"{PUSH} --force", "{name}", 1, ("its BUILD_ID.json",), versions=1),
        Step(PUSH, says=("unchanged, version 2",)),
    ),
    held=True,
)
CASES: dict[str, Case] = {
    **{
        name: _taken_unsaid(name)
        for name in (
            "save_html",
            "save_not_json",
            "save_nothing",
            "save_list",
            "save_null",
            "save_500",
            "save_408",
            "save_code_500",
            "save_empty",
            "save_no_version",
            "save_null_version",
            "save_version_and_error",
            "save_ref_and_error",
            "save_302",
            "save_hung_up",
            "save_cut_off",
            "save_answer_lost",
        )
    },
    "the next commands after a push without an answer": Case(
        (
            Step(TRAIN, saved=1),
            Step(TRAIN, "save_html kernel_old_number", 1, ("may have been saved all the same",), saved=1, unsure=True),
            Step(
                TRAIN,
                "kernel_old_number",
                1,
                (
                    "went through is not known yet",
                    "run this again in some minutes, or push it all the same with --force",
                ),
                unsure=True,
            ),
            Step(
                FOLLOW,
                "kernel_old_number",
                says=("whether the push of alice/hubmap-train", "alice/hubmap-train: complete"),
                unsure=True,
            ),
            Step(TRAIN, "", 1, ("went through as version 2 although its answer was lost",)),
            Step(TRAIN, saved=1),
        )
    ),
    "a push without an answer to a kernel without a number": Case(
        (
            Step(f"{TRAIN} --follow", saved=1),
            Step(TRAIN, "save_empty kernel_no_number", 1, ("may have been saved all the same",), saved=1, unsure=True),
            Step(
                TRAIN,
                "",
                1,
                ("went through is not known; look at", "--follow', or push it all the same with --force"),
                unsure=True,
            ),
            Step(f"{TRAIN} --force", saved=1),
        )
    ),
    **_harmless(
        "save_null_lists",
        "save_half_character",
        "save_ref_slug",
        "save_ref_code",
        "save_ref_query",
        "save_ref_version",
        "save_ref_address",
        "save_ref_number",
        "save_no_ref",
        "kernel_odd_facts",
    ),
    **_harmless(
        "quota_403",
        "quota_404",
        "quota_500",
        "quota_html",
        "quota_null",
        "quota_odd_duration",
        says=("30.0 of 30.0", "assumed, not read"),
    ),
    **_harmless("quota_odd_date", "quota_old_date", says=("29.0 of 30.0", "the date is assumed")),
    **_harmless(
        "kernel_no_metadata",
        "kernel_no_private",
        "kernel_null_private",
        "kernel_403",
        "kernel_500",
        "kernel_html",
        says=("is private could not be checked",),
    ),
    **_harmless(
        "kernel_no_number",
        "kernel_status_unknown",
        "kernel_status_null",
        "kernel_status_number",
        "kernel_status_403",
        "kernel_status_400_first",
        "kernel_status_403_first",
        "kernel_status_404_first",
        "kernel_status_html_first",
        "output_400_first",
        "output_404_first",
        "output_endless",
        "output_null_files",
    ),
    **_harmless(
        "log_lines",
        "log_prefixed",
        "log_prefixed_lines",
        "log_indented",
        "log_unclosed",
        "log_cut_off",
        "log_halves",
        "log_half_character",
        "log_bad_escape",
        "log_as_list",
        "log_odd_text",
        says=("HUBMAP END train complete",),
    ),
    "output_403": Case((Step(f"{TRAIN} --follow", "output_403", 1, ("does not hand out its log",), saved=1),)),
    "kernel_public": Case(
        (
            Step(TRAIN, "kernel_public", 1, ("was saved as version 1 and runs, but it is public",), saved=1),
            Step(FOLLOW, "kernel_public", says=("alice/hubmap-train: complete",)),
            Step(f"{TRAIN} --force", "kernel_public", saved=1, says=("it is public on Kaggle; going on all the same",)),
        )
    ),
    "invalid_model_source": Case(
        (
            Step(
                TRAIN,
                "invalid_model_source",
                1,
                ("was saved as version 1 and runs, but it was saved without its model source",),
                saved=1,
            ),
            Step(FOLLOW, says=("alice/hubmap-train: complete",)),
        )
    ),
    "save_refused_503": Case(
        (
            Step(TRAIN, "save_refused_503", 1, ("may have been saved all the same",), unsure=True),
            Step(TRAIN, "", 1, ("went through is not known yet", "--force"), unsure=True),
            Step(TRAIN, aged=True, says=("did not go through as far as Kaggle shows",), saved=1),
        )
    ),
    "save_refused_503, forced": Case(
        (
            Step(TRAIN, "save_refused_503", 1, ("may have been saved all the same",), unsure=True),
            Step(f"{TRAIN} --force", saved=1),
        )
    ),
    "save_400": Case((Step(TRAIN, "save_400", 1, ("HTTP 400: Invalid notebook",)), Step(TRAIN, saved=1))),
    **{
        name: Case(
            (Step(TRAIN, name, 1, ("Maximum batch GPU session count", "push with --follow, which tries again")),)
        )
        for name in ("save_busy_400", "gpu_limit")
    },
    "gpu_limit_briefly": Case(
        (Step(f"{TRAIN} --follow", "gpu_limit_briefly", says=("trying again", "train: complete"), saved=1),)
    ),
    "gpu_limit, followed": Case(
        (Step(f"{TRAIN} --follow --timeout 0.0001", "gpu_limit", 1, ("Maximum batch GPU session count",)),)
    ),
    **{
        name: _lost_submission(name)
        for name in (
            "submit_no_ref",
            "submit_null_ref",
            "submit_html",
            "submit_nothing",
            "submit_code_503",
            "submit_500",
            "submit_hung_up",
            "submit_cut_off",
        )
    },
    "the next commands after a submission without an answer": Case(
        (
            Step(
                SUBMIT,
                "submit_html submissions_403",
                1,
                ("may have been taken all the same", "--refresh"),
                handed_in=1,
                ledger="ASKED",
            ),
            Step(REFRESH, "submissions_empty", 1, ("taken is not known",), ledger="ASKED"),
            Step(SUBMIT, "submissions_403", 1, ("HTTP 403", "or hand in another with --force"), ledger="ASKED"),
            Step(f"{SUBMIT} --force", "submissions_403", handed_in=1, ledger="COMPLETE"),
            Step(REFRESH, says=("submission 500001",)),
        ),
        ran=True,
    ),
    "a submission without an answer is not made twice": Case(
        (
            Step(
                SUBMIT,
                "submit_no_ref submissions_403",
                1,
                ("may have been taken all the same",),
                handed_in=1,
                ledger="ASKED",
            ),
            Step(
                SUBMIT,
                "",
                1,
                ("was taken as submission 500001", "or run this again to hand in another"),
                ledger="PENDING",
            ),
            Step(SUBMIT, handed_in=1, ledger="COMPLETE"),
        ),
        ran=True,
    ),
    **_handed_in(
        "submit_text_ref",
        "submissions_400",
        "submissions_403",
        "submissions_500",
        "submissions_html",
        "submissions_null",
        "submissions_no_ref",
        "submissions_no_message",
        "submissions_text_ref",
        "submissions_odd_date",
        "submissions_odd_status",
        "submissions_endless",
        "submission_no_status",
        "submission_odd_date",
        "submission_404_first",
        "kernel_status_403 submissions_403",
        "output_403 submissions_403",
        "kernel_status_unknown",
        "kernel_status_null",
    ),
    "submissions_400, forced": Case(
        (Step(f"{SUBMIT} --force", "submissions_400", says=("public 0.61234",), handed_in=1, ledger="COMPLETE"),),
        ran=True,
    ),
    "submission_odd_status": Case(
        (
            Step(
                f"{SUBMIT} --timeout 0.0001",
                "submission_odd_status",
                1,
                ("has no score after",),
                handed_in=1,
                ledger="PENDING",
            ),
            Step(REFRESH, "submission_odd_status", ledger="PENDING"),
            Step(REFRESH, says=("public 0.61234",), ledger="COMPLETE"),
        ),
        ran=True,
    ),
    **{
        f"without an answer, {name}": Case(
            (
                Step(
                    SUBMIT,
                    f"submit_no_ref {name}",
                    1,
                    ("may have been taken all the same",),
                    handed_in=1,
                    ledger="ASKED",
                ),
                Step(REFRESH, name, 1, (words,), ledger="ASKED", aged=True),
                Step(REFRESH, says=("submission 500001: ",)),
            ),
            ran=True,
        )
        for name, words in (
            ("submissions_no_message", "is not known: in Kaggle's list it is"),
            ("submissions_no_ref", "is not known: in Kaggle's list it is"),
            ("submissions_cut_message", "is not known: in Kaggle's list it is"),
            ("submissions_escaped_message", "is not known: in Kaggle's list it is"),
            ("submissions_of_numbers", "is not known: in Kaggle's list it is"),
            ("submissions_object", "is not known: in Kaggle's list it is"),
            ("submissions_500", "could not be completed"),
        )
    },
    "submission_refused_503": Case(
        (
            Step(SUBMIT, "submission_refused_503", 1, ("may have been taken all the same",), ledger="ASKED"),
            Step(SUBMIT, "", 1, ("is not known", "not there yet", "or hand in another with --force"), ledger="ASKED"),
            Step(REFRESH, aged=True, says=("so it was not taken; hand it in again",), ledger="REFUSED"),
        ),
        ran=True,
    ),
    "submit_busy_429": Case(
        (Step(SUBMIT, "submit_busy_429", 1, ("takes no more requests for now",), ledger="REFUSED"),), ran=True
    ),
    **{
        name: Case(
            (
                Step(
                    SUBMIT,
                    f"submission_refused {name}",
                    1,
                    ("accepted the rules", "submission limits: "),
                    ledger="REFUSED",
                ),
            ),
            ran=True,
        )
        for name in ("limits_403", "limits_nulls")
    },
    "nothing of the run can be looked at": Case(
        (
            Step(SUBMIT, "kernel_status_403 output_403", 1, ("neither the status", "--force")),
            Step(f"{SUBMIT} --force", "kernel_status_403 output_403", handed_in=1, ledger="COMPLETE"),
        ),
        ran=True,
    ),
    "kernel_degraded": Case(
        (
            Step(
                f"{INFER} --follow",
                "kernel_degraded",
                1,
                ("4998 of 5000 slides failed and have an empty mask", "hubmap submit --version 1 --force"),
                saved=1,
            ),
            Step(
                f"kernels infer --follow --force {PLACES}",
                says=("alice/hubmap-infer: degraded", "4998 of 5000", "next: hubmap submit --version 1 --force"),
            ),
            Step(SUBMIT, "", 1, ("4998 of 5000 slides failed", "--force")),
            Step(SUBMIT, "output_endless", 1, ("4998 of 5000 slides failed",)),
            Step(f"{SUBMIT} --force", says=("public 0.61234",), handed_in=1, ledger="COMPLETE"),
        )
    ),
    **_pushed(
        "files_403",
        "files_500",
        "files_none",
        "files_null",
        "files_endless",
        "files_of_numbers",
        "files_without_build_id",
        "version_warning",
        "files_odd_dates",
        "dataset_no_version",
        "dataset_odd_facts",
        "version_no_status",
        "version_html",
        "version_503",
        "version_hung_up",
        "version_403_once",
        "blob_html_first",
        "blob_500_first",
    ),
    "dataset_old_version": Case(
        (
            Step(PUSH, "dataset_old_version", says=("versioned, version 1",), versions=1),
            Step(PUSH, says=("unchanged, version 2",)),
        ),
        held=True,
    ),
    **{
        name: Case((Step(PUSH, name, 1, ("nothing was published",)), Step(PUSH, versions=1)), held=True)
        for name in ("blob_no_token", "blob_no_address")
    },
    **_pushed(
        "dataset_no_private",
        "dataset_null_private",
        "dataset_403",
        "dataset_500",
        "dataset_html",
        says=("is private could not be checked",),
    ),
    **_pushed(
        "dataset_status_unknown",
        "dataset_status_null",
        "dataset_status_number",
        "dataset_status_400",
        "dataset_status_500",
    ),
    **_pushed(
        "create_ok_in_words",
        "create_no_status",
        "create_html",
        "create_503",
        "create_hung_up",
        "create_403_once",
        held=False,
    ),
    "absent answers 400": Case(
        (Step(PUSH, says=("created, version 1",), versions=1), Step(TRAIN, saved=1)), settings={"absent_status": 400}
    ),
    "version_403": Case(
        (Step(PUSH, "version_403", 1, ("HTTP 403",)), Step(PUSH, says=("versioned, version 2",), versions=1)), held=True
    ),
    "version_refused_503": Case(
        (
            Step(PUSH, "version_refused_503", 1, ("HTTP 503", "may have been taken all the same", "still gives build")),
            Step(PUSH, says=("versioned, version 2",), versions=1),
        ),
        held=True,
    ),
    "dataset_public": Case(
        (
            Step(PUSH, "dataset_public", 1, ("was uploaded and is public on Kaggle", "make it private"), versions=1),
            Step(PUSH, "dataset_public", 1, ("is public on Kaggle",)),
            Step(PUSH, says=("unchanged, version 1",)),
        )
    ),
    **{
        name: Case(
            tuple(
                Step(
                    step.words,
                    step.faults.replace("{name}", name),
                    step.code,
                    step.says,
                    step.saved,
                    versions=step.versions,
                )
                for step in UNKNOWN_BUILD.steps
            ),
            held=True,
        )
        for name in ("build_id_400", "build_id_403", "build_id_404", "build_id_500")
    },
}


class TooLong(BaseException):
    """A case that does not end."""


def play(name: str, case: Case, tmp: Path) -> list[dict[str, Any]]:
    """What came of each step."""
    from kaggle_double import Double
    from staged_builds import stage, stage_weights

    from hubmap_kit import build_id

    def too_long(*_: Any) -> None:
        raise TooLong(f"{name} has not ended")

    signal.signal(signal.SIGALRM, too_long)
    signal.alarm(60)
    stage(tmp / "staged" / "code", b"one")
    stage_weights(tmp / "staged" / "weights", b"name: one\n")
    for kind in ("older", "pretrained"):
        (tmp / kind).mkdir()
        (tmp / kind / "encoder.safetensors").write_bytes(kind.encode())
        build_id.write(tmp / kind, build_id.describe("pretrained", tmp / kind))
    with Double(hidden_calls=0, polls_until_ready=0, polls_queued=0, daily_limit=99, **case.settings) as double:
        os.environ.update(double.environment(tmp / "environment"))
        _hold(double, tmp, case)
        found = [_step(double, step, tmp) for step in case.steps]
        assert not double.escapes and not double.mistakes, (name, double.escapes, double.mistakes)
    return found


def _hold(double: Any, tmp: Path, case: Case) -> None:
    """Datasets that are there already, and a kernel that has run."""
    from kaggle_double.server import METHODS
    from kaggle_double.state import Dataset, DatasetVersion

    folders = {"code": "staged/code", "weights": "staged/weights", **({"pretrained": "older"} if case.held else {})}
    for kind, folder in folders.items():
        files = [double.state.add(path.name, path.read_bytes()) for path in sorted((tmp / folder).iterdir())]
        version = DatasetVersion(1, kind, files, "2026-01-01T00:00:00.000Z", polls=1000)
        double.state.datasets[f"alice/hubmap-kit-{kind}"] = Dataset(
            "alice", f"hubmap-kit-{kind}", kind, "other", True, 0, [version], "READY"
        )
    if case.ran:
        script = 'BUILD_ID = "abc"\nstart("infer", BUILD_ID, job)\n'
        METHODS["kernels.KernelsApiService/SaveKernel"](
            double.world, {"slug": "alice/hubmap-infer", "text": script, "isPrivate": True}
        )
        double.state.kernels["alice/hubmap-infer"].versions[0].status = "COMPLETE"


def _step(double: Any, step: Step, tmp: Path) -> dict[str, Any]:
    from hubmap_kit.__main__ import main

    def held() -> dict[str, int]:
        state = double.state
        return {
            "saved": sum(len(kernel.versions) for kernel in state.kernels.values()),
            "handed_in": len(state.submissions),
            "versions": sum(len(dataset.versions) for dataset in state.datasets.values()),
        }

    noted, ledger = [*(tmp / "kernels").glob("*.pushing.json")], tmp / "ledger.csv"
    for path in [*noted, *([ledger] if ledger.exists() else [])] if step.aged else []:
        path.write_text(re.sub(r"20\d\d-\d\d-\d\dT\d\d", "2026-01-01T00", path.read_text()))
    before, out, err, code = held(), io.StringIO(), io.StringIO(), 0
    double.faults = step.faults.split()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            main(shlex.split(step.words.format(tmp=tmp)))
        except SystemExit as stop:
            code = int(stop.code or 0)
    rows = ledger.read_text().splitlines()[1:] if ledger.exists() else []
    status = [word for word in ("ASKED", "PENDING", "COMPLETE", "REFUSED", "ERROR") if rows and f",{word}," in rows[-1]]
    return {
        "code": code,
        "out": out.getvalue(),
        "err": err.getvalue(),
        "unsure": any((tmp / "kernels").glob("*.pushing.json")),
        "ledger": status[0] if status else "",
        **{key: value - before[key] for key, value in held().items()},
    }


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What came of all cases, from one process."""
    done = subprocess.run(
        [sys.executable, __file__, *CASES],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        cwd=tmp_path_factory.mktemp("played"),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(json.loads(done.stdout))


@pytest.mark.parametrize("name", CASES)
def test_an_answer_of_another_form(name: str, played: dict[str, Any]) -> None:
    assert isinstance(played[name], list), played[name]
    for number, (step, found) in enumerate(zip(CASES[name].steps, played[name], strict=True), 1):
        text, where = (
            found["out"] + found["err"],
            f"{name}, step {number}: {step.words}\n{found['out']}\n{found['err']}",
        )
        expected = {
            key: value
            for key, value in asdict(step).items()
            if key in ("code", "saved", "handed_in", "versions", "unsure", "ledger")
        }
        expected["ledger"] = expected["ledger"] or found["ledger"]
        assert {key: found[key] for key in expected} == expected, where
        for words in step.says:
            assert words in text, where
        assert "Traceback" not in text and "dummy-key" not in text, where
        errors = [line for line in found["err"].splitlines() if line.startswith("error: ")]
        assert errors == ([found["err"].splitlines()[-1]] if step.code else []), where


def test_every_variant_of_the_double_is_tried() -> None:
    from kaggle_double.variants import VARIANTS

    tried = {name for case in CASES.values() for step in case.steps for name in step.faults.split()}
    assert not VARIANTS.keys() - tried


def _main() -> None:
    """Play the cases that are named; a case that breaks off is told as its last words."""
    import typer.main

    sys.path.insert(0, str(TESTS))
    typer.main.get_command = functools.cache(
        typer.main.get_command
    )  # half the time of a command: reading the options of every verb
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in sys.argv[1:]:
            try:
                found[name] = play(name, CASES[name], Path(folder) / re.sub(r"\W", "_", name))
            except (Exception, TooLong):
                found[name] = traceback.format_exc()
            signal.alarm(0)
    print(json.dumps(found))


if __name__ == "__main__":
    _main()
