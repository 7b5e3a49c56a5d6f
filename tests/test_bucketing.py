"""Batches hold every input once, none above the budget but those that are alone above it."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from compiler.bucketing import batches


@given(st.lists(st.integers(1, 600), max_size=60), st.integers(1, 2000))
def test_every_input_once_within_the_budget(sizes: list[int], budget: int) -> None:
    found = batches(sizes, budget)
    assert sorted(place for batch in found for place in batch) == list(range(len(sizes)))
    for batch in found:
        assert len(batch) == 1 or len(batch) * max(sizes[place] for place in batch) <= budget
    longest = [max(sizes[place] for place in batch) for batch in found]
    assert longest == sorted(longest, reverse=True)


def test_similar_lengths_share_a_batch() -> None:
    assert batches([5, 100, 6, 98], 200) == [[1, 3], [2, 0]]
