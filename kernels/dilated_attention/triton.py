"""The fused dilated-attention kernel: every branch of a layer in one launch, one online softmax (SPEC 3).

The merge of the branches by their log-sum-exp is one softmax over the multiset union of the branches' keys, so a
program walks the keys of all branches its queries take part in, and writes each output once: no output per branch, no
scatter, no log-sum-exp in memory. Needs Triton; what prepares a launch is in `launch.py`, what it is prepared from in
`programs.py` and `configs.py`. Source of the online softmax: Milakov and Gimelshein, arXiv 1805.02867.

Prefixes: p_ pointer, m_ mask.
"""

# ruff: noqa: N803, N806 - compile-time constants of a kernel are upper case, as is the habit in Triton

from __future__ import annotations

import torch
import triton
import triton.language as tl

from wsi_rt.kernels.aot_case import SHIPPED_SM, AotCase
from wsi_rt.kernels.dilated_attention.configs import WIDTHS
from wsi_rt.kernels.dilated_attention.launch import launch_options


@triton.jit
def _load(p_rows, offsets, left, FIRST: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr, MASKED: tl.constexpr):
    """Columns FIRST ... FIRST + WIDTH - 1 of some rows: [rows, WIDTH]; zeros beyond column D and beyond row `left`."""
    column = FIRST + tl.arange(0, WIDTH)  # [WIDTH]
    p_x = p_rows + offsets[:, None] + column[None, :]  # [rows, WIDTH]
    if not MASKED and FIRST + WIDTH <= D:
        x = tl.load(p_x)
    elif not MASKED:
        x = tl.load(p_x, mask=(column < D)[None, :], other=0.0)
    else:
        m_row = tl.arange(0, offsets.shape[0]) < left
        if FIRST + WIDTH <= D:
            x = tl.load(p_x, mask=m_row[:, None], other=0.0)
        else:
            x = tl.load(p_x, mask=m_row[:, None] & (column < D)[None, :], other=0.0)
    return x


@triton.jit
def _attend(
    acc0, acc1, row_max, row_sum, b_q0, b_q1, p_k, p_v, k_offsets, v_offsets, left,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of keys into the running softmax; `left` keys of it are real where MASKED. Scores in bits (log2)."""
    SCALE: tl.constexpr = D**-0.5 * 1.4426950408889634  # log2(e): exp(x) as the hardware's exp2
    b_k0 = _load(p_k, k_offsets, left, 0, D0, D, MASKED)  # [BLOCK_N, D0]
    scores = tl.dot(b_q0, tl.trans(b_k0), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N] fp32
    if D1 > 0:
        b_k1 = _load(p_k, k_offsets, left, D0, D1, D, MASKED)  # [BLOCK_N, D1]
        scores = tl.dot(b_q1, tl.trans(b_k1), acc=scores, input_precision=PRECISION)
    if MASKED:
        scores = tl.where((tl.arange(0, k_offsets.shape[0]) < left)[None, :], scores, float("-inf"))
    new_max = tl.maximum(row_max, tl.max(scores, axis=1) * SCALE)  # finite: a block holds at least one real key
    weights = tl.math.exp2(scores * SCALE - new_max[:, None])  # [BLOCK_M, BLOCK_N]
    shrink = tl.math.exp2(row_max - new_max)
    row_sum = row_sum * shrink + tl.sum(weights, axis=1)
    b_v0 = _load(p_v, v_offsets, left, 0, D0, D, MASKED)  # [BLOCK_N, D0]
    weights = weights.to(b_v0.dtype)
    acc0 = tl.dot(weights, b_v0, acc=acc0 * shrink[:, None], input_precision=PRECISION)
    if D1 > 0:
        b_v1 = _load(p_v, v_offsets, left, D0, D1, D, MASKED)  # [BLOCK_N, D1]
        acc1 = tl.dot(weights, b_v1, acc=acc1 * shrink[:, None], input_precision=PRECISION)
    return acc0, acc1, new_max, row_sum


@triton.jit
def _branch(
    acc0, acc1, row_max, row_sum, b_q0, b_q1, p_k, p_v, k_step, v_step, real,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The `real` keys of one branch, `k_step` and `v_step` elements apart: whole blocks unmasked, then the rest."""
    n = tl.arange(0, BLOCK_N)
    k_offsets = n * k_step  # [BLOCK_N]
    v_offsets = n * v_step
    for _ in range(0, real // BLOCK_N):
        acc0, acc1, row_max, row_sum = _attend(
            acc0, acc1, row_max, row_sum, b_q0, b_q1, p_k, p_v, k_offsets, v_offsets, BLOCK_N,
            D, D0, D1, False, PRECISION,
        )  # fmt: skip
        p_k += k_step * BLOCK_N
        p_v += v_step * BLOCK_N
    if real % BLOCK_N > 0:
        acc0, acc1, row_max, row_sum = _attend(
            acc0, acc1, row_max, row_sum, b_q0, b_q1, p_k, p_v, k_offsets, v_offsets, real % BLOCK_N,
            D, D0, D1, True, PRECISION,
        )  # fmt: skip
    return acc0, acc1, row_max, row_sum


# The integers are not specialised (no variant of the kernel for a stride of 1 or a multiple of 16): what matters, that
# rows start on 16 bytes, is said by UNIT.
_INTEGERS = ["q_row", "q_head", "k_row", "k_head", "v_row", "v_head", "heads", "row_step", "n_branches"]


@triton.jit(do_not_specialize=_INTEGERS)
def dilated_attention_kernel(
    q, k, v, programs, branches,
    q_row, q_head, k_row, k_head, v_row, v_head, heads, row_step, n_branches,
    out,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: `rows` queries of one head, `row_step` tokens apart, that share their branches and their keys.

    q, k, v: [T, H, D] of one dtype, strides in units of UNIT elements, D contiguous. programs: [P, 5] int32 (first
    token of the slide, tokens of the slide, first query within the slide, queries, head), see programs.py. branches:
    [n_branches, 2] int32 (segment length, ratio). out: [T, H, D] contiguous, dtype of q. Grid: (P,).
    """
    p_program = programs + tl.program_id(0) * 5
    slide = tl.load(p_program).to(tl.int64)  # 64 bits: token * stride passes 2^31 at 932,068 tokens of 3 x 768
    length = tl.load(p_program + 1)
    first = tl.load(p_program + 2)
    rows = tl.load(p_program + 3)
    head = tl.load(p_program + 4)
    k_step = k_row.to(tl.int64) * UNIT
    v_step = v_row.to(tl.int64) * UNIT

    m = tl.arange(0, BLOCK_M)
    token = slide + first + m.to(tl.int64) * row_step  # [BLOCK_M]
    p_q = q + head * q_head.to(tl.int64) * UNIT
    q_offsets = token * (q_row.to(tl.int64) * UNIT)
    b_q0 = _load(p_q, q_offsets, rows, 0, D0, D, True)  # [BLOCK_M, D0]
    b_q1 = b_q0
    acc0 = tl.zeros([BLOCK_M, D0], tl.float32)
    acc1 = acc0
    if D1 > 0:
        b_q1 = _load(p_q, q_offsets, rows, D0, D1, D, True)  # [BLOCK_M, D1]
        acc1 = tl.zeros([BLOCK_M, D1], tl.float32)
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    padded = 0  # zero-padded keys of all branches: score 0, value 0

    for b in range(n_branches):
        w = tl.minimum(tl.load(branches + 2 * b), length)
        r = tl.load(branches + 2 * b + 1)
        group = head // tl.cdiv(heads, r)  # H / r consecutive heads, H padded up to a multiple of r
        segment = first // w * w
        if (first - segment) % r == group:  # then of all rows: they are a multiple of r apart, in one segment
            real = tl.cdiv(tl.minimum(w, length - segment) - group, r)
            padded += tl.cdiv(w, r) - real
            p_k = k + head * k_head.to(tl.int64) * UNIT + (slide + segment + group) * k_step
            p_v = v + head * v_head.to(tl.int64) * UNIT + (slide + segment + group) * v_step
            acc0, acc1, row_max, row_sum = _branch(
                acc0, acc1, row_max, row_sum, b_q0, b_q1, p_k, p_v, k_step * r, v_step * r, real,
                D, D0, D1, BLOCK_N, PRECISION,
            )  # fmt: skip

    if padded > 0:  # at least one key is real, so row_max is finite
        new_max = tl.maximum(row_max, 0.0)
        shrink = tl.math.exp2(row_max - new_max)
        row_sum = row_sum * shrink + padded * tl.math.exp2(-new_max)
        acc0 = acc0 * shrink[:, None]
        if D1 > 0:
            acc1 = acc1 * shrink[:, None]
    row_sum = tl.where(row_sum > 0.0, row_sum, 1.0)  # no branch keeps these queries: 0
    p_out = out + token[:, None] * (heads * D) + head * D  # [BLOCK_M, 1]
    m_row = (m < rows)[:, None]
    d0 = tl.arange(0, D0)[None, :]
    tl.store(p_out + d0, (acc0 / row_sum[:, None]).to(out.dtype.element_ty), mask=m_row & (d0 < D))
    if D1 > 0:
        d1 = D0 + tl.arange(0, D1)[None, :]
        tl.store(p_out + d1, (acc1 / row_sum[:, None]).to(out.dtype.element_ty), mask=m_row & (d1 < D))


_KINDS = {"fp16": torch.float16, "bf16": torch.bfloat16, "ieee": torch.float32, "tf32": torch.float32}


def aot_cases() -> list[AotCase]:
    """Every shipped configuration: each architecture, way of multiplying and head width, rows on 16 bytes or off."""
    return [
        _aot_case(sm, kind, width, aligned)
        for aligned in (True, False)
        for sm in SHIPPED_SM
        for kind in _KINDS
        for width in WIDTHS
    ]


def _aot_case(sm: int, kind: str, width: int, aligned: bool) -> AotCase:
    full = _KINDS[kind] == torch.float32
    constexprs, options = launch_options(sm, _KINDS[kind], width, kind, aligned)
    tensors = dict.fromkeys(("q", "k", "v", "out"), "*fp32" if full else f"*{kind}")
    tables = {"programs": "*i32", "branches": "*i32"}
    types = {**tensors, **tables, **dict.fromkeys(_INTEGERS, "i32"), **dict.fromkeys(constexprs, "constexpr")}
    return AotCase(
        op="dilated_attention",
        variant=f"{'fp32-' if full else ''}{kind}-D{width}{'' if aligned else '-unaligned'}",
        sm=sm,
        kernel=dilated_attention_kernel,
        signature={name: types[name] for name in dilated_attention_kernel.arg_names},
        constexprs=constexprs,
        # Where q, k or v begins on 16 bytes after all, Triton tells the compiler so, which can make nothing of it: the
        # strides, in units of one element, leave no row aligned.
        divisible=(*tensors, *tables) if aligned else ("out", *tables),
        matrix=kind != "ieee",  # no tensor core multiplies fp32 exactly
        **options,
    )
