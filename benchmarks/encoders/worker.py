"""One measurement in a process of its own: a job in JSON on stdin, its result in JSON in the file that it names."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from wsi_rt.benchmarks.encoders.cases import LIMIT, REFERENCE, slide
from wsi_rt.benchmarks.encoders.tile_worker import run_tile_job
from wsi_rt.benchmarks.llm.worker import memory_bytes

Encode = Callable[[], np.ndarray]


def run_job(job: Mapping[str, Any]) -> dict[str, Any]:
    """job: provider, tiles, word (the checkpoint), bundle, threads, runs, tokens (a file for the tokens). -> seconds of
    each run but the first (of the only one), peak_rss_bytes, first_seconds and first_peak_bytes (of the first run, as a
    user's is), and of ours planned_seconds and planned_bytes; of the limits, samples by kind."""
    if "case" in job:
        return run_tile_job(job)
    if job["provider"] == LIMIT:
        from wsi_rt.benchmarks.llm.limits import gemm_gflops

        return {kind: gemm_gflops(kind, job["threads"], job["runs"]) for kind in ("fp32", "int8")}
    encode, planned = _published(job) if job["provider"] == REFERENCE else _ours(job)
    seconds, peaks = [], []
    for _ in range(job["runs"]):
        started = perf_counter()
        tokens = encode()
        seconds.append(perf_counter() - started)
        peaks.append(memory_bytes("VmHWM:"))
    np.save(job["tokens"], tokens)
    first = {"first_seconds": seconds[0], "first_peak_bytes": peaks[0]}
    return {"seconds": seconds[1:] or seconds, "peak_rss_bytes": peaks[-1], **first, **planned}


def _published(job: Mapping[str, Any]) -> tuple[Encode, dict[str, float]]:
    import torch

    from wsi_rt.benchmarks.encoders.published import PublishedSlideEncoder
    from wsi_rt.benchmarks.encoders.run import source_of

    torch.set_num_threads(job["threads"])
    c, source = source_of(job["word"])
    module = PublishedSlideEncoder(c, source)
    inputs = {name: torch.from_numpy(x) for name, x in slide(c, job["tiles"]).items()}
    return (lambda: module.tokens(**inputs).numpy()), {}


def _ours(job: Mapping[str, Any]) -> tuple[Encode, dict[str, float]]:
    """Through the engine that `wsi-rt encode` opens, with what `wsi-rt plan` makes of it; torch is not imported."""
    import onnxruntime  # noqa: F401 - part of what is resident before the plan is made

    from wsi_rt.export.arch import LongNetConfig
    from wsi_rt.runtime.bundle import Bundle
    from wsi_rt.runtime.plan import plan_encode
    from wsi_rt.runtime.plan_measure import resident_bytes, stored

    bundle = Bundle.open(job["bundle"], job["threads"])
    planned: dict[str, float] = {}
    if (measured := stored(bundle)) is not None:
        plan = plan_encode(bundle, measured, job["tiles"], held_bytes=resident_bytes())
        planned = {"planned_seconds": plan.seconds, "planned_bytes": plan.peak_bytes}
    inputs = slide(LongNetConfig(in_width=int(bundle.component("slide_encoder").inputs[0].dims[-1])), job["tiles"])
    engine = bundle.engine("slide_encoder")
    return (lambda: engine.run(inputs)["tokens"]), planned


if __name__ == "__main__":
    given = json.load(sys.stdin)
    Path(given["out"]).write_text(json.dumps(run_job(given)))
