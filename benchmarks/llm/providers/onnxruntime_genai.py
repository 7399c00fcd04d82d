"""onnxruntime-genai on the model that its own builder makes of the checkpoint: int4 blocks of 32."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from wsi_rt.benchmarks.llm.providers import Place
from wsi_rt.benchmarks.llm.providers.base import F32, Ids, Model


class GenAi(Model):
    """Prompt caching: the generator is rewound to the slide's prefix for the next question."""

    note = "int4 by its own builder; token ids stand for the slide's embeddings"

    def __init__(self, place: Place) -> None:
        import onnxruntime_genai

        folder = place.path("genai")
        self._og: Any = onnxruntime_genai
        config = onnxruntime_genai.Config(str(folder))
        config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": place.threads}}}}))
        self._model = onnxruntime_genai.Model(config)
        self._length, self._cached = place.context, 0
        self._generator: Any = None
        about = json.loads((folder / "about.json").read_text())
        self.weight_bytes, self.kv_bytes_per_token = about["read_bytes"], about["kv_values_per_token"] * 4

    def prefill(self, ids: Ids) -> F32:
        parameters = self._og.GeneratorParams(self._model)
        parameters.set_search_options(max_length=self._length, do_sample=False)
        self._generator = self._og.Generator(self._model, parameters)
        return self._extend(ids)

    def step(self, ids: Ids) -> F32:
        return self._extend(ids)[None]

    def begin(self, prefix: Ids) -> None:
        self.prefill(prefix)
        self._cached = len(prefix)

    def ask(self, question: Ids) -> F32:
        self._generator.rewind_to(self._cached)
        return self._extend(question)

    def _extend(self, ids: Ids) -> F32:
        self._generator.append_tokens(ids.astype(np.int32))
        return np.array(self._generator.get_logits(), np.float32).reshape(-1)
