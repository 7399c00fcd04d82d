"""The cases of `wsi-rt bench encoders`, and what each takes in arithmetic."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from wsi_rt.benchmarks.encoders.tile_cases import TILE_CASES
from wsi_rt.runtime.errors import InputError

if TYPE_CHECKING:
    from wsi_rt.export.arch import LongNetConfig

REFERENCE, OURS, INT8, LIMIT = "reference", "wsi-rt", "wsi-rt:int8", "limit"
PROVIDERS = (REFERENCE, OURS, INT8)
TILES = {f"slide-{n}": n for n in (1_000, 3_000, 10_000, 20_000, 50_000)}
# Runs in one process, the first not timed, in each round.
RUNS, ROUNDS, QUICK_ROUNDS = 2, 3, 1
LONG = 20_000  # tiles from which one run is timed, once, cold: it takes minutes
QUICK = ("slide-1000",)


def chosen(names: Sequence[str], quick: bool) -> tuple[str, ...]:
    """Raises InputError on a name that is no case."""
    known = (*TILES, *TILE_CASES)
    for name in names:
        if name not in known:
            raise InputError(f"--case is {name!r}, expected one of: {', '.join(known)}")
    return tuple(n for n in names if n in TILES) if names else (QUICK if quick else tuple(TILES))


def repeats(case: str, rounds: int) -> tuple[int, int]:
    """(rounds, runs in each)."""
    return (1, 1) if TILES[case] >= LONG else (rounds, RUNS)


def slide(c: LongNetConfig, tiles: int) -> dict[str, np.ndarray]:
    """The encoder's inputs: features as a tile encoder's last norm leaves them, tiles of a square, row by row."""
    side = math.isqrt(tiles - 1) + 1
    index = np.arange(tiles, dtype=np.int64)
    features = np.random.default_rng(0).standard_normal((tiles, c.in_width), np.float32)
    return {"features": features, "positions": np.stack([index % side, index // side], axis=1)}


def linear_flops(c: LongNetConfig, tiles: int) -> int:
    """Two for each multiply-add of the Linear layers."""
    layer = 4 * c.width**2 + 2 * c.width * c.ffn
    return 2 * ((tiles + 1) * layer * c.depth + tiles * c.in_width * c.width)


def attention_flops(c: LongNetConfig, tiles: int) -> int:
    """The same of scores and values, zero-padded keys and queries included, as published."""
    total = 0
    for w, r in zip(c.segment_lengths, c.dilated_ratios, strict=True):
        segment = min(w, tiles + 1)
        kept, segments = -(-segment // r), -(-(tiles + 1) // segment)
        total += segments * kept**2
    return 4 * total * c.width * c.depth
