"""Centre crop and normalisation of uint8 tiles in one pass: one program per (tile, block of its pixels)."""

# ruff: noqa: N803, N806 - compile-time constants of a kernel are upper case, as is the habit in Triton

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from wsi_rt.kernels.aot_case import SHIPPED_SM, AotCase
from wsi_rt.kernels.checks import shipped_sm
from wsi_rt.kernels.tile_normalize import is_hwc

# Per architecture: pixels of a program, and warps. At 4 pixels a thread, a byte load of an HWC warp spans 32 x 12
# bytes, 3 lines of 128: 12 loads and 3 stores of 128 pixels take about 42 cycles of the load unit, 27 B a cycle and SM,
# above what memory gives one (H100: 15). 8 pixels a thread halve that. Predicted, not measured.
CONFIGS = {
    80: {"block": 512, "num_warps": 4},
    86: {"block": 512, "num_warps": 4},
    89: {"block": 512, "num_warps": 4},
    90: {"block": 512, "num_warps": 4},
    100: {"block": 512, "num_warps": 4},
    120: {"block": 512, "num_warps": 4},
}


@triton.jit
def tile_normalize_kernel(
    p_tiles,  # [B, SIDE, SIDE, 3], or [B, 3, SIDE, SIDE], contiguous
    p_out,  # [B, 3, CROP, CROP]
    SCALE: tl.constexpr,  # three of 1 / (255 std)
    SHIFT: tl.constexpr,  # three of -mean / std
    SIDE: tl.constexpr,
    CROP: tl.constexpr,
    HWC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_tile = tl.program_id(0).to(tl.int64)
    o_p = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK] pixels of the crop, row-major
    m_p = o_p < CROP * CROP
    AT: tl.constexpr = (SIDE - CROP) // 2
    o_in = (o_p // CROP + AT) * SIDE + o_p % CROP + AT  # [BLOCK] pixels of the tile
    p_in = p_tiles + i_tile * (3 * SIDE * SIDE) + (o_in * 3 if HWC else o_in)
    p_y = p_out + i_tile * (3 * CROP * CROP) + o_p
    for c in tl.static_range(3):
        b_x = tl.load(p_in + (c if HWC else c * SIDE * SIDE), mask=m_p, other=0).to(tl.float32)  # [BLOCK]
        b_y = b_x * SCALE[c] + SHIFT[c]
        tl.store(p_y + c * CROP * CROP, b_y.to(p_out.dtype.element_ty), mask=m_p)


def tile_normalize_triton(
    tiles: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    crop: int,
    dtype: torch.dtype,
) -> Tensor:
    """Launch on checked arguments -> [B, 3, crop, crop].

    Raises KernelInputError on a GPU older than sm_80.
    """
    shape = tuple(tiles.shape)
    out = tiles.new_empty((shape[0], 3, crop, crop), dtype=dtype)
    constexprs, options = launch_options(shipped_sm(tiles), mean, std, shape[2], crop, is_hwc(shape))
    grid = (shape[0], triton.cdiv(crop * crop, constexprs["BLOCK"]))
    with torch.cuda.device_of(tiles):
        tile_normalize_kernel[grid](tiles, out, **constexprs, **options)
    return out


def launch_options(
    sm: int, mean: Sequence[float], std: Sequence[float], side: int, crop: int, hwc: bool
) -> tuple[dict[str, object], dict[str, int]]:
    """(constexprs, compiler options) of a launch, by the table of the architecture."""
    config = CONFIGS[sm]
    constexprs = {
        "SCALE": tuple(1.0 / (255.0 * s) for s in std),
        "SHIFT": tuple(-m / s for m, s in zip(mean, std, strict=True)),
        "SIDE": side,
        "CROP": crop,
        "HWC": hwc,
        "BLOCK": config["block"],
    }
    return constexprs, {"num_warps": config["num_warps"], "num_stages": 1}


def aot_cases() -> list[AotCase]:
    """256 px tiles as a decoder gives them (HWC) and 224 px tiles cropped before (CHW), every dtype."""
    return [
        _aot_case(sm, dtype, hwc) for sm in SHIPPED_SM for dtype in ("fp16", "bf16", "fp32") for hwc in (True, False)
    ]


def _aot_case(sm: int, dtype: str, hwc: bool) -> AotCase:
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    constexprs, options = launch_options(sm, mean, std, 256 if hwc else 224, 224, hwc)
    return AotCase(
        op="tile_normalize",
        variant=f"{dtype}-{'hwc256' if hwc else 'chw224'}",
        sm=sm,
        kernel=tile_normalize_kernel,
        signature={"p_tiles": "*u8", "p_out": f"*{dtype}", **dict.fromkeys(constexprs, "constexpr")},
        constexprs=constexprs,
        divisible=("p_tiles", "p_out"),
        matrix=False,
        **options,
    )
