"""`wsi_rt::rms_norm` and `wsi_rt::add_rms_norm` for torch.library: plain torch on the CPU, the Triton kernel on CUDA,
shapes for tracing."""

from __future__ import annotations

import torch
from torch import Tensor

from wsi_rt.kernels.rms_norm.reference import add_rms_norm_reference, rms_norm_reference


@torch.library.custom_op("wsi_rt::rms_norm", mutates_args=(), device_types="cpu")
def rms_norm_op(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Arguments checked by the public function."""
    return rms_norm_reference(x, weight, eps).to(x.dtype)


@rms_norm_op.register_kernel("cuda")
def _(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    from wsi_rt.kernels.rms_norm.triton import rms_norm_triton

    return rms_norm_triton(x, weight, eps)


@rms_norm_op.register_fake
def _(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("wsi_rt::add_rms_norm", mutates_args=(), device_types="cpu")
def add_rms_norm_op(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Arguments checked by the public function."""
    normed, total = add_rms_norm_reference(x, residual, weight, eps)
    return normed.to(x.dtype), total


@add_rms_norm_op.register_kernel("cuda")
def _(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    from wsi_rt.kernels.rms_norm.triton import add_rms_norm_triton

    return add_rms_norm_triton(x, residual, weight, eps)


@add_rms_norm_op.register_fake
def _(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), residual.new_empty(residual.shape)
