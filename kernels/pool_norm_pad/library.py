"""`wsi_rt::pool_norm_pad` for torch.library: plain torch on the CPU, the Triton kernel on CUDA, shapes for tracing."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from wsi_rt.kernels.checks import check_cu_values, cu_on_device
from wsi_rt.kernels.pool_norm_pad import OP
from wsi_rt.kernels.pool_norm_pad.reference import pool_norm_pad_reference


@torch.library.custom_op("wsi_rt::pool_norm_pad", mutates_args=(), device_types="cpu")
def pool_norm_pad_op(
    tokens: Tensor,
    weight: Tensor,
    bias: Tensor,
    cu_seqlens: Tensor | None,
    eps: float,
    pooled: int,
    padded: int,
    leading: int,
    dtype: torch.dtype,
) -> Tensor:
    """Arguments checked by the public function, but for the values of `cu_seqlens`."""
    if cu_seqlens is None:
        return pool_norm_pad_reference(tokens[leading:], weight, bias, eps, pooled, padded).to(dtype)
    check_cu_values(OP, cu_seqlens, tokens.shape[0], 1 + leading)
    bounds = cu_seqlens.tolist()
    slides = [tokens[a + leading : b] for a, b in pairwise(bounds)]
    return torch.stack([pool_norm_pad_reference(x, weight, bias, eps, pooled, padded) for x in slides]).to(dtype)


@pool_norm_pad_op.register_kernel("cuda")
def _cuda(
    tokens: Tensor,
    weight: Tensor,
    bias: Tensor,
    cu_seqlens: Tensor | None,
    eps: float,
    pooled: int,
    padded: int,
    leading: int,
    dtype: torch.dtype,
) -> Tensor:
    from wsi_rt.kernels.pool_norm_pad.triton import pool_norm_pad_triton

    if cu_seqlens is not None:
        check_cu_values(OP, cu_seqlens, tokens.shape[0], 1 + leading)
        cu_seqlens = cu_on_device(OP, cu_seqlens, tokens.device)
    return pool_norm_pad_triton(tokens, weight, bias, cu_seqlens, eps, pooled, padded, leading, dtype)


@pool_norm_pad_op.register_fake
def _fake(
    tokens: Tensor,
    weight: Tensor,
    bias: Tensor,
    cu_seqlens: Tensor | None,
    eps: float,
    pooled: int,
    padded: int,
    leading: int,
    dtype: torch.dtype,
) -> Tensor:
    slides = () if cu_seqlens is None else (cu_seqlens.shape[0] - 1,)
    return tokens.new_empty((*slides, pooled, padded), dtype=dtype)
