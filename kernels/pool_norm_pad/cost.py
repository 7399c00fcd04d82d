"""What one launch of pool_norm_pad costs at the published sizes."""

from __future__ import annotations

from wsi_rt.kernels.aot_case import Cost

CHANNELS, POOLED, PADDED = 768, 576, 1024


def cost(tiles: int, dtype_bytes: int) -> Cost:
    """Every token read once, 576 rows of 1,024 written: one add a value, then about 8 operations a pooled value."""
    read, written = tiles * CHANNELS + 2 * CHANNELS, POOLED * PADDED
    return Cost(flops=tiles * CHANNELS + 8.0 * POOLED * CHANNELS, bytes=float(dtype_bytes * (read + written)))
