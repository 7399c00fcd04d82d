"""Epilogue of the patch projection: bias, closed-form sin-cos position, CLS row."""

from __future__ import annotations

from typing import TYPE_CHECKING

from wsi_rt.kernels.checks import check_cu_seqlens, check_floats, check_one_device
from wsi_rt.kernels.errors import KernelInputError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

OP = "slide_embed"
GRID = 1000  # rows and columns that the published position index can tell apart


def slide_embed(
    projected: Tensor,
    positions: Tensor,
    bias: Tensor,
    cls_token: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """projected [N >= 1, C] (rows may be strided), positions [N, 2] int (col, row), bias [C], cls_token [C] ->
    [N + 1, C], the CLS row first.

    fp16, bf16 or fp32 in, computed in fp32, returned as `dtype` (default: that of `projected`). C is a multiple of 4.

    Several slides in one launch: `cu_seqlens` [S + 1] int32 or int64, rising from 0 to N by the tiles of each, gives
    [N + S, C]: slide s begins at row cu_seqlens[s] + s with its own CLS. It may stay on the CPU,
    but for CUDA graph capture, which wants it on the GPU and leaves its values unchecked.

    CUDA tensors run the Triton kernel (sm_80 or newer), CPU tensors plain torch. Traces and exports as
    `torch.ops.wsi_rt.slide_embed` (importing `library` registers it).
    Raises KernelInputError on shapes, strides, dtypes, devices and lengths that do not fit, and on a position off the
    1000 x 1000 grid, beyond which the published index aliases. Reading positions on a GPU waits for it, once a slide;
    under CUDA graph capture nothing can be read, and the kernel gives such a tile a row of NaN. Source: SPEC 3.
    """
    from wsi_rt.kernels.slide_embed.library import slide_embed_op

    if projected.ndim != 2 or tuple(positions.shape) != (projected.shape[0], 2) or projected.shape[0] < 1:
        raise KernelInputError(
            f"projected {list(projected.shape)} with positions {list(positions.shape)}, "
            "expected [N, C] and [N, 2], N >= 1"
        )
    channels = projected.shape[1]
    if channels % 4 or tuple(bias.shape) != (channels,) or tuple(cls_token.shape) != (channels,):
        raise KernelInputError(
            f"{channels} channels, bias {list(bias.shape)}, CLS {list(cls_token.shape)}: "
            f"expected a multiple of 4, [{channels}] and [{channels}]"
        )
    check_floats(OP, {"projected": projected, "bias": bias, "cls_token": cls_token}, dtype)
    check_positions(positions)
    check_one_device(OP, {"projected": projected, "positions": positions})
    if cu_seqlens is not None:
        check_cu_seqlens(OP, cu_seqlens)
    return slide_embed_op(projected, positions, bias, cls_token, cu_seqlens, dtype or projected.dtype)


def check_positions(positions: Tensor) -> None:
    """Type and strides of positions [N, 2]; their values are checked where the operator runs."""
    import torch

    if positions.dtype not in (torch.int32, torch.int64):
        raise KernelInputError(f"positions are {positions.dtype}, expected torch.int32 or int64")
    if positions.stride(-1) != 1:
        raise KernelInputError(
            f"positions have strides {tuple(positions.stride())}, expected (col, row) side by side: call .contiguous()"
        )
