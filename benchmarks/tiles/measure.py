"""One provider, once, in this process: `python -m wsi_rt.benchmarks.tiles.measure` reads a job on stdin (JSON).

mode "reference" writes the sample's pixels, "check" compares with them, "time" measures. Answers one line of JSON.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import numpy as np

from wsi_rt.benchmarks.tiles.cases import LIMIT
from wsi_rt.benchmarks.tiles.work import WARM_UP, Work
from wsi_rt.runtime.slides import ReadPlan

Answer = dict[str, Any]


def run(job: dict[str, Any]) -> Answer:
    """{"skipped": why} where the provider is not installed or does not read the slide."""
    from wsi_rt.benchmarks.tiles.providers import provider

    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: job["threads"]])
    work = Work(Path(job["path"]), np.load(job["xy0"]), ReadPlan(**job["plan"]))
    try:
        reading = provider(job["provider"])(work, job["threads"])
        return {"reference": _reference, "check": _check, "time": _time}[job["mode"]](reading, work, job)
    except ImportError as error:
        return {"skipped": f"not installed: {error}"}
    except Exception as error:  # peers raise what they like: it is their row that says so
        return {"skipped": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}


def _time(reading: Any, work: Work, job: dict[str, Any]) -> Answer:
    for _ in reading.read(work.xy0[:WARM_UP]):
        pass
    cpu, start = process_time(), perf_counter()
    done = 0
    for batch in reading.read(work.xy0[WARM_UP:]):
        done += len(batch)
    seconds, cpu = perf_counter() - start, process_time() - cpu
    if done != work.timed:
        return {"skipped": f"it gave {done} tiles of {work.timed}"}
    return {"tiles_per_s": done / seconds, "cpu_ms_per_tile": cpu / done * 1e3, "peak_rss_bytes": _peak_rss()}


def _peak_rss() -> int:
    """Of this process since it began, and of its largest child. getrusage would count what the process that started
    this one held; of a child it does, which is at most this process."""
    import resource

    children = 1024 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    status = Path("/proc/self/status").read_text()
    return children + 1024 * int(next(x for x in status.splitlines() if x.startswith("VmHWM")).split()[1])


def _sample(reading: Any, job: dict[str, Any]) -> np.ndarray:
    return np.concatenate([np.array(batch) for batch in reading.read(np.load(job["sample"]))])  # [S, 256, 256, 3]


def _reference(reading: Any, work: Work, job: dict[str, Any]) -> Answer:
    np.save(job["pixels"], _sample(reading, job))
    return {}


def _check(reading: Any, work: Work, job: dict[str, Any]) -> Answer:
    """Tiles of the sample that differ, and by how much at most; the limit compares its segments instead."""
    got, want = _segments(reading, work, job) if job["provider"] == LIMIT else (_sample(reading, job), None)
    want = np.load(job["pixels"]) if want is None else want
    if got.shape != want.shape:
        return {"skipped": f"it gave {got.shape}, expected {want.shape}"}
    off = np.abs(got.astype(np.int16) - want).reshape(len(want), -1).max(axis=1)
    return {"tiles": len(want), "differ": int((off > 0).sum()), "most": int(off.max())}


def _segments(reading: Any, work: Work, job: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Whole stored tiles of the limit, and OpenSlide's region there."""
    import openslide

    from wsi_rt.benchmarks.tiles.providers import slide_file

    w, h = reading.stored.tile
    indices = reading.indices(np.load(job["sample"]))[:32]
    got = np.empty((len(indices), h, w, 3), np.uint8)
    for out, index in zip(got, indices.tolist(), strict=True):
        reading.decode(index, out)
    want = got.copy()
    with openslide.OpenSlide(slide_file(work.path)) as slide:
        for out, index in zip(want, indices.tolist(), strict=True):
            row, col = divmod(index, reading.stored.cols)
            place = (round(col * w * work.plan.downsample), round(row * h * work.plan.downsample))
            rgba = np.asarray(slide.read_region(place, work.plan.level, (w, h)))
            out[:] = np.where(rgba[..., 3:] == 255, rgba[..., :3], out)  # beyond the slide a segment holds padding
    return got, want


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no answer
    answers.write(json.dumps(run(json.load(sys.stdin))) + "\n")
    answers.flush()
    os._exit(0)  # some peers crash or hang while they are torn down


if __name__ == "__main__":
    main()
