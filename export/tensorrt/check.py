"""The ONNX files that an engine is compiled from, run by onnxruntime on the CPU: what can be held against the fp32
reference where there is no GPU. A layer's weights are in memory at a time."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from wsi_rt.export.arch import ComponentConfig, LlamaConfig
from wsi_rt.export.graphs.dilated_attention_rtx import HEADROOM
from wsi_rt.export.graphs.llama_rtx import PARTS
from wsi_rt.export.parity import Arrays
from wsi_rt.export.portable import Pieces
from wsi_rt.export.tensorrt.sources import Sources
from wsi_rt.runtime.errors import ParityError
from wsi_rt.runtime.llm.ort_layers import EMBED


def trajectory(c: ComponentConfig, sources: Sources, inputs: Arrays, threads: int = 0) -> list[NDArray[np.float32]]:
    """What goes into the first layer on inputs as `export.parity.check_inputs` makes them, and comes out of each: a
    language model's prompt and answer in one call. threads 0: onnxruntime's default.

    Raises ParityError when the sums of exponentials of a slide encoder leave the range of the type on these inputs.
    """
    pieces = Pieces(sources.runnable, threads)
    if isinstance(c, LlamaConfig):
        return _llama(c, pieces, sources, inputs, threads)
    headrooms = _headrooms(sources)
    found: list[NDArray[Any]] = []
    values = inputs
    for i, name in enumerate(pieces.boundaries):
        wanted = [name, *headrooms[i - 1 : i]] if i else [name]
        x, *rest = pieces.open(list(values), wanted)(values)
        if rest and not rest[0] >= 1:
            raise ParityError(
                f"{c.component}: sums of exponentials in layer {i - 1} leave the range of the precision (headroom "
                f"{float(rest[0]):.2g}, at least 1); build it with --precision {c.component}=bf16"
            )
        found.append(x)
        values = {name: x}
    return found


def outputs(c: ComponentConfig, sources: Sources, inputs: Arrays, threads: int = 0) -> Arrays:
    """The outputs that the portable graph has, too; of a language model, the logits behind the prompt and each given
    token."""
    pieces = Pieces(sources.runnable, threads)
    layers = trajectory(c, sources, inputs, threads)
    last = {pieces.boundaries[-1]: layers[-1]} if layers else inputs
    if isinstance(c, LlamaConfig):
        rows = np.arange(len(inputs["embeds"]) - 1, layers[-1].shape[1])
        return {"logits": pieces.open([*last, "rows"], ["logits"])({**last, "rows": rows})[0]}
    names = [n for n in pieces.outputs if n != HEADROOM]
    return dict(zip(names, pieces.open(list(last), names)(last), strict=True))


def _headrooms(sources: Sources) -> list[str]:
    """Names of the layers' own, in order; none but in a slide encoder."""
    graph = onnx.load(str(sources.runnable), load_external_data=False).graph
    return next((list(n.input) for n in graph.node if HEADROOM in n.output), [])


def _llama(c: LlamaConfig, pieces: Pieces, sources: Sources, inputs: Arrays, threads: int) -> list[NDArray[np.float32]]:
    embed = Pieces(sources.compiled.parents[1] / f"{EMBED}.onnx", threads).open(["input_ids"], ["embeds"])
    (new,) = embed({"input_ids": inputs["token_ids"]})
    x = np.concatenate([inputs["embeds"], new])[None]
    given = {
        "inputs_embeds": x,
        "start": np.zeros(1, np.int64),
        "keys": np.arange(x.shape[1], dtype=np.int64),
    }
    empty = np.zeros((1, c.kv_heads, c.context, c.head_width), _cache_type(sources))
    found = [x]
    for i, (before, after) in enumerate(pairwise(pieces.boundaries)):
        caches = [f"cache.{i}.{part}" for part in PARTS]
        run = pieces.open(list(dict.fromkeys([*given, before, *caches])), [after])
        (x,) = run({**given, before: x, **dict.fromkeys(caches, empty)})
        found.append(x)
    return found


def _cache_type(sources: Sources) -> np.dtype[Any]:
    graph = onnx.load(str(sources.runnable), load_external_data=False).graph
    return _numpy_type(next(v for v in graph.input if v.name.startswith("cache.")))


def _numpy_type(value: onnx.ValueInfoProto) -> np.dtype[Any]:
    return onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)


def specs(values: Sequence[onnx.ValueInfoProto]) -> list[tuple[str, str, tuple[int | str, ...]]]:
    """(name, dtype, dims) of graph inputs or outputs."""
    found = []
    for value in values:
        tensor = value.type.tensor_type
        dims = tuple(d.dim_param or d.dim_value for d in tensor.shape.dim)
        found.append((value.name, _numpy_type(value).name, dims))
    return found
