"""What `hubmap pretrained pack` does: weights of encoders, each with a card, in a folder for `model.encoder_weights`
and `hubmap push`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hubmap_kit import experiment
from hubmap_kit.config import Triple
from hubmap_kit.errors import ConfigError
from hubmap_kit.models.packing import Given, Packed, check_name, pack_download, pack_file
from hubmap_kit.models.weights_card import UNKNOWN, triple
from hubmap_kit.progress import track


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
