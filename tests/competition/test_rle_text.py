"""Numbers to text and back against int() and str()."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hubmap_kit.competition import rle

AROUND = [0, 1, 9, 10, 99, 100, 9_999, 10_000, 99_999, 999_999, 1_000_000, 99_999_999, 100_000_000, 2**31 - 1, 2**40]
NUMBERS = st.one_of(st.sampled_from(AROUND), st.integers(0, 99_999_999), st.integers(0, 9_999))
no_deadline = settings(deadline=None, max_examples=200)


@no_deadline
@given(pairs=st.lists(st.tuples(NUMBERS, NUMBERS), max_size=30))
def test_writing_is_joining_the_numerals(pairs: list[tuple[int, int]]) -> None:
    numbers = np.array(pairs, np.int64).reshape(-1, 2)
    text = rle.format_runs(rle.Runs(numbers[:, 0], numbers[:, 1]))
    assert text == " ".join(f"{start} {length}" for start, length in pairs)


def test_a_negative_number_is_written_as_it_is() -> None:
    runs = rle.Runs(np.array([2, 8]), np.array([1, 4]))
    assert rle.format_runs(runs, origin=-5) == "-3 1 3 4"


@no_deadline
@given(
    edges=st.lists(NUMBERS, unique=True, max_size=40).map(sorted),
    zeros=st.integers(0, 3),
    blanks=st.one_of(
        st.just([" "]), st.lists(st.sampled_from([" ", " ", "  ", "\n", "\t", "\r\n"]), min_size=1, max_size=5)
    ),
)
def test_reading_is_int_of_every_word(edges: list[int], zeros: int, blanks: list[str]) -> None:
    runs = [(start, stop - start) for start, stop in zip(edges[0::2], edges[1::2], strict=False)]
    numbers = [number for run in runs for number in run]
    text = "".join("0" * zeros + str(number) + blanks[place % len(blanks)] for place, number in enumerate(numbers))
    for variant in (text, text.strip(), f" {text}\n"):
        found = rle.parse(variant)
        assert found.starts.dtype == found.lengths.dtype == np.int64
        assert list(zip(found.starts.tolist(), found.lengths.tolist(), strict=True)) == runs


@no_deadline
@given(
    count=st.integers(3, 60),
    place=st.integers(0, 10**6),
    odd=st.sampled_from(["/", ":", "-", "+", ".", "x", "\0", "\x1c", "\x85", "é", "٣"]),
)
def test_one_wrong_character_anywhere_is_refused(count: int, place: int, odd: str) -> None:
    text = " ".join(str(10**7 + number) for number in range(count))
    place %= len(text)
    broken = text[:place] + odd + text[place + 1 :]
    if odd in "\x1c\x85" and broken.strip() != broken:
        return  # blanks of other scripts are dropped at both ends
    with pytest.raises(rle.RleError, match="whole numbers of 0 or more"):
        rle.parse(broken)


@no_deadline
@given(
    edges=st.lists(st.lists(st.integers(0, 400), unique=True, max_size=30).map(sorted), min_size=2, max_size=2),
    shift=st.sampled_from([0, 2**31, 2**52 - 500]),
)
def test_dice_of_any_runs_is_dice_of_sets(edges: list[list[int]], shift: int) -> None:
    sets, runs = [], []
    for each in edges:
        pairs = list(zip(each[0::2], each[1::2], strict=False))
        sets.append({pixel for start, stop in pairs for pixel in range(start, stop)})
        runs.append(" ".join(f"{start + shift} {stop - start}" for start, stop in pairs))
    total = len(sets[0]) + len(sets[1])
    assert rle.dice(*runs) == (2 * len(sets[0] & sets[1]) / total if total else 1.0)
