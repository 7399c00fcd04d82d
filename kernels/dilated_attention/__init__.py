"""Dilated attention over slides: several (segment length, ratio) branches merged by one softmax."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import TYPE_CHECKING

from wsi_rt.kernels.errors import KernelInputError

if TYPE_CHECKING:
    from torch import Tensor


def dilated_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segment_lengths: Sequence[int],
    dilated_ratios: Sequence[int],
    *,
    cu_seqlens: Tensor | None = None,
    precision: str = "ieee",
) -> Tensor:
    """q, k, v: [T, H, D] of one dtype (fp16, bf16, fp32) and device -> [T, H, D] of that dtype, computed in fp32.

    One slide, or several whose tokens follow one another: `cu_seqlens` [S + 1] int32 or int64, from 0 to T, then each
    slide attends within itself, to the same bits as alone. Its values are read on the host: keep it on the CPU.

    On CUDA (Triton, sm_80 or newer) any strides are taken with D contiguous, such as the views q, k, v of a projection
    [T, 3, H, D], and D is one of 8, 16, 24, 32, 48, 64, 96, 128. Rows that do not start on 16 bytes run in smaller
    tiles: slower, and rounded otherwise. `precision` says there how fp32 is multiplied: "ieee", exactly, or "tf32", on
    the tensor cores at 10 bits. On the CPU it is plain torch, any D.

    The output is the only allocation there beside tables of about 20 bytes per 50 (token, head). Those of the last 8
    different calls stay on the GPU. Before a CUDA graph is captured the same call must have run once, with `cu_seqlens`
    on the CPU; whoever owns the graph keeps `launch.device_tables(...)` of its lengths as long as the graph.

    Raises KernelInputError on shapes, dtypes, devices, strides or branch lists that do not fit, and in a capture that
    would have to make tables or to read `cu_seqlens`. Traces and exports as
    `torch.ops.wsi_rt.dilated_attention` (importing `library` registers it). Source: SPEC 3, LongNet (arXiv 2307.02486).
    """
    check_branches(segment_lengths, dilated_ratios)
    check_inputs(q, k, v, cu_seqlens, precision)

    from wsi_rt.kernels.dilated_attention.library import dilated_attention_op

    lengths, ratios = [int(w) for w in segment_lengths], [int(r) for r in dilated_ratios]
    return dilated_attention_op(q, k, v, lengths, ratios, cu_seqlens, precision)


def check_branches(segment_lengths: Sequence[int], dilated_ratios: Sequence[int]) -> None:
    """Raises KernelInputError unless both are lists of as many integers, at least one, each from 1 to 2^63 - 1."""
    for name, values in (("segment lengths", segment_lengths), ("ratios", dilated_ratios)):
        if isinstance(values, (str, bytes)) or not isinstance(values, Sequence):
            raise KernelInputError(f"{name} {values!r}, expected a list of integers")
        if wrong := [x for x in values if isinstance(x, bool) or not isinstance(x, Integral) or not 1 <= x < 2**63]:
            raise KernelInputError(f"{name} {list(values)} hold {wrong[0]!r}, expected positive integers below 2^63")
    if len(segment_lengths) != len(dilated_ratios) or not segment_lengths:
        raise KernelInputError(
            f"{len(segment_lengths)} segment lengths for {len(dilated_ratios)} ratios, expected as many of each, >= 1"
        )


def check_inputs(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, precision: str) -> None:
    """Raises KernelInputError unless the tensors fit each other; reads no values."""
    from wsi_rt.kernels.checks import check_cu_seqlens, check_floats
    from wsi_rt.kernels.dilated_attention.configs import PRECISIONS

    shapes = [tuple(x.shape) for x in (q, k, v)]
    # == and not a set: sizes are symbolic, and not hashable, under torch.export
    if q.ndim != 3 or shapes[0] != shapes[1] or shapes[0] != shapes[2] or 0 in shapes[0]:
        raise KernelInputError(f"q, k, v are {shapes}, expected three equal shapes [L >= 1, H, D]")
    check_floats("dilated_attention", {"q": q, "k": k, "v": v})
    if not q.dtype == k.dtype == v.dtype:
        raise KernelInputError(f"q, k, v are {[x.dtype for x in (q, k, v)]}, expected one dtype")
    if precision not in PRECISIONS:
        raise KernelInputError(f"precision {precision!r}, expected one of {', '.join(PRECISIONS)}")
    if cu_seqlens is not None:
        check_cu_seqlens("dilated_attention", cu_seqlens)
