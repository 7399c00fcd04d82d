"""The kernels of block_linear: a vector one for up to 4 rows of x, a matrix one for more. W is only ever in registers.

Codes are loaded as 32-bit words, 4 to a thread. A code is made a float without a conversion instruction (a quarter of
the speed of others): masked where it stands in its half of the word and joined with the bits of 2^23, it reads
2^23 + code * 2^shift; less 2^23 + zero * 2^shift, that is exactly (code - zero) * 2^shift. The power of two goes into
x (vector) or the scale (matrix), exactly too. So only the upper half of a word is shifted, once for all its codes. Two
codes of one byte are neighbours in K: x is split, or W joined, in registers, since the parts a thread holds are its
own; nothing is interleaved through memory.

Names: p_ pointer, o_ offsets, m_ mask, b_ values of a block; n rows of W, m rows of x, c chunks of 16 bytes, k columns.
"""

# ruff: noqa: N803, N806 - compile-time constants of a kernel are upper case, as is the habit in Triton
# ruff: noqa: RUF005 - Triton has no starred tuples
# Tuples of a kernel grow in loops that the compiler unrolls:
# mypy: disable-error-code="assignment, misc"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from wsi_rt.kernels.aot_case import SHIPPED_SM, AotCase
from wsi_rt.kernels.block_linear.configs import MATRIX_ROWS, VECTOR_ROWS
from wsi_rt.kernels.block_linear.launch import SUM_BLOCK, launch_options


@triton.jit
def _centred(b_w, b_z, magic, INDEX: tl.constexpr, BITS: tl.constexpr):
    """b_w uint32 [N, C, 4], b_z uint32 [N, C] or None -> fp32 [N, C, 4]: code INDEX of a word less its zero, times
    2^(BITS * (INDEX % (16 / BITS))).

    `magic` (2^23 in bits) is an argument of the kernel: LOP3 masks and joins at once only if one of the two constants
    is in a register, and a compile-time one never is. 0.75 instructions a weight less on sm_90.
    """
    SHIFT: tl.constexpr = BITS * (INDEX % (16 // BITS))
    b_half = b_w if INDEX < 16 // BITS else b_w >> 16
    b_code = ((b_half & (((1 << BITS) - 1) << SHIFT)) | magic).to(tl.float32, bitcast=True)
    if b_z is None:
        b_centred = b_code - (8388608.0 + (1 << (BITS - 1 + SHIFT)))
    else:
        b_centred = b_code - ((b_z << SHIFT) | magic).to(tl.float32, bitcast=True)[:, :, None]
    return b_centred


@triton.jit
def _of_blocks(o_n, o_c, blocks, BITS: tl.constexpr, BLOCK: tl.constexpr):
    """Where every chunk's scale and zero lie: [N, C]."""
    return o_n[:, None] * blocks + (o_c // (BLOCK * BITS // 128))[None, :]


@triton.jit
def _columns(b_x, BITS: tl.constexpr, CHUNKS: tl.constexpr):
    """b_x [1, K] -> 32 / BITS tensors [1, C, 4]: the columns of code 0 of every word, of code 1, ..."""
    if BITS == 4:
        even, odd = tl.split(tl.reshape(b_x, [1, CHUNKS, 4, 2, 2, 2]))
        even0, even1 = tl.split(even)
        odd0, odd1 = tl.split(odd)
        b_0, b_4 = tl.split(even0)
        b_2, b_6 = tl.split(even1)
        b_1, b_5 = tl.split(odd0)
        b_3, b_7 = tl.split(odd1)
        columns = (b_0, b_1, b_2, b_3, b_4, b_5, b_6, b_7)
    else:
        even, odd = tl.split(tl.reshape(b_x, [1, CHUNKS, 4, 2, 2]))
        b_0, b_2 = tl.split(even)
        b_1, b_3 = tl.split(odd)
        columns = (b_0, b_1, b_2, b_3)
    return columns


@triton.jit(do_not_specialize=["rows", "outputs", "units", "magic"])
def vector_kernel(
    p_x,  # [rows, inputs], rows `x_stride` apart
    p_codes,  # uint8 [outputs, blocks, BLOCK * BITS / 8]
    p_scales,  # [outputs, blocks]
    p_zeros,  # uint8 [outputs, blocks], or None
    p_out,  # [rows, outputs], dtype of x
    rows,  # 1 ... ROWS
    inputs,
    outputs,
    units,  # blocks of a row / UNIT
    x_stride,
    magic,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """BLOCK_N rows of W with all rows of x; products and sums in fp32. Grid: (ceil(outputs / BLOCK_N),).

    In a step, every thread takes one chunk of 16 bytes of each row of W: the warps split K. Their sums are added once
    at the end, in a fixed order.
    """
    WIDE: tl.constexpr = 128 // BITS  # columns of a chunk
    o_n = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    m_n = o_n < outputs
    chunks = units * (UNIT * BLOCK // WIDE)  # of a row
    p_w = p_codes.to(tl.pointer_type(tl.uint32)) + o_n[:, None, None] * (chunks * 4) + tl.arange(0, 4)[None, None, :]
    acc = ()
    for _m in tl.static_range(ROWS):
        acc = acc + (tl.zeros([BLOCK_N, CHUNKS], tl.float32),)
    for first in range(0, chunks, CHUNKS):
        o_c = first + tl.arange(0, CHUNKS)
        m_w = m_n[:, None] & (o_c < chunks)[None, :]
        o_b = _of_blocks(o_n, o_c, units * UNIT, BITS, BLOCK)
        b_s = tl.load(p_scales + o_b, mask=m_w, other=0.0).to(tl.float32)  # [BLOCK_N, CHUNKS]
        b_z = None
        if p_zeros is not None:
            b_z = tl.load(p_zeros + o_b, mask=m_w, other=0).to(tl.uint32)  # [BLOCK_N, CHUNKS]
        o_k = (first * WIDE + tl.arange(0, CHUNKS * WIDE))[None, :]
        b_x = ()  # loaded before W: the compiler keeps the layout of the last load, and W is what must not be moved
        for m in tl.static_range(ROWS):
            p_row = p_x + tl.full([], m, tl.int64) * x_stride
            b_x = b_x + (tl.load(p_row + o_k, mask=(m < rows) & (o_k < inputs), other=0.0),)
        b_w = tl.load(p_w + o_c[None, :, None] * 4, mask=m_w[:, :, None], other=0)  # [BLOCK_N, CHUNKS, 4]
        b_codes = ()
        for i in tl.static_range(32 // BITS):
            b_codes = b_codes + (_centred(b_w, b_z, magic, i, BITS),)
        sums = ()
        for m in tl.static_range(ROWS):
            columns = _columns(b_x[m], BITS, CHUNKS)
            b_sum = columns[0].to(tl.float32) * b_codes[0]
            for i in tl.static_range(1, 32 // BITS):
                b_sum += columns[i].to(tl.float32) * (2.0 ** -(BITS * (i % (16 // BITS)))) * b_codes[i]
            sums = sums + (acc[m] + tl.sum(b_sum, axis=2) * b_s,)
        acc = sums
    for m in tl.static_range(ROWS):
        b_y = tl.sum(acc[m], axis=1)  # [BLOCK_N]
        p_y = p_out + tl.full([], m, tl.int64) * outputs + o_n
        tl.store(p_y, b_y.to(p_out.dtype.element_ty), mask=(m < rows) & m_n)


@triton.jit
def _weight(b_w, b_s, b_z, magic, INDEX: tl.constexpr, BITS: tl.constexpr, DTYPE: tl.constexpr):
    """Column INDEX of every word as a weight: fp32 [N, C, 4], rounded once to DTYPE."""
    b_scale = b_s * (2.0 ** -(BITS * (INDEX % (16 // BITS))))
    return (_centred(b_w, b_z, magic, INDEX, BITS) * b_scale[:, :, None]).to(DTYPE)


@triton.jit
def _weights(b_w, b_s, b_z, magic, BITS: tl.constexpr, DTYPE: tl.constexpr):
    """b_w uint32 [N, C, 4] -> DTYPE [N, K], columns in order: joined in registers, where a thread's words lie."""
    b_0 = _weight(b_w, b_s, b_z, magic, 0, BITS, DTYPE)
    b_1 = _weight(b_w, b_s, b_z, magic, 1, BITS, DTYPE)
    b_2 = _weight(b_w, b_s, b_z, magic, 2, BITS, DTYPE)
    b_3 = _weight(b_w, b_s, b_z, magic, 3, BITS, DTYPE)
    if BITS == 4:
        b_0 = tl.join(b_0, _weight(b_w, b_s, b_z, magic, 4, BITS, DTYPE))
        b_1 = tl.join(b_1, _weight(b_w, b_s, b_z, magic, 5, BITS, DTYPE))
        b_2 = tl.join(b_2, _weight(b_w, b_s, b_z, magic, 6, BITS, DTYPE))
        b_3 = tl.join(b_3, _weight(b_w, b_s, b_z, magic, 7, BITS, DTYPE))
    b_all = tl.join(tl.join(b_0, b_2), tl.join(b_1, b_3))
    return tl.reshape(b_all, [b_w.shape[0], b_w.shape[1] * (128 // BITS)])


@triton.jit(do_not_specialize=["rows", "outputs", "units", "steps", "magic"])
def matrix_kernel(
    p_x,  # [rows, inputs], rows `x_stride` apart
    p_codes,  # uint8 [outputs, blocks, BLOCK * BITS / 8]
    p_scales,  # [outputs, blocks]
    p_zeros,  # uint8 [outputs, blocks], or None
    p_out,  # [splits, rows, outputs]: dtype of x where there is one split, else fp32
    rows,
    inputs,
    outputs,
    units,  # blocks of a row / UNIT
    x_stride,
    steps,  # of CHUNKS that a program takes
    magic,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """A tile [BLOCK_N, BLOCK_M] of W x^T over one split of K, summed in fp32. Grid: (tiles of N, of M, splits)."""
    WIDE: tl.constexpr = 128 // BITS  # columns of a chunk
    DTYPE: tl.constexpr = p_x.dtype.element_ty
    o_n = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    o_m = (tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    m_n = o_n < outputs
    m_m = o_m < rows
    chunks = units * (UNIT * BLOCK // WIDE)  # of a row
    p_w = p_codes.to(tl.pointer_type(tl.uint32)) + o_n[:, None, None] * (chunks * 4) + tl.arange(0, 4)[None, None, :]
    p_rows = p_x + o_m[:, None] * x_stride
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    begin = tl.program_id(2) * steps * CHUNKS
    for first in range(begin, tl.minimum(begin + steps * CHUNKS, chunks), CHUNKS):
        o_c = first + tl.arange(0, CHUNKS)
        m_w = m_n[:, None] & (o_c < chunks)[None, :]
        o_b = _of_blocks(o_n, o_c, units * UNIT, BITS, BLOCK)
        b_s = tl.load(p_scales + o_b, mask=m_w, other=0.0).to(tl.float32)  # [BLOCK_N, CHUNKS]
        b_z = None
        if p_zeros is not None:
            b_z = tl.load(p_zeros + o_b, mask=m_w, other=0).to(tl.uint32)  # [BLOCK_N, CHUNKS]
        o_k = (first * WIDE + tl.arange(0, CHUNKS * WIDE))[None, :]
        b_x = tl.load(p_rows + o_k, mask=m_m[:, None] & (o_k < inputs), other=0.0)  # [BLOCK_M, K]
        b_w = tl.load(p_w + o_c[None, :, None] * 4, mask=m_w[:, :, None], other=0)  # [BLOCK_N, CHUNKS, 4]
        b_weights = _weights(b_w, b_s, b_z, magic, BITS, DTYPE)  # [BLOCK_N, K]
        acc = tl.dot(b_weights, tl.trans(b_x), acc=acc, input_precision="ieee")
    p_y = p_out + (tl.program_id(2) * rows + o_m)[None, :] * outputs + o_n[:, None]
    tl.store(p_y, acc.to(p_out.dtype.element_ty), mask=m_n[:, None] & m_m[None, :])


@triton.jit(do_not_specialize=["splits"])
def sum_kernel(p_parts, p_out, splits, numel, BLOCK: tl.constexpr):
    """p_parts fp32 [splits, numel] -> p_out [numel]: summed in order. Grid: (ceil(numel / BLOCK),)."""
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_o = o < numel
    p_part = p_parts + o
    b_sum = tl.load(p_part, mask=m_o, other=0.0)
    for _ in range(1, splits):
        p_part += numel
        b_sum += tl.load(p_part, mask=m_o, other=0.0)
    tl.store(p_out + o, b_sum.to(p_out.dtype.element_ty), mask=m_o)


_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
# Format -> (bits, block, whether blocks have zeros of their own): what bundles hold. All have as many blocks as 4,096
# columns take.
_FORMATS = {"int4x32": (4, 32, True), "int8x64": (8, 64, False), "int8x128": (8, 128, False)}


def aot_cases() -> list[AotCase]:
    """The formats of bundles, where rows of x start on 16 bytes: every dtype, but blocks of 128 in fp16 alone; each
    number of rows; K split for int4 in fp16, and the sum of the splits."""
    kinds = [(dtype, name) for dtype in _DTYPES for name in _FORMATS if dtype == "fp16" or name != "int8x128"]
    cases = [
        _aot_case(sm, dtype, name, rows, False)
        for sm in SHIPPED_SM
        for dtype, name in kinds
        for rows in (*VECTOR_ROWS, *MATRIX_ROWS)
    ]
    cases += [_aot_case(sm, "fp16", "int4x32", rows, True) for sm in SHIPPED_SM for rows in MATRIX_ROWS[:2]]
    return cases + [_sum_case(sm, dtype) for sm in SHIPPED_SM for dtype in _DTYPES]


def _aot_case(sm: int, dtype: str, name: str, rows: int, split: bool) -> AotCase:
    bits, block, own_zeros = _FORMATS[name]
    kernel = vector_kernel if rows in VECTOR_ROWS else matrix_kernel
    constexprs, options = launch_options(sm, _DTYPES[dtype], rows, (4096 // block, block * bits // 8), bits)
    types = {"p_x": f"*{dtype}", "p_codes": "*u8", "p_scales": "*fp32", "p_out": "*fp32" if split else f"*{dtype}"}
    types["p_zeros"] = "*u8" if own_zeros else "constexpr"
    signature = {n: types.get(n, "constexpr" if n in constexprs else "i32") for n in kernel.arg_names}
    pointers = tuple(n for n in kernel.arg_names if signature[n].startswith("*"))
    return AotCase(
        op="block_linear",
        variant=f"{dtype}-{name}-M{rows}{'-split' if split else ''}",
        sm=sm,
        kernel=kernel,
        signature=signature,
        constexprs={**constexprs, **({} if own_zeros else {"p_zeros": None})},
        divisible=(*pointers, "inputs", "x_stride"),
        matrix=kernel is matrix_kernel and dtype != "fp32",  # no tensor core multiplies fp32 exactly
        **options,
    )


def _sum_case(sm: int, dtype: str) -> AotCase:
    return AotCase(
        op="block_linear",
        variant=f"{dtype}-sum",
        sm=sm,
        kernel=sum_kernel,
        signature={"p_parts": "*fp32", "p_out": f"*{dtype}", "splits": "i32", "numel": "i32", "BLOCK": "constexpr"},
        constexprs={"BLOCK": SUM_BLOCK},
        divisible=("p_parts", "p_out", "numel"),
        num_warps=4,
        num_stages=1,
        matrix=False,
    )
