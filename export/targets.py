"""Target -> how the export compiles a component for it. What the runtime opens for a target is in
`runtime.engines.registry`; a target can be built only when it is in both.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from wsi_rt.export.arch import ComponentConfig, LlamaConfig
from wsi_rt.export.graphs import llama
from wsi_rt.export.graphs.builder import WeightFile
from wsi_rt.export.lowering import lower_ort_cpu
from wsi_rt.export.sources.weights import WeightSource
from wsi_rt.runtime.engines.registry import TARGETS
from wsi_rt.runtime.errors import InputError


@dataclass(frozen=True)
class Portable:
    """A component's standard ONNX graphs by role; `weights`: the file that the language model's graphs share."""

    config: ComponentConfig
    source: WeightSource
    graphs: Mapping[str, Path]
    weights: WeightFile | None = None


@dataclass(frozen=True)
class Lowered:
    """A target's graphs by role, the folder that their weights are relative to, and what the machine must have."""

    graphs: Mapping[str, Path]
    weights_dir: Path
    requires: Mapping[str, str]


# (portable graphs, the target's own empty folder, threads or 0) -> what was written there
Lowering = Callable[[Portable, Path, int], Lowered]


def _ort_cpu(portable: Portable, folder: Path, threads: int) -> Lowered:
    requires = {"isa": platform.machine()}
    graphs = {role: folder / f"{role}.onnx" for role in portable.graphs}
    c = portable.config
    if isinstance(c, LlamaConfig) and portable.weights:
        llama.build_embed(c, portable.source, portable.weights, graphs["embed"])
        llama.OrtCpuLlamaGraph(c, portable.source, portable.weights).build(graphs["decoder"])
        return Lowered(graphs, portable.weights.path.parent, requires)
    lower_ort_cpu(portable.graphs["model"], graphs["model"], threads)
    return Lowered(graphs, folder, requires)


LOWERINGS: dict[str, Lowering] = {"ort-cpu": _ort_cpu}


def lowering(target: str) -> Lowering:
    """Raises InputError naming what can be built when `target` is not among it."""
    if target not in LOWERINGS:
        known = " (this wsi-rt opens it, but does not build it)" if target in TARGETS else ""
        raise InputError(f"--target is {target!r}{known}, expected one of: {', '.join(LOWERINGS)}")
    return LOWERINGS[target]
