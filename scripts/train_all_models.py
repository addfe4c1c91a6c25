"""Trains every network of the catalog for two short epochs on a few slides: a proof that each one learns, not a
comparison.

Called by scripts/train_all_models.sh. Rows go to OUT/results.csv one by one; the same command again goes on with what
is missing or failed.
"""

from __future__ import annotations

import csv
import datetime
import shutil
from pathlib import Path
from typing import Annotated

import typer
from benchmarks.document import replace
from benchmarks.machine import machine, versions

from hubmap_kit import experiment
from hubmap_kit.errors import ConfigError, HubmapError
from hubmap_kit.files import atomic_path
from hubmap_kit.jobs.train import train
from hubmap_kit.models import catalog
from hubmap_kit.models.catalog import NETWORKS, Network
from hubmap_kit.progress import track
from hubmap_kit.training.clock import OutOfTime
from hubmap_kit.training.history import METRICS_FILE, read_rows, read_timing

PAGE = Path(__file__).resolve().parents[1] / "docs" / "models.md"
COLUMNS = ("name", "first_loss", "last_loss", "val_loss", "seconds", "tiles_per_second", "peak_gib", "error")
HEADER = ("network", "train loss, epoch 1", "epoch 2", "valid loss")
LARGE = 60e9  # multiply-adds at 512 px, above which a network gets half of the tiles
# One recipe for all, so that a row differs by its network only; one fold of two.
SHORT = (
    "data.n_folds=2",
    "scale.policy=physical",
    "scale.max_zoom=4",
    "training.epochs=2",
    "training.validate_every=2",
    "training.batch_size=4",
    "training.accumulate=1",
    "training.workers=0",
    "training.optimizer=adamw",
    "training.schedule=cosine",
    "training.warmup=0.1",
    "training.ema_decay=0",
    "augment.pipeline=flips",
    "inference.views=none",
    "inference.overlap=0",
)
Row = dict[str, str]


def main(
    data: Annotated[Path, typer.Option(help="Folder with train.csv and train_images/: a few slides.")],
    out: Annotated[Path, typer.Option(help="Folder for the runs and results.csv.")] = Path("all-models"),
    only: Annotated[
        list[str] | None, typer.Option(help="A network of the catalog; may be repeated; default: all.")
    ] = None,
    size: Annotated[int, typer.Option(help="Side of tiles and windows.")] = 128,
    um_per_px: Annotated[float, typer.Option(help="Scale of the tiles in micrometres per pixel.")] = 3.2,
    samples: Annotated[int, typer.Option(help="Tiles an epoch; large networks get half.")] = 48,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda.")] = "cpu",
    keep: Annotated[bool, typer.Option("--keep", help="Keep the run folders.")] = False,
    write: Annotated[bool, typer.Option("--write", help="Write the table into docs/models.md.")] = False,
) -> None:
    """Train all networks shortly."""
    chosen = [catalog.find(name) for name in only] if only else list(NETWORKS)
    path = out / "results.csv"
    rows = _read(path)
    missing = [network for network in chosen if rows.get(network.name, {"error": "not yet"})["error"]]
    for network in track(missing, "train", "network"):
        windows = (
            [f"model.options.img_size={size}"] if "maxvit" in network.name else []
        )  # it would pad tiles to what its windows divide
        words = [*SHORT, *windows, f"scale.um_per_px={um_per_px}", f"tiles.size={size}", f"inference.window={size}"]
        rows[network.name] = _train(
            network, data, out, [*words, f"training.samples_per_epoch={_tiles(network, samples)}"], device, keep
        )
        _write(path, rows)
        typer.echo(" ".join(f"{key}={value}" for key, value in rows[network.name].items() if value))
    text = _text(rows, samples, size, um_per_px)
    typer.echo(text)
    if write:
        replace(PAGE, "training", text)
    failed = [network.name for network in chosen if rows[network.name]["error"]]
    if failed:
        raise HubmapError(
            f"{len(failed)} of {len(chosen)} networks did not train ({', '.join(failed)}); {path} says why"
        )


def _tiles(network: Network, samples: int) -> int:
    found = catalog.costs().get(network.name)
    return samples // 2 if found is not None and found.multiply_adds > LARGE else samples


def _train(network: Network, data: Path, out: Path, words: list[str], device: str, keep: bool) -> Row:
    run = out / "runs" / network.name
    shutil.rmtree(run, ignore_errors=True)
    row = dict.fromkeys(COLUMNS, "") | {"name": network.name}
    try:
        train(experiment.load(network.config, words, str(data)), run, [0], device=device, stores=out / "stores")
    except OutOfTime:  # somebody stops it all: SIGTERM
        raise
    except HubmapError as error:
        return row | {"error": str(error)}
    except Exception as error:  # the row of one broken network must not cost those of all others
        return row | {"error": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"}
    rows, timing = read_rows(run / "fold0" / METRICS_FILE), read_timing(run)
    if not keep:
        shutil.rmtree(run)
    seconds = sum(each["seconds"] - each["validation_seconds"] for each in timing) / len(timing)
    peak = max((each.get("peak_memory_gib", 0) for each in timing), default=0)
    losses = {
        "first_loss": rows[0]["train_loss"],
        "last_loss": rows[-1]["train_loss"],
        "val_loss": rows[-1]["val_loss"],
    }
    speeds = {
        "seconds": f"{seconds:.1f}",
        "tiles_per_second": f"{timing[-1]['tiles_per_second']:.3g}",
        "peak_gib": f"{peak:.2f}" if peak else "",
    }
    return row | {key: f"{value:.4f}" for key, value in losses.items()} | speeds


def _read(path: Path) -> dict[str, Row]:
    if not path.is_file():
        return {}
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    if any(set(row) != set(COLUMNS) for row in rows):
        raise ConfigError(f"{path} has other columns than {', '.join(COLUMNS)}; choose another --out")
    return {row["name"]: row for row in rows}


def _write(path: Path, rows: dict[str, Row]) -> None:
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows.values())


def _text(rows: dict[str, Row], samples: int, size: int, um_per_px: float) -> str:
    """The section of docs/models.md: what was run where, and a row for each network in the catalog's order."""
    cells = []
    for network in NETWORKS:
        row = rows.get(network.name)
        if row is not None:
            # Times stay in results.csv: they say as much about what else the machine did as about the network.
            shown = [row[key] for key in COLUMNS[1 : len(HEADER)]]
            cells.append([network.name, *shown] if not row["error"] else [network.name, "did not train", "", ""])
    about = (
        f"`scripts/train_all_models.sh`, {datetime.date.today().isoformat()}: 2 epochs of {samples} tiles of {size} px"
        f" at {um_per_px:g} um/px ({samples // 2} tiles for networks above {LARGE / 1e9:.0f} GMAC), batch 4, one fold"
        " of two, from random weights. It shows that each network trains, not which one is"
        f" better.\n\n{machine()}<br>\n{versions()}\n"
    )
    return f"{about}\n{catalog.markdown(HEADER, cells)}\n"


if __name__ == "__main__":
    try:
        typer.run(main)
    except HubmapError as stop:
        typer.echo(f"error: {stop}", err=True)
        raise SystemExit(1) from stop
