"""What one launch of add_rms_norm costs at the sizes of a 7 B model, which has two a layer."""

from __future__ import annotations

from wsi_rt.kernels.aot_case import Cost

CHANNELS = 4096
FLOPS_PER_VALUE = 5  # sum, square and its sum, two products


def cost(tokens: int, dtype_bytes: int) -> Cost:
    """x and the residual read, the normed rows and the sum written; the weight once."""
    values = tokens * CHANNELS
    return Cost(flops=float(FLOPS_PER_VALUE * values), bytes=float(dtype_bytes * (4 * values + CHANNELS)))
