"""The Triton entry that TensorRT launches for dilated attention. Needs Triton."""

# ruff: noqa: N803 - compile-time constants of a kernel are upper case, as is the habit in Triton

from __future__ import annotations

import triton
import triton.language as tl

from wsi_rt.kernels.dilated_attention.triton import dilated_attention_kernel


@triton.jit
def dilated_attention_packed(
    qkv, programs, branches, out,
    HEADS: tl.constexpr, ROW_STEP: tl.constexpr, BRANCHES: tl.constexpr,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`dilated_attention_kernel` on one contiguous qkv [L, 3, H, D]: what differs between launches is pointers alone.

    One input instead of q, k and v: slicing those out would move 1.5 times the bytes that the kernel itself moves. The
    nine integers of the kernel are constants of an engine, and compiled in: on sm_90, 128 registers instead of 167.
    """
    row = tl.cast(3 * HEADS * D // UNIT, tl.int32)
    head = tl.cast(D // UNIT, tl.int32)
    dilated_attention_kernel(
        qkv, qkv + HEADS * D, qkv + 2 * HEADS * D, programs, branches,
        row, head, row, head, row, head,
        tl.cast(HEADS, tl.int32), tl.cast(ROW_STEP, tl.int32), tl.cast(BRANCHES, tl.int32),
        out, D, D0, D1, UNIT, BLOCK_M, BLOCK_N, PRECISION,
    )  # fmt: skip
