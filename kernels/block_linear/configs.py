"""Which kernel and which tile sizes a product runs with, per architecture and number of rows.

Chosen from compiled code (registers, instructions a weight, shared memory): nothing here ran on a GPU yet.
"""

from __future__ import annotations

from dataclasses import dataclass

from wsi_rt.kernels.aot_case import SHIPPED_SM

VECTOR_ROWS = (1, 4)  # rows of x that the vector kernel is compiled for
MATRIX_ROWS = (16, 32, 64)  # rows of x in a tile of the matrix kernel; more rows are several tiles


@dataclass(frozen=True)
class Vector:
    """block_n: rows of W a program multiplies. chunks: 16-byte pieces of a row in one step, one for each thread."""

    block_n: int
    chunks: int
    num_warps: int


@dataclass(frozen=True)
class Matrix:
    """block_n: rows of W of a tile. block_k: columns of one step, a multiple of 32."""

    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


# All warps of a program share its rows and split K: a thread unpacks its 32 columns of x once for block_n rows of W.
# With Triton 3.8 on sm_90, int4 and one row of x, 4 rows of W take 128 registers and 5.1 instructions a weight (counted
# in the loop of the compiled code); 8 take 255 registers, which halves the resident warps. Four rows of x take 128
# registers for themselves: 2 rows of W.
_VECTOR = {1: Vector(4, 128, 4), 4: Vector(2, 128, 4)}
VECTOR = dict.fromkeys(SHIPPED_SM, _VECTOR)

# W is the left factor, so that its rows fill the 64 that wgmma (sm_90) and tcgen05 (sm_100) multiply at once, however
# few rows x has; mma (the others) multiplies 16 at once, one group for each of 4 warps.
_HALF = {16: Matrix(64, 128, 4, 3), 32: Matrix(64, 128, 4, 3), 64: Matrix(128, 128, 8, 3)}
_SMALL = _HALF | {64: Matrix(128, 128, 8, 2)}  # three stages of int8 take 104 KiB of shared memory, a block has 99
# int8 spills on sm_120 otherwise: 3 to 9 instructions with the tiles above.
_BLACKWELL = _SMALL | {16: Matrix(64, 64, 4, 3), 32: Matrix(64, 128, 4, 2)}
# fp32 runs on the FMA units (no tensor core multiplies fp32 exactly): both factors lie in registers, which shrinks the
# tile. It is there for parity, not for speed.
_FULL = {16: Matrix(32, 32, 4, 2), 32: Matrix(32, 32, 4, 2), 64: Matrix(32, 32, 4, 2)}
MATRIX = {
    "half": dict.fromkeys(SHIPPED_SM, _HALF) | dict.fromkeys((86, 89), _SMALL) | {120: _BLACKWELL},
    "full": dict.fromkeys(SHIPPED_SM, _FULL),
}

# Programs that fill a GPU of the architecture: two for each SM of the one in gpus.py. Where a product has fewer, K is
# split among programs. A table and not the GPU at hand: sums are taken in the same order on all GPUs of one
# architecture.
PROGRAMS = {80: 2 * 108, 86: 2 * 82, 89: 2 * 142, 90: 2 * 132, 100: 2 * 148, 120: 2 * 170}
LEAST_STEPS = 4  # of a split: fewer would not fill the pipeline of loads


def bucket(rows: int) -> int:
    """Rows of x that a product of `rows` is compiled for: one of VECTOR_ROWS or MATRIX_ROWS, the largest for more."""
    return next((b for b in (*VECTOR_ROWS, *MATRIX_ROWS) if rows <= b), MATRIX_ROWS[-1])


def split_steps(sm: int, tiles: int, steps: int) -> int:
    """Steps of K that one program takes, where a product has `tiles` tiles of the output and `steps` steps of K."""
    splits = max(1, min(PROGRAMS[sm] // tiles, steps // LEAST_STEPS))
    return -(-steps // splits)
