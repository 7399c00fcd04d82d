"""Which tile sizes the kernel is compiled with, per architecture, precision and head width."""

from __future__ import annotations

from dataclasses import dataclass

from wsi_rt.kernels.aot_case import SHIPPED_SM

WIDTHS = (8, 16, 24, 32, 48, 64, 96, 128)
PRECISIONS = ("ieee", "tf32")  # how fp32 is multiplied; fp16 and bf16 know one way


@dataclass(frozen=True)
class Config:
    """One compilation: queries and keys of a tile, warps of a program, stages of the software pipeline."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


def chunks(head_width: int) -> tuple[int, int]:
    """Widths (D0, D1) of the two power-of-two column chunks a head is multiplied in; D1 = 0: one chunk.

    48 = 32 + 16 and 96 = 64 + 32 exactly: nothing is loaded or multiplied in vain, where one chunk of 64 would waste a
    quarter. 128 = 64 + 64 takes fewer registers than one chunk: 233 against 236 on sm_90, and no spills on sm_100
    where one chunk has 24. 24 is one masked chunk of 32: the tensor cores contract at least 16 fp16 values, so 16 + 8
    would be multiplied as 16 + 16, no less work for more instructions. 8 is masked to 16 for the same reason. Masked
    columns are not loaded.
    """
    halves = {48: (32, 16), 96: (64, 32), 128: (64, 64)}
    return halves.get(head_width, (max(16, 1 << (head_width - 1).bit_length()), 0))


# 64 queries: what a run of 1,024 tokens (the shortest published segment) holds of one residue modulo 16, and the least
# that wgmma (sm_90) and tcgen05 (sm_100) multiply. Keys, warps and stages are the outcome of a static search over
# {16, 32, 64, 128} x {4, 8} x {1, 2, 3} with Triton 3.8: of those without spills (in fp16 and bf16) and within shared
# memory, the largest warps / (warps + 8) x keys / (keys + 27), with `warps` those resident on an SM, which hide
# latency, and 27 keys the work of a block that does not grow with it (rescaling, row reductions).
_WIDE = Config(64, 128, 4, 2)
_EVEN = Config(64, 64, 4, 2)
_DEEP = Config(64, 64, 4, 3)
_NARROW = Config(64, 32, 4, 2)
_PAIRED = Config(64, 32, 8, 2)

_HOPPER = dict.fromkeys(WIDTHS, _EVEN)
_AMPERE = _HOPPER | {48: _WIDE, 96: _DEEP, 128: _PAIRED}
_BLACKWELL = _HOPPER | {24: Config(64, 128, 4, 3), 32: _WIDE, 48: Config(64, 32, 4, 3), 96: _DEEP}
_CONSUMER = _HOPPER | {24: Config(64, 128, 4, 3), 32: _NARROW, 128: Config(64, 32, 8, 3)}
_HALF = {80: _AMPERE, 86: _AMPERE, 89: _AMPERE, 90: _HOPPER, 100: _BLACKWELL, 120: _CONSUMER}

# fp32 "ieee" runs on the FMA units (no tensor core multiplies fp32 exactly): a thread holds whole rows of both
# operands, and registers shrink the tile. It is there for parity, not for speed.
_FMA, _FMA_LONG, _FMA_SMALL = Config(32, 32, 8, 2), Config(32, 64, 8, 2), Config(16, 16, 8, 2)
_IEEE = dict.fromkeys(WIDTHS, _FMA) | {8: _FMA_LONG, 16: _FMA_LONG, 96: _FMA_SMALL, 128: _FMA_SMALL}
_TF32 = dict.fromkeys(WIDTHS, _NARROW) | {64: _PAIRED, 96: _PAIRED, 128: _PAIRED}
# Rows that do not start on 16 bytes are copied element by element through registers: smaller tiles, one for all widths
# but those at which it spills with Triton 3.8 (half: 4 instructions on sm_86 and sm_89; ieee: 4 on sm_90, 16 on sm_100,
# 8 on sm_120). tf32 with 64 queries in 2 stages has 8 on sm_80 at D = 128, 19 on sm_100 at D = 96.
_OFF_HALF, _OFF_IEEE, _OFF_TF32 = (dict.fromkeys(WIDTHS, c) for c in (_PAIRED, _FMA_SMALL, Config(32, 16, 8, 2)))
_UNALIGNED = {
    "half": dict.fromkeys(SHIPPED_SM, _OFF_HALF) | dict.fromkeys((86, 89), _OFF_HALF | {128: Config(32, 32, 8, 2)}),
    "ieee": dict.fromkeys(SHIPPED_SM, _OFF_IEEE)
    | dict.fromkeys((90, 100), _OFF_IEEE | {48: Config(16, 16, 8, 1)})
    | {120: _OFF_IEEE | {24: Config(16, 16, 4, 2)}},
    "tf32": dict.fromkeys(SHIPPED_SM, _OFF_TF32)
    | {90: dict.fromkeys(WIDTHS, Config(64, 16, 8, 2)), 100: dict.fromkeys(WIDTHS, Config(64, 16, 8, 3))},
}
_TABLES = {
    "half": _HALF,
    "ieee": dict.fromkeys(SHIPPED_SM, _IEEE),
    "tf32": dict.fromkeys(SHIPPED_SM, _TF32),
}


def config(sm: int, kind: str, head_width: int, aligned: bool = True) -> Config:
    """sm: one of SHIPPED_SM; kind: "half" (fp16, bf16), or a precision of fp32; head_width: one of WIDTHS.

    aligned: the rows of q, k and v start on 16 bytes, as those of every tensor of these widths do that is contiguous
    and begins on 16 bytes itself.
    """
    return (_TABLES if aligned else _UNALIGNED)[kind][sm][head_width]
