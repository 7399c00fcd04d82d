"""fp32 torch references, one per component, that the compiled engines are held against."""

from __future__ import annotations

from typing import TYPE_CHECKING

from wsi_rt.export.arch import (
    EMBED_TOKENS,
    LM_HEAD,
    ComponentConfig,
    LlamaConfig,
    LongNetConfig,
    ProjectorConfig,
    ViTConfig,
)
from wsi_rt.export.models.streaming import stream_weights
from wsi_rt.export.sources.stored import with_head
from wsi_rt.export.sources.weights import WeightSource

if TYPE_CHECKING:
    from torch import nn

# Submodules of each component that repeat: `<prefix>.<i>`.
LAYERS = {"tile_encoder": "blocks", "slide_encoder": "encoder.layers", "projector": "", "llm": "model.layers"}


def layer_names(config: ComponentConfig) -> list[str]:
    """State-dict prefixes of the component's layers, in order; none for a projector."""
    depth = config.layers if isinstance(config, LlamaConfig) else getattr(config, "depth", 0)
    return [f"{LAYERS[config.component]}.{i}" for i in range(depth)]


def reference_model(config: ComponentConfig, source: WeightSource) -> nn.Module:
    """The component's fp32 torch module in eval mode with the source's weights, of which a layer's are in memory only
    while it runs: a 7 B model takes a layer's 0.8 GB, not 27."""
    import torch

    with torch.device("meta"):
        module = _module(config)
    units = layer_names(config)
    if isinstance(config, LlamaConfig):
        from wsi_rt.export.models.llama import finish_llama

        finish_llama(module)
        units += [EMBED_TOKENS, LM_HEAD]
    stream_weights(module, units, with_head(config, source).get)
    return module.eval().requires_grad_(False)


def _module(config: ComponentConfig) -> nn.Module:
    if isinstance(config, ViTConfig):
        from wsi_rt.export.models.vit import TileEncoder

        return TileEncoder(config)
    if isinstance(config, LongNetConfig):
        from wsi_rt.export.models.longnet import SlideEncoder

        return SlideEncoder(config)
    if isinstance(config, ProjectorConfig):
        from wsi_rt.export.models.projector import Projector

        return Projector(config)
    from wsi_rt.export.models.llama import build_llama

    return build_llama(config)
