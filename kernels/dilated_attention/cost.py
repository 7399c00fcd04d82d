"""What one layer's dilated attention costs at the published sizes."""

from __future__ import annotations

from collections.abc import Sequence

from wsi_rt.kernels.aot_case import Cost

SEGMENT_LENGTHS = (1024, 5792, 32768, 185363, 1048576)
DILATED_RATIOS = (1, 2, 4, 8, 16)
HEADS, HEAD_WIDTH = 16, 48


def cost(
    tiles: int,
    dtype_bytes: int,
    heads: int = HEADS,
    head_width: int = HEAD_WIDTH,
    segment_lengths: Sequence[int] = SEGMENT_LENGTHS,
    dilated_ratios: Sequence[int] = DILATED_RATIOS,
) -> Cost:
    """One slide of tiles + 1 tokens: 4 D operations a (query, key) pair of a branch; q, k, v read and out written once.

    Zero-padded keys cost nothing, and exponentials are not counted.
    """
    tokens = tiles + 1
    pairs = 0
    for w, r in zip(segment_lengths, dilated_ratios, strict=True):
        whole, rest = divmod(tokens, min(w, tokens))
        pairs += whole * _pairs(min(w, tokens), r, heads) + _pairs(rest, r, heads)
    return Cost(flops=4.0 * head_width * pairs, bytes=4.0 * tokens * heads * head_width * dtype_bytes)


def _pairs(length: int, ratio: int, heads: int) -> int:
    """(query, key) pairs of one segment, over all heads: each head keeps every `ratio`-th position."""
    groups = (head // -(-heads // ratio) for head in range(heads))
    return sum(max(0, -(-(length - group) // ratio)) ** 2 for group in groups)
