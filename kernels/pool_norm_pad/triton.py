"""Pooling, LayerNorm and zero-padding in one pass over the tokens: one program per (bin, slide)."""

# ruff: noqa: N803 - compile-time constants of a kernel are upper case, as is the habit in Triton

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from wsi_rt.kernels.aot_case import SHIPPED_SM, AotCase
from wsi_rt.kernels.checks import shipped_sm
from wsi_rt.kernels.errors import KernelInputError
from wsi_rt.kernels.pool_norm_pad import WIDEST

MOST_SLIDES = 65_535  # CUDA's limit of a grid's second axis

# Per architecture: elements of the [rows, channels] tile whose sums a program holds in fp32 registers, and warps.
# All 576 programs of a slide should be resident at once, with enough loads in flight to cover memory latency: sm_90 has
# 132 SMs and wants 25 B/ns for each, so about 20 kB in flight. 8,192 elements at 4 warps take 78 to 126 registers (4 to
# 6 programs an SM, 8 kB in flight each at fp16); 4,096 take 47 to 64 (8 to 10 programs), enough for the slower
# memories, and sm_80's 108 SMs need 6 programs each.
CONFIGS = {
    80: {"elements": 4096, "num_warps": 4},
    86: {"elements": 4096, "num_warps": 4},
    89: {"elements": 4096, "num_warps": 4},
    90: {"elements": 8192, "num_warps": 4},
    100: {"elements": 8192, "num_warps": 4},
    120: {"elements": 4096, "num_warps": 4},
}


@triton.jit(do_not_specialize=["length", "leading"])
def pool_norm_pad_kernel(
    p_tokens,  # [N, C], rows `stride` apart
    p_weight,  # [NORM]
    p_bias,  # [NORM]
    p_cu,  # [S + 1], or None: one slide of `length` rows
    length,
    stride,
    leading,  # rows left out at the head of every slide
    p_out,  # [S, POOLED, PADDED]
    EPS: tl.constexpr,
    POOLED: tl.constexpr,
    C: tl.constexpr,
    PADDED: tl.constexpr,
    NORM: tl.constexpr,  # C: norm then pad; PADDED: pad then norm
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,  # power of 2 >= PADDED
):
    i_bin, i_slide = tl.program_id(0), tl.program_id(1)
    if p_cu is None:
        start, end = tl.cast(0, tl.int64), tl.cast(length, tl.int64)
    else:
        start, end = tl.load(p_cu + i_slide).to(tl.int64), tl.load(p_cu + i_slide + 1).to(tl.int64)
    start += leading
    n = end - start
    first = i_bin * n // POOLED
    last = ((i_bin + 1) * n + POOLED - 1) // POOLED

    o_r, o_c = tl.arange(0, ROWS), tl.arange(0, BLOCK)
    # Row r of the tile sums rows first + r, first + r + ROWS, ...; then a tree over the tile's rows. The order depends
    # on the bin's length alone: no atomics, and the same bits in any batch whose rows have the same stride and
    # alignment (Triton compiles for those, and may then let other threads hold other rows of the tree).
    b_sum = tl.zeros([ROWS, BLOCK], tl.float32)
    for row in range(first, last, ROWS):
        # [ROWS, BLOCK]
        p_row = p_tokens + (start + row + o_r)[:, None] * stride + o_c[None, :]
        m_row = (row + o_r < last)[:, None] & (o_c < C)[None, :]
        b_sum += tl.load(p_row, mask=m_row, other=0.0).to(tl.float32)
    b_x = tl.div_rn(tl.sum(b_sum, 0), (last - first).to(tl.float32))  # [BLOCK], 0 beyond C

    m_n = o_c < NORM
    b_x = tl.where(m_n, b_x - tl.sum(b_x, 0) / NORM, 0.0)
    rstd = tl.div_rn(1.0, tl.sqrt_rn(tl.sum(b_x * b_x, 0) / NORM + EPS))
    b_w = tl.load(p_weight + o_c, mask=m_n, other=0.0).to(tl.float32)  # [BLOCK]
    b_b = tl.load(p_bias + o_c, mask=m_n, other=0.0).to(tl.float32)  # [BLOCK]
    p_row = p_out + (i_slide.to(tl.int64) * POOLED + i_bin) * PADDED + o_c
    tl.store(p_row, (b_x * rstd * b_w + b_b).to(p_out.dtype.element_ty), mask=o_c < PADDED)


def pool_norm_pad_triton(
    tokens: Tensor,
    weight: Tensor,
    bias: Tensor,
    cu_seqlens: Tensor | None,
    eps: float,
    pooled: int,
    padded: int,
    leading: int,
    dtype: torch.dtype,
) -> Tensor:
    """Launch on checked arguments -> [pooled, padded], or [S, pooled, padded] with `cu_seqlens` [S + 1].

    Raises KernelInputError on a padded width above 8,192, on more than 65,535 slides and on a GPU older than sm_80.
    """
    if padded > WIDEST:
        raise KernelInputError(f"padded width {padded}, expected at most {WIDEST} on a GPU")
    slides = 1 if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if slides > MOST_SLIDES:
        raise KernelInputError(
            f"{slides:,} slides in one launch, expected at most {MOST_SLIDES:,} on a GPU: split them"
        )
    shape = (pooled, padded) if cu_seqlens is None else (slides, pooled, padded)
    out = tokens.new_empty(shape, dtype=dtype)
    grid = (pooled, slides)
    constexprs, options = launch_options(shipped_sm(tokens), tokens.shape[1], padded, weight.shape[0], pooled, eps)
    with torch.cuda.device_of(tokens):
        pool_norm_pad_kernel[grid](
            tokens,
            weight,
            bias,
            cu_seqlens,
            tokens.shape[0],
            tokens.stride(0),
            leading,
            out,
            **constexprs,
            **options,
        )
    return out


def launch_options(
    sm: int, channels: int, padded: int, norm: int, pooled: int, eps: float
) -> tuple[dict[str, int | float], dict[str, int]]:
    """(constexprs, compiler options) of a launch, by the table of the architecture."""
    config = CONFIGS[sm]
    block = triton.next_power_of_2(padded)
    shape = {"EPS": eps, "POOLED": pooled, "C": channels, "PADDED": padded, "NORM": norm}
    return (
        {**shape, "ROWS": max(1, config["elements"] // block), "BLOCK": block},
        {"num_warps": config["num_warps"], "num_stages": 1},
    )


def aot_cases() -> list[AotCase]:
    """The published sizes (576 tokens of 768 channels, padded to 1,024), both norm orders, one slide and several."""
    return [
        _aot_case(sm, dtype, norm, several)
        for sm in SHIPPED_SM
        for dtype in ("fp16", "bf16", "fp32")
        for norm in (768, 1024)
        for several in (False, True)
    ]


def _aot_case(sm: int, dtype: str, norm: int, several: bool) -> AotCase:
    constexprs, options = launch_options(sm, channels=768, padded=1024, norm=norm, pooled=576, eps=1e-6)
    pointers = {"p_tokens": f"*{dtype}", "p_weight": f"*{dtype}", "p_bias": f"*{dtype}"}
    lengths = {"p_cu": "*i64" if several else "constexpr", "length": "i32", "stride": "i32", "leading": "i32"}
    return AotCase(
        op="pool_norm_pad",
        variant=f"{dtype}-{'norm-pad' if norm == 768 else 'pad-norm'}-{'slides' if several else 'slide'}",
        sm=sm,
        kernel=pool_norm_pad_kernel,
        signature={**pointers, **lengths, "p_out": f"*{dtype}", **dict.fromkeys(constexprs, "constexpr")},
        constexprs={**constexprs, **({} if several else {"p_cu": None})},
        divisible=("p_tokens", "p_weight", "p_bias", *(("p_cu",) if several else ()), "stride", "p_out"),
        matrix=False,
        **options,
    )
