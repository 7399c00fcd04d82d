"""The projector in torch: LLaVA's mm_projector (SPEC 4), slide tokens to embeddings of the language model."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch.nn.functional as F
from torch import Tensor

from wsi_rt.runtime.engines.torch_layers import Layers
from wsi_rt.runtime.manifest import EngineManifest


class TorchProjector:
    """tokens f32 [tokens, widths[0]] -> embeds f32 [tokens, widths[-1]]; exact GELU between the Linears, of which one
    is called by its module's name, several by their places in it, none leaves the tokens as they are."""

    def __init__(self, manifest: EngineManifest, layers: Layers) -> None:
        count, name = len(manifest.config["widths"]) - 1, "model.mm_projector"
        self.facts: dict[str, str] = {}
        self._device, self._dtype = layers.device, layers.dtype
        names = [name] if count == 1 else [f"{name}.{2 * i}" for i in range(count)]
        self._linears = [layers.linear(n, bias=True) for n in names]

    def __call__(self, inputs: Mapping[str, Tensor], wanted: Collection[str]) -> dict[str, Tensor]:
        x = inputs["tokens"].to(self._device, self._dtype, non_blocking=True)
        for i, linear in enumerate(self._linears):
            x = linear(F.gelu(x) if i else x)
        return {"embeds": x.float()}
