"""`wsi_rt::rope_kv_write` for torch.library: plain torch on the CPU, the Triton kernel on CUDA, shapes for tracing."""

from __future__ import annotations

import torch
from torch import Tensor

from wsi_rt.kernels.errors import KernelInputError
from wsi_rt.kernels.rope_kv_write import OP, PADDING
from wsi_rt.kernels.rope_kv_write.reference import rotated_reference, write_reference


@torch.library.custom_op("wsi_rt::rope_kv_write", mutates_args=("k_cache", "v_cache"), device_types="cpu")
def rope_kv_write_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    slots: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
) -> Tensor:
    """Arguments checked by the public function, but for the values of `positions` and `slots`."""
    _check_values(positions, slots, cos.shape[0], k_cache.shape[0] * k_cache.shape[1])
    write_reference(rotated_reference(k, cos, sin, positions), slots, k_cache)
    write_reference(v, slots, v_cache)
    return rotated_reference(q, cos, sin, positions).to(q.dtype)


@rope_kv_write_op.register_kernel("cuda")
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    slots: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
) -> Tensor:
    from wsi_rt.kernels.rope_kv_write.triton import rope_kv_write_triton

    return rope_kv_write_triton(q, k, v, cos, sin, positions, slots, k_cache, v_cache)


@rope_kv_write_op.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    slots: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
) -> Tensor:
    return q.new_empty(q.shape)


def _check_values(positions: Tensor, slots: Tensor, context: int, room: int) -> None:
    for name, values, least, most in (("positions", positions, 0, context), ("slots", slots, PADDING, room)):
        low, high = (int(x) for x in torch.aminmax(values))
        if low < least or high >= most:
            raise KernelInputError(f"{OP}: {name} run from {low} to {high}, expected {least} to {most - 1}")
