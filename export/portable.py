"""A portable graph run in onnxruntime layer by layer: standard operators dequantise every matrix of a graph before its
first layer, 27 GB for a 7 B model.

The pieces are cut out of the very file, at the layer boundaries that it names in its metadata; every node runs.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from wsi_rt.export.arch import ComponentConfig, LlamaConfig
from wsi_rt.export.graphs.builder import BOUNDARIES
from wsi_rt.runtime.engines.ort import open_session

Arrays = dict[str, NDArray[Any]]


def run_portable(
    c: ComponentConfig,
    graphs: Mapping[str, Path],
    inputs: Arrays,
    threads: int = 0,
    trajectory: list[NDArray[np.float32]] | None = None,
) -> Arrays:
    """The portable graphs, by role, on inputs as `export.parity.check_inputs` makes them. threads 0: onnxruntime's
    default. trajectory: where given, what goes into the first layer is appended to it, and what comes out of each."""
    if isinstance(c, LlamaConfig):
        return {"logits": _run_llama(c, graphs["embed"], Pieces(graphs["decoder"], threads), inputs, trajectory)}
    pieces = Pieces(graphs["model"], threads)
    values = inputs
    for name in pieces.boundaries:
        values = {name: pieces.open(list(values), [name])(values)[0]}
        if trajectory is not None:
            trajectory.append(values[name])
    return dict(zip(pieces.outputs, pieces.open(list(values), pieces.outputs)(values), strict=True))


class Pieces:
    """A graph file, cut where asked. `boundaries`: the values that go into the first layer and come out of each."""

    def __init__(self, path: Path, threads: int) -> None:
        self._path, self._threads = path, threads
        model = onnx.load(str(path), load_external_data=False)
        metadata = {p.key: p.value for p in model.metadata_props}
        self.boundaries: list[str] = json.loads(metadata[BOUNDARIES])
        self.outputs = [o.name for o in model.graph.output]
        self._extractor = onnx.utils.Extractor(onnx.shape_inference.infer_shapes(model, data_prop=True))

    def open(self, inputs: Sequence[str], outputs: Sequence[str]) -> Callable[[Arrays], list[NDArray[Any]]]:
        """The nodes between these values: a function of arrays by input name, others ignored -> outputs in order."""
        piece = self._extractor.extract_model(list(inputs), list(outputs))
        session = open_session(piece.SerializeToString(), self._path.parent, self._threads, fold_constants=False)
        wanted = {i.name for i in session.get_inputs()}
        return lambda arrays: session.run(list(outputs), {n: x for n, x in arrays.items() if n in wanted})


def _run_llama(
    c: LlamaConfig, embed: Path, pieces: Pieces, inputs: Arrays, trajectory: list[NDArray[np.float32]] | None
) -> NDArray[np.float32]:
    """Prefill, then one token at a time with past and present KV -> logits [steps + 1, vocab]. The tokens are given, so
    that each layer can take all of them before the next one is opened."""
    (new,) = Pieces(embed, 0).open(["input_ids"], ["embeds"])({"input_ids": inputs["token_ids"]})
    first = [x[None] for x in (inputs["embeds"], *np.split(new, len(new)))]  # [1, tokens, hidden] of each call
    lengths = np.cumsum([0, *(x.shape[1] for x in first)])
    hidden = first
    for i, (before, after) in enumerate(pairwise(pieces.boundaries)):
        past, present = ([f"{when}.{i}.{part}" for part in ("key", "value")] for when in ("past", "present"))
        # The rotary positions and the mask are computed from these two, whatever the layer.
        names = list(dict.fromkeys(["inputs_embeds", "past.0.key", before, *past]))
        kv: Arrays = {n: np.zeros((1, c.kv_heads, 0, c.head_width), np.float32) for n in past}
        run, outs = pieces.open(names, [after, *present]), []
        for x, h, length in zip(first, hidden, lengths, strict=False):
            seen = np.zeros((1, c.kv_heads, length, c.head_width), np.float32)  # only its length is read
            out, *new_kv = run({"inputs_embeds": x, "past.0.key": seen, before: h, **kv})
            outs.append(out)
            kv = dict(zip(past, new_kv, strict=True))
        if trajectory is not None:
            trajectory += [np.concatenate(x, axis=1) for x in ([hidden, outs] if i == 0 else [outs])]
        hidden = outs
    last = pieces.boundaries[-1]
    head = pieces.open([last], ["logits"])
    return np.concatenate([head({last: h})[0] for h in hidden])
