"""Bias, sin-cos position and CLS row in one launch; no position table, exact range reduction.

An angle is counted in turns, as a 64-bit fixed-point fraction: index x (omega / 2 pi) x 2^64 in wrapping integer
arithmetic leaves exactly the fraction of a turn, whatever the index (an fp32 product, at 999 radians, would be off by
3e-5). What is left is rounded to fp32 only once it lies within an eighth of a turn of a multiple of a quarter.
"""

# ruff: noqa: N803 - compile-time constants of a kernel are upper case, as is the habit in Triton

from __future__ import annotations

import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from wsi_rt.kernels.aot_case import SHIPPED_SM, AotCase
from wsi_rt.kernels.checks import shipped_sm
from wsi_rt.kernels.slide_embed import GRID

SLIDES_AT_ONCE = 16  # boundaries compared with a block of rows in one step

# Per architecture: rows and channels of the tile a program writes, and warps. 256 divides the published 768 channels
# without waste; 8 rows share one load of bias and phase steps.
CONFIGS = {
    80: {"rows": 8, "block": 256, "num_warps": 4},
    86: {"rows": 8, "block": 256, "num_warps": 4},
    89: {"rows": 8, "block": 256, "num_warps": 4},
    90: {"rows": 8, "block": 256, "num_warps": 4},
    100: {"rows": 8, "block": 256, "num_warps": 4},
    120: {"rows": 8, "block": 256, "num_warps": 4},
}


@triton.jit
def sin_of_turns(phase):
    """Signed int64 in units of 2^-64 turn -> sine, fp32, error <= 1.2e-7.

    Taylor series on [-pi/4, pi/4]: the first terms left out are x^11/11! < 2e-9 and x^12/12! < 2e-10.
    """
    p = (phase >> 32).to(tl.int32)  # units of 2^-32 turn: 1.5e-9 radians
    quarter = (p + (1 << 29)) >> 30  # nearest multiple of a quarter turn; may wrap to -2, which is 2 modulo 4
    x = (p - (quarter << 30)).to(tl.float32) * 1.4629180792671596e-09  # 2 pi / 2^32: radians
    x2 = x * x
    sin = x * (1.0 + x2 * (-1.0 / 6 + x2 * (1.0 / 120 + x2 * (-1.0 / 5040 + x2 * (1.0 / 362880)))))
    cos = 1.0 + x2 * (-0.5 + x2 * (1.0 / 24 + x2 * (-1.0 / 720 + x2 * (1.0 / 40320 + x2 * (-1.0 / 3628800)))))
    y = tl.where((quarter & 1) == 0, sin, cos)
    return tl.where((quarter & 2) == 0, y, -y)


@triton.jit
def slide_of_row(p_cu, slides, o_u, ROWS: tl.constexpr, BLOCK_S: tl.constexpr):
    """([ROWS] slides, [ROWS] whether they are CLS rows) of rows of the output; slide s begins at row cu[s] + s."""
    b_begun = tl.zeros([ROWS], tl.int32)  # how many slides begin at or before a row
    b_here = tl.zeros([ROWS], tl.int32)
    for s in range(0, slides, BLOCK_S):
        o_s = s + tl.arange(0, BLOCK_S)
        m_s = o_s < slides
        b_start = tl.load(p_cu + o_s, mask=m_s, other=0).to(tl.int64) + o_s  # [BLOCK_S]
        b_begun += tl.sum(((b_start[None, :] <= o_u[:, None]) & m_s[None, :]).to(tl.int32), 1)
        b_here += tl.sum(((b_start[None, :] == o_u[:, None]) & m_s[None, :]).to(tl.int32), 1)
    return (b_begun - 1).to(tl.int64), b_here > 0


@triton.jit(do_not_specialize=["rows", "slides"])
def slide_embed_kernel(
    p_projected,  # [N, C], rows `stride` apart
    p_positions,  # [N, 2] (col, row), rows `stride_pos` apart
    p_bias,  # [C]
    p_cls,  # [C]
    p_step,  # [C // 4] int64: omega_k / 2 pi in units of 2^-64 turn
    p_cu,  # [S + 1], or None: one slide
    rows,  # of the output: N + S
    slides,
    stride,
    stride_pos,
    p_out,  # [N + S, C]
    C: tl.constexpr,
    GRID: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    o_u = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # [ROWS] rows of the output
    if p_cu is None:
        b_s, is_cls = tl.zeros([ROWS], tl.int64), o_u == 0
    else:
        b_s, is_cls = slide_of_row(p_cu, slides, o_u, ROWS, BLOCK_S)
    o_t = o_u - b_s - 1  # [ROWS] rows of the input
    m_u = o_u < rows
    m_t = m_u & ~is_cls

    b_col = tl.load(p_positions + o_t * stride_pos, mask=m_t, other=0).to(tl.int64)  # [ROWS]
    b_row = tl.load(p_positions + o_t * stride_pos + 1, mask=m_t, other=0).to(tl.int64)  # [ROWS]
    on_grid = (b_col >= 0) & (b_col < GRID) & (b_row >= 0) & (b_row < GRID)

    o_c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK] channels: sin row, cos row, sin col, cos col
    m_c = o_c < C
    b_step = tl.load(p_step + o_c % (C // 4), mask=m_c, other=0)  # [BLOCK]
    b_shift = tl.where((o_c // (C // 4)) % 2 == 1, 1 << 62, 0)  # the cosine is the sine a quarter turn on
    b_index = tl.where((o_c < C // 2)[None, :], b_row[:, None], b_col[:, None])  # [ROWS, BLOCK]
    b_pos = sin_of_turns(b_index * b_step[None, :] + b_shift[None, :])

    b_x = tl.load(p_projected + o_t[:, None] * stride + o_c[None, :], mask=m_t[:, None] & m_c[None, :], other=0.0)
    b_bias = tl.load(p_bias + o_c, mask=m_c, other=0.0).to(tl.float32)  # [BLOCK]
    b_y = b_x.to(tl.float32) + b_bias[None, :] + b_pos
    b_y = tl.where(on_grid[:, None], b_y, float("nan"))  # would alias another tile's position: never silently
    b_first = tl.load(p_cls + o_c, mask=m_c, other=0.0).to(tl.float32)  # [BLOCK]
    b_y = tl.where(is_cls[:, None], b_first[None, :], b_y)
    p_y = p_out + o_u[:, None] * C + o_c[None, :]
    tl.store(p_y, b_y.to(p_out.dtype.element_ty), mask=m_u[:, None] & m_c[None, :])


@functools.lru_cache(maxsize=16)
def phase_steps(channels: int, device: torch.device) -> Tensor:
    """[C // 4] int64: omega_k / 2 pi in units of 2^-64 turn, from float64; omega_k = 10000^(-k / (C / 4)).

    1.5 kB at 768 channels, made once per device. float64 rounds a step by 2^-53 of itself: 1e-13 radians at index 999.
    """
    quarter = channels // 4
    omega = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    return (omega / (2 * math.pi) * 2.0**64).round().to(torch.int64).to(device)


def slide_embed_triton(
    projected: Tensor,
    positions: Tensor,
    bias: Tensor,
    cls_token: Tensor,
    cu_seqlens: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """Launch on checked arguments -> [N + S, C].

    The first call for a width and device copies the phase steps there: make it before a CUDA graph is captured.
    Raises KernelInputError on a GPU older than sm_80.
    """
    (n, channels), slides = projected.shape, 1 if cu_seqlens is None else cu_seqlens.shape[0] - 1
    out = projected.new_empty((n + slides, channels), dtype=dtype)
    constexprs, options = launch_options(shipped_sm(projected), channels)
    grid = (triton.cdiv(n + slides, constexprs["ROWS"]), triton.cdiv(channels, constexprs["BLOCK"]))
    with torch.cuda.device_of(projected):
        slide_embed_kernel[grid](
            projected,
            positions,
            bias,
            cls_token,
            phase_steps(channels, projected.device),
            cu_seqlens,
            n + slides,
            slides,
            projected.stride(0),
            positions.stride(0),
            out,
            **constexprs,
            **options,
        )
    return out


def launch_options(sm: int, channels: int) -> tuple[dict[str, int], dict[str, int]]:
    """(constexprs, compiler options) of a launch, by the table of the architecture."""
    config = CONFIGS[sm]
    constexprs = {
        "C": channels,
        "GRID": GRID,
        "ROWS": config["rows"],
        "BLOCK": min(config["block"], triton.next_power_of_2(channels)),
        "BLOCK_S": SLIDES_AT_ONCE,
    }
    return constexprs, {"num_warps": config["num_warps"], "num_stages": 1}


def aot_cases() -> list[AotCase]:
    """The published width (768), every dtype, one slide and several."""
    return [
        _aot_case(sm, dtype, several)
        for sm in SHIPPED_SM
        for dtype in ("fp16", "bf16", "fp32")
        for several in (False, True)
    ]


def _aot_case(sm: int, dtype: str, several: bool) -> AotCase:
    constexprs, options = launch_options(sm, channels=768)
    floats = dict.fromkeys(("p_projected", "p_bias", "p_cls", "p_out"), f"*{dtype}")
    integers = {"p_positions": "*i64", "p_step": "*i64", "p_cu": "*i64" if several else "constexpr"}
    scalars = dict.fromkeys(("rows", "slides", "stride", "stride_pos"), "i32")
    types = {**floats, **integers, **scalars, **dict.fromkeys(constexprs, "constexpr")}
    pointers = tuple(name for name in slide_embed_kernel.arg_names if types[name].startswith("*"))
    return AotCase(
        op="slide_embed",
        variant=f"{dtype}-{'slides' if several else 'slide'}",
        sm=sm,
        kernel=slide_embed_kernel,
        signature={name: types[name] for name in slide_embed_kernel.arg_names},
        constexprs={**constexprs, **({} if several else {"p_cu": None})},
        divisible=(*pointers, "stride"),
        matrix=False,
        **options,
    )
