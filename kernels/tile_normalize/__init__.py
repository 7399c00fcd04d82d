"""Decoded tiles -> the tile encoder's input: centre crop, /255, (x - mean) / std, channels first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from wsi_rt.kernels.checks import check_finite, check_floats, check_one_device
from wsi_rt.kernels.errors import KernelInputError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

OP = "tile_normalize"


def tile_normalize(
    tiles: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    crop: int = 224,
    *,
    resize: int = 256,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """tiles uint8 RGB [B >= 1, S, S, 3] or [B, 3, S, S], contiguous -> [B, 3, crop, crop] as `dtype` (default fp32).

    S is `resize` (what the published transform resizes to: a no-op for 256 px tiles), cropped at floor((S - crop) / 2),
    or `crop` (cropped before). mean and std: three numbers each, in units of 0 ... 1. Computed in fp32; dtype is fp16,
    bf16 or fp32.

    CUDA tensors run the Triton kernel (sm_80 or newer), CPU tensors plain torch. Traces and exports as
    `torch.ops.wsi_rt.tile_normalize` (importing `library` registers it).
    Raises KernelInputError on anything else: this operator does not resample. Source: SPEC 1.
    """
    import torch

    from wsi_rt.kernels.tile_normalize.library import tile_normalize_op

    if tiles.dtype != torch.uint8:
        raise KernelInputError(f"{OP}: tiles are {tiles.dtype}, expected torch.uint8")
    side = tile_side(tuple(tiles.shape))
    if crop < 1 or side not in {crop, resize} or side < crop:
        raise KernelInputError(
            f"{OP}: tiles are {side} px, expected {resize} px (resized before: this operator does not resample) "
            f"or {crop} px (cropped before)"
        )
    if not tiles.is_contiguous():
        raise KernelInputError(f"{OP}: tiles have strides {tuple(tiles.stride())}, expected contiguous memory")
    check_one_device(OP, {"tiles": tiles})
    check_finite(OP, {"mean": mean, "std": std})
    if len(mean) != 3 or len(std) != 3 or not all(s > 0 for s in std):
        raise KernelInputError(
            f"{OP}: mean {list(mean)}, std {list(std)}, expected three numbers each, every std above 0"
        )
    dtype = torch.float32 if dtype is None else dtype
    check_floats(OP, {}, dtype)
    return tile_normalize_op(tiles, list(map(float, mean)), list(map(float, std)), crop, dtype)


def tile_side(shape: tuple[int, ...]) -> int:
    """S of [B, S, S, 3] or [B, 3, S, S]; raises KernelInputError on any other shape, and on S = 3, which is both."""
    if len(shape) == 4 and shape[0] >= 1 and (is_hwc(shape) != (shape[1] == 3 and shape[2] == shape[3])):
        return shape[2]
    raise KernelInputError(f"{OP}: tiles are {list(shape)}, expected [B >= 1, S, S, 3] or [B >= 1, 3, S, S]")


def is_hwc(shape: tuple[int, ...]) -> bool:
    """Whether a shape of four is [B, S, S, 3]."""
    return shape[3] == 3 and shape[1] == shape[2]
