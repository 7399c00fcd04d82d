"""The host's side of the kernel: checks, tables on the device, one launch."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from wsi_rt.kernels.checks import check_cu_values, shipped_sm, values_readable
from wsi_rt.kernels.dilated_attention import check_branches, check_inputs
from wsi_rt.kernels.dilated_attention.configs import WIDTHS, chunks, config
from wsi_rt.kernels.dilated_attention.programs import LARGEST, branch_table, program_table, row_step
from wsi_rt.kernels.errors import KernelInputError

UNIT = 8  # strides are counted in this many elements where they can be: rows then start on 16 bytes


def dilated_attention_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segment_lengths: Sequence[int],
    dilated_ratios: Sequence[int],
    cu_seqlens: Tensor | None = None,
    precision: str = "ieee",
    out: Tensor | None = None,
) -> Tensor:
    """The public operator's arguments, shapes and branches checked -> [T, H, D] contiguous, dtype of q.

    Allocates the output (unless `out` is given, filled in place) and, once per (lengths, branches, heads), the tables.
    A captured CUDA graph reads those tables: run the same lengths once before the capture, and keep what
    `device_tables` returns for them as long as the graph.
    """
    check_branches(segment_lengths, dilated_ratios)
    check_inputs(q, k, v, cu_seqlens, precision)
    check_launch(q, k, v, cu_seqlens)
    tokens, heads, width = q.shape
    lengths = slide_lengths(tokens, cu_seqlens)
    aligned = all(stride % UNIT == 0 for x in (q, k, v) for stride in x.stride()[:2])
    constexprs, options = launch_options(shipped_sm(q), q.dtype, width, precision, aligned)
    programs, branches = device_tables(
        lengths, tuple(segment_lengths), tuple(dilated_ratios), heads, constexprs["BLOCK_M"], q.device
    )
    out = q.new_empty((tokens, heads, width)) if out is None else out
    strides = [x.stride(axis) // constexprs["UNIT"] for x in (q, k, v) for axis in (0, 1)]

    from wsi_rt.kernels.dilated_attention.triton import dilated_attention_kernel

    with torch.cuda.device_of(q):
        dilated_attention_kernel[(len(programs),)](
            q, k, v, programs, branches, *strides, heads, row_step(dilated_ratios), len(branches), out,
            **constexprs, **options,
        )  # fmt: skip
    return out


def check_launch(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> None:
    """What the kernel asks for beyond the operator: raises KernelInputError."""
    tokens, _, width = q.shape
    if width not in WIDTHS:
        raise KernelInputError(f"head width {width}, expected one of {', '.join(map(str, WIDTHS))} on a GPU")
    if tokens > LARGEST:
        raise KernelInputError(f"{tokens:,} tokens in one launch, expected at most {LARGEST:,}")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if max(x.stride()) >= 2**31:
            raise KernelInputError(f"{name} has strides {x.stride()}, expected less than 2^31: call .contiguous()")
    if cu_seqlens is not None and not values_readable(cu_seqlens):
        raise KernelInputError("cu_seqlens is on the GPU while a CUDA graph is captured, expected it on the CPU")


def slide_lengths(tokens: int, cu_seqlens: Tensor | None) -> tuple[int, ...]:
    """Tokens of each slide; reads `cu_seqlens` (on a GPU: waits for it, so keep it on the CPU)."""
    if cu_seqlens is None:
        return (tokens,)
    check_cu_values("dilated_attention", cu_seqlens, tokens, 1)
    return tuple(cu_seqlens.diff().tolist())


@lru_cache(maxsize=32)
def device_tables(
    lengths: tuple[int, ...],
    segment_lengths: tuple[int, ...],
    dilated_ratios: tuple[int, ...],
    heads: int,
    block_m: int,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """(programs [P, 5], branches [branches, 2]) int32 on `device`; all layers of a slide share them.

    0.3 MB and 6 ms to make at 50,000 tiles, 6 MB and 80 ms at a million.
    """
    programs = program_table(lengths, segment_lengths, dilated_ratios, heads, block_m)
    branches = branch_table(segment_lengths, dilated_ratios)
    return torch.from_numpy(programs).to(device), torch.from_numpy(branches).to(device)


def launch_options(
    sm: int, dtype: torch.dtype, width: int, precision: str, aligned: bool = True
) -> tuple[dict[str, Any], dict[str, int]]:
    """(constexprs, compiler options) by the table of the architecture. fp16 and bf16 ignore `precision`.

    aligned: every stride but the last is a multiple of `UNIT`, and counted in it.
    """
    full = dtype == torch.float32
    c = config(sm, precision if full else "half", width, aligned)
    d0, d1 = chunks(width)
    shape = {"D": width, "D0": d0, "D1": d1, "UNIT": UNIT if aligned else 1}
    tile = {"BLOCK_M": c.block_m, "BLOCK_N": c.block_n, "PRECISION": precision if full else "ieee"}
    return {**shape, **tile}, {"num_warps": c.num_warps, "num_stages": c.num_stages}
