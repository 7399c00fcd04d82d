"""Settings a caller may choose, validated where they are made."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from wsi_rt.runtime.errors import InputError

# Turn markers a model may leak into its answer; the answer is trimmed there (SPEC 5).
STOP_STRINGS = ("\nUSER:", "\nASSISTANT:", "\nHuman:", "\nQUESTION:", "\nTASK:")
TEMPLATES = ("vicuna_v1", "llava_v1")
TARGET_MPP = 0.5  # um/px the model was trained at (SPEC 1)
MPP_RANGE = (0.05, 100.0)  # um/px; anything else is absurd (SPEC 1)
BAD_TILE = ("fail", "skip", "white")  # what becomes of a tile that cannot be read


def _require(ok: bool, flag: str, given: object, expected: str) -> None:
    if not ok:
        raise InputError(f"{flag} is {given!r}, expected {expected}")


@dataclass(frozen=True)
class GenerationSettings:
    """How an answer is generated (definitions follow transformers' logits processors, SPEC 5).

    temperature 0 is greedy; top_k 0 and top_p 1 switch those filters off; penalties see generated
    tokens only. `seed` makes sampling reproducible within wsi-rt.
    """

    max_new_tokens: int = 1024
    temperature: float = 0.0
    top_k: int = 50
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    seed: int = 0
    template: str = "vicuna_v1"
    stop: tuple[str, ...] = STOP_STRINGS

    def __post_init__(self) -> None:
        finite = math.isfinite
        _require(self.max_new_tokens >= 1, "--max-new-tokens", self.max_new_tokens, "an integer >= 1")
        _require(finite(self.temperature) and self.temperature >= 0, "--temperature", self.temperature, "0 or more")
        _require(self.top_k >= 0, "--top-k", self.top_k, "0 (off) or a positive integer")
        _require(0 < self.top_p <= 1, "--top-p", self.top_p, "a number in (0, 1]")
        _require(
            finite(self.repetition_penalty) and self.repetition_penalty > 0,
            "--repetition-penalty",
            self.repetition_penalty,
            "a positive number",
        )
        _require(self.no_repeat_ngram_size >= 0, "--no-repeat-ngram-size", self.no_repeat_ngram_size, "0 or more")
        _require(0 <= self.seed < 2**64, "--seed", self.seed, "an integer in [0, 2^64)")
        _require(self.template in TEMPLATES, "--template", self.template, " or ".join(TEMPLATES))
        _require(all(self.stop), "--stop", self.stop, "non-empty strings")

    def with_overrides(self, **overrides: Any) -> GenerationSettings:
        """A copy with the given fields replaced; None leaves a field as it is."""
        return replace(self, **{k: v for k, v in overrides.items() if v is not None})

    def to_json(self) -> dict[str, Any]:
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> GenerationSettings:
        known = {f.name for f in fields(cls)}
        unknown = set(data) - known
        _require(not unknown, "generation settings", sorted(unknown), f"only {sorted(known)}")
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()}
        return cls(**values)


@dataclass(frozen=True)
class SlideSettings:
    """How an input is read.

    Slides: `mpp` overrides the level-0 um/px; `allow_dark` accepts a dark background (as in fluorescence), whose
    bright side then counts as tissue; `reader` pins the slide reader (None: the first that knows the format); `roi`
    is a GeoJSON file whose regions bound the tissue; `on_bad_tile` says what becomes of a tile that cannot be read,
    tried again once: "fail" (SlideError), "skip" (it leaves the grid) or "white"; `plain_otsu` finds tissue by Otsu's
    threshold alone (pen marks and black borders count, a slide without glass is split). Slides and tile features:
    `position_tile` overrides the divisor of the position grid (None: patch_size_level0; GigaPath's own code uses
    256). Tile features: `patch_size_level0` overrides what the file says, `keep_order` leaves its tiles in the file's
    order.
    """

    mpp: float | None = None
    target_mpp: float = TARGET_MPP
    allow_upsample: bool = False
    allow_dark: bool = False
    position_tile: int | None = None
    patch_size_level0: int | None = None
    keep_order: bool = False
    reader: str | None = None
    roi: Path | None = None
    on_bad_tile: str = "fail"
    plain_otsu: bool = False

    def __post_init__(self) -> None:
        low, high = MPP_RANGE
        for flag, value in (("--mpp", self.mpp), ("--target-mpp", self.target_mpp)):
            _require(value is None or low <= value <= high, flag, value, f"um/px between {low:g} and {high:g}")
        for flag, px in (("--position-tile", self.position_tile), ("--patch-size-level0", self.patch_size_level0)):
            _require(px is None or px >= 1, flag, px, "1 or more level-0 px")
        _require(self.on_bad_tile in BAD_TILE, "--on-bad-tile", self.on_bad_tile, ", ".join(BAD_TILE))

    def to_json(self) -> dict[str, Any]:
        return {k: str(v) if isinstance(v, Path) else v for k, v in asdict(self).items()}
