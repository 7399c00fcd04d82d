"""What one launch of slide_embed costs at the published sizes."""

from __future__ import annotations

from wsi_rt.kernels.aot_case import Cost

CHANNELS = 768
FLOPS_PER_VALUE = 24  # two polynomials of 5 multiply-adds, scale, square, bias and position


def cost(tiles: int, dtype_bytes: int) -> Cost:
    """The projection read, the sequence with its CLS row written, two int64 a tile; bias, CLS and steps once."""
    values = tiles * CHANNELS + (tiles + 1) * CHANNELS + 2 * CHANNELS
    return Cost(
        flops=float(FLOPS_PER_VALUE * tiles * CHANNELS), bytes=float(dtype_bytes * values + 16 * tiles + 2 * CHANNELS)
    )
