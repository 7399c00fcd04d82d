"""Decoding attention of many sequences that share prefixes: one softmax over a group's prefix and each own suffix."""

from __future__ import annotations

from typing import TYPE_CHECKING

from wsi_rt.kernels.checks import (
    check_cache,
    check_finite,
    check_floats,
    check_integers,
    check_one_device,
    check_shapes,
)
from wsi_rt.kernels.errors import KernelInputError

if TYPE_CHECKING:
    from torch import Tensor

OP = "shared_prefix_attention"


def shared_prefix_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    prefix_table: Tensor,
    prefix_lengths: Tensor,
    group_starts: Tensor,
    suffix_table: Tensor,
    suffix_lengths: Tensor,
    *,
    scale: float | None = None,
) -> Tensor:
    """q [B >= 1, H, D], one token a sequence -> [B, H, D], dtype of q.

    Sequences are sorted by prefix: group g of G is rows group_starts[g] ... group_starts[g + 1] - 1 (int32 [G + 1],
    from 0 to B; empty groups allowed). Each attends to the first prefix_lengths[g] (int32 [G]) tokens of the pages
    prefix_table[g] (int32 [G, P] page numbers), then to the first suffix_lengths[b] (int32 [B]) tokens of the pages
    suffix_table[b] (int32 [B, Q]). Either length may be 0; with both 0 the row pads a bucket, and is 0. Table entries
    beyond a length are not read, nor are slots. scale: default D^-0.5.

    k_cache, v_cache [pages, page, Hkv, D]: contiguous within a page of a power of two of tokens; head h reads KV head
    h // (H / Hkv). One dtype (fp16, bf16, fp32); fp32 arithmetic, but that the softmax weights are rounded to the
    cache's dtype before the product with its values. q may be strided, D contiguous.

    CUDA tensors run the Triton kernel (sm_80 or newer; D 64 or 128): a group's prefix is read once for all its rows and
    each KV head, up to 64 rows (sequences x heads of a KV head); two launches, whose grids depend on shapes only, so
    that a CUDA graph holds them: lengths, tables and group starts are read on the GPU. The same call gives the same
    bits; another shape of the batch or its tables may round otherwise. CPU tensors run plain torch. Traces and exports
    as `torch.ops.wsi_rt.shared_prefix_attention` (importing `library` registers it).

    Raises KernelInputError on shapes, strides, dtypes and devices that do not fit and, on the CPU, on group starts,
    lengths and page numbers that do not fit the tables and the cache. On a GPU those values are not read, which would
    wait for it at every layer: the caller vouches for them.
    Source: SPEC 5 (the slide before the question); Hydragen (arXiv 2402.05099), flash-decoding.
    """
    from wsi_rt.kernels.shared_prefix_attention.library import shared_prefix_attention_op

    if q.ndim != 3 or 0 in q.shape:
        raise KernelInputError(f"{OP}: q is {list(q.shape)}, expected [B >= 1, H, D]")
    check_cache(OP, k_cache, v_cache)
    batch, heads, width = q.shape
    kv_heads = k_cache.shape[2]
    if k_cache.shape[3] != width or heads % kv_heads:
        raise KernelInputError(
            f"{OP}: {heads} heads of {width} with a cache of {kv_heads} heads of {k_cache.shape[3]}, "
            "expected a multiple of its heads and one width"
        )
    if prefix_table.ndim != 2 or suffix_table.ndim != 2 or 0 in prefix_table.shape or 0 in suffix_table.shape:
        raise KernelInputError(
            f"{OP}: prefix_table {list(prefix_table.shape)}, suffix_table {list(suffix_table.shape)}, "
            "expected [G >= 1, P >= 1] and [B, Q >= 1]"
        )
    groups = prefix_table.shape[0]
    check_shapes(
        OP,
        {
            "prefix_lengths": (prefix_lengths, (groups,)),
            "group_starts": (group_starts, (groups + 1,)),
            "suffix_table": (suffix_table, (batch, suffix_table.shape[1])),
            "suffix_lengths": (suffix_lengths, (batch,)),
        },
    )
    integers = {
        "prefix_table": prefix_table,
        "prefix_lengths": prefix_lengths,
        "group_starts": group_starts,
        "suffix_table": suffix_table,
        "suffix_lengths": suffix_lengths,
    }
    _check_types(q, k_cache, v_cache, integers)
    scale = width**-0.5 if scale is None else scale
    check_finite(OP, {"scale": (scale,)})
    return shared_prefix_attention_op(q, k_cache, v_cache, *integers.values(), scale)


def _check_types(q: Tensor, k_cache: Tensor, v_cache: Tensor, integers: dict[str, Tensor]) -> None:
    import torch

    check_floats(OP, {"q": q, "k_cache": k_cache, "v_cache": v_cache})
    if q.dtype != k_cache.dtype:
        raise KernelInputError(f"{OP}: q is {q.dtype}, the cache {k_cache.dtype}, expected one dtype")
    check_integers(OP, torch.int32, integers)
    check_one_device(OP, {"q": q, **integers})
