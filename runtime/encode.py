"""Tile features -> slide tokens, and the files that stand in for either; slides become tile features in
`encode_slide`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from wsi_rt.runtime.config import SlideSettings
from wsi_rt.runtime.engines.base import Array, Engine
from wsi_rt.runtime.errors import FeatureFileError
from wsi_rt.runtime.features import read_slide_tokens, read_tile_file
from wsi_rt.runtime.features.stamp import maker_digest
from wsi_rt.runtime.manifest import EngineManifest
from wsi_rt.runtime.positions import grid_positions, shared_cells
from wsi_rt.runtime.sentinel import OpenWider, Sentinel
from wsi_rt.runtime.timing import Stopwatch
from wsi_rt.runtime.types import (
    POOLED_TOKENS,
    Provenance,
    SlideRef,
    SlideTokens,
    TileFailure,
    TileFeatures,
    TileGrid,
)

Kind = Literal["slide", "tile_features", "slide_tokens"]
OnProgress = Callable[[str, int, int], None]  # stage, done, total


def input_kind(path: Path) -> Kind:
    """By suffix: `.pt` holds slide tokens, `.h5` tile features, anything else is a slide."""
    kinds: dict[str, Kind] = {".pt": "slide_tokens", ".h5": "tile_features", ".hdf5": "tile_features"}
    return kinds.get(path.suffix.lower(), "slide")


_KIND_TEXT = {"slide": "a slide", "tile_features": "a file of tile features", "slide_tokens": "a file of slide tokens"}
# The settings that act on each kind of input.
_ACTING: dict[Kind, set[str]] = {
    "slide": {
        *("mpp", "target_mpp", "allow_upsample", "allow_dark", "plain_otsu", "position_tile"),
        *("reader", "roi", "on_bad_tile"),
    },
    "tile_features": {"position_tile", "patch_size_level0", "keep_order", "target_mpp"},
    "slide_tokens": set(),
}


def ignored_settings(kind: Kind, settings: SlideSettings) -> tuple[str, ...]:
    """A note naming the settings that were chosen but have nothing to act on in this kind of input."""
    chosen = {k for k, v in settings.to_json().items() if v != getattr(SlideSettings, k)} - _ACTING[kind]
    flags = ", ".join(f"--{k.replace('_', '-')}" for k in sorted(chosen))
    return (f"{flags} given, but the input is {_KIND_TEXT[kind]}: no effect",) if chosen else ()


@dataclass(frozen=True)
class Encoded:
    """What the encoders made of one input. `tokens` is None when only tile features were wanted;
    `features` is None when the input was a token file. `tiles`: grid, kept, failed, distinct_tokens.
    `settings`: how the input was read (Pipeline.encode records it). `file_attributes`: what an `.h5` input says of
    its slide, to be carried on. `grid`: the tiles that the features or tokens are of, where known. `failures`: tiles
    that could not be read and were left out or taken as white."""

    tokens: SlideTokens | None
    features: TileFeatures | None
    tiles: Mapping[str, int | None]
    slide: SlideRef | None = None
    notes: tuple[str, ...] = ()
    timings_ms: Mapping[str, float] = field(default_factory=dict)
    settings: SlideSettings = field(default_factory=SlideSettings)
    file_attributes: Mapping[str, Any] | None = None
    grid: TileGrid | None = None
    failures: tuple[TileFailure, ...] = ()


def load_tiles(path: Path, settings: SlideSettings) -> Encoded:
    """Tile features of an `.h5` file, sorted to row-major order (noted when that moved any) unless told not to."""
    features, attributes = read_tile_file(
        path, sort=not settings.keep_order, patch_size_level0=settings.patch_size_level0
    )
    tiles = {"grid": features.grid.cells, "kept": len(features.grid), "failed": 0, "distinct_tokens": None}
    return Encoded(None, features, tiles, notes=features.notes, file_attributes=attributes, grid=features.grid)


def require_own(encoded: Encoded, components: Mapping[str, EngineManifest], where: str) -> None:
    """Refuse features and tokens that a tile or slide encoder made which is not the bundle's of that name.

    Nothing to compare where the bundle has none, or another tool made them. Raises FeatureFileError.
    """
    features, tokens = encoded.features, encoded.tokens
    makers: list[tuple[str, object]] = []
    if features is not None:
        makers.append(("tile_encoder", maker_digest(features.provenance, "tile_encoder")))
    if tokens is not None:
        made_by = maker_digest(tokens.provenance, "slide_encoder")
        makers += [("slide_encoder", made_by)]
        makers += [("tile_encoder", tokens.provenance.settings.get("tile_encoder") if made_by else None)]
    for name, digest in makers:
        own = components[name].weights if name in components else ""
        if own and isinstance(digest, str) and digest != own:
            raise FeatureFileError(
                f"{where} comes from another {name} (weights {ascii(digest[:12])[1:-1]}) than this bundle's "
                f"({own[:12]}): encode the slide again with this bundle, or use the bundle that made it"
            )


def other_precisions(encoded: Encoded, components: Mapping[str, EngineManifest], target: str) -> tuple[str, ...]:
    """Notes on features and tokens of a file that the bundle's own encoder made, but in another precision."""
    made: list[tuple[str, object]] = []
    if encoded.features is not None and maker_digest(encoded.features.provenance, "tile_encoder"):
        made.append(("tile_encoder", encoded.features.provenance.settings.get("precision")))
    if encoded.tokens is not None and maker_digest(encoded.tokens.provenance, "slide_encoder"):
        settings = encoded.tokens.provenance.settings
        made += [("slide_encoder", settings.get("precision")), ("tile_encoder", settings.get("tile_encoder_precision"))]
    own = {name: components[name].compiled(target).precision for name, _ in made if name in components}
    return tuple(
        f"the {name} that made this input was {ascii(theirs)[1:-1]}, this bundle's is {own[name]}"
        for name, theirs in made
        if isinstance(theirs, str) and theirs != own.get(name, theirs)
    )


def encode_tokens(
    encoded: Encoded,
    position_tile: int | None,
    encoder: Engine,
    clock: Stopwatch,
    wider: OpenWider | None = None,
) -> Encoded:
    """Tile features -> 576 slide tokens. wider: what opens an encoder of higher precision, for tokens that are not
    finite.

    Raises FeatureFileError when the features are not as wide as the encoder wants, InputError for tiles
    off the position grid.
    """
    features = encoded.features
    if features is None:
        raise ValueError("nothing to encode: no tile features")
    wanted = encoder.manifest.config["in_width"]
    if features.x.shape[1] != wanted:
        raise FeatureFileError(
            f"tile features have {features.x.shape[1]} numbers each, this bundle's slide encoder takes {wanted}: "
            "they come from another tile encoder"
        )
    positions = grid_positions(features.grid, position_tile)
    inputs: dict[str, Array] = {"features": features.x, "positions": positions}
    where = f"{encoded.slide.path}: " if encoded.slide is not None else ""
    with clock.measure("slide_encoder"), Sentinel(f"{where}slide token", encoder.manifest, wider) as sentinel:
        out = encoder.run(inputs)["tokens"]
        sentinel.mend(out, range(len(out)), lambda engine, rows: engine.run(inputs)["tokens"][rows])
    distinct = min(len(features.grid), POOLED_TOKENS)
    divisor = position_tile or features.grid.patch_size_level0
    settings = {"position_tile": divisor, "order": features.grid.order, "precision": encoder.precision}
    tile_encoder = maker_digest(features.provenance, "tile_encoder")
    if tile_encoder:
        settings |= {
            "tile_encoder": tile_encoder,
            "tile_encoder_precision": features.provenance.settings.get("precision"),
        }
    made_by = Provenance("slide_encoder", encoder.manifest.weights, settings)
    notes = sentinel.notes()
    shared = shared_cells(positions)
    if shared:
        notes += (f"{shared} of {len(positions)} tiles share a position with another tile (divisor {divisor} px)",)
    if distinct < POOLED_TOKENS:
        tiles = "1 tile fills" if distinct == 1 else f"{distinct} tiles fill"
        notes += (f"{tiles} {POOLED_TOKENS} slide tokens: some tokens repeat",)
    return replace(
        encoded,
        tokens=SlideTokens(out, made_by, distinct, notes),
        tiles={**encoded.tiles, "distinct_tokens": distinct},
        notes=encoded.notes + notes,
    )


def load_tokens(path: Path, width: int, unpadded: int | None) -> Encoded:
    """Slide tokens of a `.pt` file, `width` wide, or `unpadded` wide and zero-padded here.

    Raises FeatureFileError for any other shape.
    """
    tokens = read_slide_tokens(path, {width} if unpadded is None else {width, unpadded})
    missing = width - tokens.tokens.shape[1]
    if missing:
        note = f"slide tokens zero-padded from {unpadded} to {width} channels"
        padded = np.pad(tokens.tokens, ((0, 0), (0, missing)))
        tokens = replace(tokens, tokens=padded, notes=(*tokens.notes, note))
    tiles = {"grid": None, "kept": None, "failed": 0, "distinct_tokens": tokens.distinct}
    return Encoded(tokens, None, tiles, notes=tokens.notes)
