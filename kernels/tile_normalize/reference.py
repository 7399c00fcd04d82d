"""Crop and normalisation of tiles in plain fp32 torch (SPEC 1, "Preprocess")."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from wsi_rt.kernels.tile_normalize import is_hwc


def tile_normalize_reference(tiles: Tensor, mean: Sequence[float], std: Sequence[float], crop: int) -> Tensor:
    """tiles uint8 [B, S, S, 3] or [B, 3, S, S] -> crop, /255, (x - mean) / std -> [B, 3, crop, crop] fp32."""
    if is_hwc(tuple(tiles.shape)):
        tiles = tiles.permute(0, 3, 1, 2)
    at = (tiles.shape[2] - crop) // 2
    x = tiles[:, :, at : at + crop, at : at + crop].float() / 255.0
    m, s = (torch.tensor(v, dtype=torch.float32, device=tiles.device).reshape(1, 3, 1, 1) for v in (mean, std))
    return ((x - m) / s).contiguous()
