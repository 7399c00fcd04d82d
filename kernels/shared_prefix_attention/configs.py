"""Which tile sizes the kernels are compiled with, per architecture, precision, head width and rows of a prefix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from wsi_rt.kernels.aot_case import SHIPPED_SM

WIDTHS = (64, 128)
ROWS_OF = {"half": (16, 32, 64), "full": (16,)}  # queries that a program multiplies a prefix with
SUFFIX_ROWS = 16  # the least that tl.dot takes; a sequence has H / Hkv queries for a KV head
LEAST_TOKENS = 128  # of a part: below it, writing and merging 512 B of fp32 a row costs as much as what it splits


@dataclass(frozen=True)
class Config:
    """One compilation: keys of a tile, warps of a program, stages of the software pipeline."""

    block_n: int
    num_warps: int
    num_stages: int


# 64 keys are what wgmma (sm_90) and tcgen05 (sm_100) multiply at least; K and V of them are 32 KB in fp16 at D = 128,
# more than an SM of any GPU here moves in the latency of its memory, so two resident programs suffice. 4 warps and 3
# stages (page numbers are loaded two steps ahead) unless that spills with Triton 3.8, in fp16 or bf16: then 8 warps, a
# shorter tile or fewer stages, whichever leaves more warps on an SM. `wsi-rt kernels --op
# shared_prefix_attention` shows what each takes.
_DEEP, _WARPS, _SHORT = Config(64, 4, 3), Config(64, 8, 2), Config(32, 4, 3)
_TWO, _ONE = Config(64, 4, 2), Config(64, 4, 1)
_ALL_DEEP = {(width, rows): _DEEP for width in WIDTHS for rows in ROWS_OF["half"]}
_ADA = _ALL_DEEP | {(128, 64): _WARPS}
_HALF = {
    80: _ADA | {(64, 64): _SHORT, (128, 32): _WARPS},
    86: _ADA,
    89: _ADA,
    90: _ALL_DEEP,
    100: {(width, rows): _ONE if rows == 64 else _TWO for width, rows in _ALL_DEEP},
    120: _ALL_DEEP | {(64, 64): _WARPS},
}

# fp32 runs on the FMA units, where a thread holds whole rows of both operands. It is there for parity, not for speed.
_FMA = {(width, rows): Config(16, 4, 2) for width in WIDTHS for rows in ROWS_OF["full"]}
_FULL = dict.fromkeys(SHIPPED_SM, _FMA) | dict.fromkeys((86, 89), _FMA | {(128, 16): Config(16, 4, 1)})
_TABLES = {"half": _HALF, "full": _FULL}


def config(sm: int, full: bool, width: int, rows: int) -> Config:
    """sm: one of SHIPPED_SM; full: fp32; width: one of WIDTHS; rows: one of ROWS_OF."""
    return _TABLES["full" if full else "half"][sm][width, rows]


def parts_options(sm: int, full: bool, width: int, rows: int) -> tuple[dict[str, Any], dict[str, int]]:
    """(constexprs, compiler options) of the first launch."""
    c = config(sm, full, width, rows)
    tile = {"D": width, "ROWS": rows, "SUFFIX_ROWS": SUFFIX_ROWS, "BLOCK_N": c.block_n, "PRECISION": "ieee"}
    return tile, {"num_warps": c.num_warps, "num_stages": c.num_stages}


def merge_options(sm: int, width: int) -> tuple[dict[str, int], dict[str, int]]:
    """(constexprs, compiler options) of the second launch: 4 heads a program, 4 values a thread at D = 128."""
    return {"D": width, "BLOCK_H": 4}, {"num_warps": 4, "num_stages": 1}
