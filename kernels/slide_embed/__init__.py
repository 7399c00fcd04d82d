"""Epilogue of the patch projection: bias, closed-form sin-cos position, CLS row."""

from __future__ import annotations

from typing import TYPE_CHECKING

from wsi_rt.kernels.errors import KernelInputError

if TYPE_CHECKING:
    from torch import Tensor

GRID = 1000  # rows and columns that the published position index can tell apart


def slide_embed(projected: Tensor, positions: Tensor, bias: Tensor, cls_token: Tensor) -> Tensor:
    """projected [N, C], positions [N, 2] int64 (col, row), bias [C], cls_token [C] -> [N + 1, C] fp32.

    Raises KernelInputError on shapes that do not fit. Positions must lie on the 1000 x 1000 grid, beyond which the
    published index aliases: the caller checks (runtime.positions), since reading values here would stall a GPU and
    cannot be traced. Source: SPEC 3.
    """
    from wsi_rt.kernels.slide_embed.reference import slide_embed_reference

    if projected.ndim != 2 or positions.shape != (projected.shape[0], 2):
        raise KernelInputError(
            f"projected {list(projected.shape)} with positions {list(positions.shape)}, expected [N, C] and [N, 2]"
        )
    channels = projected.shape[1]
    if channels % 4 or bias.numel() != channels or cls_token.numel() != channels:
        raise KernelInputError(
            f"{channels} channels, bias {bias.numel()}, CLS {cls_token.numel()}: expected equal multiples of 4"
        )
    return slide_embed_reference(projected, positions, bias, cls_token)
