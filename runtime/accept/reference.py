"""Published slide tokens: what the file itself tells, before anything is compared with it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wsi_rt.runtime.accept.agreement import ROUNDING
from wsi_rt.runtime.accept.report import Level, Section
from wsi_rt.runtime.accept.states import Norm, bin_edges
from wsi_rt.runtime.features import read_slide_tokens, read_tensor
from wsi_rt.runtime.features.slide_tokens import MAX_TOKENS_BYTES
from wsi_rt.runtime.manifest import Manifest
from wsi_rt.runtime.pipeline import PUBLISHED_PADDED, PUBLISHED_WIDTH
from wsi_rt.runtime.types import POOLED_TOKENS

TELLING_TILES = POOLED_TOKENS // 2  # up to here, which tokens repeat tells how many tiles there were
_STATISTICS = 2e-3  # of a normed row, beyond its storage: mean off 0, mean square off 1


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
        tokens.tokens, raw.shape, str(raw.dtype), _storage(raw), width, tokens.provenance.digest, tile_count(raw)
    )


def token_widths(manifest: Manifest) -> tuple[int, int]:
    """(width of a token, width after padding). They are equal where the norm comes after the padding (SPEC 3)."""
    encoder, projector = (manifest.components.get(name) for name in ("slide_encoder", "projector"))
    if encoder is not None:
        padded = int(encoder.config["padded"])
        return (padded if int(encoder.config["norm_width"]) == padded else int(encoder.config["width"])), padded
    padded = int(projector.config["widths"][0]) if projector is not None else PUBLISHED_PADDED
    return (PUBLISHED_WIDTH if padded == PUBLISHED_PADDED else padded), padded


def _storage(raw: NDArray[Any]) -> str:
    """The narrowest type that holds every value: a float32 file may have been through a narrower one."""
    x = np.ascontiguousarray(raw, dtype=np.float32)
    if not (x.view(np.uint32) & 0xFFFF).any():  # bf16 is the upper half of fp32
        return "bf16"
    with np.errstate(over="ignore"):
        return "fp16" if np.array_equal(x.astype(np.float16).astype(np.float32), x) else "fp32"


def tile_count(tokens: NDArray[Any]) -> int | None:
    """How many tiles were pooled, from which neighbouring tokens are equal; None above 288 (SPEC 3, pooling)."""
    rows = tokens.reshape(-1, tokens.shape[-1])
    changes = (rows[1:] != rows[:-1]).any(axis=1)
    for tiles in range(1, TELLING_TILES + 1):
        if np.array_equal(changes, _changes(tiles)):
            return tiles
    return None


def _changes(tiles: int) -> NDArray[np.bool_]:
    start, end = bin_edges(tiles)
    return (np.diff(start) != 0) | (np.diff(end) != 0)


@dataclass(frozen=True)
class RowStatistics:
    """Of the rows once weight and bias of the norm are taken off: after that norm, means are 0 and mean squares 1."""

    mean: float
    mean_square: float
    normed: bool


def row_statistics(reference: Reference, norm: Norm | None) -> RowStatistics | None:
    """Whether the reference can have come out of this checkpoint's norm; None where there is no telling."""
    if norm is None or len(norm.weight) != reference.width or not norm.weight.all():
        return None
    x = reference.tokens[:, : reference.width].astype(np.float64)
    weight, bias = norm.weight.astype(np.float64), norm.bias.astype(np.float64)
    z = (x - bias) / weight
    # What storage may do to a row's mean: a weight near zero magnifies the rounding of its column.
    slack = _STATISTICS + float((ROUNDING[reference.storage] * np.abs(x / weight)).mean(axis=1).max())
    mean, square = float(np.abs(z.mean(axis=1)).max()), float(np.abs((z**2).mean(axis=1) - 1).max())
    # A row that hardly varies before the norm keeps a mean square below 1 (epsilon), never above.
    return RowStatistics(mean, square, mean <= slack and square <= 4 * slack)


def examine(reference: Reference, norm: Norm | None) -> Section:
    """The file on its own: usable or not, as far as the checkpoint's norm tells."""
    statistics = row_statistics(reference, norm)
    told = f"{list(reference.shape)} {reference.dtype}"
    if reference.storage != "fp32":
        told += f", values fit {reference.storage}"
    if reference.tokens.shape[1] == reference.width and norm is not None and len(norm.weight) == reference.width:
        told += ", without padding columns"
    if reference.tiles is not None:
        told += f", pooled from {reference.tiles} tiles"
    differences = []
    if reference.padding.any():
        differences.append(
            f"the padding columns {reference.width}.. of the reference are not zero: it was padded before its norm, or "
            "comes from another encoder"
        )
    if statistics is not None and not statistics.normed:
        differences.append(
            "the reference's rows did not come out of this checkpoint's norm (norm missing, or another checkpoint)"
        )
    known = "not told: this bundle has no norm to check rows with" if statistics is None else ""
    rows = known or f"rows are {'' if statistics and statistics.normed else 'not '}as after this checkpoint's norm"
    figures = {
        "shape": list(reference.shape),
        "dtype": reference.dtype,
        "storage": reference.storage,
        "sha256": reference.digest,
        "tiles": reference.tiles,
        "padding_is_zero": not reference.padding.any(),
        "row_mean": statistics.mean if statistics else None,
        "row_mean_square_off_1": statistics.mean_square if statistics else None,
        "rows_as_normed": statistics.normed if statistics else None,
    }
    level = Level.DIFFERS if differences else Level.AGREES
    return Section("reference", level, tuple(differences), (f"{told}; {rows}",), figures)
