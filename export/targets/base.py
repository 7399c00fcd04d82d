"""What a target's lowering is given, and what it gives."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from wsi_rt.export.graphs.write import Component
from wsi_rt.export.parity import Arrays

Trajectory = Callable[[Arrays], list[NDArray[np.float32]]]


@dataclass(frozen=True)
class Lowered:
    """A target's graphs by role, the folder that their weights are relative to, and what the machine must have.

    trajectory: what goes into the first layer on given inputs and comes out of each, computed as the target does;
    called once. None: the portable graph's. wide_trajectory: that of the graphs for calls of many rows, where there are
    any. source: the ONNX files that the graphs were made from, for a target that needs a GPU: onnxruntime on the CPU
    runs them in the engine's stead. outputs: what those answer, computed there a layer at a time; None: they are the
    portable graphs. Architectures that share files share the function.
    """

    graphs: Mapping[str, Path]
    weights_dir: Path
    requires: Mapping[str, str]
    trajectory: Trajectory | None = None
    wide_trajectory: Trajectory | None = None
    source: Mapping[str, Path] = field(default_factory=dict)
    outputs: Callable[[Arrays], Arrays] | None = None


@dataclass(frozen=True)
class Order:
    """What is asked of a lowering. target: as --target takes it. sms: GPU architectures, for a target that is compiled
    for one. threads: 0 is each library's default. portable: the component's portable graphs by role, written already.
    """

    component: Component
    target: str
    precision: str
    sms: tuple[int, ...]
    threads: int
    portable: Mapping[str, Path]

    def folder(self, target: str) -> Path:
        """The empty folder of a bundle's target."""
        folder = self.component.weights.path.parent / target
        folder.mkdir()
        return folder


# -> what was made, by the bundle's name of the target
Lowering = Callable[[Order], Mapping[str, Lowered]]
