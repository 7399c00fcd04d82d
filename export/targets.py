"""Target -> how the export compiles a component for it. What the runtime opens for a target is in
`runtime.engines.registry`; a target can be built only when it is in both.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from wsi_rt.export.arch import LlamaConfig
from wsi_rt.export.graphs.layers import Style
from wsi_rt.export.graphs.linears import FusedLinears
from wsi_rt.export.graphs.llama import build_embed
from wsi_rt.export.graphs.llama_layers import build_layers
from wsi_rt.export.graphs.write import EMBED, MODEL, Component, write_main
from wsi_rt.export.lowering import lower_ort_cpu
from wsi_rt.export.parity import Arrays, run_layers, run_probe
from wsi_rt.runtime.engines.registry import TARGETS
from wsi_rt.runtime.errors import InputError


@dataclass(frozen=True)
class Lowered:
    """A target's graphs by role, the folder that their weights are relative to, and what the machine must have.

    trajectory: what goes into the first layer on given inputs and comes out of each, computed as the target does, while
    `weights.data` of the component is there. Called once.
    """

    graphs: Mapping[str, Path]
    weights_dir: Path
    requires: Mapping[str, str]
    trajectory: Callable[[Arrays], list[NDArray[np.float32]]]


# (component, the target's own empty folder, threads or 0) -> what was written there
Lowering = Callable[[Component, Path, int], Lowered]


def _ort_cpu(component: Component, folder: Path, threads: int) -> Lowered:
    """The language model is written lowered, since its KV handling differs; the others are onnxruntime's own
    optimisation of the same graph with the target's Linear layers."""
    c, shared, requires = component.config, component.weights.path.parent, {"isa": platform.machine()}
    style = Style(FusedLinears(component.format_of))
    if isinstance(c, LlamaConfig):
        graphs = build_layers(c, component.source, component.weights, folder, style)
        build_embed(c, component.source, component.weights, graphs.setdefault(EMBED, folder / "embed.onnx"))
        return Lowered(graphs, shared, requires, lambda inputs: run_layers(c, graphs, shared, inputs, threads))
    probe, source = shared / "probe.onnx", shared / "to-lower.onnx"
    write_main(component, probe, replace(style, probe=True))
    write_main(component, source, style)
    lower_ort_cpu(source, folder / "model.onnx", threads)
    source.unlink()
    return Lowered({MODEL: folder / "model.onnx"}, folder, requires, lambda inputs: run_probe(probe, inputs, threads))


LOWERINGS: dict[str, Lowering] = {"ort-cpu": _ort_cpu}


def lowering(target: str) -> Lowering:
    """Raises InputError naming what can be built when `target` is not among it."""
    if target not in LOWERINGS:
        known = " (this wsi-rt opens it, but does not build it)" if target in TARGETS else ""
        raise InputError(f"--target is {target!r}{known}, expected one of: {', '.join(LOWERINGS)}")
    return LOWERINGS[target]
