"""How far two sets of slide tokens are apart, token by token, and how far they may be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wsi_rt.runtime.manifest import EngineManifest
from wsi_rt.runtime.parity import GATES

# Half of the distance between neighbouring numbers, relative to them: what storing in a type may change.
ROUNDING: Mapping[str, float] = {"fp32": 0.0, "fp16": 2.0**-11, "bf16": 2.0**-9}
# Relative L2 error of a token that half-precision arithmetic explains: median, and worst. The synthetic slide encoder
# (2 layers) under bf16 autocast comes to 1.2e-2 and 1.8e-2; 12 layers in fp16, as published, should stay below. The
# smallest known difference there (no norm) starts at 0.17; a tile lost out of 1,500 at 0.27.
HALF_MEDIAN, HALF_WORST = 3e-2, 6e-2


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

    @property
    def exact(self) -> bool:
        """Every token is inside the gate."""
        return self.agreeing == self.tokens

    @property
    def half(self) -> bool:
        """Close enough that the reference's half-precision arithmetic may be all of it."""
        return self.median_error <= HALF_MEDIAN and self.worst_error <= HALF_WORST

    def to_json(self) -> dict[str, float | int]:
        return {k: v if isinstance(v, int) else float(f"{v:.6g}") for k, v in asdict(self).items()}


@dataclass(frozen=True)
class TokenGate:
    """Both bounds must hold for a token: largest error over the largest reference value of all, and cosine."""

    max_rel: float
    min_cosine: float


def gate_of(components: Sequence[EngineManifest], target: str, storage: str, *, fp32: bool = False) -> TokenGate:
    """What the engines that made our tokens may differ by, and the reference's storage type on top.

    fp32: the slide encoder among them ran as its fp32 graph, whatever the target's precision.
    """
    unit, max_rel, loss = ROUNDING[storage], 0.0, 0.0
    for component in components:
        gate: Mapping[str, float] = component.compiled(target).parity["gate"]
        if fp32 and component.name == "slide_encoder":
            gate = {"max_rel": GATES["fp32"].max_rel, "min_cosine": GATES["fp32"].min_cosine}
        max_rel, loss = max_rel + gate["max_rel"], loss + 1 - gate["min_cosine"]
    return TokenGate(max_rel + unit, 1 - loss - unit**2)


def compare_tokens(ours: NDArray[Any], reference: NDArray[Any], gate: TokenGate) -> Agreement:
    """Both [576, C]; the narrower one (unpadded) is compared where it has columns."""
    width = min(ours.shape[1], reference.shape[1])
    a, e = ours[:, :width].astype(np.float64), reference[:, :width].astype(np.float64)
    norm_a, norm_e = np.linalg.norm(a, axis=1), np.linalg.norm(e, axis=1)
    both = norm_a * norm_e
    cosine = np.where(both > 0, (a * e).sum(1) / np.where(both > 0, both, 1.0), (a == e).all(axis=1))
    rel = np.abs(a - e).max(axis=1) / max(float(np.abs(e).max()), 1e-30)
    error = np.linalg.norm(a - e, axis=1) / np.maximum(norm_e, 1e-30)
    inside = (rel <= gate.max_rel) & (cosine >= gate.min_cosine)
    return Agreement(
        min_cosine=float(cosine.min()),
        median_cosine=float(np.median(cosine)),
        max_rel=float(rel.max()),
        median_error=float(np.median(error)),
        worst_error=float(error.max()),
        agreeing=int(inside.sum()),
        tokens=len(a),
    )
