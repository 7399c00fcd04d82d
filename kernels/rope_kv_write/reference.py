"""Rotary positions and the write to a paged cache in plain torch, fp32 arithmetic (SPEC 5)."""

from __future__ import annotations

import torch
from torch import Tensor


def rotated_reference(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor) -> Tensor:
    """x [T, H, D]; cos, sin [context, D / 2]; positions [T] -> [T, H, D] fp32."""
    a, b = x.float().chunk(2, dim=-1)
    cos, sin = cos[positions, None], sin[positions, None]  # [T, 1, D / 2]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def write_reference(x: Tensor, slots: Tensor, cache: Tensor) -> None:
    """x [T, Hkv, D] into cache [pages, page, Hkv, D] at the flat slots [T]; slot -1: nothing. In place."""
    real = slots >= 0
    page = cache.shape[1]
    cache[slots[real] // page, slots[real] % page] = x[real].to(cache.dtype)
