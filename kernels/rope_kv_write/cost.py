"""What one launch of rope_kv_write costs at the sizes of a 7 B model."""

from __future__ import annotations

from wsi_rt.kernels.aot_case import Cost

HEADS, KV_HEADS, HEAD_WIDTH = 32, 32, 128
FLOPS_PER_VALUE = 3  # two products and a sum


def cost(tokens: int, dtype_bytes: int) -> Cost:
    """q, k and v read; q and the slots of k and v written; angles, a position and a slot a token."""
    rotated = tokens * (HEADS + KV_HEADS) * HEAD_WIDTH
    moved = 2 * (rotated + tokens * KV_HEADS * HEAD_WIDTH)
    angles = tokens * (HEAD_WIDTH * 4 + 2 * 8)
    return Cost(flops=float(FLOPS_PER_VALUE * rotated), bytes=float(dtype_bytes * moved + angles))
