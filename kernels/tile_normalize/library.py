"""`wsi_rt::tile_normalize` for torch.library: plain torch on the CPU, the Triton kernel on CUDA, shapes for tracing."""

from __future__ import annotations

import torch
from torch import Tensor

from wsi_rt.kernels.tile_normalize.reference import tile_normalize_reference


@torch.library.custom_op("wsi_rt::tile_normalize", mutates_args=(), device_types="cpu")
def tile_normalize_op(tiles: Tensor, mean: list[float], std: list[float], crop: int, dtype: torch.dtype) -> Tensor:
    """Arguments checked by the public function."""
    return tile_normalize_reference(tiles, mean, std, crop).to(dtype)


@tile_normalize_op.register_kernel("cuda")
def _cuda(tiles: Tensor, mean: list[float], std: list[float], crop: int, dtype: torch.dtype) -> Tensor:
    from wsi_rt.kernels.tile_normalize.triton import tile_normalize_triton

    return tile_normalize_triton(tiles, mean, std, crop, dtype)


@tile_normalize_op.register_fake
def _fake(tiles: Tensor, mean: list[float], std: list[float], crop: int, dtype: torch.dtype) -> Tensor:
    return tiles.new_empty((tiles.shape[0], 3, crop, crop), dtype=dtype)
