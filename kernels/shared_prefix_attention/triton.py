"""Attention of a decoding step: prefixes once for a group's rows, suffixes a sequence at a time, parts, then a merge.

The queries of a group that read one KV head (sequences x H / Hkv) are columns of a matrix [D, ROWS], keys the rows of
the other: scores [keys, ROWS] = K Q^T and out [D, ROWS] = V^T weights put keys and D, which are many, on the axis of
which wgmma and tcgen05 take 64 at a time, and the few queries on the one of which they take 8. Keys are split into
parts (flash-decoding), each with its own softmax; a second launch merges a row's parts by their log-sum-exp. What
prepares the launches is in `launch.py`. Source of the online softmax: Milakov and Gimelshein, arXiv 1805.02867.

Prefixes: p_ pointer, b_ block, o_ offset, m_ mask.
"""

# ruff: noqa: N803, N806 - compile-time constants of a kernel are upper case, as is the habit in Triton

from __future__ import annotations

import triton
import triton.language as tl

from wsi_rt.kernels.aot_case import SHIPPED_SM, AotCase
from wsi_rt.kernels.shared_prefix_attention.configs import ROWS_OF, WIDTHS, merge_options, parts_options

_GROUPS_AT_ONCE = tl.constexpr(64)


@triton.jit
def _group_of(block, p_starts, groups, shared, ROWS: tl.constexpr):
    """(group, which of its blocks of ROWS rows) of the prefix row block `block`; group -1 beyond the last block."""
    group, index, before = -1, 0, 0
    for g in range(0, groups, _GROUPS_AT_ONCE):
        o_g = g + tl.arange(0, _GROUPS_AT_ONCE)
        m_g = o_g < groups
        b_n = tl.load(p_starts + o_g + 1, mask=m_g, other=0) - tl.load(p_starts + o_g, mask=m_g, other=0)
        b_blocks = (b_n * shared + ROWS - 1) // ROWS  # [GROUPS_AT_ONCE]
        b_end = before + tl.cumsum(b_blocks, 0)
        m_mine = (block < b_end) & (block >= b_end - b_blocks)  # at most one
        group += tl.sum(tl.where(m_mine, o_g + 1, 0))
        index += tl.sum(tl.where(m_mine, block - b_end + b_blocks, 0))
        before += tl.sum(b_blocks)
    return group, index


@triton.jit
def _attend(
    b_q, p_table, first, last, p_k, p_v, kv_heads, page_rows, page_shift, scale,
    D: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """b_q [D, ROWS] over tokens first ... last - 1 of a table -> out [D, ROWS] (not divided), max and sum [ROWS].

    Scores in bits (log2): `scale` holds the factor. p_k, p_v: the KV head's row of the first slot.
    """
    ROWS: tl.constexpr = b_q.shape[1]
    o_d = tl.arange(0, D)
    b_acc = tl.zeros([D, ROWS], tl.float32)
    b_max = tl.full([ROWS], float("-inf"), tl.float32)
    b_sum = tl.zeros([ROWS], tl.float32)
    for start in range(first, last, BLOCK_N):
        o_n = start + tl.arange(0, BLOCK_N)
        m_n = o_n < last
        b_page = tl.load(p_table + (o_n >> page_shift), mask=m_n, other=0).to(tl.int64)  # [BLOCK_N]
        o_row = b_page * page_rows + (o_n & ((1 << page_shift) - 1)) * kv_heads
        o_kv = o_row[:, None] * D + o_d[None, :]  # [BLOCK_N, D]
        b_k = tl.load(p_k + o_kv, mask=m_n[:, None], other=0.0)
        b_s = tl.dot(b_k, b_q, input_precision=PRECISION)  # [BLOCK_N, ROWS] fp32
        b_s = tl.where(m_n[:, None], b_s * scale, float("-inf"))
        b_new = tl.maximum(b_max, tl.max(b_s, 0))  # finite: a block holds at least one real key
        b_w = tl.math.exp2(b_s - b_new[None, :])
        b_shrink = tl.math.exp2(b_max - b_new)
        b_sum = b_sum * b_shrink + tl.sum(b_w, 0)
        b_v = tl.load(p_v + o_kv, mask=m_n[:, None], other=0.0)  # [BLOCK_N, D]
        b_acc = tl.dot(tl.trans(b_v), b_w.to(b_v.dtype), acc=b_acc * b_shrink[None, :], input_precision=PRECISION)
        b_max = b_new
    return b_acc, b_max, b_sum


@triton.jit
def _part(
    p_q, q_row, q_head, p_table, length, part, parts, p_k, p_v, p_out, p_lse, first_b, first_row, rows, heads, kv_heads,
    page_rows, page_shift, scale, D: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Part `part` of `parts` of the tokens of a table for `rows` rows: output and log-sum-exp, -inf where it is empty.

    Row r is sequence first_b + r // (H / Hkv). p_out [B, H, D] fp32 and p_lse [B, H] are those of the part.
    """
    kv_head, shared = tl.program_id(1), heads // kv_heads
    o_r = first_row + tl.arange(0, ROWS)  # [ROWS] rows of the group
    m_r = o_r < rows
    o_b = (first_b + o_r // shared).to(tl.int64)
    o_h = kv_head * shared + o_r % shared
    o_d = tl.arange(0, D)
    p_x = p_q + (o_b * q_row + o_h * q_head)[None, :] + o_d[:, None]
    b_q = tl.load(p_x, mask=m_r[None, :], other=0.0)  # [D, ROWS]

    chunk = tl.cdiv(tl.cdiv(length, parts), BLOCK_N) * BLOCK_N
    first = part * chunk
    last = tl.minimum(first + chunk, length)
    b_acc, b_max, b_sum = _attend(
        b_q, p_table, first, last, p_k + kv_head * D, p_v + kv_head * D, kv_heads, page_rows, page_shift, scale,
        D, BLOCK_N, PRECISION,
    )  # fmt: skip
    b_sum = tl.where(first < last, b_sum, 1.0)
    b_lse = tl.where(first < last, b_max + tl.math.log2(b_sum), float("-inf"))
    o_y = o_b * heads + o_h  # [ROWS]
    tl.store(p_lse + o_y, b_lse, mask=m_r)
    tl.store(p_out + o_y[None, :] * D + o_d[:, None], b_acc / b_sum[None, :], mask=m_r[None, :] & (first < last))


_INTEGERS = (
    "batch", "heads", "kv_heads", "groups", "prefix_pages", "suffix_pages", "page_rows", "page_shift",
    "prefix_blocks", "prefix_parts", "suffix_parts",
)  # fmt: skip
_STRIDES = ("q_row", "q_head")


@triton.jit(do_not_specialize=list(_INTEGERS))
def parts_kernel(
    p_q,  # [B, H, D]
    p_k,  # [pages, 1 << page_shift, Hkv, D], pages `page_rows` rows of D apart
    p_v,  # as p_k
    p_prefix_table,  # [groups, prefix_pages] int32
    p_prefix_lengths,  # [groups] int32
    p_starts,  # [groups + 1] int32
    p_suffix_table,  # [B, suffix_pages] int32
    p_suffix_lengths,  # [B] int32
    p_out,  # [prefix_parts + suffix_parts, B, H, D] fp32
    p_lse,  # [prefix_parts + suffix_parts, B, H] fp32, log2
    scale,
    q_row, q_head, batch, heads, kv_heads, groups, prefix_pages, suffix_pages, page_rows, page_shift,
    prefix_blocks, prefix_parts, suffix_parts,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    SUFFIX_ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid: (prefix_blocks * prefix_parts + B * blocks of a sequence's rows * suffix_parts, Hkv)."""
    unit, shared = tl.program_id(0), heads // kv_heads
    is_prefix = unit < prefix_blocks * prefix_parts
    if is_prefix:
        part, parts, first_part = unit % prefix_parts, prefix_parts, 0
        group, index = _group_of(unit // prefix_parts, p_starts, groups, shared, ROWS)
        first_b = tl.load(p_starts + group, mask=group >= 0, other=0)
        rows = (tl.load(p_starts + group + 1, mask=group >= 0, other=0) - first_b) * shared  # 0: nothing to do
        first_row = index * ROWS
        p_table = p_prefix_table + group.to(tl.int64) * prefix_pages
        length = tl.load(p_prefix_lengths + group, mask=group >= 0, other=0)
    else:
        unit -= prefix_blocks * prefix_parts
        part, parts, first_part = unit % suffix_parts, suffix_parts, prefix_parts
        blocks = tl.cdiv(shared, SUFFIX_ROWS)
        first_b = unit // suffix_parts // blocks
        rows = shared
        first_row = unit // suffix_parts % blocks * SUFFIX_ROWS
        p_table = p_suffix_table + first_b.to(tl.int64) * suffix_pages
        length = tl.load(p_suffix_lengths + first_b)
    at = (first_part + part) * (batch.to(tl.int64) * heads)  # rows of the parts before
    if ROWS == SUFFIX_ROWS:  # noqa: SIM114 - decided when compiled: two equal bodies would not share their memory
        _part(
            p_q, q_row, q_head, p_table, length, part, parts, p_k, p_v, p_out + at * D, p_lse + at,
            first_b, first_row, rows, heads, kv_heads, page_rows, page_shift, scale, D, ROWS, BLOCK_N, PRECISION,
        )  # fmt: skip
    elif is_prefix:
        _part(
            p_q, q_row, q_head, p_table, length, part, parts, p_k, p_v, p_out + at * D, p_lse + at,
            first_b, first_row, rows, heads, kv_heads, page_rows, page_shift, scale, D, ROWS, BLOCK_N, PRECISION,
        )  # fmt: skip
    else:
        _part(
            p_q, q_row, q_head, p_table, length, part, parts, p_k, p_v, p_out + at * D, p_lse + at,
            first_b, first_row, rows, heads, kv_heads, page_rows, page_shift, scale, D, SUFFIX_ROWS, BLOCK_N, PRECISION,
        )  # fmt: skip


@triton.jit(do_not_specialize=["batch", "heads", "parts"])
def merge_kernel(
    p_parts,  # [parts, B, H, D] fp32; not written where p_lse is -inf
    p_lse,  # [parts, B, H] fp32, log2
    batch,
    heads,
    parts,
    p_out,  # [B, H, D]
    D: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Grid: (B, blocks of heads). A row's parts weighted by their log-sum-exp; 0 where all are empty."""
    o_h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    m_h = o_h < heads
    o_d = tl.arange(0, D)
    row = tl.program_id(0).to(tl.int64) * heads + o_h  # [BLOCK_H]
    b_acc = tl.zeros([BLOCK_H, D], tl.float32)
    b_max = tl.full([BLOCK_H], float("-inf"), tl.float32)
    b_sum = tl.zeros([BLOCK_H], tl.float32)
    for part in range(parts):
        at = part * batch.to(tl.int64) * heads + row
        b_lse = tl.load(p_lse + at, mask=m_h, other=float("-inf"))  # [BLOCK_H]
        m_part = (b_lse != float("-inf"))[:, None]  # NaN of a query is a part, and goes on to the answer
        b_x = tl.load(p_parts + at[:, None] * D + o_d[None, :], mask=m_part, other=0.0)  # [BLOCK_H, D]
        b_new = tl.maximum(b_max, b_lse)
        b_from = tl.where(b_new == float("-inf"), 0.0, b_new)  # no part yet: -inf - 0, not -inf + inf
        b_shrink, b_w = tl.math.exp2(b_max - b_from), tl.math.exp2(b_lse - b_from)
        b_acc = b_acc * b_shrink[:, None] + b_x * b_w[:, None]
        b_sum = b_sum * b_shrink + b_w
        b_max = b_new
    b_y = b_acc / tl.where(b_sum == 0.0, 1.0, b_sum)[:, None]
    tl.store(p_out + row[:, None] * D + o_d[None, :], b_y.to(p_out.dtype.element_ty), mask=m_h[:, None])


def aot_cases() -> list[AotCase]:
    """Heads of 64 and 128, every dtype, every number of rows of a prefix; and the merge to every dtype."""
    kinds = [(dtype, width) for dtype in ("fp16", "bf16", "fp32") for width in WIDTHS]
    parts = [
        _parts_case(sm, dtype, width, rows)
        for sm in SHIPPED_SM
        for dtype, width in kinds
        for rows in ROWS_OF["full" if dtype == "fp32" else "half"]
    ]
    return parts + [_merge_case(sm, dtype, width) for sm in SHIPPED_SM for dtype, width in kinds]


def _parts_case(sm: int, dtype: str, width: int, rows: int) -> AotCase:
    constexprs, options = parts_options(sm, dtype == "fp32", width, rows)
    types = dict.fromkeys(("p_q", "p_k", "p_v"), f"*{dtype}") | {"p_out": "*fp32", "p_lse": "*fp32"}
    tables = ("p_prefix_table", "p_prefix_lengths", "p_starts", "p_suffix_table", "p_suffix_lengths")
    types |= dict.fromkeys(tables, "*i32")
    pointers = tuple(types)
    types |= {"scale": "fp32"} | dict.fromkeys((*_STRIDES, *_INTEGERS), "i32") | dict.fromkeys(constexprs, "constexpr")
    return AotCase(
        op="shared_prefix_attention",
        variant=f"{dtype}-D{width}-R{rows}",
        sm=sm,
        kernel=parts_kernel,
        signature={name: types[name] for name in parts_kernel.arg_names},
        constexprs=constexprs,
        divisible=(*pointers, *_STRIDES),
        matrix=dtype != "fp32",  # no tensor core multiplies fp32 exactly
        **options,
    )


def _merge_case(sm: int, dtype: str, width: int) -> AotCase:
    constexprs, options = merge_options(sm, width)
    types = {"p_parts": "*fp32", "p_lse": "*fp32", "batch": "i32", "heads": "i32", "parts": "i32"}
    types |= {"p_out": f"*{dtype}", **dict.fromkeys(constexprs, "constexpr")}
    return AotCase(
        op="shared_prefix_attention",
        variant=f"{dtype}-D{width}-merge",
        sm=sm,
        kernel=merge_kernel,
        signature=types,
        constexprs=constexprs,
        divisible=("p_parts", "p_lse", "p_out"),
        matrix=False,
        **options,
    )
