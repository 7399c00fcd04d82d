"""Target -> how the export compiles a component for it. What the runtime opens for a target is in
`runtime.engines.registry`; a target can be built only when it is in both.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
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
from wsi_rt.runtime.engines.registry import TARGETS
from wsi_rt.runtime.errors import InputError
from wsi_rt.runtime.llm.ort_layers import wide_role


@dataclass(frozen=True)
class Lowered:
    """A target's graphs by role, the folder that their weights are relative to, and what the machine must have.

    trajectory: what goes into the first layer on given inputs and comes out of each, computed as the target does;
    called once. wide_trajectory: that of the graphs for calls of many rows, where there are any.
    """

    graphs: Mapping[str, Path]
    weights_dir: Path
    requires: Mapping[str, str]
    trajectory: Callable[[Arrays], list[NDArray[np.float32]]]
    wide_trajectory: Callable[[Arrays], list[NDArray[np.float32]]] | None = None


# (component, the target's own empty folder, threads or 0) -> what was written there
Lowering = Callable[[Component, Path, int], Lowered]


def _ort_cpu(component: Component, folder: Path, threads: int) -> Lowered:
    """The language model is written lowered, since its KV handling differs; the others are onnxruntime's own
    optimisation of the same graph with the target's Linear layers."""
    c, shared, requires = component.config, component.weights.path.parent, {"isa": platform.machine()}
    style = Style(FusedLinears(component.format_of))
    if isinstance(c, LlamaConfig):
        return _ort_cpu_llama(c, component, folder, style, threads)
    probe, source = shared / "probe.onnx", shared / "to-lower.onnx"
    _write_ort_cpu(component, probe, replace(style, probe=True))
    _write_ort_cpu(component, source, style)
    lower_ort_cpu(source, folder / "model.onnx", threads)
    source.unlink()
    return Lowered({MODEL: folder / "model.onnx"}, folder, requires, lambda inputs: run_probe(probe, inputs, threads))


def _write_ort_cpu(component: Component, path: Path, style: Style) -> None:
    if isinstance(component.config, ViTConfig):
        tile_encoder_cpu.build(component.config, component.source, component.weights, path, style)
    elif isinstance(component.config, LongNetConfig):
        slide_encoder_cpu.build(component.config, component.source, component.weights, path, style)
    else:
        write_main(component, path, style)


def _ort_cpu_llama(c: LlamaConfig, component: Component, folder: Path, style: Style, threads: int) -> Lowered:
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


LOWERINGS: dict[str, Lowering] = {"ort-cpu": _ort_cpu}


def lowering(target: str) -> Lowering:
    """Raises InputError naming what can be built when `target` is not among it."""
    if target not in LOWERINGS:
        known = " (this wsi-rt opens it, but does not build it)" if target in TARGETS else ""
        raise InputError(f"--target is {target!r}{known}, expected one of: {', '.join(LOWERINGS)}")
    return LOWERINGS[target]
