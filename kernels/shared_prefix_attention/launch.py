"""The host's side of the kernels: how keys are split into parts, a workspace, two launches."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from wsi_rt.kernels.checks import shipped_sm
from wsi_rt.kernels.errors import KernelInputError
from wsi_rt.kernels.shared_prefix_attention import OP
from wsi_rt.kernels.shared_prefix_attention.configs import (
    LEAST_TOKENS,
    ROWS_OF,
    SUFFIX_ROWS,
    WIDTHS,
    merge_options,
    parts_options,
)

LOG2_E = 1.4426950408889634  # exp(x) = exp2(x LOG2_E), which the hardware has
ALIGNED_BYTES = 16  # what one thread loads at once
PROGRAMS_PER_SM = 2  # of either kind: with K and V of 64 keys in flight each, more than memory latency takes
INTERPRETED_SMS = 108  # the CPU stands for Triton's interpreter, which runs what an A100 (sm_80) runs
MOST_KV_HEADS = 65_535  # CUDA's limit of a grid's second axis


@dataclass(frozen=True)
class Plan:
    """The grid of the first launch: what shapes alone decide, so that a CUDA graph holds it for any lengths.

    rows: queries that a program multiplies a prefix with; prefix_blocks: the most blocks of so many that the groups'
    rows can make; *_parts: ranges of keys that a prefix and a suffix are split into; suffix_units: blocks of rows of
    all sequences.
    """

    rows: int
    prefix_blocks: int
    prefix_parts: int
    suffix_units: int
    suffix_parts: int

    @property
    def units(self) -> int:
        """Programs of the first launch for one KV head."""
        return self.prefix_blocks * self.prefix_parts + self.suffix_units * self.suffix_parts

    @property
    def parts(self) -> int:
        return self.prefix_parts + self.suffix_parts


def plan(
    batch: int, heads: int, kv_heads: int, groups: int, prefix_room: int, suffix_room: int, sms: int, full: bool
) -> Plan:
    """prefix_room, suffix_room: tokens that a row of each table holds; sms: of the GPU; full: fp32.

    A prefix block has as many rows as the batch could give one group, up to the largest tile: within it the prefix is
    read once. Groups of n_g sequences make sum(ceil(n_g H / Hkv / rows)) blocks, at most what is allowed for here;
    programs beyond the last block of a step end at once. Keys are split until there are PROGRAMS_PER_SM programs of
    either kind, but into no less than LEAST_TOKENS.
    """
    shared = heads // kv_heads
    sizes = ROWS_OF["full" if full else "half"]
    rows = next((n for n in sizes if n >= batch * shared), sizes[-1])
    prefix_blocks = (batch * shared + min(groups, batch) * (rows - 1)) // rows
    suffix_units = batch * -(-shared // SUFFIX_ROWS)
    prefix_parts, suffix_parts = (
        max(1, min(-(-PROGRAMS_PER_SM * sms // (units * kv_heads)), -(-room // LEAST_TOKENS)))
        for units, room in ((prefix_blocks, prefix_room), (suffix_units, suffix_room))
    )
    return Plan(rows, prefix_blocks, prefix_parts, suffix_units, suffix_parts)


def shared_prefix_attention_triton(
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
    """Launches on checked arguments -> [B, H, D].

    Allocates the output and (D + 1) * 4 bytes a row and part, which the second launch reads again.
    Raises KernelInputError on another head width than 64 or 128, a cache that does not begin on 16 bytes, and a GPU
    older than sm_80.
    """
    (batch, heads, width), kv_heads = q.shape, k_cache.shape[2]
    check_launch(q, k_cache, v_cache)
    (groups, prefix_pages), suffix_pages, page = prefix_table.shape, suffix_table.shape[1], k_cache.shape[1]
    sm, full = shipped_sm(q), q.dtype == torch.float32
    p = plan(batch, heads, kv_heads, groups, prefix_pages * page, suffix_pages * page, multiprocessors(q), full)
    out = q.new_empty(q.shape)
    parts = q.new_empty((p.parts, batch, heads, width), dtype=torch.float32)
    lse = q.new_empty((p.parts, batch, heads), dtype=torch.float32)
    page_rows, page_shift = k_cache.stride(0) // width, page.bit_length() - 1
    constexprs, options = parts_options(sm, full, width, p.rows)
    merge_constexprs, merge_opts = merge_options(sm, width)

    from wsi_rt.kernels.shared_prefix_attention.triton import merge_kernel, parts_kernel

    with torch.cuda.device_of(q):
        parts_kernel[(p.units, kv_heads)](
            q, k_cache, v_cache, prefix_table, prefix_lengths, group_starts, suffix_table, suffix_lengths, parts, lse,
            scale * LOG2_E, q.stride(0), q.stride(1), batch, heads, kv_heads, groups, prefix_pages, suffix_pages,
            page_rows, page_shift, p.prefix_blocks, p.prefix_parts, p.suffix_parts, **constexprs, **options,
        )  # fmt: skip
        merge_kernel[(batch, -(-heads // merge_constexprs["BLOCK_H"]))](
            parts, lse, batch, heads, p.parts, out, **merge_constexprs, **merge_opts
        )
    return out


def check_launch(q: Tensor, k_cache: Tensor, v_cache: Tensor) -> None:
    """What the kernels ask for beyond the operator: raises KernelInputError."""
    if q.shape[2] not in WIDTHS:
        raise KernelInputError(f"{OP}: head width {q.shape[2]}, expected {' or '.join(map(str, WIDTHS))} on a GPU")
    for name, x in (("k_cache", k_cache), ("v_cache", v_cache)):
        if x.data_ptr() % ALIGNED_BYTES:
            raise KernelInputError(f"{OP}: {name} begins at {x.data_ptr():#x}, expected a multiple of {ALIGNED_BYTES}")
    if k_cache.shape[2] > MOST_KV_HEADS:
        raise KernelInputError(f"{OP}: {k_cache.shape[2]:,} KV heads, expected at most {MOST_KV_HEADS:,} on a GPU")


def multiprocessors(x: Tensor) -> int:
    """SMs of the GPU that a tensor lies on."""
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else INTERPRETED_SMS
