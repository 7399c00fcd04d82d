"""Encoding a slide through the feature store: what is there is not computed again, what is computed is kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from wsi_rt.runtime.bundle import Bundle
from wsi_rt.runtime.encode import Encoded, OnProgress, encode_tokens
from wsi_rt.runtime.encode_slide import ChosenTiles, encode_chosen
from wsi_rt.runtime.engines.base import Engine
from wsi_rt.runtime.errors import SlideError
from wsi_rt.runtime.features.slide_digest import Identity, SlideDigest, identity
from wsi_rt.runtime.features.store import FeatureStore, TilesKey, TokensKey, grid_digest
from wsi_rt.runtime.plan import plan_run
from wsi_rt.runtime.sentinel import wider_engine
from wsi_rt.runtime.timing import Stopwatch
from wsi_rt.runtime.types import POOLED_TOKENS, SlideTokens, TileFeatures

TILES_HIT, TOKENS_HIT = "tile features from the cache", "slide tokens from the cache"


@dataclass(frozen=True)
class Task:
    """What is wanted of one slide, and what to make it with. `engine` opens a component of the bundle once."""

    bundle: Bundle
    engine: Callable[[str], Engine]
    position_tile: int | None
    tokens: bool
    features: bool
    clock: Stopwatch
    on_progress: OnProgress


def file_identity(path: Path) -> Identity | None:
    """Of a slide that is one file, before it is opened; None for a folder, or where there is nothing."""
    return identity(path) if path.is_file() else None


def encode_stored(chosen: ChosenTiles, store: FeatureStore | None, task: Task, before: Identity | None) -> Encoded:
    """`encode_chosen` and `encode_tokens` as far as the store lacks their results; without a store, `encode_chosen`.

    With `task.features` False, stored tokens are enough and `features` may be None. Stage "tiles" has the time that
    the store takes. before: `file_identity` of the slide before it was opened. A slide that changes meanwhile, or has
    tiles that could not be read, is encoded but not kept.
    """
    if store is None:
        return _encode(chosen, task)
    store.take_notes()  # of a run that failed
    digest = _digest(chosen, store, task, before)
    if digest is None:
        encoded = _encode(chosen, task)
        return replace(encoded, notes=(*encoded.notes, *store.take_notes()))
    key = _tiles_key(chosen, digest, task)
    tokens_key = _tokens_key(chosen, key, task) if task.tokens else None
    with task.clock.measure("tiles"):
        tokens = store.get_tokens(tokens_key) if tokens_key is not None else None
    if tokens is not None and not task.features:
        encoded = _from_store(chosen, None)
    else:
        encoded = _tiles(chosen, store, key, digest, task)
    if tokens is not None:
        encoded = _adopt(encoded, tokens)
    elif tokens_key is not None:
        encoded = _tokens(encoded, store, tokens_key, digest, task)
    return replace(encoded, notes=(*encoded.notes, *store.take_notes()))


def _digest(chosen: ChosenTiles, store: FeatureStore, task: Task, before: Identity | None) -> SlideDigest | None:
    mib = 1 << 20
    try:
        with task.clock.measure("tiles"):
            digest = store.digest(
                chosen.reader.files, lambda done, total: task.on_progress("slide digest", done // mib, total // mib)
            )
    except SlideError as error:
        store.notes.append(f"the cache is not used: {error}")
        return None
    if before is not None and chosen.reader.files == (chosen.reader.path,) and digest.identities != (before,):
        store.notes.append("the cache is not used: the slide changed while it was opened")
        return None
    return digest


def _tiles_key(chosen: ChosenTiles, digest: SlideDigest, task: Task) -> TilesKey:
    plan, manifest = chosen.plan, task.bundle.component("tile_encoder")
    reads = {name: getattr(plan, name) for name in ("level", "downsample", "read_px", "resample")}
    precision = manifest.compiled(task.bundle.target).precision
    return TilesKey(digest.value, chosen.reader.name, grid_digest(chosen.grid, reads), manifest.weights, precision)


def _tokens_key(chosen: ChosenTiles, tiles: TilesKey, task: Task) -> TokensKey:
    manifest = task.bundle.component("slide_encoder")
    divisor = int(task.position_tile or chosen.grid.patch_size_level0)
    return TokensKey(tiles, divisor, manifest.weights, manifest.compiled(task.bundle.target).precision)


def _tiles(chosen: ChosenTiles, store: FeatureStore, key: TilesKey, digest: SlideDigest, task: Task) -> Encoded:
    """Tile features, stored or made. One process makes them; another that wants the same waits, and reads."""
    with task.clock.measure("tiles"):
        features = store.get_tiles(key, chosen.grid)
    if features is not None:
        return _from_store(chosen, features)
    with store.lock(key, lambda: task.on_progress("waiting for another run to encode this slide", 0, 1)) as waited:
        if waited:
            store.notes.append("waited for another run that encoded the same slide")
        with task.clock.measure("tiles"):  # it may have finished between the look before and the lock
            features = store.get_tiles(key, chosen.grid)
        if features is not None:
            return _from_store(chosen, features)
        encoded = _encode(chosen, task)
        if encoded.features is not None and _keepable(encoded, digest, store):
            store.put_tiles(key, encoded.features)
        return encoded


def _encode(chosen: ChosenTiles, task: Task) -> Encoded:
    bundle = task.bundle
    run = plan_run(bundle, len(chosen.grid), task.tokens)  # refused before the weights are loaded
    engine, wider = task.engine("tile_encoder"), wider_engine(bundle, "tile_encoder")
    return encode_chosen(chosen, engine, bundle.threads, task.clock, task.on_progress, run, wider)


def _tokens(encoded: Encoded, store: FeatureStore, key: TokensKey, digest: SlideDigest, task: Task) -> Encoded:
    """Slide tokens, made here unless another process did so meanwhile."""
    with store.lock(key):
        tokens = store.get_tokens(key)
        if tokens is not None:
            return _adopt(encoded, tokens)
        encoded = with_tokens(encoded, task)
        if encoded.tokens is not None and encoded.grid is not None and _keepable(encoded, digest, store):
            store.put_tokens(key, encoded.tokens, len(encoded.grid))
        return encoded


def _keepable(encoded: Encoded, digest: SlideDigest, store: FeatureStore) -> bool:
    if encoded.tiles["failed"]:
        store.notes.append("not kept in the cache: some tiles could not be read")
        return False
    if not digest.still_holds():
        store.notes.append("not kept in the cache: the slide changed while it was encoded")
        return False
    return True


def _from_store(chosen: ChosenTiles, features: TileFeatures | None) -> Encoded:
    grid = chosen.grid
    tiles = {"grid": grid.cells, "kept": len(grid), "failed": 0, "distinct_tokens": None}
    notes = (*chosen.notes, *((TILES_HIT,) if features is not None else ()))
    return Encoded(None, features, tiles, chosen.reader.ref, notes, grid=grid)


def _adopt(encoded: Encoded, tokens: SlideTokens) -> Encoded:
    distinct = min(len(encoded.grid), POOLED_TOKENS) if encoded.grid is not None else tokens.distinct
    return replace(
        encoded,
        tokens=tokens,
        tiles={**encoded.tiles, "distinct_tokens": distinct},
        notes=(*encoded.notes, *tokens.notes, TOKENS_HIT),
    )


def with_tokens(encoded: Encoded, task: Task) -> Encoded:
    """`encode_tokens` by the bundle's slide encoder. Raises what that raises."""
    task.on_progress("slide encoder", 0, 1)
    wider = wider_engine(task.bundle, "slide_encoder")
    encoded = encode_tokens(encoded, task.position_tile, task.engine("slide_encoder"), task.clock, wider)
    task.on_progress("slide encoder", 1, 1)
    return encoded
