"""Slide -> tile features: the tiles are chosen first, without any encoder, then read and encoded in grid order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from wsi_rt.runtime.config import SlideSettings
from wsi_rt.runtime.encode import Encoded, OnProgress
from wsi_rt.runtime.engines.base import Engine
from wsi_rt.runtime.errors import SlideError
from wsi_rt.runtime.plan import TILE_BATCH, RunPlan
from wsi_rt.runtime.positions import grid_positions
from wsi_rt.runtime.sentinel import OpenWider, Sentinel
from wsi_rt.runtime.slides import (
    Regions,
    SlideReader,
    TissueMask,
    find_tissue,
    iter_tiles,
    open_slide,
    plan_reads,
    read_regions,
    read_tile,
    select_tiles,
    selection_notes,
)
from wsi_rt.runtime.slides.device import on_device, open_device, open_tiles, refuse_gpu_reader
from wsi_rt.runtime.slides.grid import ReadPlan
from wsi_rt.runtime.slides.tiles import TileSource
from wsi_rt.runtime.timing import Stopwatch
from wsi_rt.runtime.types import TILE_PX, Provenance, TileFailure, TileFeatures, TileGrid

if TYPE_CHECKING:
    from wsi_rt.runtime.features.coords import TileCoords
    from wsi_rt.runtime.slides.device.features import FeatureBatch

NAMED_FAILURES = 5  # in a note; provenance holds MAX_LISTED of them
MAX_LISTED = 200  # x, y pairs in the provenance, which a file attribute of 60 KB has to hold


@dataclass(frozen=True)
class ChosenTiles:
    """An open slide and the tiles to encode, nothing encoded yet.

    mask: the tissue the tiles were chosen by; None when a file said which tiles (`coords`).
    regions: those of `settings.roi`.
    notes: what a user should know of the slide and its tissue. `reader.rereads` may still grow.
    """

    reader: SlideReader
    plan: ReadPlan
    grid: TileGrid
    settings: SlideSettings
    mask: TissueMask | None = None
    regions: Regions | None = None
    notes: tuple[str, ...] = ()


@contextmanager
def choose_tiles(
    path: Path,
    settings: SlideSettings,
    threads: int,
    clock: Stopwatch,
    on_progress: OnProgress,
    coords: TileCoords | None = None,
) -> Iterator[ChosenTiles]:
    """Open a slide and choose its tiles: those with tissue, inside the regions of `settings.roi` if given.

    coords: the tiles of a file instead; no tissue is looked for. The slide is closed on leaving the context.
    Tissue detection has all `threads`.

    Raises SlideError (unreadable, no resolution, no tissue), InputError (regions that are none, tiles off the
    position grid).
    """
    if coords is not None:
        with _tiles_of_file(path, settings, coords, clock) as chosen:
            yield chosen
        return
    regions = read_regions(settings.roi) if settings.roi is not None else None  # refused before the slide is opened
    with open_slide(path, settings) as reader:
        with clock.measure("tissue"):
            plan = plan_reads(reader, settings)
            mask = find_tissue(
                reader,
                allow_dark=settings.allow_dark,
                plain_otsu=settings.plain_otsu,
                threads=threads,
                on_progress=lambda d, n: on_progress("tissue", d, n),
            )
            grid = select_tiles(plan, mask, regions=regions)
        grid_positions(grid, settings.position_tile)  # refuse before the long work, not after
        yield ChosenTiles(
            reader, plan, grid, settings, mask, regions, (*reader.notes, *mask.notes, *selection_notes(grid))
        )


@contextmanager
def _tiles_of_file(path: Path, settings: SlideSettings, coords: TileCoords, clock: Stopwatch) -> Iterator[ChosenTiles]:
    from wsi_rt.runtime.features.coords import plan_coords

    with open_slide(path, settings) as reader:
        with clock.measure("tissue"):
            plan, grid = plan_coords(reader, coords, settings)
        grid_positions(grid, settings.position_tile)
        chosen = [f"--{k.replace('_', '-')}" for k in ("allow_dark", "plain_otsu", "roi") if getattr(settings, k)]
        idle = (f"{', '.join(chosen)} given, but the tiles come from a file: no effect",) if chosen else ()
        yield ChosenTiles(reader, plan, grid, settings, None, None, (*reader.notes, *idle))


def encode_chosen(
    chosen: ChosenTiles,
    encoder: Engine,
    threads: int,
    clock: Stopwatch,
    on_progress: OnProgress,
    run: RunPlan = RunPlan(TILE_BATCH),  # noqa: B008 - frozen
    wider: OpenWider | None = None,
) -> Encoded:
    """Read the chosen tiles and encode them in grid order; what becomes of unreadable ones, `on_bad_tile` says.

    max(1, threads // 2) threads read ahead while the encoder, opened with all of them, computes; they pause once a
    batch is ready, which bounds the overlap. An encoder that takes tiles on its GPU (`slides.device`) has all threads
    read, or none where `settings.reader` decodes there too. run: how many tiles at a time. wider: what opens an encoder
    of higher precision, for tiles whose features are not finite.

    Raises SlideError for a tile that cannot be read (policy "fail", or none can be read), WsiRtError when a tile's
    features are not finite whatever was tried, InputError for a reader that decodes on a GPU where the encoder does not
    run.
    """
    reader, grid, settings = chosen.reader, chosen.grid, chosen.settings
    refuse_gpu_reader(settings.reader, encoder)
    facts: dict[str, Any] = {"slide": reader.ref.provenance.digest, "precision": encoder.precision}
    with Sentinel(f"{reader.path}: tile", encoder.manifest, wider) as sentinel:
        encoding = _Encoding(chosen, encoder, sentinel, clock, on_progress, run.batch)
        if on_device(encoder):
            facts["device"] = encoding.on_device(threads)
        else:
            encoding.on_host(threads)
    failures = encoding.failures
    x, grid, notes = _settle(encoding.x, grid, failures, settings.on_bad_tile, reader.path)
    if sentinel.retried:
        facts["retried_tiles"] = {"count": len(sentinel.retried), "xy0": sentinel.retried[:MAX_LISTED]}
    if failures:
        facts["bad_tiles"] = _bad_tiles(failures, settings.on_bad_tile)
    features = TileFeatures(x, grid, Provenance("tile_encoder", encoder.manifest.weights, facts))
    tiles = {"grid": grid.cells, "kept": len(grid), "failed": len(failures), "distinct_tokens": None}
    all_notes = (*chosen.notes, *run.notes, *_reread_note(reader), *notes, *sentinel.notes())
    return Encoded(None, features, tiles, reader.ref, all_notes, grid=grid, failures=tuple(failures))


class _Encoding:
    """The features of one slide's tiles as they come: x f32 [N, C], and the tiles that could not be read."""

    def __init__(
        self,
        chosen: ChosenTiles,
        encoder: Engine,
        sentinel: Sentinel,
        clock: Stopwatch,
        on_progress: OnProgress,
        batch_size: int,
    ) -> None:
        self._chosen, self._encoder, self._sentinel, self._clock = chosen, encoder, sentinel, clock
        self._on_progress, self._batch_size = on_progress, batch_size
        self.x = np.empty((len(chosen.grid), int(encoder.manifest.outputs[0].dims[-1])), np.float32)
        self.failures: list[TileFailure] = []

    def on_host(self, threads: int) -> None:
        reader, plan, grid, clock = self._chosen.reader, self._chosen.plan, self._chosen.grid, self._clock
        started = perf_counter()
        batches = iter_tiles(reader, grid, plan, self._batch_size, threads=max(1, threads // 2), raise_bad=False)
        with closing(batches):
            for batch in batches:
                self._note(batch.failures)
                clock.add("tiles", (perf_counter() - started) * 1e3)
                with clock.measure("tile_encoder"):
                    rows = slice(int(batch.index[0]), int(batch.index[-1]) + 1)
                    self._encoder.run({"tiles": batch.pixels}, {"features": self.x[rows]})
                    self._mend(rows, partial(_encode_again, batch.pixels))
                self._on_progress("tile encoder", rows.stop, len(grid))
                started = perf_counter()

    def on_device(self, threads: int) -> dict[str, Any]:
        """Of a `slides.device.device.DeviceTileEngine`; returns what did it, for the provenance. Stage "tiles" is what
        the encoder waited for."""
        from wsi_rt.runtime.slides.device.features import iter_features, ring_shape

        reader, plan, grid, clock = self._chosen.reader, self._chosen.plan, self._chosen.grid, self._clock
        encoder: Any = self._encoder  # `on_device` said that it is one
        started = perf_counter()
        with open_device(encoder) as device:
            tiles = open_tiles(TileSource(reader, grid, plan), self._chosen.settings.reader, device, threads)
            ring = ring_shape(tiles, encoder, self._batch_size)
            with closing(iter_features(tiles, encoder, device, ring)) as batches:
                for batch in batches:
                    self._note(batch.failures)
                    rows = slice(batch.rows.start, batch.rows.stop)
                    self.x[rows] = batch.features
                    self._mend(rows, partial(self._read_and_encode_again, batch))
                    clock.add("tiles", batch.waited_ms)
                    clock.add("tile_encoder", (perf_counter() - started) * 1e3 - batch.waited_ms)
                    self._on_progress("tile encoder", rows.stop, len(grid))
                    started = perf_counter()
        return {"name": device.name, "tiles": tiles.name, "slots": ring.slots, "batch": ring.batch}

    def _note(self, failures: Sequence[TileFailure]) -> None:
        self.failures += failures
        if failures and self._chosen.settings.on_bad_tile == "fail":
            raise _cannot_go_on(self.failures[0], len(self._chosen.grid))

    def _mend(self, rows: slice, again: Callable[[Engine, NDArray[np.intp]], NDArray[np.float32]]) -> None:
        self._sentinel.mend(self.x[rows], self._chosen.grid.xy0[rows].tolist(), again)

    def _read_and_encode_again(self, batch: FeatureBatch, wider: Engine, rows: NDArray[np.intp]) -> NDArray[np.float32]:
        """The batch's pixels are not on the host any more."""
        failed = {failure.index for failure in batch.failures}
        pixels = np.full((len(rows), TILE_PX, TILE_PX, 3), 255, np.uint8)
        for place, row in enumerate((rows + batch.rows.start).tolist()):
            if row not in failed:
                x0, y0 = self._chosen.grid.xy0[row].tolist()
                pixels[place] = read_tile(self._chosen.reader, self._chosen.plan, (x0, y0))
        return _encode_again(pixels, wider, np.arange(len(rows)))


def _encode_again(pixels: NDArray[np.uint8], wider: Engine, rows: NDArray[np.intp]) -> NDArray[np.float32]:
    """Tile by tile: memory for one is enough."""
    return np.concatenate([wider.run({"tiles": pixels[i : i + 1]})["features"] for i in rows])


def _cannot_go_on(failure: TileFailure, total: int) -> SlideError:
    return SlideError(
        f"{_named(failure)} of {total} tiles cannot be read, tried twice; get an intact copy of the slide, or go on "
        "without such tiles (--on-bad-tile skip) or with white in their place (--on-bad-tile white)"
    )


def _named(failure: TileFailure) -> str:
    return f"tile {failure.index} at level-0 position {failure.xy0} ({failure.reason})"


def _settle(
    x: NDArray[np.float32], grid: TileGrid, failures: Sequence[TileFailure], policy: str, path: Path
) -> tuple[NDArray[np.float32], TileGrid, tuple[str, ...]]:
    """Features and grid after the policy, and the note that names the tiles."""
    if not failures:
        return x, grid, ()
    if len(failures) == len(grid):
        raise SlideError(
            f"{path}: none of {len(grid)} tiles can be read; the first: {_named(failures[0])}; get an intact copy"
        )
    what = "left out" if policy == "skip" else "taken as white"
    named = "; ".join(_named(f) for f in failures[:NAMED_FAILURES])
    rest = f"; and {len(failures) - NAMED_FAILURES} more" if len(failures) > NAMED_FAILURES else ""
    note = f"{len(failures)} of {len(grid)} tiles could not be read, tried twice, and were {what}: {named}{rest}"
    if policy == "skip":
        left = np.ones(len(grid), bool)
        left[[f.index for f in failures]] = False
        made_by = grid.provenance
        settings = {**made_by.settings, "bad_tiles": _bad_tiles(failures, policy)}
        grid = replace(grid, xy0=grid.xy0[left], provenance=replace(made_by, settings=settings))
        x = x[left]
    return x, grid, (note,)


def _bad_tiles(failures: Sequence[TileFailure], policy: str) -> dict[str, Any]:
    return {"policy": policy, "count": len(failures), "xy0": [list(f.xy0) for f in failures[:MAX_LISTED]]}


def _reread_note(reader: SlideReader) -> tuple[str, ...]:
    if not reader.rereads:
        return ()
    regions = "1 region was" if reader.rereads == 1 else f"{reader.rereads} regions were"
    return (f"{regions} read again after an error",)
