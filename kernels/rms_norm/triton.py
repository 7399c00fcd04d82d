"""RMSNorm of rows that lie in registers, the residual sum before it in the same pass: one read, one write of each."""

# ruff: noqa: N803 - compile-time constants of a kernel are upper case, as is the habit in Triton

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from wsi_rt.kernels.aot_case import SHIPPED_SM, AotCase
from wsi_rt.kernels.checks import shipped_sm
from wsi_rt.kernels.errors import KernelInputError
from wsi_rt.kernels.rms_norm import WIDEST

# Per architecture: the least elements of a program (rows narrower than that share one: a head of 128), elements of a
# warp, most warps. A 7 B row of 4,096 takes 8 warps at 16 values a thread: two fp16 loads of 16 bytes each. A decoding
# step has at most some tens of rows, fewer than SMs, so what counts is the latency of one row, not bandwidth.
CONFIGS = {sm: {"least": 1024, "per_warp": 512, "num_warps": 8} for sm in SHIPPED_SM}


@triton.jit(do_not_specialize=["rows"])
def rms_norm_kernel(
    p_x,  # [T, C], rows `x_stride` apart
    p_residual,  # [T, C], rows `residual_stride` apart, or None
    p_weight,  # [C]
    rows,
    x_stride,
    residual_stride,
    p_out,  # [T, C]
    p_sum,  # [T, C], or None
    EPS: tl.constexpr,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,  # power of 2 >= C
):
    o_t = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # [ROWS]
    o_c = tl.arange(0, BLOCK)
    m = (o_t < rows)[:, None] & (o_c < C)[None, :]  # [ROWS, BLOCK]
    o_y = o_t[:, None] * C + o_c[None, :]
    b_x = tl.load(p_x + o_t[:, None] * x_stride + o_c[None, :], mask=m, other=0.0).to(tl.float32)
    if p_residual is not None:
        p_r = p_residual + o_t[:, None] * residual_stride + o_c[None, :]
        b_sum = (b_x + tl.load(p_r, mask=m, other=0.0).to(tl.float32)).to(p_sum.dtype.element_ty)
        tl.store(p_sum + o_y, b_sum, mask=m)
        b_x = b_sum.to(tl.float32)  # what is normed is what the next layer adds to
    rstd = tl.div_rn(1.0, tl.sqrt_rn(tl.sum(b_x * b_x, 1) / C + EPS))  # [ROWS]
    b_w = tl.load(p_weight + o_c, mask=o_c < C, other=0.0).to(tl.float32)  # [BLOCK]
    tl.store(p_out + o_y, (b_x * rstd[:, None] * b_w[None, :]).to(p_out.dtype.element_ty), mask=m)


def rms_norm_triton(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Launch on checked arguments -> [T, C]. Raises KernelInputError above WIDEST channels, and on an older GPU."""
    out = x.new_empty(x.shape)
    _launch(x, None, weight, eps, out, None)
    return out


def add_rms_norm_triton(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Launch on checked arguments -> (normed, sum) [T, C]. Raises KernelInputError as `rms_norm_triton`."""
    out, total = x.new_empty(x.shape), residual.new_empty(residual.shape)
    _launch(x, residual, weight, eps, out, total)
    return out, total


def _launch(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, out: Tensor, total: Tensor | None) -> None:
    rows, channels = x.shape
    if channels > WIDEST:
        raise KernelInputError(f"{channels} channels, expected at most {WIDEST} on a GPU")
    constexprs, options = launch_options(shipped_sm(x), channels, eps)
    stride = 0 if residual is None else residual.stride(0)
    with torch.cuda.device_of(x):
        rms_norm_kernel[(triton.cdiv(rows, constexprs["ROWS"]),)](
            x, residual, weight, rows, x.stride(0), stride, out, total, **constexprs, **options
        )


def launch_options(sm: int, channels: int, eps: float) -> tuple[dict[str, int | float], dict[str, int]]:
    """(constexprs, compiler options) of a launch, by the table of the architecture."""
    config = CONFIGS[sm]
    block = triton.next_power_of_2(channels)
    rows = max(1, config["least"] // block)
    warps = min(config["num_warps"], max(1, rows * block // config["per_warp"]))
    return {"EPS": eps, "C": channels, "ROWS": rows, "BLOCK": block}, {"num_warps": warps, "num_stages": 1}


def aot_cases() -> list[AotCase]:
    """A 7 B model's rows of 4,096: alone, after a sum of one dtype, and after a sum in fp32; and its heads of 128."""
    plain = [(dtype, None, channels) for dtype in ("fp16", "bf16", "fp32") for channels in (4096, 128)]
    summed = [("fp16", "fp16"), ("bf16", "bf16"), ("fp32", "fp32"), ("fp16", "fp32"), ("bf16", "fp32")]
    return [
        _aot_case(sm, dtype, residual, channels)
        for sm in SHIPPED_SM
        for dtype, residual, channels in (*plain, *((x, r, 4096) for x, r in summed))
    ]


def _aot_case(sm: int, dtype: str, residual: str | None, channels: int) -> AotCase:
    constexprs, options = launch_options(sm, channels, eps=1e-5)
    types = dict.fromkeys(("p_x", "p_weight", "p_out"), f"*{dtype}") | {"rows": "i32", "x_stride": "i32"}
    types |= dict.fromkeys(("p_residual", "p_sum"), f"*{residual}" if residual else "constexpr")
    types |= {"residual_stride": "i32", **dict.fromkeys(constexprs, "constexpr")}
    return AotCase(
        op="rms_norm",
        variant=f"{dtype}-C{channels}{f'-add-{residual}' if residual else ''}",
        sm=sm,
        kernel=rms_norm_kernel,
        signature={name: types[name] for name in rms_norm_kernel.arg_names},
        constexprs={**constexprs, **({} if residual else {"p_residual": None, "p_sum": None})},
        divisible=(*(n for n, kind in types.items() if kind.startswith("*")), "x_stride", "residual_stride"),
        matrix=False,
        **options,
    )
