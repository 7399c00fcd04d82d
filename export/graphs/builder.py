"""ONNX graphs, node by node, with names that do not change between builds.

A node is called after its scope and operator (`/blocks.0/attn/qkv/MatMul`), its output after the node.
Weights go straight to an external data file as they are added, so a graph never holds them in memory.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

OPSET = 21  # DequantizeLinear in blocks and 4-bit integers; Gelu since 20
IR_VERSION = 10
ORT_DOMAIN = "com.microsoft"
OUR_DOMAIN = "wsi_rt"
BOUNDARIES = "wsi_rt.layer_boundaries"  # metadata key
_INLINE_BYTES = 1024  # smaller weights stay in the graph, where shape inference can read them
_ALIGN = 4096  # offsets that can be memory-mapped page by page

Dims = Sequence[int | str]


class WeightFile:
    """An external data file that several graphs of one component share; a weight is written once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._written: dict[str, TensorProto] = {}
        path.write_bytes(b"")

    def add(self, name: str, make: Callable[[], NDArray[Any]]) -> TensorProto:
        """The initializer of that name, `make` called only when it is not written yet: one name, one tensor."""
        if name in self._written:
            return self._written[name]
        array = np.ascontiguousarray(make())
        if array.nbytes <= _INLINE_BYTES:
            tensor = onnx.numpy_helper.from_array(array, name)
        else:
            tensor = TensorProto(name=name, dims=array.shape, data_location=TensorProto.EXTERNAL)
            tensor.data_type = helper.np_dtype_to_tensor_dtype(array.dtype)
            with self.path.open("ab") as f:
                offset = f.tell() + (-f.tell() % _ALIGN)
                f.write(b"\0" * (offset - f.tell()))
                f.write(array.data)  # tofile() would hide the errno of a full disk
            entries = {"location": self.path.name, "offset": str(offset), "length": str(array.nbytes)}
            for key, value in entries.items():
                tensor.external_data.add(key=key, value=value)
        self._written[name] = tensor
        return tensor

    def holds(self, name: str) -> bool:
        """Whether a tensor of that name was written."""
        return name in self._written

    def read(self, name: str) -> NDArray[np.uint8]:
        """The bytes of a tensor that was written."""
        tensor = self._written[name]
        where = {e.key: e.value for e in tensor.external_data}
        if not where:
            return np.frombuffer(tensor.raw_data, np.uint8)
        return np.fromfile(self.path, np.uint8, count=int(where["length"]), offset=int(where["offset"]))


@dataclass
class Body:
    """inputs: values by the names given. results: (value, dims), to be filled. graph: when its block has ended."""

    inputs: dict[str, str]
    results: list[tuple[str, Dims]] = field(default_factory=list)
    graph: onnx.GraphProto | None = None


class GraphBuilder:
    """Builds one graph (or, with no weight file, the body of one function)."""

    def __init__(self, name: str, weights: WeightFile | None = None) -> None:
        self.name = name
        self._weights = weights
        self._nodes: list[onnx.NodeProto] = []
        self._initializers: dict[str, TensorProto] = {}
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []
        self._functions: dict[str, onnx.FunctionProto] = {}
        self._scope: list[str] = []
        self._used: dict[str, int] = {}
        self._domains: set[str] = set()
        self.boundaries: list[str] = []  # values between layers, in order; the model's metadata names them

    @contextmanager
    def scope(self, name: str) -> Iterator[None]:
        self._scope.append(name)
        try:
            yield
        finally:
            self._scope.pop()

    def input(self, name: str, dtype: int, dims: Dims) -> str:
        self._inputs.append(helper.make_tensor_value_info(name, dtype, dims))
        return name

    def output(self, value: str, name: str, dtype: int, dims: Dims) -> None:
        """Expose `value` under a public name."""
        self._nodes.append(helper.make_node("Identity", [value], [name], name=f"/{name}/Identity"))
        self._outputs.append(helper.make_tensor_value_info(name, dtype, dims))

    def bind_output(self, name: str, dtype: int, dims: Dims) -> str:
        """Declare an output that a node writes itself (in-place KV); returns the name for `outputs=`."""
        self._outputs.append(helper.make_tensor_value_info(name, dtype, dims))
        return name

    def weight(
        self, name: str, make: Callable[[], NDArray[Any]], seen_as: tuple[int, Sequence[int]] | None = None
    ) -> str:
        """An initializer in the external data file; `make` loads it unless the file holds one of that name.
        seen_as: ONNX type and dims that this graph reads the same bytes as."""
        if self._weights is None:
            raise ValueError("a function body holds no weights")
        if name not in self._initializers:
            tensor = self._weights.add(name, make)
            if seen_as is not None:
                stored, tensor = tensor, TensorProto()
                tensor.CopyFrom(stored)
                tensor.data_type, dims = seen_as
                del tensor.dims[:]
                tensor.dims.extend(dims)
            self._initializers[name] = tensor
        return name

    def constant(self, value: Any, dtype: Any = np.int64, name: str | None = None) -> str:
        """A small constant, one initializer (or Constant node in a function) per distinct value or name."""
        array = np.asarray(value, dtype=dtype)
        digits = "_".join(str(v) for v in array.reshape(-1)).replace("-", "m").replace(".", "p")
        kind = "scalar" if array.ndim == 0 else f"{array.ndim}d"
        name = f"const/{name}" if name else f"const/{array.dtype}_{kind}_{digits}"
        if name in self._initializers:
            return name
        tensor = onnx.numpy_helper.from_array(array, name)
        self._initializers[name] = tensor
        if self._weights is None:
            self._nodes.append(helper.make_node("Constant", [], [name], name=f"/{name}", value=tensor))
        return name

    def op(
        self, kind: str, inputs: Sequence[str], *, domain: str = "", outputs: Sequence[str] | int = 1, **attributes: Any
    ) -> Any:
        """Add a node; returns its output name (a tuple of names when there are several)."""
        path = "/".join(["", *self._scope, kind])
        count = self._used[path] = self._used.get(path, 0) + 1
        path = path if count == 1 else f"{path}_{count}"
        if isinstance(outputs, int):
            outputs = [f"{path}:{i}" for i in range(outputs)] if outputs > 1 else [path + ":0"]
        self._domains.add(domain)
        node = helper.make_node(kind, list(inputs), list(outputs), name=path, domain=domain, **attributes)
        self._nodes.append(node)
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    @contextmanager
    def body(self, inputs: Mapping[str, Dims], dtype: int = TensorProto.FLOAT) -> Iterator[Body]:
        """The subgraph of an If or a Scan: nodes added meanwhile go there, and see what stands outside. inputs: dims
        by name."""
        outer, self._nodes = self._nodes, []
        scope = "/".join(["", *self._scope])
        body = Body({name: f"{scope}/{name}" for name in inputs})
        try:
            yield body
        finally:
            nodes, self._nodes = self._nodes, outer
        given = [helper.make_tensor_value_info(f"{scope}/{name}", dtype, dims) for name, dims in inputs.items()]
        made = [helper.make_tensor_value_info(name, dtype, dims) for name, dims in body.results]
        body.graph = helper.make_graph(nodes, scope, given, made)

    def declare(self, function: onnx.FunctionProto) -> None:
        """Make a function part of the model (one that only other functions call needs this)."""
        self._functions[function.name] = function

    def call(self, function: onnx.FunctionProto, inputs: Sequence[str], **attributes: Any) -> str:
        """Add a node that calls a function of this model."""
        self.declare(function)
        return self.op(function.name, inputs, domain=function.domain, outputs=len(function.output), **attributes)

    def function(
        self, inputs: Sequence[str], results: Sequence[str], attributes: Sequence[str] = ()
    ) -> onnx.FunctionProto:
        """The nodes so far as a function body of our domain."""
        outputs = [f"out{i}" for i in range(len(results))]
        for result, name in zip(results, outputs, strict=True):
            self._nodes.append(helper.make_node("Identity", [result], [name], name=f"/{name}/Identity"))
        imports = [helper.make_opsetid("", OPSET), helper.make_opsetid(OUR_DOMAIN, 1)]
        return helper.make_function(
            OUR_DOMAIN, self.name, list(inputs), outputs, self._nodes, imports, list(attributes)
        )

    def save(self, path: Path) -> None:
        """Write the model file; its weights already stand beside it."""
        graph = helper.make_graph(
            self._nodes, self.name, self._inputs, self._outputs, initializer=list(self._initializers.values())
        )
        imports = [helper.make_opsetid("", OPSET), *(helper.make_opsetid(d, 1) for d in sorted(self._domains - {""}))]
        model = helper.make_model(
            graph,
            opset_imports=imports,
            ir_version=IR_VERSION,
            functions=list(self._functions.values()),
            producer_name="wsi-rt",
        )
        helper.set_model_props(model, {BOUNDARIES: json.dumps(self.boundaries)})
        path.write_bytes(model.SerializeToString(deterministic=True))


def check_model(path: Path) -> None:
    """Checker and strict shape inference with data propagation; raises what onnx raises."""
    onnx.checker.check_model(str(path), full_check=False)
    model = onnx.load(str(path), load_external_data=False)
    onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
