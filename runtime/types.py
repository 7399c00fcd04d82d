"""The data that flows from a slide to an answer: frozen, checked once where it is born.

SlideRef -> TileGrid -> TileBatch -> TileFeatures -> SlideTokens -> (llm.prefix.SlidePrefix) -> Answer
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wsi_rt.runtime.errors import FeatureFileError

TILE_PX = 256  # tile edge at the working resolution (SPEC: 256 px at 0.5 um/px)
POOLED_TOKENS = 576  # slide tokens after adaptive pooling


@dataclass(frozen=True)
class Provenance:
    """What made a value: the maker, the digest of what it was made from, and the settings used."""

    maker: str
    digest: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class SlideRef:
    """A readable slide: where it is, how large, at what resolution.

    `size0` is (width, height) in level-0 px; `mpp0` is um per level-0 px; `mpp_source` says where
    the value came from (a property name or `--mpp`). `bounds0` is (x, y, width, height) in level-0 px of
    the scanned area, where the file declares one (MIRAX, SCN).
    """

    path: Path
    size0: tuple[int, int]
    mpp0: float
    mpp_source: str
    provenance: Provenance
    bounds0: tuple[int, int, int, int] | None = None


@dataclass(frozen=True)
class TileGrid:
    """Kept tiles of one slide.

    xy0: [N, 2] int64, level-0 px of each tile's top-left corner, in `order`.
    patch_size_level0: tile edge (and step) in level-0 px.
    cells: tiles of the whole grid before tissue selection (N when unknown).
    """

    xy0: NDArray[np.int64]
    patch_size_level0: int
    order: str = "row-major"
    cells: int = 0
    provenance: Provenance = field(default_factory=lambda: Provenance("unknown"))

    def __post_init__(self) -> None:
        if self.xy0.ndim != 2 or self.xy0.shape[1] != 2 or self.xy0.dtype != np.int64:
            raise FeatureFileError(
                f"tile coordinates are {self.xy0.dtype}{list(self.xy0.shape)}, expected int64 [N, 2]"
            )
        if self.patch_size_level0 <= 0:
            raise FeatureFileError(f"patch_size_level0 is {self.patch_size_level0}, expected a positive number of px")

    def __len__(self) -> int:
        return int(self.xy0.shape[0])


@dataclass(frozen=True)
class TileFailure:
    """A tile that could not be read, tried again once.

    index: into the grid.    xy0: level-0 px of its top-left corner.    reason: one line.
    """

    index: int
    xy0: tuple[int, int]
    reason: str


@dataclass(frozen=True)
class TileBatch:
    """pixels: u8 [B, 256, 256, 3] RGB; index: [B] int64 into the grid; failures: tiles among them that could not be
    read, whose pixels are white."""

    pixels: NDArray[np.uint8]
    index: NDArray[np.int64]
    failures: tuple[TileFailure, ...] = ()


@dataclass(frozen=True)
class TileFeatures:
    """x: [N, C] f32, one row per tile of `grid`, in its order."""

    x: NDArray[np.float32]
    grid: TileGrid
    provenance: Provenance
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.x.ndim != 2 or self.x.shape[0] != len(self.grid):
            raise FeatureFileError(
                f"tile features are {list(self.x.shape)} for {len(self.grid)} coordinates, expected [N, C]"
            )


@dataclass(frozen=True)
class SlideTokens:
    """tokens: [576, C] f32, pooled and normed (C is 768 unpadded or 1024 padded in the published model).

    distinct: how many of the 576 are distinct (min(N, 576)); None when a file does not tell.
    """

    tokens: NDArray[np.float32]
    provenance: Provenance
    distinct: int | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Answer:
    """One answer. `stop_reason` is eos, length, stop_string, cancelled, or choice: a closed question, whose options'
    probabilities are in `choices`."""

    text: str
    token_ids: tuple[int, ...]
    stop_reason: str
    timings_ms: Mapping[str, float]
    tiles: Mapping[str, int | None]
    engines: Mapping[str, str]
    settings: Mapping[str, Any]
    notes: tuple[str, ...] = ()
    choices: Mapping[str, float] | None = None

    def to_json(self) -> dict[str, Any]:
        """The object that `ask --json` prints; `choices` for a closed question only."""
        choices = {} if self.choices is None else {"choices": dict(self.choices)}
        return {
            "text": self.text,
            **choices,
            "token_ids": list(self.token_ids),
            "stop_reason": self.stop_reason,
            "timings_ms": {k: round(v, 3) for k, v in self.timings_ms.items()},
            "tiles": dict(self.tiles),
            "engines": dict(self.engines),
            "settings": dict(self.settings),
            "notes": list(self.notes),
        }
