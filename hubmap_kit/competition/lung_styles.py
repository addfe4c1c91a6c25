"""Lung slides whose masks cut the alveoli in another way than the rest, and what can be done about them.

The organisers called both ways right. Winners of the competition dropped such slides, gave them less weight, or
labelled them anew with their models; where two lists differ, nobody has said which one is right.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType

from hubmap_kit.errors import TableError

# Left out of training, and labelled anew by their models, by the 3rd place (its write-up).
THIRD_PLACE = frozenset(
    (
        "12476",
        "127",
        "13189",
        "15124",
        "16564",
        "23252",
        "25516",
        "25945",
        "29610",
        "30084",
        "30500",
        "31139",
        "31571",
        "7359",
        "8151",
    )
)
# The "type 2" of the 26th place (its write-up), which trained its separate lung model on the others only.
TYPE_TWO = THIRD_PLACE - {"25516", "30084"}
LISTS = MappingProxyType({"third-place": THIRD_PLACE, "type-two": TYPE_TWO})
Rows = Sequence[Mapping[str, str]]


def odd(rows: Rows, ids: Collection[str] = THIRD_PLACE) -> list[str]:
    """The ids among `ids` of a train table's lung slides, in the table's order; descendants (column parent) count with
    their parents.
    """
    return [row["id"] for row in rows if row["organ"] == "lung" and (row["id"] in ids or row.get("parent", "") in ids)]


def dropped(rows: Rows, ids: Collection[str] = THIRD_PLACE) -> list[dict[str, str]]:
    """The rows of a train table without its odd lung slides."""
    gone = set(odd(rows, ids))
    return [dict(row) for row in rows if row["id"] not in gone]


def weighted(rows: Rows, weight: float, ids: Collection[str] = THIRD_PLACE) -> list[dict[str, str]]:
    """The rows of a train table with the column `weight` (0..1): odd lung slides have theirs multiplied by `weight`,
    others keep it.

    Slides without a weight had 1. Raises TableError for a weight, given or found, that is no number from 0 to 1.
    """
    changed = set(odd(rows, ids))
    factor = _share(weight, "the weight of odd lung slides")
    found = {row["id"]: _share(row.get("weight", "") or 1, f"the weight of slide {row['id']}") for row in rows}
    return [{**row, "weight": f"{found[row['id']] * (factor if row['id'] in changed else 1):g}"} for row in rows]


def _share(value: float | str, name: str) -> float:
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not 0 <= number <= 1:
        raise TableError(f"{name} is {value!r}, but a number from 0 to 1 was expected; mend it")
    return number
