"""transformers' own Llama in eager torch, as the published runners use it: fp32, or bf16 where it is a checkpoint's."""

from __future__ import annotations

from typing import Any

import numpy as np

from wsi_rt.benchmarks.llm.files import source_of
from wsi_rt.benchmarks.llm.providers import Place
from wsi_rt.benchmarks.llm.providers.base import F32, SMALL_PARAMETERS, CannotError, Ids, Model
from wsi_rt.export.arch import parameter_count


class Transformers(Model):
    """A slide's prefix is computed again for every question, as there; one sequence at a time."""

    note = "fp32 weights, SDPA attention, the prefix computed again for each question"

    def __init__(self, place: Place) -> None:
        import torch
        from transformers import DynamicCache

        c, source = source_of(place.files["source"])
        if parameter_count(c) > SMALL_PARAMETERS:
            raise CannotError(f"small shapes only: {parameter_count(c) / 1e9:.1f} B parameters in fp32")
        torch.set_num_threads(place.threads)
        self._torch: Any = torch
        self._new_cache: Any = DynamicCache
        self._cache: Any = None
        self._model: Any = _whole(c, source)
        self.weight_bytes = 4 * (parameter_count(c) - c.vocab * c.hidden * (not c.tied_embeddings))
        self.kv_bytes_per_token = 2 * 4 * c.layers * c.kv_heads * c.head_width

    def prefill(self, ids: Ids) -> F32:
        self._cache = self._new_cache()
        return self._extend(ids[None])[0]

    def step(self, ids: Ids) -> F32:
        return self._extend(ids[:, None])

    def _extend(self, ids: Ids) -> F32:
        with self._torch.inference_mode():
            out = self._model(self._torch.from_numpy(ids), past_key_values=self._cache, logits_to_keep=1)
        return np.asarray(out.logits[:, -1])


def _whole(c: Any, source: Any) -> Any:
    """The model with all of its weights in memory."""
    import torch

    from wsi_rt.export.models.llama import build_llama, finish_llama

    with torch.device("meta"):
        model: Any = build_llama(c)
    finish_llama(model)
    tensors = {name: torch.from_numpy(source.get(name)) for name in c.tensors()}
    model.load_state_dict(tensors, assign=True, strict=not c.tied_embeddings)
    if c.tied_embeddings:
        model.tie_weights()
    return model.eval().requires_grad_(False)
