"""What `hubmap models` prints: the table of all networks, or one of them in detail."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hubmap_kit import experiment
from hubmap_kit.config import ModelConfig, Triple
from hubmap_kit.errors import ConfigError
from hubmap_kit.models import catalog
from hubmap_kit.models.catalog import ESTIMATE, HEADER, NETWORKS, Cost, Network
from hubmap_kit.models.packing import Given, Packed, check_name, pack_download, pack_file
from hubmap_kit.models.pretrained import UNKNOWN, triple
from hubmap_kit.progress import track

LEGEND = (
    "GFLOP: one 512 x 512 tile, forward; GMAC, multiply-adds, is half of that. MiB: what training keeps of one tile"
    f" between forward and backward.\nbatch: {ESTIMATE} of the largest batch of such tiles on one 16 GB card (T4, P100)"
    " with AdamW and averaged weights; no GPU has run it."
)


def models_table(families: Sequence[str] = (), wide: bool = False) -> str:
    """The catalog as text, of some families if given; `wide` adds columns that 120 characters have no room for.

    Raises ConfigError.
    """
    from hubmap_kit.report.tables import text_table

    chosen = _chosen(families)
    costs = catalog.costs()
    columns = (
        range(len(HEADER))
        if wide
        else [HEADER.index(name) for name in HEADER if name not in ("was", "GMAC", "fp32 MiB", "fp16 MiB")]
    )
    rows = [catalog.table_row(network, costs.get(network.name)) for network in chosen]
    table = text_table([HEADER[column] for column in columns], [[row[column] for column in columns] for row in rows])
    return f"{table}\n\n{LEGEND}\nnext: hubmap models NAME, hubmap train --config net-NAME"


def model_details(name: str) -> str:
    """One network in lines: a name of the catalog, or a shipped experiment or file, whose network is counted now.

    Raises ConfigError.
    """
    try:
        known = catalog.find(name)
    except ConfigError as unknown:
        network, model = None, _other(name, unknown)
    else:
        network, model = known, known.settings().model
    found = catalog.costs().get(network.name) if network else None
    return "\n".join(_lines(name, network, model, found or catalog.cost(model)))


def _chosen(families: Sequence[str]) -> list[Network]:
    known = {network.family.lower() for network in NETWORKS}
    for family in families:
        if family.lower() not in known:
            raise ConfigError(
                f"no network of the catalog is of the family '{family}'; there are {', '.join(sorted(known))}"
            )
    wanted = {family.lower() for family in families} or known
    return [network for network in NETWORKS if network.family.lower() in wanted]


def _other(name: str, unknown: ConfigError) -> ModelConfig:
    if name in experiment.shipped() or Path(name).is_file():
        return experiment.load(name).model
    raise unknown


def _lines(name: str, network: Network | None, model: ModelConfig, found: Cost) -> list[str]:
    options = ", ".join(f"{key}: {value}" for key, value in model.options.items()) or "none"
    auxiliary = ", ".join(f"{key} (weight {value:g})" for key, value in model.auxiliary.items()) or "none"
    whose = (
        [("family", network.family), ("used by", f"{network.whose}: {network.theirs}"), ("experiment", network.config)]
        if network
        else []
    )
    facts = [
        *whose,
        ("arch", model.arch),
        ("encoder", model.encoder),
        ("options", options),
        ("only in training", auxiliary),
        ("input", f"mean {_triple(model.mean)}, std {_triple(model.std)} of RGB in 0..1"),
        (
            "weights",
            (
                f"{found.parameters:,}, of which {found.encoder_parameters:,} in the encoder"
                f" ({found.parameters * 4 / 2**20:.0f} MiB in float32)"
            ),
        ),
        (
            "forward at 512",
            f"{found.multiply_adds / 1e9:.1f} G multiply-adds = {2 * found.multiply_adds / 1e9:.1f} GFLOP a tile",
        ),
        ("kept for backward", f"{found.saved_fp32_mib} MiB a tile in fp32, {found.saved_fp16_mib} MiB in fp16"),
        (
            "batch on 16 GB",
            f"{_fits(found.batch_fp32)} in fp32, {_fits(found.batch_fp16)} in fp16 ({ESTIMATE}; no GPU has run it)",
        ),
    ]
    width = max(len(key) for key, _ in facts)
    return [name, *(f"  {key.ljust(width)}  {value}" for key, value in facts)]


def _fits(batch: int) -> str:
    return str(batch) if batch else "none"


def _triple(values: Sequence[float]) -> str:
    return "/".join(f"{value:g}" for value in values)


# What `hubmap pretrained pack` does: weights of encoders, each with a card, in a folder for `model.encoder_weights` and
# `hubmap push`.


def pack(
    names: Sequence[str],
    out: Path,
    file: Path | None = None,
    mean: str = "",
    std: str = "",
    licence: str = "",
    source: str = "",
) -> list[Packed]:
    """Pack the encoders `names` (or those of shipped experiments) into `out`: downloaded, or one of them out of a local
    `file`.

    A local file needs `mean` and `std` as three numbers between commas, because it does not say them. Raises
    ConfigError and WeightsError.
    """
    encoders = list(dict.fromkeys(_encoder(name) for name in names))
    if not encoders:
        raise ConfigError(
            "no encoder was named to pack; give one, such as tu-efficientnet_b1, or an experiment, such as net-unet-b1"
        )
    if file is None:
        given = next(
            (
                option
                for option, text in {"--mean": mean, "--std": std, "--licence": licence, "--source": source}.items()
                if text
            ),
            None,
        )
        if given:
            raise ConfigError(f"{given} goes with --from FILE; what is downloaded brings its own")
        return [pack_download(encoder, out) for encoder in track(encoders, "pack", "encoder")]
    if len(encoders) > 1:
        raise ConfigError(
            f"--from {file} is one file, but {len(encoders)} encoders were named ({', '.join(encoders)}); pack them one"
            " by one"
        )
    return [
        pack_file(
            encoders[0], file, Given(_numbers("--mean", mean), _numbers("--std", std), source, licence or UNKNOWN), out
        )
    ]


def packed_lines(found: Sequence[Packed]) -> str:
    """What was packed, and what to write into an experiment."""
    lines = []
    for each in found:
        card = each.card
        lines.append(
            f"{each.weights}: {each.tensors} tensors, {each.weights.stat().st_size / 2**20:.1f} MiB, from"
            f" {card.source}, licence {card.licence}"
        )
        words = [
            f"--set model.{key}=[{','.join(f'{value:g}' for value in values)}]"
            for key, values in (("mean", card.mean), ("std", card.std))
        ]
        lines.append(
            f"  --set model.encoder={card.encoder} --set model.encoder_weights={each.weights} {' '.join(words)}"
        )
    return "\n".join(lines)


def _encoder(name: str) -> str:
    if name in experiment.shipped():
        return experiment.load(name).model.encoder
    check_name(name)
    return name


def _numbers(option: str, text: str) -> Triple:
    try:
        return triple([float(part) for part in text.split(",")] if text else [])
    except ValueError as error:
        found = f"is '{text}'" if text else "is missing"
        raise ConfigError(
            f"{option} {found}; a file does not say what its network learnt from, so give three numbers in 0..1, such"
            " as 0.485,0.456,0.406"
        ) from error
