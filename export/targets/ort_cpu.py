"""`ort-cpu`: graphs as onnxruntime's CPU kernels want them."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from wsi_rt.export.arch import LlamaConfig, LongNetConfig, ViTConfig
from wsi_rt.export.graphs import slide_encoder_cpu, tile_encoder_cpu
from wsi_rt.export.graphs.layers import Style
from wsi_rt.export.graphs.linears import FusedLinears
from wsi_rt.export.graphs.llama import build_embed
from wsi_rt.export.graphs.llama_layers import build_attention, build_layers
from wsi_rt.export.graphs.write import EMBED, MODEL, Component, write_main
from wsi_rt.export.lowering import lower_ort_cpu
from wsi_rt.export.parity import Arrays, run_layers, run_probe
from wsi_rt.export.targets.base import Lowered, Order
from wsi_rt.runtime.llm.ort_layers import wide_role


def lower(order: Order) -> Mapping[str, Lowered]:
    """The language model is written lowered, since its KV handling differs; the others are onnxruntime's own
    optimisation of the same graph with the target's Linear layers."""
    return {order.target: _lower(order.component, order.folder(order.target), order.threads)}


def _lower(component: Component, folder: Path, threads: int) -> Lowered:
    c, shared, requires = component.config, component.weights.path.parent, {"isa": platform.machine()}
    style = Style(FusedLinears(component.format_of))
    if isinstance(c, LlamaConfig):
        return _lower_llama(c, component, folder, style, threads)
    probe, source = shared / "probe.onnx", shared / "to-lower.onnx"
    _write(component, probe, replace(style, probe=True))
    _write(component, source, style)
    lower_ort_cpu(source, folder / "model.onnx", threads)
    source.unlink()
    return Lowered({MODEL: folder / "model.onnx"}, folder, requires, lambda inputs: run_probe(probe, inputs, threads))


def _write(component: Component, path: Path, style: Style) -> None:
    if isinstance(component.config, ViTConfig):
        tile_encoder_cpu.build(component.config, component.source, component.weights, path, style)
    elif isinstance(component.config, LongNetConfig):
        slide_encoder_cpu.build(component.config, component.source, component.weights, path, style)
    else:
        write_main(component, path, style)


def _lower_llama(c: LlamaConfig, component: Component, folder: Path, style: Style, threads: int) -> Lowered:
    source, weights, shared = component.source, component.weights, component.weights.path.parent
    graphs = build_attention(c, weights, folder) | build_layers(c, source, weights, folder, style)
    build_embed(c, source, weights, graphs.setdefault(EMBED, folder / "embed.onnx"))
    if component.wide is not None:
        (folder / "wide").mkdir()
        layers = build_layers(c, source, weights, folder / "wide", Style(FusedLinears(component.wide)))
        graphs |= {wide_role(role): path for role, path in layers.items()}

    def trajectory(inputs: Arrays, all_wide: bool = False) -> list[NDArray[np.float32]]:
        return run_layers(c, graphs, shared, inputs, threads, all_wide)

    wide_too = partial(trajectory, all_wide=True) if component.wide is not None else None
    return Lowered(graphs, shared, {"isa": platform.machine()}, trajectory, wide_too)
