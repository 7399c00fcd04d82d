"""Stored inputs, fp32 torch outputs, and graphs run on them: whole, and layer by layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wsi_rt.export.arch import (
    ComponentConfig,
    LlamaConfig,
    LongNetConfig,
    ProjectorConfig,
    ViTConfig,
    config_json,
)
from wsi_rt.export.models import layer_names, reference_model
from wsi_rt.export.sources.synthetic import uniform
from wsi_rt.export.sources.weights import WeightSource
from wsi_rt.runtime.engines.ort import open_session
from wsi_rt.runtime.errors import ParityError
from wsi_rt.runtime.llm.decoder import Chunk
from wsi_rt.runtime.llm.ort_layers import LayersRun, OrtLayers
from wsi_rt.runtime.parity import INPUT, OUTPUT, LayerError
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


@dataclass(frozen=True)
class Reference:
    """What the fp32 module answers. layers: how far each layer of a trajectory was off, by name (LayerCheck)."""

    outputs: Arrays
    layers: Mapping[str, LayerError]


def reference_outputs(
    c: ComponentConfig,
    source: WeightSource,
    inputs: Arrays,
    threads: int = 0,
    trajectory: Sequence[NDArray[np.float32]] = (),
) -> Reference:
    """One pass through the fp32 torch module, a layer's weights in memory at a time. threads 0: torch's default.

    trajectory: what went into an engine's first layer and came out of each, on these inputs. Every layer is then also
    run on the engine's own values, so that an error shows in the layer that makes it.
    """
    import torch

    if threads:
        torch.set_num_threads(threads)
    module: Any = reference_model(c, source)  # called, indexed: nn.Module's attributes are untyped
    check = LayerCheck(c, module, trajectory) if trajectory else None
    tensors = {name: torch.from_numpy(x) for name, x in inputs.items()}
    with torch.inference_mode():
        if isinstance(c, LlamaConfig):
            out = module(inputs_embeds=_all_embeds(module, tensors)[None], use_cache=False).logits
            outputs = {"logits": out[0, len(inputs["embeds"]) - 1 :]}
        elif isinstance(c, LongNetConfig):
            outputs = {name: x for name, x in module(*tensors.values()).items() if name != "encoder_out"}
        else:
            outputs = {"embeds" if isinstance(c, ProjectorConfig) else "features": module(*tensors.values())}
    return Reference({name: x.numpy() for name, x in outputs.items()}, check.errors if check else {})


def _all_embeds(module: Any, tensors: Mapping[str, Any]) -> Any:
    """The prompt's and the answer's embeddings as one sequence [T + S, hidden]."""
    import torch

    return torch.cat([tensors["embeds"], module.get_input_embeddings()(tensors["token_ids"])])


class LayerCheck:
    """Holds an engine's layers against the reference's while that runs: an error is how far what the engine's layer
    gives is from what the reference's gives on the same input, over what the latter adds to it; `embed` compares the
    first layer's input itself. A layer left out has an error of 1."""

    def __init__(self, c: ComponentConfig, module: Any, trajectory: Sequence[NDArray[np.float32]]) -> None:
        names = layer_names(c)
        if len(trajectory) != len(names) + 1:
            raise ParityError(
                f"{c.component}: the engine has {len(trajectory) - 1} layers, its checkpoint {len(names)}; "
                "nothing was installed"
            )
        self.errors: dict[str, LayerError] = {}
        self._trajectory = trajectory
        for i, name in enumerate(names):
            module.get_submodule(name).register_forward_hook(self._hook(i, name), prepend=True, with_kwargs=True)

    def _hook(self, i: int, name: str) -> Callable[..., None]:
        import torch

        def compare(layer: Any, args: Any, kwargs: Any, _: Any) -> None:
            x, after = (torch.from_numpy(x).reshape(args[0].shape) for x in self._trajectory[i : i + 2])
            if i == 0:
                self.errors["embed"] = _layer_error(x, args[0], args[0])
            expected = layer.forward(x, *args[1:], **kwargs)
            self.errors[name] = _layer_error(after, expected, expected - x)

        return compare


def _layer_error(actual: Any, expected: Any, added: Any) -> LayerError:
    """[..., C] each. What fp32 itself loses in adding a small `added` to a large input is no error of the layer."""
    own = 4 * np.finfo(np.float32).eps * expected.norm(dim=-1)  # [...]
    rows = ((actual - expected).norm(dim=-1) - own).clamp(min=0)
    sizes = added.norm(dim=-1)
    size = sizes.square().mean().sqrt().clamp(min=1e-30)  # of an average row
    # A token to which trained weights add tens of times what they add to others is rounded in proportion.
    total, row = float(rows.square().mean().sqrt() / size), float((rows / sizes.clamp(min=size)).max())
    return LayerError(total, row) if math.isfinite(total + row) else LayerError(math.inf, math.inf)


def write_check(path: Path, inputs: Arrays, outputs: Arrays) -> None:
    """`check.npz`, as `runtime.parity.load_check` reads it."""
    arrays = {INPUT + k: v for k, v in inputs.items()} | {OUTPUT + k: v for k, v in outputs.items()}
    np.savez(path, allow_pickle=False, **arrays)


def run_probe(probe: Path, inputs: Arrays, threads: int = 0) -> list[NDArray[np.float32]]:
    """What goes into the first layer of a graph with probes (`Style.probe`), and comes out of each; removes the file.
    threads 0: onnxruntime's default."""
    session = open_session(probe, probe.parent, threads)
    found = session.run([o.name for o in session.get_outputs() if o.name.startswith("probe.")], inputs)
    probe.unlink()
    return found


def run_layers(
    c: LlamaConfig, graphs: Mapping[str, Path], weights_dir: Path, inputs: Arrays, threads: int = 0, wide: bool = False
) -> list[NDArray[np.float32]]:
    """The same of a language model's layers, prompt and answer in one call, one layer's weights in memory at a time.
    wide: those for calls of many rows."""
    layers = OrtLayers(config_json(c), graphs, weights_dir, threads, wide_from=1 if wide else None)
    embeds = np.concatenate([inputs["embeds"], layers.embed(inputs["token_ids"])])
    found: list[NDArray[np.float32]] = []
    run = LayersRun([Chunk(layers.new_kv(len(embeds)), embeds)])
    for i in range(c.layers + 1):
        run.through(layers, i)
        found.append(run.x[None])
    return found
