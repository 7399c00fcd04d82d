"""The bench: slides written, pixels compared, then rounds of fresh processes; rows of every provider."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from wsi_rt.benchmarks.report import Outcome, Row, percentiles
from wsi_rt.benchmarks.tiles.cases import LIMIT, OURS, REFERENCE, Case, chosen
from wsi_rt.benchmarks.tiles.work import WARM_UP, Work, make_slide, plan_work, warm_page_cache

ROUNDS, QUICK_ROUNDS = 5, 2
SAMPLE = 96  # tiles compared before a provider's time counts
SECONDS = 900  # one process; none took more than 60
METRICS = {"tiles_per_s": "1/s", "cpu_ms_per_tile": "ms", "peak_rss_bytes": "B"}
# For every process alike: what is freed stays with the process, so that no provider pays for pages again and again.
MALLOC = {"MALLOC_ARENA_MAX": "4", "MALLOC_MMAP_THRESHOLD_": "33554432", "MALLOC_TRIM_THRESHOLD_": "1073741824"}
CONDITIONS = (
    "a fresh process per provider and round, rounds interleaved; pinned to as many CPUs as threads; page cache warm; "
    f"{' '.join(f'{name}={value}' for name, value in MALLOC.items())}; opening and {WARM_UP} tiles of warm-up not timed"
)

PACKAGES = (
    "openslide-bin", "tiffslide", "cucim-cu12", "pyvips", "pyvips-binary",
    "fastslide", "wsidicom", "pydicom", "simplejpeg", "imagecodecs",
)  # fmt: skip

Progress = Callable[[str, int, int], None]


def bench_tiles(
    slide: Path | None,
    names: Sequence[str],
    *,
    threads: int,
    quick: bool,
    folder: Path,
    on_progress: Progress = lambda stage, done, total: None,
) -> Outcome:
    """Every chosen case; a slide instead of cases where one is given.

    folder: keeps the slides that are written (0.5 GB). threads: of each provider. Raises InputError, SlideError.
    """
    outcome = Outcome()
    for case in chosen(names, slide):
        path = make_slide(case, quick, folder, threads, lambda done, total: on_progress("write slide", done, total))
        work = plan_work(path, case.most, threads)
        warm_page_cache(path)
        bench_case(case, work, threads, QUICK_ROUNDS if quick else ROUNDS, outcome, on_progress)
    return outcome


def versions() -> dict[str, str]:
    """Those of the readers and codecs that are installed."""
    found = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def bench_case(case: Case, work: Work, threads: int, rounds: int, outcome: Outcome, on_progress: Progress) -> None:
    """Gate, then time: a provider whose pixels are not the reference's is timed too, and its rows say so."""
    with tempfile.TemporaryDirectory(prefix="wsi-rt-bench-") as scratch:
        job = _job(work, threads, Path(scratch))
        notes: dict[str, str] = {}
        skipped: dict[str, str] = {}
        _measure({**job, "provider": REFERENCE, "mode": "reference"})
        for provider in case.providers:
            checked = _measure({**job, "provider": provider, "mode": "check"})
            if "skipped" in checked:
                skipped[provider] = checked["skipped"]
            elif checked["differ"]:
                notes[provider] = (
                    f"not pixel-exact: {checked['differ']} of {checked['tiles']} tiles, up to {checked['most']}"
                )
        if OURS in notes:
            outcome.red.append(f"{case.name}: {notes[OURS]}")
            skipped[OURS] = notes.pop(OURS)  # a speedup is never reported on a red gate
        samples: dict[str, list[dict[str, float]]] = defaultdict(list)
        for turn in range(rounds):
            for n, provider in enumerate(case.providers):
                on_progress(case.name, turn * len(case.providers) + n, rounds * len(case.providers))
                if provider not in skipped:
                    measured = _measure({**job, "provider": provider, "mode": "time"})
                    if "skipped" in measured:
                        skipped[provider] = measured["skipped"]
                    else:
                        samples[provider].append(measured)
    for provider in case.providers:
        outcome.rows += _rows(case, provider, threads, samples[provider], notes.get(provider), skipped.get(provider))
    if OURS in skipped and not any(red.startswith(f"{case.name}:") for red in outcome.red):
        outcome.broken.append(f"{case.name}: {skipped[OURS]}")


def _job(work: Work, threads: int, scratch: Path) -> dict[str, Any]:
    step = max(1, len(work.xy0) // (SAMPLE // 2))
    near = len(work.xy0) // 2
    sample = np.unique(np.concatenate([work.xy0[::step], work.xy0[near : near + SAMPLE // 2]]), axis=0)
    np.save(scratch / "xy0.npy", work.xy0)
    np.save(scratch / "sample.npy", sample)
    return {
        "path": str(work.path.resolve()),
        "plan": asdict(work.plan),
        "xy0": str(scratch / "xy0.npy"),
        "sample": str(scratch / "sample.npy"),
        "pixels": str(scratch / "pixels.npy"),
        "threads": threads,
    }


def _measure(job: dict[str, Any]) -> dict[str, Any]:
    """One process; {"skipped": why} also where it dies or hangs."""
    environment = {**os.environ, **MALLOC, "OMP_NUM_THREADS": "1", "VIPS_CONCURRENCY": "1"}
    try:
        done = subprocess.run(
            [sys.executable, "-m", "wsi_rt.benchmarks.tiles.measure"],
            input=json.dumps(job), capture_output=True, text=True, env=environment, timeout=SECONDS, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return {"skipped": f"it did not end within {SECONDS} s"}
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no word"])[-1]
        return {"skipped": f"its process ended with exit code {done.returncode}: {last[:200]}"}
    return dict(json.loads(done.stdout.splitlines()[-1]))


def _rows(
    case: Case,
    provider: str,
    threads: int,
    samples: Sequence[dict[str, float]],
    note: str | None,
    skipped: str | None,
) -> list[Row]:
    if provider == LIMIT and note is None:
        note = "the codec alone, each stored tile once"
    common: dict[str, Any] = {"bench": "tiles", "case": case.name, "provider": provider, "threads": threads}
    if skipped is not None:
        return [Row(metric="tiles_per_s", unit="1/s", skipped=skipped, **common)]
    return [
        Row(metric=metric, unit=unit, note=note, **percentiles([s[metric] for s in samples]), **common)
        for metric, unit in METRICS.items()
    ]
