"""The table of programs: every (token, head) once, in programs that share branches and keys, longest first."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wsi_rt.kernels.dilated_attention.cost import DILATED_RATIOS, HEADS, SEGMENT_LENGTHS, cost
from wsi_rt.kernels.dilated_attention.programs import LARGEST, branch_table, keys, program_table, row_step


def kept_keys(position: int, length: int, w: int, r: int, head: int, heads: int) -> tuple[int, ...]:
    """Positions of the real keys that one branch gives to a query, by SPEC 3 step by step; empty: not kept."""
    w = min(w, length)
    segment = range(position // w * w, min(position // w * w + w, length))
    group = head // math.ceil(heads / r)
    mine = [p for p in segment if (p - segment.start) % r == group]
    return tuple(mine) if position in mine else ()


branch = st.tuples(st.integers(1, 70), st.sampled_from([1, 2, 3, 4, 6, 8]))


@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=3),
    branches=st.lists(branch, min_size=1, max_size=3),
    heads=st.integers(1, 5),
    block_m=st.sampled_from([4, 16]),
)
@settings(max_examples=40, deadline=None)
def test_programs_partition_the_launch_and_share_their_keys(lengths, branches, heads, block_m):
    widths, ratios = zip(*branches, strict=True)
    table = program_table(lengths, widths, ratios, heads, block_m)
    starts = np.cumsum([0, *lengths])
    assert table.dtype == np.int32
    seen, work = [], []
    for start, length, first, rows, head in table.tolist():
        assert (start, length) in zip(starts.tolist(), lengths, strict=False)
        assert 1 <= rows <= block_m
        queries = [first + i * row_step(ratios) for i in range(rows)]
        assert queries[-1] < length
        shared = {tuple(kept_keys(p, length, w, r, head, heads) for w, r in branches) for p in queries}
        assert len(shared) == 1
        work.append(sum(map(len, *shared)))
        seen += [(start + p, head) for p in queries]
    assert sorted(seen) == [(t, h) for t in range(sum(lengths)) for h in range(heads)]
    assert work == sorted(work, reverse=True)


def test_a_slide_has_the_programs_it_has_alone():
    together = program_table([70, 90], [32, 50], [1, 4], 3, 16)
    for start, length in ((0, 70), (70, 90)):
        mine = together[together[:, 0] == start].copy()
        mine[:, 0] = 0
        assert np.array_equal(mine, program_table([length], [32, 50], [1, 4], 3, 16))


def test_a_million_tokens_at_the_published_sizes():
    length = 2**20 + 1
    table = program_table([length], SEGMENT_LENGTHS, DILATED_RATIOS, HEADS, 64)
    assert table[:, 3].sum() == length * HEADS
    full = length * HEADS / (64 * len(table))
    assert (
        full > 0.84
    )  # of the rows of all programs; segments of 1,024 cut at multiples of 5,792 and 185,363 leave rest


def test_numbers_beyond_any_slide_are_capped():
    assert row_step([1, 2, 4, 8, 16]) == 16
    assert row_step([4, 6]) == 12
    assert row_step([2**30 - 1, 2**29 - 3]) == LARGEST
    assert branch_table([2**40, 5], [3, 2**35]).tolist() == [[LARGEST, 3], [5, LARGEST]]
    table = program_table([10], [2**40], [2**35], 2, 64)
    assert (len(table), table[:, 3].max()) == (20, 1)


@pytest.mark.parametrize("tiles", [0, 100, 1023, 5000, 40_000])
def test_cost_counts_the_keys_of_every_query(tiles):
    positions = np.arange(tiles + 1)
    pairs = keys(np.full(tiles + 1, tiles + 1), positions, SEGMENT_LENGTHS, DILATED_RATIOS, HEADS).sum()
    assert cost(tiles, 2).flops == 4 * 48 * pairs
    assert cost(tiles, 2).bytes == 4 * (tiles + 1) * 768 * 2
