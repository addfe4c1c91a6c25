"""Run folders without a training: the files that one leaves, with numbers of the test's choice."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from hubmap_kit import experiment
from hubmap_kit.files import write_json, write_yaml

ORGAN_OF = {"a": "kidney", "b": "kidney", "c": "lung", "d": "spleen"}
DICE = {"a": 0.5, "b": 0.75, "c": 0.25, "d": 0.9}


def table(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows as CSV."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as handle:
        writer = csv.DictWriter(handle, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def made_run(path: Path, settings: Sequence[str] = (), dice: Mapping[str, float] = DICE, epochs: int = 3) -> Path:
    """A finished run of two folds; `dice` is slide -> out-of-fold Dice, `settings` are overrides of the baseline."""
    fold_of = {slide: number % 2 for number, slide in enumerate(dice)}
    rows = [
        {
            "id": slide,
            "organ": ORGAN_OF.get(slide, "kidney"),
            "data_source": "HPA",
            "fold": fold_of[slide],
            "dice": value,
        }
        for slide, value in dice.items()
    ]
    write_yaml(
        path / "config.yaml",
        experiment.dump(experiment.load("baseline", [f"training.epochs={epochs}", "data.n_folds=2", *settings])),
    )
    write_json(
        path / "environment.json",
        [
            {
                "time_utc": "2026-01-02T03:04:05+00:00",
                "git_sha": "0123456789abcdef",
                "cpus": 4,
                "accelerator": {"type": "cpu"},
            }
        ],
    )
    write_json(path / "thresholds.json", {"kidney": 0.4, "lung": 0.3, "spleen": 0.5})
    table(path / "folds.csv", rows)
    table(path / "oof.csv", rows)
    for fold in (0, 1):
        folder = path / f"fold{fold}"
        table(
            folder / "metrics.csv",
            [
                {
                    "fold": fold,
                    "epoch": epoch,
                    "lr": 1e-3,
                    "train_loss": 1 / epoch,
                    "val_loss": 1.1 / epoch,
                    "dice": 1 - 0.5 / epoch,
                    "dice@0.5": 0.5,
                }
                for epoch in range(1, epochs + 1)
            ],
        )
        table(
            folder / "timing.csv",
            [
                {
                    "fold": fold,
                    "epoch": epoch,
                    "seconds": 60.0 * epoch,
                    "validation_seconds": 6.0,
                    "tiles_per_second": 10,
                    "session": "s",
                }
                for epoch in range(1, epochs + 1)
            ],
        )
        weights = {
            "layer.weight": np.zeros((3, 5), np.float32),
            "norm.running_mean": np.zeros(7, np.float32),
            "norm.num_batches_tracked": np.zeros((), np.int64),
        }
        save_file(weights, folder / "model.safetensors")
        for name in ("last.ckpt", "oof_counts.parquet"):
            (folder / name).write_bytes(b"x")
    return path
