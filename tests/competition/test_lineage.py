"""Families against scipy's connected components, and splits that keep them together."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from hubmap_kit.competition.lineage import DUPLICATE_TISSUE, Families, held_out_by, judged, spread
from hubmap_kit.errors import TableError

IDS = [f"s{number}" for number in range(12)] + ["6730", "32741", "10488", "20563", "14388"]
parents = st.dictionaries(st.sampled_from(IDS), st.sampled_from([*IDS, "", "gone"]), max_size=12)
ORGANS = dict.fromkeys(IDS, "kidney") | {"s1": "lung", "s2": "lung"}


def components(links: dict[str, str]) -> dict[str, int]:
    names = [*IDS, "gone", *(slide for group in DUPLICATE_TISSUE for slide in group if slide not in IDS)]
    place = {name: number for number, name in enumerate(names)}
    pairs = [(place[one], place[other]) for one, other in links.items() if other]
    pairs += [(place[group[0]], place[other]) for group in DUPLICATE_TISSUE for other in group]
    rows, cols = zip(*pairs, strict=True)
    _, labels = connected_components(
        coo_matrix((np.ones(len(rows)), (rows, cols)), (len(names), len(names))), directed=False
    )
    return dict(zip(names, labels.tolist(), strict=True))


@given(parents)
def test_families_are_the_components_of_parents_and_known_duplicates(links: dict[str, str]) -> None:
    families, expected = Families(links), components(links)
    for one in IDS:
        for other in IDS:
            assert (families.of(one) == families.of(other)) == (expected[one] == expected[other])


@given(parents, parents)
def test_all_links_of_several_tables_count(one: dict[str, str], other: dict[str, str]) -> None:
    both, chained = (
        Families(one, other),
        Families(
            {**one, **{f"other {slide}": parent for slide, parent in other.items()}},
            {f"other {slide}": slide for slide in other},
        ),
    )
    groups = [[[a for a in IDS if families.of(a) == families.of(b)] for b in IDS] for families in (both, chained)]
    assert groups[0] == groups[1]


@given(parents, st.integers(2, 3), st.dictionaries(st.sampled_from(IDS), st.integers(0, 1), max_size=4))
@settings(max_examples=200)
def test_a_split_keeps_families_together_and_known_folds(
    links: dict[str, str], n_folds: int, known: dict[str, int]
) -> None:
    label = components(links)
    torn = any(label[one] == label[other] and known[one] != known[other] for one in known for other in known)
    try:
        folds = spread(ORGANS, links, known, n_folds)
    except TableError as error:
        assert torn or "stays empty" in str(error)
        return
    assert not torn and list(folds) == IDS and set(folds.values()) == set(range(n_folds))
    assert all(folds[one] == folds[other] for one in IDS for other in IDS if label[one] == label[other])
    assert {slide: folds[slide] for slide in known} == known
    assert spread(dict(reversed(ORGANS.items())), dict(reversed(links.items())), known, n_folds) == folds, (
        "the order of the rows decides nothing"
    )


def test_a_split_spreads_each_organ() -> None:
    organs = {f"{organ}{number}": organ for organ in ("kidney", "lung", "spleen") for number in range(10)}
    count = Counter((organs[slide], fold) for slide, fold in spread(organs, {}, {}, 5).items())
    assert set(count.values()) == {2} and len(count) == 15


def test_only_the_fold_that_held_a_tissue_out_may_speak() -> None:
    folds = {"a": 0, "b": 1, "6730": 1}
    families = Families({"crop": "a", "crop of crop": "crop", "sister": "mother", "b": "mother"})
    for slide, fold in {
        "a": 0,
        "crop": 0,
        "crop of crop": 0,
        "sister": 1,
        "mother": 1,
        "32741": 1,
        "stranger": None,
    }.items():
        assert held_out_by(slide, families, families.folds(folds)) == fold, slide
    torn = Families({"b": "a"})
    with pytest.raises(TableError, match=r"folds 0, 1, so every fold has learnt"):
        held_out_by("a", torn, torn.folds(folds))


def test_folds_that_do_not_fit_are_refused() -> None:
    with pytest.raises(TableError, match="slide a belongs to fold 4, but there are 2 folds from 0"):
        spread({"a": "lung", "b": "lung"}, {}, {"a": 4}, 2)
    with pytest.raises(TableError, match="fold 2 of 3 stays empty with 2 slides"):
        spread({"a": "lung", "b": "lung"}, {}, {}, 3)


@given(parents)
def test_each_line_of_a_table_is_judged_by_its_first_slide_only(links: dict[str, str]) -> None:
    table = dict.fromkeys(IDS, "") | links
    found = judged(table)
    assert found == judged(dict(reversed(table.items())))
    for slide in IDS:
        line = [slide]
        while (above := table[line[-1]]) in table and above not in line:
            line.append(above)
        circle = above in table and above != line[-1]
        if not circle:
            assert line[-1] in found and not found & set(line[:-1])
        else:
            assert len(found & set(line)) == 1
