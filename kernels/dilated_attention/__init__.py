"""Dilated attention over one slide: several (segment length, ratio) branches merged by one softmax."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from wsi_rt.kernels.errors import KernelInputError

if TYPE_CHECKING:
    from torch import Tensor


def dilated_attention(
    q: Tensor, k: Tensor, v: Tensor, segment_lengths: Sequence[int], dilated_ratios: Sequence[int]
) -> Tensor:
    """q, k, v: [L, H, D] of one dtype and device -> [L, H, D] fp32, computed in fp32.

    Raises KernelInputError on shapes, dtypes, devices or branch lists that do not fit. Source: SPEC 3, LongNet.
    """
    from wsi_rt.kernels.dilated_attention.reference import dilated_attention_reference

    check_branches(segment_lengths, dilated_ratios)
    shapes = [tuple(x.shape) for x in (q, k, v)]
    if len(set(shapes)) != 1 or len(shapes[0]) != 3 or 0 in shapes[0]:
        raise KernelInputError(f"q, k, v are {shapes}, expected three equal shapes [L >= 1, H, D]")
    if len({x.device for x in (q, k, v)}) != 1:
        raise KernelInputError(f"q, k, v are on {[str(x.device) for x in (q, k, v)]}, expected one device")
    if len({x.dtype for x in (q, k, v)}) != 1 or not q.dtype.is_floating_point:
        raise KernelInputError(f"q, k, v are {[x.dtype for x in (q, k, v)]}, expected one floating-point dtype")
    return dilated_attention_reference(q, k, v, segment_lengths, dilated_ratios)


def check_branches(segment_lengths: Sequence[int], dilated_ratios: Sequence[int]) -> None:
    """Raises KernelInputError unless both lists are as long as each other, non-empty and positive."""
    if len(segment_lengths) != len(dilated_ratios) or not segment_lengths:
        raise KernelInputError(
            f"{len(segment_lengths)} segment lengths for {len(dilated_ratios)} ratios, expected as many of each, >= 1"
        )
    if min(*segment_lengths, *dilated_ratios) < 1:
        raise KernelInputError(
            f"segment lengths {list(segment_lengths)}, ratios {list(dilated_ratios)}: expected positive integers"
        )
