"""The host's side of the kernels: which one, its configuration, the launches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from wsi_rt.kernels.block_linear import OP
from wsi_rt.kernels.block_linear.configs import MATRIX, VECTOR, VECTOR_ROWS, bucket, split_steps
from wsi_rt.kernels.checks import shipped_sm
from wsi_rt.kernels.errors import KernelInputError

CHUNK_BYTES = 16  # what one thread loads at once
UNIT = 4  # blocks of a row are counted in this many where they can be: four zeros are then one load
MAGIC = 0x4B000000  # the bits of 2^23 in fp32, whose last 23 count integers
SUM_BLOCK = 1024  # outputs of a program that sums splits
LARGEST_GRID = 65_535  # programs along the second axis of a grid


def block_linear_triton(x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, bits: int) -> Tensor:
    """Launch on checked arguments -> [B, N]. Allocates the output and, where K is split, [splits, B, N] in fp32.

    Raises KernelInputError on a GPU older than sm_80, and beyond 4,194,240 rows.
    """
    from wsi_rt.kernels.block_linear.triton import vector_kernel

    sm, rows, outputs = shipped_sm(x), x.shape[0], codes.shape[0]
    if bucket(rows) not in VECTOR_ROWS:
        return _matrix(sm, x, codes, scales, zeros, bits)
    constexprs, options = launch_options(sm, x.dtype, rows, codes.shape[1:], bits)
    out = x.new_empty((rows, outputs))
    grid = (-(-outputs // constexprs["BLOCK_N"]),)
    with torch.cuda.device_of(x):
        vector_kernel[grid](
            x, codes, scales, zeros, out, rows, x.shape[1], outputs, codes.shape[1] // constexprs["UNIT"], x.stride(0),
            MAGIC, **constexprs, **options,
        )  # fmt: skip
    return out


def _matrix(sm: int, x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, bits: int) -> Tensor:
    from wsi_rt.kernels.block_linear.triton import matrix_kernel, sum_kernel

    (rows, inputs), (outputs, blocks, width) = x.shape, codes.shape
    constexprs, options = launch_options(sm, x.dtype, rows, codes.shape[1:], bits)
    tiles_n, tiles_m = -(-outputs // constexprs["BLOCK_N"]), -(-rows // constexprs["BLOCK_M"])
    if tiles_m > LARGEST_GRID:
        raise KernelInputError(f"{OP}: {rows:,} rows, expected at most {LARGEST_GRID * constexprs['BLOCK_M']:,}")
    steps = -(-blocks * width // (constexprs["CHUNKS"] * CHUNK_BYTES))
    each = split_steps(sm, tiles_n * tiles_m, steps)
    splits = -(-steps // each)
    out = x.new_empty((rows, outputs))
    parts = out if splits == 1 else x.new_empty((splits, rows, outputs), dtype=torch.float32)
    with torch.cuda.device_of(x):
        matrix_kernel[(tiles_n, tiles_m, splits)](
            x, codes, scales, zeros, parts, rows, inputs, outputs, blocks // constexprs["UNIT"], x.stride(0),
            each, MAGIC, **constexprs, **options,
        )  # fmt: skip
        if splits > 1:
            sum_kernel[(-(-out.numel() // SUM_BLOCK),)](parts, out, splits, out.numel(), BLOCK=SUM_BLOCK, num_warps=4)
    return out


def launch_options(
    sm: int, dtype: torch.dtype, rows: int, block_shape: tuple[int, ...], bits: int
) -> tuple[dict[str, Any], dict[str, int]]:
    """(constexprs, compiler options) by the table of the architecture; block_shape: (blocks of a row, their bytes)."""
    blocks, width = block_shape
    unit = UNIT if blocks % UNIT == 0 else 1
    shared = {"BITS": bits, "BLOCK": width * 8 // bits, "UNIT": unit}
    if (size := bucket(rows)) in VECTOR_ROWS:
        v = VECTOR[sm][size]
        return {**shared, "ROWS": size, "BLOCK_N": v.block_n, "CHUNKS": v.chunks}, _options(v.num_warps, 1)
    m = MATRIX["full" if dtype == torch.float32 else "half"][sm][size]
    chunks = m.block_k * bits // 8 // CHUNK_BYTES
    return {**shared, "BLOCK_M": size, "BLOCK_N": m.block_n, "CHUNKS": chunks}, _options(m.num_warps, m.num_stages)


def _options(num_warps: int, num_stages: int) -> dict[str, int]:
    return {"num_warps": num_warps, "num_stages": num_stages}
