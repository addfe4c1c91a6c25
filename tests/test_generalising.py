"""The studies of scripts/generalising.py: every trial is a training that can be begun, and the tables say what the
files say.
"""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hubmap_kit import experiment
from hubmap_kit.augment.shift import SHIFTS

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"


@pytest.fixture(autouse=True)
def _scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))


def test_every_trial_has_its_own_name_and_settings_that_load(tmp_path: Path) -> None:
    from generalising_trials import STUDIES, Paths

    paths = Paths(tmp_path / "data", tmp_path / "out")
    keys: dict[str, list[list[str]]] = {}
    for study in STUDIES.values():
        for trial in study(paths):
            # A run that two studies share is trained by the same words in both.
            assert keys.setdefault(trial.key, trial.commands(paths)) == trial.commands(paths), trial.key
            words = trial.commands(paths)[0]
            overrides = [words[place + 1] for place, word in enumerate(words) if word == "--set"]
            if words[0] == "train":
                experiment.load(trial.config, overrides)
            assert trial.trained or trial.copy_of or words[0] == "train"
    assert len(keys) > 30


def test_the_table_of_a_recipe_is_the_mean_of_its_runs(tmp_path: Path) -> None:
    import generalising
    import typer

    # Two slides a run; Dice of run s under the n-th shift is 0.5 + 0.1 s + 0.01 n on average.
    for seed in range(2):
        run = tmp_path / f"robust-{seed}"
        run.mkdir()
        with (run / "shift.csv").open("w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(["id", "shift", "dice"])
            for number, shift in enumerate(SHIFTS):
                mean = 0.5 + 0.1 * seed + 0.01 * number
                rows.writerows([["a", shift, mean + 0.02], ["b", shift, mean - 0.02]])
    app = typer.Typer()
    app.command()(generalising.main)
    done = CliRunner().invoke(app, ["seeds", "--data", str(tmp_path), "--out", str(tmp_path), "--table"])
    assert done.exit_code == 0, done.output
    line = next(line for line in done.stdout.splitlines() if line.startswith("| robust |"))
    cells = [cell.strip() for cell in line.strip("|").split("|")][1:]
    assert cells[0] == "0.550 ± 0.071"  # of 0.5 and 0.6
    assert cells[-1] == f"{0.55 + 0.01 * (1 + len(SHIFTS) - 1) / 2:.3f} ± 0.071"
