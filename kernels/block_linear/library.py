"""`wsi_rt::block_linear` for torch.library: plain torch on the CPU, the Triton kernels on CUDA, shapes for tracing."""

from __future__ import annotations

import torch
from torch import Tensor

from wsi_rt.kernels.block_linear.reference import block_linear_reference

DEQUANTISED_VALUES = 1 << 24  # of W at a time: 64 MB in fp32, where a 7 B model's largest matrix takes 524


@torch.library.custom_op("wsi_rt::block_linear", mutates_args=(), device_types="cpu")
def block_linear_op(x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, bits: int) -> Tensor:
    """Arguments checked by the public function."""
    rows, given = codes.shape[0], x.float()
    step = max(1, DEQUANTISED_VALUES // x.shape[1])
    out = x.new_empty((x.shape[0], rows))
    for a in range(0, rows, step):
        part = slice(a, a + step)
        part_zeros = None if zeros is None else zeros[part]
        out[:, part] = block_linear_reference(given, codes[part], scales[part], part_zeros, bits)
    return out


@block_linear_op.register_kernel("cuda")
def _cuda(x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, bits: int) -> Tensor:
    from wsi_rt.kernels.block_linear.launch import block_linear_triton

    return block_linear_triton(x, codes, scales, zeros, bits)


@block_linear_op.register_fake
def _fake(x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, bits: int) -> Tensor:
    return x.new_empty((x.shape[0], codes.shape[0]))
