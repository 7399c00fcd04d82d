"""Before a slide is encoded: how long it will take and how much memory, stage by stage; and what fits.

From what `plan_measure` found on this machine and the number of tiles. A batch of tiles is made smaller until it fits;
what cannot be made smaller is refused. Language model, tissue detection and other processes are not in it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wsi_rt.runtime.bundle import Bundle
from wsi_rt.runtime.errors import InputError
from wsi_rt.runtime.llm.room import available_bytes
from wsi_rt.runtime.plan_measure import FILE_NAME, Measured, SlideCost, TileCost, line_through, resident_bytes, stored
from wsi_rt.runtime.types import TILE_PX

TILE_BATCH = 8  # where nothing was measured
BATCHES_READ = 3  # in memory at a time: with the encoder, ready, and being read
TILE_BYTES = TILE_PX * TILE_PX * 3


@dataclass(frozen=True)
class StagePlan:
    """peak_bytes: of the whole process while the stage runs."""

    name: str
    seconds: float
    peak_bytes: int


@dataclass(frozen=True)
class EncodePlan:
    """Of one slide of `tiles` tiles. available_bytes: what the process may still take, beside what it holds."""

    tiles: int
    batch: int
    threads: int
    precision: Mapping[str, str]
    stages: tuple[StagePlan, ...]
    available_bytes: int

    @property
    def peak_bytes(self) -> int:
        return max((s.peak_bytes for s in self.stages), default=0)

    @property
    def seconds(self) -> float:
        return sum(s.seconds for s in self.stages)

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "peak_bytes": self.peak_bytes, "seconds": self.seconds}


def plan_encode(
    bundle: Bundle,
    measured: Measured,
    tiles: int,
    *,
    tokens: bool = True,
    held_bytes: int | None = None,
    available: int | None = None,
) -> EncodePlan:
    """held_bytes: what the process has resident already (default: this one's, all modules imported). available: what
    it can still have (default: what the system says).

    Raises InputError (exit 2) where not even one tile at a time, or the slide encoder, would fit.
    """
    before = held = max(resident_bytes(), measured.process_bytes) if held_bytes is None else held_bytes
    available = available_bytes() if available is None else available
    tile, slide = measured.tile_encoder, measured.slide_encoder if tokens else None
    held += tiles * (_feature_width(bundle) * 4 + 16)  # features f32, coordinates
    stages, batch = [], 0
    if tile is not None:
        batch = _fitting_batch(tile, held, available)
        seconds = tiles * line_through(tile.seconds, min(batch, max(1, tiles)))
        stages.append(StagePlan("tile_encoder", seconds, held + _tile_bytes(tile, batch)))
        held += tile.open_bytes + tile.batch_bytes[batch]  # an engine stays open and keeps its buffers
    if slide is not None:
        stages.append(_slide_stage(bundle, slide, tiles, held))
    _require_fit(stages, available, before, tiles)
    precision = {
        name: c.compiled(bundle.target).precision
        for name, c in bundle.manifest.components.items()
        if name in ("tile_encoder", "slide_encoder") and bundle.target in c.targets
    }
    return EncodePlan(tiles, batch, tile.threads if tile else bundle.threads, precision, tuple(stages), available)


def _feature_width(bundle: Bundle) -> int:
    components = bundle.manifest.components
    key = {"tile_encoder": "width", "slide_encoder": "in_width"}
    return next((int(components[name].config[key[name]]) for name in key if name in components), 0)


def _tile_bytes(cost: TileCost, batch: int) -> int:
    return cost.open_bytes + cost.batch_bytes[batch] + BATCHES_READ * batch * TILE_BYTES


def _fitting_batch(cost: TileCost, held: int, available: int) -> int:
    """The fastest batch, or the largest smaller one that fits; 1 where none does."""
    fits = [b for b in cost.batch_bytes if b <= cost.batch and _tile_bytes(cost, b) <= available]
    return max(fits, default=1)


def _slide_stage(bundle: Bundle, cost: SlideCost, tiles: int, held: int) -> StagePlan:
    config = bundle.component("slide_encoder").config
    seconds = _slide_seconds(config, cost.seconds, tiles)
    added = line_through(cost.run_bytes, tiles)
    return StagePlan("slide_encoder", seconds, held + cost.open_bytes + int(added))


def _slide_seconds(config: Mapping[str, Any], measured: Mapping[int, float], tiles: int) -> float:
    """A constant, a cost per tile and one per score: those of them, none negative, that fit the measurements best."""

    def terms(n: int) -> NDArray[np.float64]:
        return np.array([1.0, n, attention_pairs(config, n)])

    rows = np.array([terms(n) / t for n, t in measured.items()])  # errors in proportion
    best, seconds = np.inf, 0.0
    for chosen in (c for size in (1, 2, 3) for c in combinations(range(3), size)):
        costs, *_ = np.linalg.lstsq(rows[:, chosen], np.ones(len(rows)), rcond=None)
        off = float(np.square(rows[:, chosen] @ costs - 1).sum())
        if (costs >= 0).all() and off < best - 1e-12:
            best, seconds = off, float(terms(tiles)[list(chosen)] @ costs)
    return seconds


def attention_pairs(config: Mapping[str, Any], tiles: int) -> int:
    """Scores of one layer, all heads and branches (SPEC 3): what dilated attention costs."""
    length, pairs = tiles + 1, 0
    for segment, ratio in zip(config["segment_lengths"], config["dilated_ratios"], strict=True):
        inside = min(segment, length)
        pairs += -(-length // inside) * int(config["heads"]) * (-(-inside // ratio)) ** 2
    return pairs


def _require_fit(stages: list[StagePlan], available: int, held_bytes: int, tiles: int) -> None:
    for stage in stages:
        wanted = stage.peak_bytes - held_bytes
        if wanted > available:
            raise InputError(
                f"{stage.name} of {tiles} tiles needs {wanted / 1e9:.2f} GB beside what is in use, "
                f"{available / 1e9:.2f} GB are free: take fewer tiles (--roi, a coarser --target-mpp), free memory, or "
                f"build this component smaller (--precision {stage.name}=int8)"
            )


@dataclass(frozen=True)
class RunPlan:
    """What a run goes by. plan None: nothing was measured here, which `notes` tell."""

    batch: int
    plan: EncodePlan | None = None
    notes: tuple[str, ...] = ()


def plan_run(bundle: Bundle, tiles: int, tokens: bool) -> RunPlan:
    """Before each run. Raises as `plan_encode`. A smaller batch than the fastest is noted."""
    measured = stored(bundle)
    if measured is None or measured.tile_encoder is None:
        elsewhere = (bundle.root / FILE_NAME).exists()
        note = f"memory is not planned: {bundle.root} was measured on another machine; wsi-rt plan measures it here"
        return RunPlan(TILE_BATCH, notes=(note,) if elsewhere else ())
    plan = plan_encode(bundle, measured, tiles, tokens=tokens)
    fastest = measured.tile_encoder.batch
    small = (f"tiles are encoded {plan.batch} at a time instead of {fastest}: memory is short",)
    return RunPlan(plan.batch, plan, small if plan.batch < fastest else ())
