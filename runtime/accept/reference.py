"""Published slide tokens: what the file itself tells, and how close ours come to it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import IntEnum
from math import sqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wsi_rt.runtime.accept.report import Level, Section
from wsi_rt.runtime.features import read_slide_tokens, read_tensor
from wsi_rt.runtime.features.pooled import tile_count
from wsi_rt.runtime.features.rounding import HALF_MEDIAN, HALF_WORST, ROUNDING, storage_of
from wsi_rt.runtime.features.slide_tokens import MAX_TOKENS_BYTES
from wsi_rt.runtime.features.stamp import maker_digest
from wsi_rt.runtime.manifest import EngineManifest, Manifest
from wsi_rt.runtime.parity import GATES, row_cosines, short
from wsi_rt.runtime.pipeline import PUBLISHED_PADDED, PUBLISHED_WIDTH
from wsi_rt.runtime.types import TileFeatures

# Errors of reduced precision are measured at the build, on one stored input. Other slides have larger ones: 1.7 times
# is seen (int8 tile encoder, preset nano, a real slide).
OTHER_SLIDES = 2


@dataclass(frozen=True)
class Reference:
    """tokens: [576, C] f32; shape and dtype as stored; storage: fp32, fp16 or bf16 (what the values fit into);
    width: C without padding; tiles: how many made it, None when it cannot be told."""

    tokens: NDArray[np.float32]
    shape: tuple[int, ...]
    dtype: str
    storage: str
    width: int
    digest: str
    tiles: int | None

    @property
    def padding(self) -> NDArray[np.float32]:
        """[576, C - width]: the columns that should be zero."""
        return self.tokens[:, self.width :]


def read_reference(path: str | os.PathLike[str], manifest: Manifest) -> Reference:
    """Raises FeatureFileError for another shape, width or dtype than this bundle's, and values that are not finite."""
    width, padded = token_widths(manifest)
    raw = read_tensor(path, max_bytes=MAX_TOKENS_BYTES)
    tokens = read_slide_tokens(path, {width, padded})
    return Reference(
        tokens.tokens, raw.shape, str(raw.dtype), storage_of(raw), width, tokens.provenance.digest, tile_count(raw)
    )


def token_widths(manifest: Manifest) -> tuple[int, int]:
    """(width of a token, width after padding). They are equal where the norm comes after the padding (SPEC 3)."""
    encoder, projector = (manifest.components.get(name) for name in ("slide_encoder", "projector"))
    if encoder is not None:
        padded = int(encoder.config["padded"])
        return (padded if int(encoder.config["norm_width"]) == padded else int(encoder.config["width"])), padded
    padded = int(projector.config["widths"][0]) if projector is not None else PUBLISHED_PADDED
    return (PUBLISHED_WIDTH if padded == PUBLISHED_PADDED else padded), padded


def examine(reference: Reference) -> Section:
    """The file on its own: usable or not."""
    told = f"{list(reference.shape)} {reference.dtype}"
    if reference.storage != "fp32":
        told += f", values fit {reference.storage}"
    if reference.tiles is not None:
        told += f", pooled from {reference.tiles} tiles"
    padded = bool(reference.padding.any())
    difference = (
        f"the padding columns {reference.width}.. of the reference are not zero: it was padded before its norm, or "
        "comes from another encoder"
    )
    figures = {
        "shape": list(reference.shape),
        "dtype": reference.dtype,
        "storage": reference.storage,
        "sha256": reference.digest,
        "tiles": reference.tiles,
        "padding_is_zero": not padded,
    }
    level = Level.DIFFERS if padded else Level.AGREES
    return Section("reference", level, (difference,) if padded else (), (told,), figures)


class Closeness(IntEnum):
    """EXACT: within fp32 arithmetic. ROUNDED: within what our engines' reduced precision may change. HALF: as close as
    half-precision arithmetic of the reference comes. FAR: neither."""

    EXACT = 0
    ROUNDED = 1
    HALF = 2
    FAR = 3


@dataclass(frozen=True)
class TokenGate:
    """Both bounds must hold for a token: largest error over the largest reference value of all, and cosine."""

    max_rel: float
    min_cosine: float


@dataclass(frozen=True)
class Allowance:
    """exact: what fp32 arithmetic and the reference's storage may change; gate: with reduced precision on top.

    reduced: component -> its precision, of those that made our tokens and are not fp32.
    """

    exact: TokenGate
    gate: TokenGate
    reduced: Mapping[str, str]


@dataclass(frozen=True)
class Agreement:
    """Of 576 tokens. cosine and relative L2 error are per token; max_rel is the largest error over the largest
    reference value, as parity gates have it; agreeing: tokens inside the gate."""

    min_cosine: float
    median_cosine: float
    max_rel: float
    median_error: float
    worst_error: float
    agreeing: int
    tokens: int
    closeness: Closeness

    def to_json(self) -> dict[str, Any]:
        numbers = {k: v if isinstance(v, int) else short(v) for k, v in asdict(self).items()}
        return {**numbers, "closeness": self.closeness.name.lower()}


def allowance(manifest: Manifest, target: str, features: TileFeatures, storage: str) -> Allowance:
    """What may keep our tokens apart from a reference of this storage type, by the encoders that made them.

    A reduced-precision encoder adds twice (OTHER_SLIDES) the errors of its weights' rounding and of its engine, both
    measured at the build; cosines add as angles. Tile features of a file count as well when our tile encoder made them.
    """
    unit, components = ROUNDING[storage], manifest.components
    makers = {"slide_encoder": components["slide_encoder"].compiled(target).precision}
    if maker_digest(features.provenance, "tile_encoder"):
        precision = str(features.provenance.settings.get("precision"))
        makers |= {"tile_encoder": precision} if precision in GATES else {}
    fp32 = GATES["fp32"]
    exact = TokenGate(len(makers) * fp32.max_rel + unit, 1 - len(makers) * (1 - fp32.min_cosine) - unit**2)
    reduced = {name: precision for name, precision in makers.items() if precision != "fp32"}
    errors = [_error(components.get(name), target, precision) for name, precision in reduced.items()]
    max_rel = exact.max_rel + OTHER_SLIDES * sum(e[0] for e in errors)
    angle = sqrt(1 - exact.min_cosine) + OTHER_SLIDES * sum(e[1] for e in errors)
    return Allowance(exact, TokenGate(max_rel, 1 - angle**2) if reduced else exact, reduced)


def _error(component: EngineManifest | None, target: str, precision: str) -> tuple[float, float]:
    """(max_rel, sqrt(1 - cosine)) of an encoder's outputs: rounding of its weights, and its engine on top.

    Features of another precision than this bundle's tile encoder: only the gate of their precision is known.
    """
    if component is None or target not in component.targets or component.targets[target].precision != precision:
        gate = GATES[precision]
        return gate.max_rel / OTHER_SLIDES, sqrt(1 - gate.min_cosine) / OTHER_SLIDES
    measured = [component.targets[target].measured()]
    measured += [component.rounding["outputs"]] if component.rounding else []
    return sum(m["max_rel"] for m in measured), sum(sqrt(max(1 - m["min_cosine"], 0.0)) for m in measured)


def compare_tokens(ours: NDArray[Any], reference: NDArray[Any], allowed: Allowance) -> Agreement:
    """Both [576, C]; the narrower one (unpadded) is compared where it has columns."""
    width = min(ours.shape[1], reference.shape[1])
    a, e = ours[:, :width].astype(np.float64), reference[:, :width].astype(np.float64)
    cosine = row_cosines(a, e)
    rel = np.abs(a - e).max(axis=1) / max(float(np.abs(e).max()), 1e-30)
    error = np.linalg.norm(a - e, axis=1) / np.maximum(np.linalg.norm(e, axis=1), 1e-30)
    exact, inside = ((rel <= g.max_rel) & (cosine >= g.min_cosine) for g in (allowed.exact, allowed.gate))
    half = np.median(error) <= HALF_MEDIAN and error.max() <= HALF_WORST
    reached = ((exact.all(), Closeness.EXACT), (inside.all(), Closeness.ROUNDED), (half, Closeness.HALF))
    return Agreement(
        min_cosine=float(cosine.min()),
        median_cosine=float(np.median(cosine)),
        max_rel=float(rel.max()),
        median_error=float(np.median(error)),
        worst_error=float(error.max()),
        agreeing=int(inside.sum()),
        tokens=len(a),
        closeness=next((c for holds, c in reached if holds), Closeness.FAR),
    )
