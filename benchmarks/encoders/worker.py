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


def run_job(job: Mapping[str, Any]) -> dict[str, Any]:
    """job: provider, tiles, word (the checkpoint), bundle, threads, runs, tokens (a file for the tokens). -> seconds of
    each run but the first, opening_seconds, peak_rss_bytes; of the limits, samples by kind."""
    if "case" in job:
        return run_tile_job(job)
    if job["provider"] == LIMIT:
        from wsi_rt.benchmarks.llm.limits import gemm_gflops

        return {kind: gemm_gflops(kind, job["threads"], job["runs"]) for kind in ("fp32", "int8")}
    started = perf_counter()
    encode = (_published if job["provider"] == REFERENCE else _ours)(job)
    opened = perf_counter() - started
    seconds = []
    for _ in range(job["runs"]):
        started = perf_counter()
        tokens = encode()
        seconds.append(perf_counter() - started)
    np.save(job["tokens"], tokens)
    return {"seconds": seconds[1:], "opening_seconds": opened, "peak_rss_bytes": memory_bytes("VmHWM:")}


def _published(job: Mapping[str, Any]) -> Callable[[], np.ndarray]:
    import torch

    from wsi_rt.benchmarks.encoders.published import PublishedSlideEncoder
    from wsi_rt.benchmarks.encoders.run import source_of

    torch.set_num_threads(job["threads"])
    c, source = source_of(job["word"])
    module = PublishedSlideEncoder(c, source)
    inputs = {name: torch.from_numpy(x) for name, x in slide(c, job["tiles"]).items()}
    return lambda: module.tokens(**inputs).numpy()


def _ours(job: Mapping[str, Any]) -> Callable[[], np.ndarray]:
    """Through the engine that `wsi-rt encode` opens; torch is not imported."""
    from wsi_rt.export.arch import LongNetConfig
    from wsi_rt.runtime.engines.registry import backend
    from wsi_rt.runtime.manifest import load_manifest

    root = Path(job["bundle"])
    manifest = load_manifest(root).components["slide_encoder"]
    engine = backend("ort-cpu").open_engine(root, manifest, job["threads"])
    inputs = slide(LongNetConfig(in_width=int(manifest.inputs[0].dims[-1])), job["tiles"])
    return lambda: engine.run(inputs)["tokens"]


if __name__ == "__main__":
    given = json.load(sys.stdin)
    Path(given["out"]).write_text(json.dumps(run_job(given)))
