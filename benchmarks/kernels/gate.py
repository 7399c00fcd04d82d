"""Who may be timed: an answer is held against the exact one first. Needs torch."""

from __future__ import annotations

import torch
from torch import Tensor

FLOOR = 1e-5
ROUNDINGS = 4  # of inputs, weights, output and one to spare, each half a unit in the last place


def allowed_error(dtype: torch.dtype, scale: float, eager_error: float | None) -> float:
    """What the largest error may be: twice that of eager torch at the same precision, and a floor.

    A wrong eager answer is no yardstick: its error counts up to what rounding values of `scale` can explain.
    """
    explained = ROUNDINGS * torch.finfo(dtype).eps * scale
    return FLOOR + (explained if eager_error is None else min(2 * eager_error, explained))


def largest_error(answer: Tensor, exact: Tensor) -> float:
    """Over all elements, in fp32; infinite where the shape differs or anything is NaN."""
    if answer.shape != exact.shape or answer.isnan().any():
        return float("inf")
    return (answer.float() - exact).abs().max().item()
