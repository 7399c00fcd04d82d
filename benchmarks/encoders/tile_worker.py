"""One measurement of the tile encoder's cases, in a process of its own (`worker`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from wsi_rt.benchmarks.encoders.tile_cases import PIPELINE, REFERENCE, REFERENCE_BATCH, TIMM, stained_tiles
from wsi_rt.benchmarks.llm.worker import memory_bytes

if TYPE_CHECKING:
    from wsi_rt.export.arch import ViTConfig
    from wsi_rt.export.sources.weights import WeightSource

Encode = Callable[[NDArray[np.uint8]], NDArray[np.float32]]


def tile_part(word: str) -> tuple[ViTConfig, WeightSource]:
    """The tile encoder of a synthetic checkpoint."""
    from wsi_rt.export.arch import ViTConfig
    from wsi_rt.export.sources.checkpoint import Sources, resolve

    part = resolve(Sources(checkpoint=word)).parts[ViTConfig.component]
    if not isinstance(part.config, ViTConfig):
        raise TypeError(f"tile_encoder is a {type(part.config).__name__}")
    return part.config, part.source


def run_tile_job(job: Mapping[str, Any]) -> dict[str, Any]:
    """job: case, threads, and what the case needs (`tile.TileBench`)."""
    return _pipeline(job) if job["case"] == PIPELINE else _vitg(job)


def _vitg(job: Mapping[str, Any]) -> dict[str, Any]:
    """-> seconds_per_tile of each run over all tiles, batch, peak_rss_bytes. The first batch is not timed."""
    tiles = stained_tiles(job["tiles"])
    encode, batch = (_eager_timm if job["provider"] == REFERENCE else _ours)(job)
    parts = [tiles[i : i + batch] for i in range(0, len(tiles), batch)]
    encode(parts[0])
    seconds: list[float] = []
    found: list[NDArray[np.float32]] = []
    for _ in range(job["runs"]):
        started = perf_counter()
        found = [encode(part) for part in parts]
        seconds.append((perf_counter() - started) / len(tiles))
    np.save(job["features"], np.concatenate(found))
    return {"seconds_per_tile": seconds, "batch": batch, "peak_rss_bytes": memory_bytes("VmHWM:")}


def _eager_timm(job: Mapping[str, Any]) -> tuple[Encode, int]:
    """The published way: timm's module in fp32, the checkpoint's weights, normalised tiles."""
    import timm
    import torch

    from wsi_rt.export.models.vit import preprocess

    torch.set_num_threads(job["threads"])
    c, source = tile_part(job["word"])
    size: dict[str, Any] = {"img_size": c.image_px, "patch_size": c.patch_px, "embed_dim": c.width, "depth": c.depth}
    with torch.device("meta"):
        module = timm.create_model(TIMM, num_classes=0, num_heads=c.heads, **size)
    weights = {name: torch.from_numpy(source.get(name)) for name in c.tensors()}
    module.load_state_dict(weights, strict=True, assign=True)
    module.eval()

    def encode(tiles: NDArray[np.uint8]) -> NDArray[np.float32]:
        with torch.inference_mode():
            return module(preprocess(torch.from_numpy(tiles), c)).numpy()

    return encode, REFERENCE_BATCH


def _ours(job: Mapping[str, Any]) -> tuple[Encode, int]:
    """The engine that `wsi-rt encode` opens, and its batch; torch is not imported."""
    from wsi_rt.runtime.bundle import Bundle
    from wsi_rt.runtime.plan import plan_run

    bundle = Bundle.open(job["bundle"], job["threads"])
    engine, batch = bundle.engine("tile_encoder"), plan_run(bundle, 10_000, tokens=False).batch
    return (lambda tiles: engine.run({"tiles": tiles})["features"]), batch


def _pipeline(job: Mapping[str, Any]) -> dict[str, Any]:
    """-> seconds from slide to tokens, tiles, and the encoder's share of the time spent on tiles."""
    from wsi_rt.runtime.pipeline import Pipeline

    with Pipeline.open(job["bundle"], job["threads"]) as pipeline:
        for name in ("tile_encoder", "slide_encoder"):  # opened before the clock starts
            pipeline._engine(name)
        started = perf_counter()
        encoded = pipeline.encode(Path(job["slide"]), features=False)
        seconds, ms = perf_counter() - started, encoded.timings_ms
    busy = ms["tile_encoder"] / (ms["tile_encoder"] + ms["tiles"])
    return {"seconds": seconds, "busy": busy, "tiles": encoded.tiles["kept"]}
