"""Numbers to text and back against int() and str(), at the lengths where the way changes."""

from __future__ import annotations

from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hubmap_kit.competition import rle, rle_overlap, rle_text

AROUND = [0, 1, 9, 10, 99, 100, 9_999, 10_000, 99_999, 999_999, 1_000_000, 99_999_999, 100_000_000, 2**31 - 1, 2**40]
NUMBERS = st.one_of(st.sampled_from(AROUND), st.integers(0, 99_999_999), st.integers(0, 9_999))
no_deadline = settings(deadline=None, max_examples=200)


@no_deadline
@given(
    pairs=st.lists(st.tuples(NUMBERS, NUMBERS), max_size=30),
    size=st.sampled_from([np.int32, np.int64]),
    runs=st.sampled_from([3, 2**14]),
)
def test_writing_is_joining_the_numerals(pairs: list[tuple[int, int]], size: type, runs: int) -> None:
    pairs = [pair for pair in pairs if max(pair) < 2**31] if size is np.int32 else pairs
    numbers = np.array(pairs, size).reshape(-1, 2)
    with mock.patch.object(rle_text, "_RUNS", runs):
        assert rle_text.write(numbers[:, 0], numbers[:, 1]) == " ".join(f"{start} {length}" for start, length in pairs)


@pytest.mark.parametrize("limit", [10_000, 1_000_000, 100_000_000])
def test_writing_around_the_table_sizes(limit: int) -> None:
    numbers = np.arange(limit - 20, limit + 20)
    lengths = numbers.clip(max=999_999)
    for some in (slice(None, 20), slice(20, None), slice(None)):
        words = [str(word) for pair in zip(numbers[some], lengths[some], strict=True) for word in pair]
        assert rle_text.write(numbers[some], lengths[some]).split(" ") == words


def test_a_negative_number_is_written_as_it_is() -> None:
    runs = rle.Runs(np.array([2, 8]), np.array([1, 4]))
    assert rle.format_runs(runs, origin=-5) == "-3 1 3 4"


@no_deadline
@given(
    numbers=st.lists(NUMBERS, max_size=40),
    zeros=st.integers(0, 3),
    characters=st.sampled_from([16, 40, 2**17]),
    blanks=st.one_of(
        st.just([" "]), st.lists(st.sampled_from([" ", " ", "  ", "\n", "\t", "\r\n"]), min_size=1, max_size=5)
    ),
)
def test_reading_is_int_of_every_word(numbers: list[int], zeros: int, characters: int, blanks: list[str]) -> None:
    text = "".join("0" * zeros + str(number) + blanks[place % len(blanks)] for place, number in enumerate(numbers))
    for variant in (text, text.strip(), f" {text}\n"):
        with mock.patch.object(rle_text, "_CHARACTERS", characters):
            values = rle_text.read(variant)
        assert values.dtype == np.int64 and values.tolist() == numbers


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
    with (
        mock.patch.object(rle_text, "_CHARACTERS", 64),
        pytest.raises(rle.RleError, match="whole numbers of 0 or more"),
    ):
        rle_text.read(broken)


@no_deadline
@given(
    edges=st.lists(st.lists(st.integers(0, 400), unique=True, max_size=30).map(sorted), min_size=2, max_size=2),
    shift=st.sampled_from([0, 2**31, 2**52 - 500]),
    block=st.sampled_from([1, 3, 4096]),
)
def test_dice_of_any_runs_is_dice_of_sets(edges: list[list[int]], shift: int, block: int) -> None:
    sets, runs = [], []
    for each in edges:
        pairs = list(zip(each[0::2], each[1::2], strict=False))
        sets.append({pixel for start, stop in pairs for pixel in range(start, stop)})
        runs.append(" ".join(f"{start + shift} {stop - start}" for start, stop in pairs))
    total = len(sets[0]) + len(sets[1])
    with mock.patch.object(rle_overlap, "_RUNS", block):
        found = rle.dice(*runs)
    assert found == (2 * len(sets[0] & sets[1]) / total if total else 1.0)
