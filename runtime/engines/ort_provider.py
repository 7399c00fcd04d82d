"""An execution provider of onnxruntime other than the default: asked for by name, and held to it.

onnxruntime falls back to the CPU silently, for a whole session (a library that does not load) and node by node (an
operator without a kernel). Neither passes here. What may stay on the CPU is arithmetic on shapes, which onnxruntime
puts there on purpose; `session.disable_cpu_ep_fallback` would refuse that too, and with it nearly every graph with a
symbolic dimension, so the placement of every node is read instead.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from wsi_rt.runtime.engines.base import Array
from wsi_rt.runtime.engines.ort import PROVIDER as CPU
from wsi_rt.runtime.engines.ort import session_options
from wsi_rt.runtime.errors import EngineMismatchError, MachineError

if TYPE_CHECKING:
    import onnxruntime

_RECORD_PLACEMENT = "session.record_ep_graph_assignment_info"
# What shapes and positions are computed with; none of them multiplies matrices, normalises or activates.
_OF_SHAPES = frozenset(
    {
        *("Abs", "Add", "Cast", "Ceil", "Concat", "Constant", "ConstantOfShape", "Div"),
        *("Equal", "Expand", "Floor", "Gather", "Greater", "Identity", "Less", "LessOrEqual"),
        *("Max", "Min", "Mod", "Mul", "Neg", "Range", "ReduceMax", "ReduceProd"),
        *("Reshape", "Shape", "Size", "Slice", "Split", "Squeeze", "Sub", "Unsqueeze"),
    }
)


@dataclass(frozen=True)
class Provider:
    """names: execution providers in order of preference, options: theirs. device, index: where tensors live, as
    onnxruntime calls it ("cuda", 0). threads: of the operators that stay on the CPU."""

    names: tuple[str, ...]
    options: tuple[Mapping[str, str], ...]
    device: str
    index: int
    threads: int

    def open(self, graph: Path, weights_dir: Path) -> onnxruntime.InferenceSession:
        """Raises MachineError where a provider does not load, EngineMismatchError when the graph cannot be opened, or a
        node of it that is more than arithmetic on shapes would run elsewhere."""
        import onnxruntime as ort

        options = session_options(weights_dir, self.threads)
        options.add_session_config_entry(_RECORD_PLACEMENT, "1")
        providers = list(zip(self.names, map(dict, self.options), strict=True))
        try:
            session = ort.InferenceSession(graph.read_bytes(), options, providers=providers)
        except Exception as e:  # onnxruntime raises its own classes, which share no base
            reason = str(e).splitlines()[0]
            raise EngineMismatchError(f"{graph}: onnxruntime {ort.__version__} cannot open it ({reason})") from e
        session.disable_fallback()
        lacking = [name for name in self.names if name not in session.get_providers()]
        if lacking:
            raise MachineError(
                f"{graph}: onnxruntime would run it on {session.get_providers()} instead of {lacking[0]}, which does "
                "not load; wsi-rt doctor says what is missing"
            )
        self._require_placement(graph, session)
        return session

    def _require_placement(self, graph: Path, session: onnxruntime.InferenceSession) -> None:
        placed = session.get_provider_graph_assignment_info()
        strays = [
            f"{node.op_type} ({node.name})"
            for part in placed
            if part.ep_name not in self.names
            for node in part.get_nodes()
            if node.op_type not in _OF_SHAPES
        ]
        if strays:
            more = f" and {len(strays) - 1} more" if len(strays) > 1 else ""
            raise EngineMismatchError(
                f"{graph}: {strays[0]}{more} would run on the CPU, since {self.names[0]} has no kernel for it; "
                "use engines of another target: wsi-rt build-engines --target torch"
            )

    def put(self, x: Array) -> onnxruntime.OrtValue:
        """A copy of `x` where the provider's tensors live."""
        import onnxruntime as ort

        return ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(x), self.device, self.index)

    def run(
        self,
        session: onnxruntime.InferenceSession,
        inputs: Mapping[str, onnxruntime.OrtValue],
        names: Sequence[str],
    ) -> dict[str, onnxruntime.OrtValue]:
        """Outputs by name, left where the provider's tensors live."""
        binding = session.io_binding()
        for name, value in inputs.items():
            binding.bind_ortvalue_input(name, value)
        for name in names:
            binding.bind_output(name, self.device, self.index)
        binding.synchronize_inputs()
        session.run_with_iobinding(binding)
        binding.synchronize_outputs()
        return dict(zip(names, binding.get_outputs(), strict=True))


def on_cpu(threads: int) -> Provider:
    """The CPU provider through the same code: what checks ONNX files of a GPU target, and stands in for a GPU in
    tests."""
    return Provider((CPU,), ({},), "cpu", 0, threads)
