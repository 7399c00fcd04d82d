"""Projector -> ONNX (SPEC 4): slide tokens in, language-model embeddings out."""

from __future__ import annotations

from pathlib import Path

from wsi_rt.export.arch import ProjectorConfig
from wsi_rt.export.graphs.builder import WeightFile
from wsi_rt.export.graphs.layers import FLOAT, Graph, Style, activation
from wsi_rt.export.sources.weights import WeightSource


def build(c: ProjectorConfig, source: WeightSource, weights: WeightFile, path: Path, style: Style) -> None:
    """Writes `path`; `tokens` f32 [tokens, widths[0]] -> `embeds` f32 [tokens, widths[-1]]."""
    graph = Graph("projector", source, weights, style)
    b = graph.b
    x = b.input("tokens", FLOAT, ["tokens", c.widths[0]])
    for i, name in enumerate(c.linear_names()):
        with b.scope("mm_projector"):
            x = graph.make_linear(activation(b, x, "gelu") if i else x, name, bias=True)
    b.output(x, "embeds", FLOAT, ["tokens", c.widths[-1]])
    b.save(path)
