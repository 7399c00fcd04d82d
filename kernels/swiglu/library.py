"""`wsi_rt::swiglu` for torch.library: plain torch on the CPU, the Triton kernel on CUDA, shapes for tracing."""

from __future__ import annotations

import torch
from torch import Tensor

from wsi_rt.kernels.swiglu.reference import swiglu_reference


@torch.library.custom_op("wsi_rt::swiglu", mutates_args=(), device_types="cpu")
def swiglu_op(gate_up: Tensor) -> Tensor:
    """Arguments checked by the public function."""
    return swiglu_reference(gate_up).to(gate_up.dtype)


@swiglu_op.register_kernel("cuda")
def _(gate_up: Tensor) -> Tensor:
    from wsi_rt.kernels.swiglu.triton import swiglu_triton

    return swiglu_triton(gate_up)


@swiglu_op.register_fake
def _(gate_up: Tensor) -> Tensor:
    return gate_up.new_empty((gate_up.shape[0], gate_up.shape[1] // 2))
