"""`wsi_rt::shared_prefix_attention` for torch.library: plain torch on the CPU, Triton on CUDA, shapes for tracing."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from wsi_rt.kernels.errors import KernelInputError
from wsi_rt.kernels.shared_prefix_attention import OP
from wsi_rt.kernels.shared_prefix_attention.reference import shared_prefix_attention_reference


@torch.library.custom_op("wsi_rt::shared_prefix_attention", mutates_args=(), device_types="cpu")
def shared_prefix_attention_op(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    prefix_table: Tensor,
    prefix_lengths: Tensor,
    group_starts: Tensor,
    suffix_table: Tensor,
    suffix_lengths: Tensor,
    scale: float,
) -> Tensor:
    """Arguments checked by the public function, but for the values of the integers."""
    _check_starts(group_starts, q.shape[0])
    _check_table("prefix", prefix_table, prefix_lengths, k_cache)
    _check_table("suffix", suffix_table, suffix_lengths, k_cache)
    return shared_prefix_attention_reference(
        q, k_cache, v_cache, prefix_table, prefix_lengths, group_starts, suffix_table, suffix_lengths, scale
    ).to(q.dtype)


@shared_prefix_attention_op.register_kernel("cuda")
def _(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    prefix_table: Tensor,
    prefix_lengths: Tensor,
    group_starts: Tensor,
    suffix_table: Tensor,
    suffix_lengths: Tensor,
    scale: float,
) -> Tensor:
    from wsi_rt.kernels.shared_prefix_attention.launch import shared_prefix_attention_triton

    return shared_prefix_attention_triton(
        q, k_cache, v_cache, prefix_table, prefix_lengths, group_starts, suffix_table, suffix_lengths, scale
    )


@shared_prefix_attention_op.register_fake
def _(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    prefix_table: Tensor,
    prefix_lengths: Tensor,
    group_starts: Tensor,
    suffix_table: Tensor,
    suffix_lengths: Tensor,
    scale: float,
) -> Tensor:
    return q.new_empty(q.shape)


def _check_starts(group_starts: Tensor, batch: int) -> None:
    starts = group_starts.tolist()
    if starts[0] != 0 or starts[-1] != batch or any(a > b for a, b in pairwise(starts)):
        raise KernelInputError(f"{OP}: group_starts is {starts}, expected to rise from 0 to {batch}")


def _check_table(part: str, table: Tensor, lengths: Tensor, cache: Tensor) -> None:
    """The lengths fit the table, and the pages in use are in the cache."""
    pages, page = cache.shape[:2]
    low, high = (int(x) for x in torch.aminmax(lengths))
    if low < 0 or high > table.shape[1] * page:
        raise KernelInputError(
            f"{OP}: {part}_lengths run from {low} to {high}, expected 0 to {table.shape[1] * page}: "
            f"{table.shape[1]} pages of {page} tokens"
        )
    used = table[torch.arange(table.shape[1]) * page < lengths[:, None]]
    if used.numel() and (int(used.min()) < 0 or int(used.max()) >= pages):
        raise KernelInputError(
            f"{OP}: {part}_table has pages {int(used.min())} to {int(used.max())} in use, expected 0 to {pages - 1}"
        )
