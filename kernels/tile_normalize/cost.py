"""What one launch of tile_normalize costs at the published sizes."""

from __future__ import annotations

from wsi_rt.kernels.aot_case import Cost

VALUES = 3 * 224 * 224  # of one tile after the crop


def cost(tiles: int, dtype_bytes: int) -> Cost:
    """The cropped bytes read, as many values written: one multiply-add each."""
    return Cost(flops=2.0 * tiles * VALUES, bytes=float(tiles * VALUES * (1 + dtype_bytes)))
