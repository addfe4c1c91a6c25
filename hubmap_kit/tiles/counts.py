"""How many tiles each conversion makes, from the sizes in train.csv alone, beside the counts that the first team
published.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from hubmap_kit.competition.tables import Slide
from hubmap_kit.tiles.convert_config import PRESETS, ConvertConfig
from hubmap_kit.tiles.pictures import plan, tile_corners

# Tiles of the 351 training slides: the first team's report, 2022. (side of the slide or of its canvas, tile, reduce) ->
# tiles.
PUBLISHED: Mapping[tuple[int, int, int], int] = MappingProxyType(
    {
        (3000, 512, 1): 10271,
        (3000, 512, 2): 3115,
        (3000, 768, 1): 5373,
        (3000, 768, 2): 1404,
        (2048, 512, 1): 5599,
        (2048, 512, 2): 1404,
        (2048, 768, 1): 3157,
    }
)
PUBLISHED_SLIDES = 351


@dataclass(frozen=True)
class Row:
    """One conversion: tiles with the edge padded (as many as with shift) and dropped, both unfiltered; published tiles
    if there are any.
    """

    name: str
    side: str
    size: int
    reduce: int
    padded: int
    dropped: int
    published: int | None

    @property
    def filtered(self) -> float | None:
        """The share of the padded tiles that a filter must have dropped to leave the published ones."""
        return None if self.published is None else 1 - self.published / self.padded


def count(slides: Sequence[Slide], config: ConvertConfig) -> int:
    """Tiles (or pictures) of a conversion before any filter, from the sizes that the table states."""
    total = 0
    for slide in slides:
        picture = plan(config, slide.height, slide.width)
        total += len(tile_corners(config, picture.rows, picture.cols))
    return total


def count_table(slides: Sequence[Slide]) -> list[Row]:
    """A row for each tiled preset without a filter; published counts only for the 351 slides that they are of."""
    rows = []
    for name, values in PRESETS.items():
        config = ConvertConfig(**values)
        if not config.tiled or config.min_tissue:
            continue
        key = (config.canvas if config.cropped else 3000, config.size, config.reduce)
        published = PUBLISHED.get(key) if len(slides) == PUBLISHED_SLIDES else None
        padded, dropped = (count(slides, config.model_copy(update={"edge": edge})) for edge in ("pad", "drop"))
        rows.append(
            Row(
                name,
                "canvas 2048" if config.cropped else "slide",
                config.size,
                config.reduce,
                padded,
                dropped,
                published,
            )
        )
    return rows


def count_text(slides: Sequence[Slide], config: ConvertConfig | None = None) -> str:
    """The table as text; `config`, if given, adds the count of one more conversion."""
    lines = [
        f"{'--config':<12} {'of':<11} {'size':>4} {'reduce':>6} {'pad, shift':>10} {'drop':>7} {'published':>9}"
        f" {'filtered':>8}"
    ]
    for row in count_table(slides):
        published = "" if row.published is None else f"{row.published:>9} {row.filtered:>8.2%}"
        line = (
            f"{row.name:<12} {row.side:<11} {row.size:>4} {row.reduce:>6} {row.padded:>10} {row.dropped:>7} {published}"
        )
        lines.append(line.rstrip())
    lines += ["", "pad, shift, drop: tiles by edge policy, before any filter."]
    if len(slides) == PUBLISHED_SLIDES:
        lines.append(
            "published: the first team's report, 2022. filtered: the share of padded tiles that its filter must have"
            " dropped."
        )
        lines.append(
            "With drop there would be fewer tiles than published, so that team's edges were padded or shifted."
        )
    else:
        lines.append(f"Published counts are of the {PUBLISHED_SLIDES} training slides; this table has {len(slides)}.")
    if config is not None:
        filtered = f", before min_tissue {config.min_tissue:g} drops some" if config.min_tissue else ""
        lines.append(
            f"\nthese settings ({config.kind}, size {config.size}, reduce {config.reduce}, edge {config.edge}):"
            f" {count(slides, config)}{filtered}"
        )
    return "\n".join(lines)
