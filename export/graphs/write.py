"""A component's graphs, whatever it is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from wsi_rt.export.arch import ComponentConfig, LlamaConfig, LongNetConfig, ProjectorConfig, ViTConfig
from wsi_rt.export.graphs import llama, projector, slide_encoder, tile_encoder
from wsi_rt.export.graphs.builder import WeightFile
from wsi_rt.export.graphs.layers import Style
from wsi_rt.export.quantise import FormatOf
from wsi_rt.export.sources.weights import WeightSource

if TYPE_CHECKING:
    from wsi_rt.export.sensitive import Sensitive

EMBED, DECODER, MODEL = "embed", "decoder", "model"  # graph roles; the language model has the first two


@dataclass(frozen=True)
class Component:
    """What all graphs of a component are written from. `weights`: the file that they share; a Linear that several
    graphs store the same way is in it once. `wide`: how a target stores it a second time, for calls of many rows, if
    it does (`--fast`). `sensitive`: the layers that `format_of` keeps wider, where those were looked for."""

    config: ComponentConfig
    source: WeightSource
    weights: WeightFile
    format_of: FormatOf
    wide: FormatOf | None = None
    sensitive: Sensitive | None = None


def write_graphs(component: Component, folder: Path, style: Style) -> dict[str, Path]:
    """Every graph of the component in `folder`, by role."""
    c = component.config
    graphs = {role: folder / f"{role}.onnx" for role in ((EMBED, DECODER) if isinstance(c, LlamaConfig) else (MODEL,))}
    if isinstance(c, LlamaConfig):
        llama.build_embed(c, component.source, component.weights, graphs[EMBED])
    write_main(component, graphs.get(MODEL) or graphs[DECODER], style)
    return graphs


def write_main(component: Component, path: Path, style: Style) -> None:
    """The graph that computes the component: the only one, or the decoder."""
    c, source, weights = component.config, component.source, component.weights
    if isinstance(c, ViTConfig):
        tile_encoder.build(c, source, weights, path, style)
    elif isinstance(c, LongNetConfig):
        slide_encoder.build(c, source, weights, path, style)
    elif isinstance(c, ProjectorConfig):
        projector.build(c, source, weights, path, style)
    else:
        llama.build_decoder(c, source, weights, path, style)
