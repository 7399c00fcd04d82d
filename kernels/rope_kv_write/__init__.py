"""Rotary positions of queries and keys, and the new keys and values into the paged cache: one launch a layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from wsi_rt.kernels.checks import check_cache, check_floats, check_integers, check_one_device, check_shapes
from wsi_rt.kernels.errors import KernelInputError

if TYPE_CHECKING:
    from torch import Tensor

OP = "rope_kv_write"
PADDING = -1  # the slot of a row that is not written


def rope_kv_write(
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
    """q [T >= 1, H, D] -> q rotated [T, H, D]; k, v [T, Hkv, D]: k rotated and v as it is go to the cache, in place.

    Rotate-half (SPEC 5): with a, b the halves of a head, (a cos - b sin, b cos + a sin). cos, sin [context, D / 2] fp32
    at row `positions[t]`, int64 [T]. k_cache, v_cache [pages, page, Hkv, D], contiguous within a page of a power of two
    of tokens: token t goes to flat slot `slots[t]` = page number * page + offset, int64 [T], distinct; slot -1: the row
    pads the bucket of a CUDA graph, and nothing is written. q, k, v and the cache are of one dtype (fp16, bf16, fp32),
    rotated in fp32 and rounded once; views of one projection are taken, heads and tokens at any stride, D contiguous.

    CUDA tensors run the Triton kernel (sm_80 or newer, D a power of two), CPU tensors plain torch. Traces and exports
    as `torch.ops.wsi_rt.rope_kv_write` (importing `library` registers it).
    Raises KernelInputError on shapes, strides, dtypes and devices that do not fit and, on the CPU, on positions beyond
    the table and slots beyond the cache. On a GPU those values are not read, which would wait for it at every layer:
    there such a token gets a row of NaN, and nothing is written.
    """
    from wsi_rt.kernels.rope_kv_write.library import rope_kv_write_op

    if q.ndim != 3 or k.ndim != 3 or 0 in q.shape or 0 in k.shape or q.shape[2] % 2:
        raise KernelInputError(
            f"{OP}: q {list(q.shape)}, k {list(k.shape)}, expected [T >= 1, H, D] and [T, Hkv, D], D even"
        )
    check_cache(OP, k_cache, v_cache)
    tokens, _, width = q.shape
    heads, context = k.shape[1], cos.shape[0]
    check_shapes(
        OP,
        {
            "k": (k, (tokens, heads, width)),
            "v": (v, (tokens, heads, width)),
            "cos": (cos, (context, width // 2)),
            "sin": (sin, (context, width // 2)),
            "positions": (positions, (tokens,)),
            "slots": (slots, (tokens,)),
            "k_cache": (k_cache, (*k_cache.shape[:2], heads, width)),
        },
    )
    check_floats(OP, {"q": q, "k": k, "v": v, "k_cache": k_cache, "v_cache": v_cache})
    _check_types(q, k, v, cos, sin, positions, slots, k_cache)
    check_one_device(OP, {"q": q, "cos": cos, "sin": sin, "positions": positions, "slots": slots})
    return rope_kv_write_op(q, k, v, cos, sin, positions, slots, k_cache, v_cache)


def _check_types(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, slots: Tensor, k_cache: Tensor
) -> None:
    import torch

    if not q.dtype == k.dtype == v.dtype == k_cache.dtype:
        found = ", ".join(str(x.dtype) for x in (q, k, v, k_cache))
        raise KernelInputError(f"{OP}: q, k, v and the cache are {found}, expected one dtype")
    for name, table in (("cos", cos), ("sin", sin)):
        if table.dtype != torch.float32 or not table.is_contiguous():
            raise KernelInputError(
                f"{OP}: {name} is {table.dtype}, strides {tuple(table.stride())}, expected contiguous torch.float32"
            )
    check_integers(OP, torch.int64, {"positions": positions, "slots": slots})
