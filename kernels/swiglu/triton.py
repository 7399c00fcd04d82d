"""silu(gate) * up in one pass: one program per (row, block of its channels)."""

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

# Per architecture: channels of a program, and warps: 8 values a thread, one fp16 load of 16 bytes each of gate and up.
# 11,008 channels make 11 programs a row, the last three quarters full.
CONFIGS = {sm: {"block": 1024, "num_warps": 4} for sm in SHIPPED_SM}


@triton.jit
def swiglu_kernel(
    p_x,  # [T, 2 * width], rows `stride` apart
    stride,
    width,
    p_out,  # [T, width]
    BLOCK: tl.constexpr,
):
    i_t = tl.program_id(0).to(tl.int64)
    o_f = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    m_f = o_f < width
    p_gate = p_x + i_t * stride + o_f
    b_gate = tl.load(p_gate, mask=m_f, other=0.0).to(tl.float32)  # [BLOCK]
    b_up = tl.load(p_gate + width, mask=m_f, other=0.0).to(tl.float32)  # [BLOCK]
    # exp(-gate) is infinite below -88: the quotient is then -0, as is silu to fp32
    b_y = b_gate / (1.0 + tl.exp(-b_gate)) * b_up
    tl.store(p_out + i_t * width + o_f, b_y.to(p_out.dtype.element_ty), mask=m_f)


def swiglu_triton(gate_up: Tensor) -> Tensor:
    """Launch on checked arguments -> [T, F]. Raises KernelInputError above 67 million channels, and on an older GPU."""
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    constexprs, options = launch_options(shipped_sm(gate_up))
    blocks = triton.cdiv(width, constexprs["BLOCK"])
    if blocks > MOST_BLOCKS:
        raise KernelInputError(f"{width:,} channels, expected at most {MOST_BLOCKS * constexprs['BLOCK']:,} on a GPU")
    out = gate_up.new_empty((rows, width))
    with torch.cuda.device_of(gate_up):
        swiglu_kernel[(rows, blocks)](gate_up, gate_up.stride(0), width, out, **constexprs, **options)
    return out


def launch_options(sm: int) -> tuple[dict[str, int], dict[str, int]]:
    """(constexprs, compiler options) of a launch, by the table of the architecture."""
    config = CONFIGS[sm]
    return {"BLOCK": config["block"]}, {"num_warps": config["num_warps"], "num_stages": 1}


def aot_cases() -> list[AotCase]:
    """Any width that is a multiple of 16 (11,008 of a 7 B model), every dtype."""
    return [_aot_case(sm, dtype) for sm in SHIPPED_SM for dtype in ("fp16", "bf16", "fp32")]


def _aot_case(sm: int, dtype: str) -> AotCase:
    constexprs, options = launch_options(sm)
    types = {"p_x": f"*{dtype}", "stride": "i32", "width": "i32", "p_out": f"*{dtype}", "BLOCK": "constexpr"}
    return AotCase(
        op="swiglu",
        variant=dtype,
        sm=sm,
        kernel=swiglu_kernel,
        signature=types,
        constexprs=constexprs,
        divisible=("p_x", "stride", "width", "p_out"),
        matrix=False,
        **options,
    )
