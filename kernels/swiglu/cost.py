"""What one launch of swiglu costs at the sizes of a 7 B model."""

from __future__ import annotations

from wsi_rt.kernels.aot_case import Cost

WIDTH = 11_008
FLOPS_PER_VALUE = 5  # negation, exponential, sum, quotient, product


def cost(tokens: int, dtype_bytes: int) -> Cost:
    """Gate and up read, their product written."""
    values = tokens * WIDTH
    return Cost(flops=float(FLOPS_PER_VALUE * values), bytes=float(dtype_bytes * 3 * values))
