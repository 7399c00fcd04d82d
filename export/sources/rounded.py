"""Weights as a precision stores them, and the output layer that tied embeddings leave out."""

from __future__ import annotations

import numpy as np

from wsi_rt.export.arch import EMBED_TOKENS, LM_HEAD, ComponentConfig, LlamaConfig, Shapes
from wsi_rt.export.quantise import FormatOf, quantise
from wsi_rt.export.sources.weights import F32, WeightSource

HEAD, TABLE = f"{LM_HEAD}.weight", f"{EMBED_TOKENS}.weight"


class TiedHead(WeightSource):
    """A language model whose output layer is its embedding table, with both under their names."""

    def __init__(self, source: WeightSource) -> None:
        self.label, self._source = source.label, source

    def shapes(self) -> Shapes:
        shapes = self._source.shapes()
        return {**shapes, HEAD: shapes[TABLE]}

    def get(self, name: str) -> F32:
        return self._source.get(TABLE if name == HEAD else name)

    def digest(self) -> str:
        return self._source.digest()


def with_head(config: ComponentConfig, source: WeightSource) -> WeightSource:
    """`source`, in which the component's every Linear has a tensor of its own name."""
    tied = isinstance(config, LlamaConfig) and config.tied_embeddings and HEAD not in source.shapes()
    return TiedHead(source) if tied else source


class Rounded(WeightSource):
    """Another source with its Linear layers as integer blocks store them. `errors`: how far each was rounded so far,
    the norm of the difference over the norm of the weight."""

    def __init__(self, source: WeightSource, format_of: FormatOf) -> None:
        self.label, self._source, self._format_of = source.label, source, format_of
        self.errors: dict[str, float] = {}

    def shapes(self) -> Shapes:
        return self._source.shapes()

    def get(self, name: str) -> F32:
        x = self._source.get(name)
        form = self._format_of(name.removesuffix(".weight")) if name.endswith(".weight") and x.ndim == 2 else None
        if form is None or name == TABLE:
            return x
        rounded = quantise(x, form).dequantised(x.shape[1])
        self.errors[name] = float(np.linalg.norm(rounded - x) / max(float(np.linalg.norm(x)), 1e-30))
        return rounded

    def digest(self) -> str:
        return self._source.digest()
