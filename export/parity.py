"""Stored inputs, fp32 torch outputs, and the portable graphs run on them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wsi_rt.export.arch import ComponentConfig, LlamaConfig, LongNetConfig, ProjectorConfig, ViTConfig
from wsi_rt.export.models import reference_model
from wsi_rt.export.sources.synthetic import uniform
from wsi_rt.export.sources.weights import WeightSource
from wsi_rt.runtime.engines.ort import open_session
from wsi_rt.runtime.parity import INPUT, OUTPUT
from wsi_rt.runtime.types import TILE_PX

Arrays = dict[str, NDArray[Any]]

SLIDE_TILES = 1100  # more than one segment of 1024 and more than 576 bins, the last segment partly filled
PREFILL, STEPS = 640, 8  # as long as a real prompt: errors of attention grow with it


def check_inputs(c: ComponentConfig) -> Arrays:
    """A small deterministic input that exercises the whole component."""
    if isinstance(c, ViTConfig):
        ramp = np.arange(TILE_PX, dtype=np.float32)[:, None, None] / TILE_PX
        noise = uniform(0, "check.tiles", 2 * TILE_PX * TILE_PX * 3, 0, 128).reshape(2, TILE_PX, TILE_PX, 3)
        return {"tiles": (noise + 127 * ramp).astype(np.uint8)}
    if isinstance(c, LongNetConfig):
        side = math.isqrt(SLIDE_TILES) + 1
        index = np.arange(SLIDE_TILES, dtype=np.int64)
        features = uniform(0, "check.features", SLIDE_TILES * c.in_width, -2, 2).reshape(SLIDE_TILES, c.in_width)
        return {"features": features, "positions": np.stack([index % side, index // side], axis=1)}
    if isinstance(c, ProjectorConfig):
        return {"tokens": uniform(0, "check.tokens", 64 * c.widths[0], -2, 2).reshape(64, c.widths[0])}
    ids = uniform(0, "check.token_ids", STEPS, 0, c.vocab).astype(np.int64)
    length = min(PREFILL, c.context - STEPS)
    return {"embeds": uniform(0, "check.embeds", length * c.hidden, -1, 1).reshape(length, -1), "token_ids": ids}


def reference_outputs(c: ComponentConfig, source: WeightSource, inputs: Arrays, threads: int = 0) -> Arrays:
    """What the fp32 torch module answers. threads 0: torch's default."""
    import torch

    if threads:
        torch.set_num_threads(threads)

    module: Any = reference_model(c, source)  # called, indexed: nn.Module's attributes are untyped
    tensors = {name: torch.from_numpy(x) for name, x in inputs.items()}
    with torch.inference_mode():
        if isinstance(c, LlamaConfig):
            new = module.get_input_embeddings()(tensors["token_ids"])
            embeds = torch.cat([tensors["embeds"], new])
            logits = module(inputs_embeds=embeds[None]).logits[0, len(inputs["embeds"]) - 1 :]
            return {"logits": logits.numpy()}
        out = module(*tensors.values())
    if isinstance(c, LongNetConfig):
        return {name: x.numpy() for name, x in out.items() if name != "encoder_out"}
    return {"embeds" if isinstance(c, ProjectorConfig) else "features": out.numpy()}


def write_check(path: Path, inputs: Arrays, outputs: Arrays) -> None:
    """`check.npz`, as `runtime.parity.load_check` reads it."""
    arrays = {INPUT + k: v for k, v in inputs.items()} | {OUTPUT + k: v for k, v in outputs.items()}
    np.savez(path, allow_pickle=False, **arrays)


def run_portable(c: ComponentConfig, graphs: Mapping[str, Path], inputs: Arrays, threads: int = 0) -> Arrays:
    """The portable graphs in onnxruntime, on inputs as `check_inputs` makes them. threads 0: its default."""
    if isinstance(c, LlamaConfig):
        return {"logits": run_portable_llama(c, graphs["embed"], graphs["decoder"], inputs, threads)}
    path = graphs["model"]
    session = open_session(path, path.parent, threads)
    names = [o.name for o in session.get_outputs()]
    return dict(zip(names, session.run(names, inputs), strict=True))


def run_portable_llama(
    c: LlamaConfig, embed: Path, decoder: Path, inputs: Arrays, threads: int = 0
) -> NDArray[np.float32]:
    """Prefill, then one token at a time with past and present KV -> logits [steps + 1, vocab]."""
    embed_session, session = (open_session(path, path.parent, threads) for path in (embed, decoder))
    new = embed_session.run(["embeds"], {"input_ids": inputs["token_ids"]})[0]
    empty = np.zeros((1, c.kv_heads, 0, c.head_width), np.float32)
    past = {f"past.{i}.{part}": empty for i in range(c.layers) for part in ("key", "value")}
    presents = [name.replace("past", "present") for name in past]
    logits = []
    for x in [inputs["embeds"], *np.split(new, len(new))]:
        first, *present = session.run(["logits", *presents], {"inputs_embeds": x[None], **past})
        logits.append(first[0])
        past = dict(zip(past, present, strict=True))
    return np.stack(logits)
