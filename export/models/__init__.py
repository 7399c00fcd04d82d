"""fp32 torch references, one per component, that the compiled engines are held against."""

from __future__ import annotations

from typing import TYPE_CHECKING

from wsi_rt.export.arch import ComponentConfig, LlamaConfig, LongNetConfig, ProjectorConfig, ViTConfig
from wsi_rt.export.sources.weights import WeightSource

if TYPE_CHECKING:
    from torch import nn


def reference_model(config: ComponentConfig, source: WeightSource) -> nn.Module:
    """The component's fp32 torch module in eval mode, holding the source's weights."""
    import torch

    with torch.device("meta"):
        module = _module(config)
    tensors = {name: torch.from_numpy(source.get(name)) for name in config.tensors()}
    if isinstance(config, LlamaConfig):
        from wsi_rt.export.models.llama import finish_llama

        if config.tied_embeddings:
            tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
        finish_llama(module)
    module.load_state_dict(tensors, assign=True, strict=True)
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
