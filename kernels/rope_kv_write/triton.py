"""Rotation of q and k and the write of k and v to their slots: one program per (token, block of heads)."""

# ruff: noqa: N803 - compile-time constants of a kernel are upper case, as is the habit in Triton

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from wsi_rt.kernels.aot_case import SHIPPED_SM, AotCase
from wsi_rt.kernels.checks import shipped_sm
from wsi_rt.kernels.errors import KernelInputError

MOST_BLOCKS = 65_535  # CUDA's limit of a grid's second axis

# Per architecture: heads of a program, and warps. 8 heads of 128 in 4 warps are 4 values of each half a thread; 32
# heads make 4 programs a token, which share one position's 64 cosines and sines.
CONFIGS = {sm: {"heads": 8, "num_warps": 4} for sm in SHIPPED_SM}


@triton.jit
def _rotated(p_x, head_stride, o_h, m, b_cos, b_sin, HALF: tl.constexpr):
    """Both halves [BLOCK_H, HALF] fp32 of some heads of one token, rotated; zeros where not `m`."""
    p_a = p_x + o_h[:, None] * head_stride + tl.arange(0, HALF)[None, :]
    b_a = tl.load(p_a, mask=m, other=0.0).to(tl.float32)
    b_b = tl.load(p_a + HALF, mask=m, other=0.0).to(tl.float32)
    return b_a * b_cos - b_b * b_sin, b_b * b_cos + b_a * b_sin


@triton.jit
def _store(p_rows, o_h, m, b_a, b_b, HALF: tl.constexpr):
    """Both halves of some heads to contiguous rows of 2 * HALF."""
    p_a = p_rows + o_h[:, None] * (2 * HALF) + tl.arange(0, HALF)[None, :]
    tl.store(p_a, b_a.to(p_rows.dtype.element_ty), mask=m)
    tl.store(p_a + HALF, b_b.to(p_rows.dtype.element_ty), mask=m)


_INTEGERS = ["heads", "kv_heads", "context", "room", "page_rows", "page_shift"]
_STRIDES = ("q_row", "q_head", "k_row", "k_head", "v_row", "v_head")


@triton.jit(do_not_specialize=_INTEGERS)
def rope_kv_write_kernel(
    p_q,  # [T, heads, D]
    p_k,  # [T, kv_heads, D]
    p_v,  # [T, kv_heads, D]
    p_cos,  # [context, D / 2] fp32
    p_sin,  # [context, D / 2] fp32
    p_positions,  # [T] int64
    p_slots,  # [T] int64
    p_k_cache,  # [pages, 1 << page_shift, kv_heads, D], pages `page_rows` rows of D apart
    p_v_cache,  # as p_k_cache
    q_row, q_head, k_row, k_head, v_row, v_head,
    heads, kv_heads, context, room, page_rows, page_shift,
    p_out,  # [T, heads, D]
    HALF: tl.constexpr,
    BLOCK_H: tl.constexpr,
):  # fmt: skip
    i_t = tl.program_id(0).to(tl.int64)
    o_h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)  # [BLOCK_H]
    o_d = tl.arange(0, HALF)
    position, slot = tl.load(p_positions + i_t), tl.load(p_slots + i_t)
    valid = (position >= 0) & (position < context) & (slot >= -1) & (slot < room)
    at = position * HALF + o_d
    b_cos = tl.load(p_cos + at, mask=valid & (o_d < HALF), other=float("nan"))[None, :]  # never silently
    b_sin = tl.load(p_sin + at, mask=valid & (o_d < HALF), other=float("nan"))[None, :]

    m_q = (o_h < heads)[:, None]
    b_a, b_b = _rotated(p_q + i_t * q_row, q_head, o_h, m_q, b_cos, b_sin, HALF)  # [BLOCK_H, HALF]
    _store(p_out + i_t * heads * (2 * HALF), o_h, m_q, b_a, b_b, HALF)

    m_kv = (o_h < kv_heads)[:, None] & valid & (slot >= 0)
    row = (slot >> page_shift) * page_rows + (slot & ((1 << page_shift) - 1)) * kv_heads
    b_a, b_b = _rotated(p_k + i_t * k_row, k_head, o_h, m_kv, b_cos, b_sin, HALF)
    _store(p_k_cache + row * (2 * HALF), o_h, m_kv, b_a, b_b, HALF)
    p_a = p_v + i_t * v_row + o_h[:, None] * v_head + o_d[None, :]
    b_a, b_b = tl.load(p_a, mask=m_kv, other=0.0), tl.load(p_a + HALF, mask=m_kv, other=0.0)
    _store(p_v_cache + row * (2 * HALF), o_h, m_kv, b_a, b_b, HALF)


def rope_kv_write_triton(
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
    """Launch on checked arguments -> q rotated [T, H, D]; the caches are written in place.

    Raises KernelInputError on a head width that is no power of two, and on a GPU older than sm_80.
    """
    (tokens, heads, width), kv_heads = q.shape, k.shape[1]
    if width & (width - 1):
        raise KernelInputError(f"head width {width}, expected a power of two on a GPU")
    constexprs, options = launch_options(shipped_sm(q), width)
    blocks = triton.cdiv(max(heads, kv_heads), constexprs["BLOCK_H"])
    if blocks > MOST_BLOCKS:
        raise KernelInputError(f"{heads:,} heads, expected at most {MOST_BLOCKS * constexprs['BLOCK_H']:,} on a GPU")
    out = q.new_empty(q.shape)
    pages, page = k_cache.shape[:2]
    strides = [x.stride(axis) for x in (q, k, v) for axis in (0, 1)]
    sizes = (heads, kv_heads, cos.shape[0], pages * page, k_cache.stride(0) // width, page.bit_length() - 1)
    with torch.cuda.device_of(q):
        rope_kv_write_kernel[(tokens, blocks)](
            q, k, v, cos, sin, positions, slots, k_cache, v_cache, *strides, *sizes, out, **constexprs, **options
        )
    return out


def launch_options(sm: int, width: int) -> tuple[dict[str, int], dict[str, int]]:
    """(constexprs, compiler options) of a launch, by the table of the architecture."""
    config = CONFIGS[sm]
    return {"HALF": width // 2, "BLOCK_H": config["heads"]}, {"num_warps": config["num_warps"], "num_stages": 1}


def aot_cases() -> list[AotCase]:
    """Heads of 64 and 128, however many, every dtype."""
    return [_aot_case(sm, d, width) for sm in SHIPPED_SM for d in ("fp16", "bf16", "fp32") for width in (64, 128)]


def _aot_case(sm: int, dtype: str, width: int) -> AotCase:
    constexprs, options = launch_options(sm, width)
    types = dict.fromkeys(("p_q", "p_k", "p_v", "p_k_cache", "p_v_cache", "p_out"), f"*{dtype}")
    types |= {"p_cos": "*fp32", "p_sin": "*fp32", "p_positions": "*i64", "p_slots": "*i64"}
    pointers = tuple(types)
    types |= dict.fromkeys((*_STRIDES, *_INTEGERS), "i32") | dict.fromkeys(constexprs, "constexpr")
    return AotCase(
        op="rope_kv_write",
        variant=f"{dtype}-D{width}",
        sm=sm,
        kernel=rope_kv_write_kernel,
        signature={name: types[name] for name in rope_kv_write_kernel.arg_names},
        constexprs=constexprs,
        divisible=(*pointers, *_STRIDES),
        matrix=False,
        **options,
    )
