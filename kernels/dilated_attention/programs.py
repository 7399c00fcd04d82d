"""The programs of a launch: which queries share their branches and their keys, worked out on the host.

A table rather than arithmetic on program ids, because the queries of one program must cross no segment boundary of any
branch (5,792 and 185,363 divide by nothing useful), and because it lets the longest programs start first: at 10,000
tiles a program walks between 785 and 8,298 keys, and a long one that starts last leaves the GPU idle.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

FIELDS = 5  # first token of the slide, tokens of the slide, first query within the slide, queries, head
LARGEST = 2**30  # tokens of a launch: positions are int32, and adding a ratio to one must not overflow


def row_step(dilated_ratios: Sequence[int]) -> int:
    """Tokens between two queries of a program: the least multiple of every ratio (the largest, for powers of two).

    Capped at `LARGEST`, beyond any slide: then every query is a program of its own.
    """
    return min(math.lcm(*dilated_ratios), LARGEST)


def branch_table(segment_lengths: Sequence[int], dilated_ratios: Sequence[int]) -> np.ndarray:
    """[branches, 2] int32 (segment length, ratio), both capped at `LARGEST`: beyond any slide they mean the same."""
    pairs = [(min(w, LARGEST), min(r, LARGEST)) for w, r in zip(segment_lengths, dilated_ratios, strict=True)]
    return np.array(pairs, np.int32)


def program_table(
    lengths: Sequence[int], segment_lengths: Sequence[int], dilated_ratios: Sequence[int], heads: int, block_m: int
) -> np.ndarray:
    """[P, FIELDS] int32, every (token, head) of every slide in exactly one program; most keys first.

    lengths: tokens of each slide, all >= 1. What a program computes depends on its own slide alone.
    """
    step = row_step(dilated_ratios)
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    blocks = []
    for start, length in zip(starts, lengths, strict=True):
        first, rows = _blocks(length, segment_lengths, step, block_m)
        blocks.append(np.stack([np.full_like(first, start), np.full_like(first, length), first, rows]))
    block = np.concatenate(blocks, axis=1)  # [4, blocks]
    work = keys(block[1], block[2], segment_lengths, dilated_ratios, heads)  # [heads, blocks]
    # Stable: programs with as many keys stay in order of head, then position, and find each other's keys in the cache.
    order = np.argsort(-work, axis=None, kind="stable")
    head, index = np.divmod(order, block.shape[1])
    return np.ascontiguousarray(np.concatenate([block[:, index], head[None]]).T, dtype=np.int32)


def keys(
    length: np.ndarray, first: np.ndarray, segment_lengths: Sequence[int], dilated_ratios: Sequence[int], heads: int
) -> np.ndarray:
    """Real keys (of all branches) of a query at position `first` of a slide of `length` tokens: [heads, queries]."""
    total = np.zeros((heads, len(first)), np.int64)
    for w, r in zip(segment_lengths, dilated_ratios, strict=True):
        width = np.minimum(w, length)
        segment = first // width * width
        group = (np.arange(heads) // -(-heads // r))[:, None]
        real = -(-(np.minimum(width, length - segment) - group) // r)
        total += np.where((first - segment) % r == group, real, 0)
    return total


def _blocks(length: int, segment_lengths: Sequence[int], step: int, block_m: int) -> tuple[np.ndarray, np.ndarray]:
    """First query and queries of every block of one slide: `step` apart, across no segment boundary of any branch."""
    edges = [np.arange(0, length, min(w, length)) for w in segment_lengths]
    edge = np.unique(np.concatenate([*edges, [length]]))
    size = np.diff(edge)
    (start, size), residue = _spread(np.minimum(step, size), edge[:-1], size)
    rows = -(-(size - residue) // step)
    (start, residue, rows), block = _spread(-(-rows // block_m), start, residue, rows)
    return start + residue + block * block_m * step, np.minimum(block_m, rows - block * block_m)


def _spread(counts: np.ndarray, *columns: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
    """Every column repeated `counts` times, and the number (0, 1, ...) of each repetition."""
    ends = np.cumsum(counts)
    return [np.repeat(c, counts) for c in columns], np.arange(ends[-1]) - np.repeat(ends - counts, counts)
