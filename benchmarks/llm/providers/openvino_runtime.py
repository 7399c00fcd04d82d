"""OpenVINO on the bundle's portable graph: the same integer weights, its own kernels."""

from __future__ import annotations

from typing import Any

import numpy as np

from wsi_rt.benchmarks.llm.providers import Place
from wsi_rt.benchmarks.llm.providers.base import F32, Ids, Model
from wsi_rt.benchmarks.llm.providers.ours import read_bytes
from wsi_rt.runtime.bundle import Bundle


class OpenVino(Model):
    """Keys and values are the graph's state; a slide's are saved, and put back for each of its questions."""

    note = "the bundle's portable ONNX graph, made stateful; embeddings looked up outside it"

    def __init__(self, place: Place) -> None:
        import openvino

        bundle = Bundle.open(place.path("bundle"), place.threads)
        component = bundle.component("llm")
        c = component.config
        core = openvino.Core()
        self._decoder = _stateful(core, str(bundle.root / component.portable["decoder"]), c, place.threads)
        embed = core.compile_model(str(bundle.root / component.portable["embed"]), "CPU")
        self._embed = embed.create_infer_request()
        self._saved: list[tuple[Any, Any]] = []
        self.weight_bytes = read_bytes(component, bundle.target)
        self.kv_bytes_per_token = 2 * 4 * c["layers"] * c["kv_heads"] * c["head_width"]

    def prefill(self, ids: Ids) -> F32:
        self._decoder.reset_state()
        return self._extend(ids)

    def step(self, ids: Ids) -> F32:
        return self._extend(ids)[None]

    def begin(self, prefix: Ids) -> None:
        self.prefill(prefix)
        self._saved = [(state, np.array(state.state.data)) for state in self._decoder.query_state()]

    def ask(self, question: Ids) -> F32:
        import openvino

        for state, value in self._saved:
            state.state = openvino.Tensor(value)
        return self._extend(question)

    def _extend(self, ids: Ids) -> F32:
        embeds = self._embed.infer({"input_ids": ids})["embeds"]
        return np.array(self._decoder.infer({"inputs_embeds": embeds[None]})["logits"][0])


def _stateful(core: Any, path: str, c: Any, threads: int) -> Any:
    """The decoder graph for one sequence, past and present as its state -> an inference request."""
    from openvino._offline_transformations import apply_make_stateful_transformation

    model = core.read_model(path)
    past = [f"past.{i}.{part}" for i in range(c["layers"]) for part in ("key", "value")]
    dims = [1, c["kv_heads"], -1, c["head_width"]]
    model.reshape({"inputs_embeds": [1, -1, c["hidden"]], **dict.fromkeys(past, dims)})
    apply_make_stateful_transformation(model, {name: name.replace("past", "present", 1) for name in past})
    options = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
    return core.compile_model(model, "CPU", options).create_infer_request()
