"""Checks that several operators share; each raises KernelInputError with what was given and what was expected."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from numbers import Real
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
    """All tensors lie on one device: the CPU, an NVIDIA GPU, or meta, where shapes are traced."""
    import torch

    for name, x in tensors.items():
        if x.device.type not in ("cpu", "cuda", "meta") or (x.is_cuda and torch.version.hip is not None):
            what_it_is = f"an AMD GPU (ROCm {torch.version.hip})" if x.is_cuda else x.device
            raise KernelInputError(f"{what}: {name} is on {what_it_is}, expected the CPU or an NVIDIA GPU: call .cpu()")
    if len({x.device for x in tensors.values()}) > 1:
        where = ", ".join(f"{name} on {x.device}" for name, x in tensors.items())
        raise KernelInputError(f"{what}: {where}; expected one device")


def check_integers(what: str, dtype: torch.dtype, tensors: dict[str, Tensor]) -> None:
    """Every tensor is of one integer type and contiguous."""
    for name, x in tensors.items():
        if x.dtype != dtype:
            raise KernelInputError(f"{what}: {name} is {x.dtype}, expected {dtype}: call .to({dtype})")
        if not x.is_contiguous():
            raise KernelInputError(f"{what}: {name} has strides {tuple(x.stride())}, expected contiguous memory")


def check_shapes(what: str, tensors: dict[str, tuple[Tensor, tuple[int, ...]]]) -> None:
    """Every tensor has the shape beside it."""
    for name, (x, shape) in tensors.items():
        if tuple(x.shape) != shape:
            raise KernelInputError(f"{what}: {name} is {list(x.shape)}, expected {list(shape)}")


def check_cache(what: str, k_cache: Tensor, v_cache: Tensor) -> None:
    """A paged cache: k and v [pages, page, Hkv, D] of one dtype, a power of two of tokens a page, contiguous within a
    page and both alike from page to page."""
    shapes = tuple(k_cache.shape), tuple(v_cache.shape)
    strides = tuple(k_cache.stride()), tuple(v_cache.stride())
    if k_cache.ndim != 4 or shapes[0] != shapes[1] or 0 in shapes[0] or k_cache.dtype != v_cache.dtype:
        raise KernelInputError(
            f"{what}: k_cache {k_cache.dtype} {list(shapes[0])}, v_cache {v_cache.dtype} {list(shapes[1])}, "
            "expected one dtype and two equal shapes [pages, page, Hkv, D]"
        )
    _, page, heads, width = shapes[0]
    if page & (page - 1):
        raise KernelInputError(f"{what}: pages of {page} tokens, expected a power of two")
    if strides[0] != strides[1] or strides[0][1:] != (heads * width, width, 1) or strides[0][0] % width:
        raise KernelInputError(
            f"{what}: k_cache has strides {strides[0]}, v_cache {strides[1]}, expected equal ones and pages "
            f"[{page}, {heads}, {width}] that are contiguous, a multiple of {width} values apart"
        )


def check_cu_seqlens(what: str, cu_seqlens: Tensor) -> None:
    """Type, shape and device of cumulative lengths [S + 1]; their values are for `check_cu_values`."""
    import torch

    if cu_seqlens.dtype not in (torch.int32, torch.int64) or cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 2:
        raise KernelInputError(
            f"{what}: cu_seqlens is {cu_seqlens.dtype} {list(cu_seqlens.shape)}, expected int32 or int64 [slides + 1]"
        )
    if not cu_seqlens.is_contiguous():
        raise KernelInputError(f"{what}: cu_seqlens has stride {cu_seqlens.stride(0)}, expected 1: call .contiguous()")
    check_one_device(what, {"cu_seqlens": cu_seqlens})


def check_cu_values(what: str, cu_seqlens: Tensor, total: int, least: int) -> list[int] | None:
    """Cumulative lengths run from 0 to `total` in steps of at least `least`; returns them.

    Reads the values at every call: a wait for the device where they are on a GPU, so keep them on the CPU. A stream
    under CUDA graph capture cannot wait: there nothing is read, None is returned, and the caller vouches for the
    values, as for everything else a graph replays.
    """
    if not values_readable(cu_seqlens):
        return None
    values = cu_seqlens.tolist()
    steps = [b - a for a, b in pairwise(values)]
    if values[0] != 0 or values[-1] != total or min(steps) < least:
        shown = values if len(values) <= 8 else [*values[:4], "...", *values[-3:]]
        raise KernelInputError(
            f"{what}: cu_seqlens is {shown}, expected to rise from 0 to {total} rows by at least {least} a slide"
        )
    return values


def cu_on_device(what: str, cu_seqlens: Tensor, device: torch.device) -> Tensor:
    """`cu_seqlens` on a kernel's device. Raises KernelInputError where a CUDA graph would capture that copy."""
    if cu_seqlens.device != device and capturing(device):
        raise KernelInputError(
            f"{what}: cu_seqlens is on {cu_seqlens.device} while a CUDA graph is captured, expected it on {device}: "
            f"copy it there before the capture"
        )
    return cu_seqlens.to(device)


def check_finite(what: str, numbers: dict[str, Sequence[float]]) -> None:
    """Every one is a finite number (not a string, bool or NaN)."""
    for name, values in numbers.items():
        for value in values:
            if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
                raise KernelInputError(f"{what}: {name} holds {value!r}, expected finite numbers")


def values_readable(x: Tensor) -> bool:
    """Whether the host may read a tensor's values now: not while a CUDA graph is being captured."""
    return not (x.is_cuda and capturing(x.device))


def capturing(device: torch.device) -> bool:
    """Whether the current stream of a device records a CUDA graph; never on the CPU."""
    import torch

    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


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
