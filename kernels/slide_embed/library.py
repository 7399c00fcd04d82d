"""`wsi_rt::slide_embed` for torch.library: plain torch on the CPU, the Triton kernel on CUDA, shapes for tracing."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from wsi_rt.kernels.checks import check_cu_values, cu_on_device, values_readable
from wsi_rt.kernels.errors import KernelInputError
from wsi_rt.kernels.slide_embed import GRID, OP
from wsi_rt.kernels.slide_embed.reference import slide_embed_reference


@torch.library.custom_op("wsi_rt::slide_embed", mutates_args=(), device_types="cpu")
def slide_embed_op(
    projected: Tensor,
    positions: Tensor,
    bias: Tensor,
    cls_token: Tensor,
    cu_seqlens: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """Arguments checked by the public function, but for the values of `positions` and `cu_seqlens`."""
    _check_values(projected, positions, cu_seqlens)
    bounds = [0, projected.shape[0]] if cu_seqlens is None else cu_seqlens.tolist()
    slides = [slide_embed_reference(projected[a:b], positions[a:b], bias, cls_token) for a, b in pairwise(bounds)]
    return torch.cat(slides).to(dtype)


@slide_embed_op.register_kernel("cuda")
def _cuda(
    projected: Tensor,
    positions: Tensor,
    bias: Tensor,
    cls_token: Tensor,
    cu_seqlens: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    from wsi_rt.kernels.slide_embed.triton import slide_embed_triton

    _check_values(projected, positions, cu_seqlens)
    cu_seqlens = None if cu_seqlens is None else cu_on_device(OP, cu_seqlens, projected.device)
    return slide_embed_triton(projected, positions, bias, cls_token, cu_seqlens, dtype)


@slide_embed_op.register_fake
def _fake(
    projected: Tensor,
    positions: Tensor,
    bias: Tensor,
    cls_token: Tensor,
    cu_seqlens: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    slides = 1 if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return projected.new_empty((projected.shape[0] + slides, projected.shape[1]), dtype=dtype)


def _check_values(projected: Tensor, positions: Tensor, cu_seqlens: Tensor | None) -> None:
    if cu_seqlens is not None:
        check_cu_values(OP, cu_seqlens, projected.shape[0], least=1)
    if not values_readable(positions):
        return
    low, high = (int(x) for x in torch.stack(torch.aminmax(positions)).tolist())
    if low < 0 or high >= GRID:
        raise KernelInputError(f"{OP}: positions run from {low} to {high}, expected 0 to {GRID - 1}")
