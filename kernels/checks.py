"""Checks that several operators share; each raises KernelInputError with what was given and what was expected."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

from wsi_rt.kernels.aot_case import SHIPPED_SM
from wsi_rt.kernels.errors import KernelInputError

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def check_floats(what: str, tensors: dict[str, Tensor], out_dtype: torch.dtype | None = None) -> None:
    """Every tensor (and the output) is fp16, bf16 or fp32, all on one device, the last axis contiguous."""
    import torch

    floats = (torch.float16, torch.bfloat16, torch.float32)
    for name, x in tensors.items():
        if x.dtype not in floats:
            raise KernelInputError(f"{what}: {name} is {x.dtype}, expected torch.float16, bfloat16 or float32")
        if x.ndim and x.shape[-1] > 1 and x.stride(-1) != 1:
            raise KernelInputError(
                f"{what}: {name} has strides {tuple(x.stride())}, expected a contiguous last axis: call .contiguous()"
            )
    if out_dtype is not None and out_dtype not in floats:
        raise KernelInputError(f"{what}: dtype is {out_dtype}, expected torch.float16, bfloat16 or float32")
    check_one_device(what, tensors)


def check_one_device(what: str, tensors: dict[str, Tensor]) -> None:
    """All tensors lie on one device."""
    if len({x.device for x in tensors.values()}) > 1:
        where = ", ".join(f"{name} on {x.device}" for name, x in tensors.items())
        raise KernelInputError(f"{what}: {where}; expected one device")


def check_cu_seqlens(what: str, cu_seqlens: Tensor) -> None:
    """Type and shape of cumulative lengths [S + 1]; their values are for `check_cu_values`."""
    import torch

    if cu_seqlens.dtype not in (torch.int32, torch.int64) or cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 2:
        raise KernelInputError(
            f"{what}: cu_seqlens is {cu_seqlens.dtype} {list(cu_seqlens.shape)}, expected int32 or int64 [slides + 1]"
        )
    if not cu_seqlens.is_contiguous():
        raise KernelInputError(f"{what}: cu_seqlens has stride {cu_seqlens.stride(0)}, expected 1: call .contiguous()")


def check_cu_values(what: str, cu_seqlens: Tensor, total: int, least: int) -> None:
    """Cumulative lengths run from 0 to `total` in steps of at least `least`.

    Reads the values: one wait for the device per slide batch (not per layer). A stream under CUDA graph capture
    cannot wait, so there the caller vouches for them, as for everything else a graph replays.
    """
    if not values_readable(cu_seqlens):
        return
    values = cu_seqlens.tolist()
    steps = [b - a for a, b in pairwise(values)]
    if values[0] != 0 or values[-1] != total or min(steps) < least:
        shown = values if len(values) <= 8 else [*values[:4], "...", *values[-3:]]
        raise KernelInputError(
            f"{what}: cu_seqlens is {shown}, expected to rise from 0 to {total} rows by at least {least} a slide"
        )


def values_readable(x: Tensor) -> bool:
    """Whether the host may read a tensor's values now: not while a CUDA graph is being captured."""
    import torch

    return not (x.is_cuda and torch.cuda.is_current_stream_capturing())


def shipped_sm(x: Tensor) -> int:
    """The architecture whose configuration a tensor's device uses: the newest shipped one of its own generation.

    The CPU stands for Triton's interpreter, which runs what sm_80 runs. 8.7 uses 8.6's table, 10.3 uses 10.0's.
    """
    import torch

    if not x.is_cuda:
        return SHIPPED_SM[0]
    major, minor = torch.cuda.get_device_capability(x.device)
    fits = [sm for sm in SHIPPED_SM if sm // 10 == major and sm % 10 <= minor]
    if not fits:
        raise KernelInputError(f"{x.device} is sm_{major}{minor}, expected one of {', '.join(map(str, SHIPPED_SM))}")
    return max(fits)
