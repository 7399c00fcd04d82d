"""Encoder tokens -> 576 slide tokens: adaptive average pooling, LayerNorm, zero-padded channels."""

from __future__ import annotations

from typing import TYPE_CHECKING

from wsi_rt.kernels.checks import check_cu_seqlens, check_finite, check_floats
from wsi_rt.kernels.errors import KernelInputError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

OP = "pool_norm_pad"
WIDEST = 8192  # channels after padding that the kernel takes; a row of sums lives in registers


def pool_norm_pad(
    tokens: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    pooled: int,
    padded: int,
    *,
    cu_seqlens: Tensor | None = None,
    leading: int = 0,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """tokens [N >= 1, C] (rows may be strided); weight, bias [C] or [padded] -> [pooled, padded].

    fp16, bf16 or fp32 in, computed in fp32, returned as `dtype` (default: that of the tokens). The width of `weight`
    decides the order (C: norm then pad; `padded`: pad then norm). A slide of N < `pooled` repeats tokens.

    Several slides in one launch: `cu_seqlens` [S + 1] int32 or int64, rising from 0 to N, gives [S, pooled, padded];
    each slide's numbers are those it has alone (on a GPU bit for bit where strides and alignment are the same too). It
    may stay on the CPU; under CUDA graph capture it must lie on the GPU, and its values are not checked. The first
    `leading` rows of every slide are left out (1: the CLS row).

    CUDA tensors run the Triton kernel (sm_80 or newer, `padded` <= WIDEST, up to 65,535 slides), CPU tensors plain
    torch. Traces and exports as `torch.ops.wsi_rt.pool_norm_pad` (importing `library` registers it).
    Raises KernelInputError on shapes, strides, dtypes, devices and lengths that do not fit. Source: SPEC 3.
    """
    from wsi_rt.kernels.pool_norm_pad.library import pool_norm_pad_op

    check_floats(OP, {"tokens": tokens, "weight": weight, "bias": bias}, dtype)
    check_finite(OP, {"eps": (eps,)})
    if leading < 0 or pooled < 1 or eps < 0:
        raise KernelInputError(
            f"leading {leading}, pooled {pooled}, eps {eps}: expected leading >= 0, pooled >= 1, eps >= 0"
        )
    if tokens.ndim != 2 or tokens.shape[0] < 1 + leading or tokens.shape[1] < 1:
        raise KernelInputError(f"tokens are {list(tokens.shape)}, expected [N >= {1 + leading}, C]")
    channels = tokens.shape[1]
    if padded < channels:
        raise KernelInputError(f"padded width {padded} is below the {channels} channels of the tokens")
    if weight.shape != bias.shape or tuple(weight.shape) not in ((channels,), (padded,)):
        raise KernelInputError(
            f"norm weight {list(weight.shape)} and bias {list(bias.shape)}, expected both [{channels}] or [{padded}]"
        )
    if cu_seqlens is not None:
        check_cu_seqlens(OP, cu_seqlens)
    return pool_norm_pad_op(tokens, weight, bias, cu_seqlens, eps, pooled, padded, leading, dtype or tokens.dtype)
