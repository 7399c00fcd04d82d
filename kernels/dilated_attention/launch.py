"""The host's side of the kernel: checks, tables on the device, one launch."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from wsi_rt.kernels.checks import capturing, check_cu_values, shipped_sm
from wsi_rt.kernels.dilated_attention import check_branches, check_inputs
from wsi_rt.kernels.dilated_attention.configs import WIDTHS, chunks, config
from wsi_rt.kernels.dilated_attention.programs import FIELDS, LARGEST, branch_table, program_table, row_step
from wsi_rt.kernels.errors import KernelInputError

UNIT = 8  # strides are counted in this many elements where they can be: rows then start on 16 bytes
ALIGNED_BYTES = 16  # what one thread loads at once
KEPT_TABLES = 8  # pairs on the device; one a (batch of slides, branches): 2.4 MB at 50,000 tiles, 48 MB at a million


def dilated_attention_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segment_lengths: Sequence[int],
    dilated_ratios: Sequence[int],
    cu_seqlens: Tensor | None = None,
    precision: str = "ieee",
) -> Tensor:
    """The public operator's arguments, shapes and branches checked -> [T, H, D] contiguous, dtype of q.

    Allocates the output and, once per (lengths, branches, heads), the tables: see `device_tables`.
    """
    check_branches(segment_lengths, dilated_ratios)
    check_inputs(q, k, v, cu_seqlens, precision)
    check_launch(q, k, v)
    tokens, heads, width = q.shape
    lengths = slide_lengths(tokens, cu_seqlens)
    constexprs, options = launch_options(shipped_sm(q), q.dtype, width, precision, rows_aligned(q, k, v))
    programs, branches = device_tables(
        lengths, tuple(segment_lengths), tuple(dilated_ratios), heads, constexprs["BLOCK_M"], q.device
    )
    out = q.new_empty((tokens, heads, width))
    strides = [x.stride(axis) // constexprs["UNIT"] for x in (q, k, v) for axis in (0, 1)]

    from wsi_rt.kernels.dilated_attention.triton import dilated_attention_kernel

    with torch.cuda.device_of(q):
        dilated_attention_kernel[(len(programs),)](
            q, k, v, programs, branches, *strides, heads, row_step(dilated_ratios), len(branches), out,
            **constexprs, **options,
        )  # fmt: skip
    _in_use(programs, branches)
    return out


def _in_use(*tables: Tensor) -> None:
    """Tables that leave the cache are not given to others before this stream has read them, whoever made them.

    A captured graph reads them at every replay, which no stream knows of: its owner keeps them (`device_tables`).
    """
    for x in tables:
        if x.is_cuda and not capturing(x.device):
            x.record_stream(torch.cuda.current_stream(x.device))


def rows_aligned(*tensors: Tensor) -> bool:
    """Whether every row [D] of tensors [T, H, D] starts on 16 bytes: their first elements do, and all their strides."""
    starts = all(x.data_ptr() % ALIGNED_BYTES == 0 for x in tensors)
    return starts and all(stride % UNIT == 0 for x in tensors for stride in x.stride()[:2])


def check_launch(q: Tensor, k: Tensor, v: Tensor) -> None:
    """What the kernel asks for beyond the operator: raises KernelInputError."""
    tokens, _, width = q.shape
    if width not in WIDTHS:
        raise KernelInputError(f"head width {width}, expected one of {', '.join(map(str, WIDTHS))} on a GPU")
    if tokens > LARGEST:
        raise KernelInputError(f"{tokens:,} tokens in one launch, expected at most {LARGEST:,}")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if max(x.stride()) >= 2**31:
            raise KernelInputError(f"{name} has strides {x.stride()}, expected less than 2^31: call .contiguous()")


def slide_lengths(tokens: int, cu_seqlens: Tensor | None) -> tuple[int, ...]:
    """Tokens of each slide; reads `cu_seqlens` (on a GPU: waits for it, so keep it on the CPU)."""
    if cu_seqlens is None:
        return (tokens,)
    ends = check_cu_values("dilated_attention", cu_seqlens, tokens, 1)
    if ends is None:
        raise KernelInputError(
            "dilated_attention: cu_seqlens is on the GPU while a CUDA graph is captured, expected it on the CPU: "
            "call .cpu() before the capture"
        )
    return tuple(b - a for a, b in pairwise(ends))


@lru_cache(maxsize=KEPT_TABLES)
def device_tables(
    lengths: tuple[int, ...],
    segment_lengths: tuple[int, ...],
    dilated_ratios: tuple[int, ...],
    heads: int,
    block_m: int,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """(programs [P, 5], branches [branches, 2]) int32 on `device`; all layers of a slide share them.

    0.3 MB and 6 ms to make at 50,000 tiles, 6 MB and 80 ms at a million. The last KEPT_TABLES stay on the device. A
    captured CUDA graph reads them at every replay: its owner runs the same lengths once before the capture, then keeps
    what this returns for them as long as the graph.

    Raises KernelInputError where they would have to be made while a graph is captured (the copy cannot be recorded: its
    source is gone at the replay), and above 2^31 entries.
    """
    if capturing(device):
        raise KernelInputError(
            f"dilated_attention: no tables yet for slides of {_shown(lengths)} tokens while a CUDA graph is captured, "
            "expected the same call to have run once before the capture"
        )
    programs = program_table(lengths, segment_lengths, dilated_ratios, heads, block_m)
    if programs.size >= 2**31:  # the kernel's offset into them is int32
        raise KernelInputError(f"{len(programs):,} programs in one launch, expected fewer than {2**31 // FIELDS:,}")
    branches = branch_table(segment_lengths, dilated_ratios)
    return torch.from_numpy(programs).to(device), torch.from_numpy(branches).to(device)


def _shown(lengths: tuple[int, ...]) -> str:
    listed = ", ".join(f"{n:,}" for n in lengths[:4])
    return listed if len(lengths) <= 4 else f"{listed}, ... ({len(lengths)} slides)"


def launch_options(
    sm: int, dtype: torch.dtype, width: int, precision: str, aligned: bool = True
) -> tuple[dict[str, Any], dict[str, int]]:
    """(constexprs, compiler options) by the table of the architecture. fp16 and bf16 ignore `precision`.

    aligned: as `rows_aligned` says; strides are then counted in `UNIT`.
    """
    full = dtype == torch.float32
    c = config(sm, precision if full else "half", width, aligned)
    d0, d1 = chunks(width)
    shape = {"D": width, "D0": d0, "D1": d1, "UNIT": UNIT if aligned else 1}
    tile = {"BLOCK_M": c.block_m, "BLOCK_N": c.block_n, "PRECISION": precision if full else "ieee"}
    return {**shape, **tile}, {"num_warps": c.num_warps, "num_stages": c.num_stages}
