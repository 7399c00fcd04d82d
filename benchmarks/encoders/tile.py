"""The cases `tile-vitg`, one published tile encoder against eager timm, and `pipeline-2000`, a whole slide through a
small one: is the encoder ever kept waiting for tiles?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from wsi_rt.benchmarks.encoders.tile_cases import (
    INT8,
    MIN_COSINE,
    PIPELINE,
    PROVIDERS,
    QUICK_TILES,
    REFERENCE,
    ROUNDS,
    SLIDE,
    SMALL_PRESET,
    VITG,
    VITG_TILES,
    flops,
)
from wsi_rt.benchmarks.report import Row, percentiles
from wsi_rt.runtime.parity import row_cosines

Measure = Callable[[dict[str, Any], int, str], dict[str, Any]]  # as `run.measure`
Build = Callable[..., Path]  # (precision, components, preset or None: the checkpoint's own) -> bundle


class TileBench:
    """measure: one job in a process of its own. build: a bundle, made once. cache: keeps the slide that is written.

    word: the checkpoint. red, broken: as in `run.Outcome`."""

    def __init__(self, word: str, cache: Path, threads: int, quick: bool, measure: Measure, build: Build) -> None:
        self._word, self._cache, self._threads, self._quick = word, cache, threads, quick
        self._measure, self._build = measure, build
        self.red: list[str] = []
        self.broken: list[str] = []

    def run(self, case: str, step: Callable[[str], None]) -> list[Row]:
        return self._vitg(step) if case == VITG else self._pipeline(step)

    def _row(self, case: str, provider: str) -> Callable[..., Row]:
        def row(metric: str, unit: str, **rest: Any) -> Row:
            return Row("encoders", case, provider, metric, unit, threads=self._threads, **rest)

        return row

    def _vitg(self, step: Callable[[str], None]) -> list[Row]:
        """Reference and ours take the same stained tiles; ours is not timed where its features are off."""
        step(f"{VITG}: build int8")
        bundle = self._build("int8", "tile_encoder")
        found: dict[str, dict[str, Any]] = {}
        with TemporaryDirectory() as aside:
            for provider in PROVIDERS:
                step(f"{VITG}: {provider}")
                job: dict[str, Any] = {"case": VITG, "provider": provider, "word": self._word, "bundle": str(bundle)}
                job |= {"tiles": QUICK_TILES if self._quick else VITG_TILES, "runs": 1 if self._quick else ROUNDS}
                job |= {"features": str(Path(aside) / f"{PROVIDERS.index(provider)}.npy")}
                found[provider] = self._measure(job, self._threads, aside)
            cosine = _worst_cosine(Path(aside)) if not any("skipped" in f for f in found.values()) else None
        return [row for provider in PROVIDERS for row in self._vitg_rows(provider, found, cosine)]

    def _vitg_rows(self, provider: str, found: dict[str, dict[str, Any]], cosine: float | None) -> list[Row]:
        row, got = self._row(VITG, provider), found[provider]
        if provider == INT8 and cosine is not None and not cosine >= MIN_COSINE:
            why = f"its features are off: cosine {cosine:.6f} in the worst tile (at least {MIN_COSINE})"
            self.red.append(f"{VITG}: {provider}: {why}")
            return [row("min_cosine", "", p50=cosine), row("tiles_per_s", "1/s", skipped=why)]
        if "skipped" in got:
            self.broken += [f"{VITG}: {provider}: {got['skipped']}"] if provider == INT8 else []
            return [row("tiles_per_s", "1/s", skipped=got["skipped"])]
        rates, tokens = [1 / s for s in got["seconds_per_tile"]], flops(self._word)
        rows = [
            row("tiles_per_s", "1/s", note=f"{got['batch']} at a time", **percentiles(rates)),
            row("gflops", "GFLOP/s", **percentiles([tokens * rate / 1e9 for rate in rates])),
            row("peak_rss_bytes", "B", p50=got["peak_rss_bytes"], n=1),
        ]
        base = found[REFERENCE].get("seconds_per_tile")
        if provider == INT8 and base:
            speedups = [float(np.median(base)) * rate for rate in rates]
            rows += [row("speedup", "x", **percentiles(speedups)), row("min_cosine", "", p50=cosine)]
        return rows

    def _pipeline(self, step: Callable[[str], None]) -> list[Row]:
        step(f"{PIPELINE}: build")
        bundle = self._build("tile_encoder=int8,slide_encoder=fp32", "tile_encoder,slide_encoder", SMALL_PRESET)
        slide = self._cache / ("pipeline-small.svs" if self._quick else "pipeline.svs")
        if not slide.exists():
            from wsi_rt.runtime.slides.synth import write_synth_slide

            step(f"{PIPELINE}: write the slide")
            write_synth_slide(slide, **SLIDE | ({"width": 4096, "height": 3072} if self._quick else {}))
        row, seconds, busy, tiles = self._row(PIPELINE, INT8), [], [], 0
        for _ in range(1 if self._quick else ROUNDS):
            step(f"{PIPELINE}: {INT8}")
            with TemporaryDirectory() as aside:
                job = {"case": PIPELINE, "provider": INT8, "bundle": str(bundle), "slide": str(slide)}
                got = self._measure(job, self._threads, aside)
            if "skipped" in got:
                self.broken.append(f"{PIPELINE}: {INT8}: {got['skipped']}")
                return [row("seconds", "s", skipped=got["skipped"])]
            seconds.append(got["seconds"])
            busy.append(got["busy"])
            tiles = got["tiles"]
        note = f"{tiles} tiles; the encoder's share of the time in which tiles are read and encoded"
        return [
            row("seconds", "s", **percentiles(seconds)),
            row("tiles_per_s", "1/s", **percentiles([tiles / s for s in seconds])),
            row("encoder_busy", "", note=note, **percentiles(busy)),
        ]


def _worst_cosine(folder: Path) -> float:
    expected, actual = (np.load(folder / f"{PROVIDERS.index(p)}.npy").astype(np.float64) for p in (REFERENCE, INT8))
    return float(row_cosines(actual, expected).min())


def tile_cases(names: Sequence[str], quick: bool) -> tuple[str, ...]:
    """Those of `names` that are cases of this module; all of them without names, of which --quick leaves the small."""
    known = (PIPELINE,) if quick else (VITG, PIPELINE)
    return tuple(n for n in (VITG, PIPELINE) if n in names) if names else known
