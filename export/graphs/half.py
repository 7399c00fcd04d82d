"""A graph in fp32 -> the same in fp16 or bf16, strongly typed: what TensorRT compiles.

Which operator computes in which type is decided as torch.autocast does: products of matrices, convolutions and fused
attention read and write half precision (they sum in fp32), and a Linear's bias is added to its output. Norms, softmax
outside fused attention, activations, gates, rotary positions, pooling, sums of exponentials and the stream between the
layers (`Graph.layer_boundary`) stay fp32: a stream in bf16 loses 2^-9 of its own size at every one of 80 additions.
Operators that only move values take the type of what they move, of several the first one's. Inputs and outputs keep the
types of the portable graph, except those that a caller names (key and value caches).

Weights are rounded to nearest even, once, into a weight file of their own.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx.inliner
from numpy.typing import NDArray
from onnx import TensorProto, helper

from wsi_rt.export.graphs.builder import OUR_DOMAIN, WeightFile
from wsi_rt.runtime.errors import InputError

OPSET = 24  # Attention since 23, TensorScatter since 24
_IR_VERSION = 11
FLOAT = TensorProto.FLOAT
_HALF_KINDS = {"MatMul", "Gemm", "Conv", "Attention", "TensorScatter"}
# Only move values, or choose among them.
_MOVE_KINDS = {
    "Concat", "Expand", "Flatten", "Gather", "Identity", "Pad", "Reshape", "Slice", "Split", "Squeeze", "Transpose",
    "Unsqueeze",
}  # fmt: skip


@dataclass(frozen=True)
class Half:
    """name: as `--precision` has it. bits: of the significand, the hidden one included. largest: finite value."""

    name: str
    onnx_type: int
    dtype: np.dtype[Any]
    bits: int
    largest: float

    @property
    def unit_roundoff(self) -> float:
        return float(2.0**-self.bits)


HALVES = {
    "fp16": Half("fp16", TensorProto.FLOAT16, np.dtype(np.float16), 11, 65504.0),
    "bf16": Half("bf16", TensorProto.BFLOAT16, np.dtype(ml_dtypes.bfloat16), 8, float(ml_dtypes.finfo("bfloat16").max)),
}


def half_of(name: str) -> Half:
    """Raises InputError when there is no such half precision."""
    if name not in HALVES:
        raise InputError(f"precision is {name!r}, expected one of: {', '.join(HALVES)}")
    return HALVES[name]


def write_half(
    model: onnx.ModelProto,
    read_from: Path,
    path: Path,
    weights: WeightFile,
    half: Half,
    half_borders: Collection[str] = (),
    emulated: bool = False,
) -> None:
    """`model`, loaded without its weights, in half precision -> `path`; they are read from the folder `read_from` and
    go to `weights`, which stands beside `path`. The model given is spoilt.

    half_borders: inputs and outputs that are half, not fp32. emulated: computes in fp32 the numbers that half precision
    is stored with, each rounded where the typed graph rounds it; for a runtime that lacks the type. Both forms may
    share a weight file.

    Raises InputError, naming the tensor, when a weight is beyond the largest number of the type.
    """
    _to_opset(model)
    model = onnx.inliner.inline_local_functions(model)
    typed = _HalfGraph(model, read_from, weights, half, half_borders, emulated)
    typed.rewrite()
    path.write_bytes(model.SerializeToString(deterministic=True))


class _HalfGraph:
    """The rewriting of one graph. `of`: is a float value half (True), fp32 (False)?; no other values are in it."""

    def __init__(
        self,
        model: onnx.ModelProto,
        read_from: Path,
        weights: WeightFile,
        half: Half,
        half_borders: Collection[str],
        emulated: bool,
    ) -> None:
        self.graph, self.half, self.emulated = model.graph, half, emulated
        self._read_from, self._weights, self._borders = read_from, weights, half_borders
        self._constants_to_initializers()
        self._stored = {t.name: t for t in self.graph.initializer}
        self._float = _float_values(model)
        self.of: dict[str, bool] = {v.name: v.name in half_borders for v in self.graph.input if v.name in self._float}
        self._nodes: list[onnx.NodeProto] = []
        self._initializers: dict[str, TensorProto] = {}
        self._casts: set[str] = set()

    def rewrite(self) -> None:
        nodes = list(self.graph.node)
        wants = self._decide(nodes)
        outputs = {v.name for v in self.graph.output}
        for node, want in zip(nodes, wants, strict=True):
            self._emit(node, want, outputs)
        del self.graph.node[:], self.graph.initializer[:], self.graph.value_info[:]
        self.graph.node.extend(self._nodes)
        self.graph.initializer.extend(self._initializers.values())
        for value in (*self.graph.input, *self.graph.output):
            if value.name in self._borders and not self.emulated:
                value.type.tensor_type.elem_type = self.half.onnx_type

    def _constants_to_initializers(self) -> None:
        kept = []
        for node in self.graph.node:
            if node.op_type == "Constant":
                tensor = TensorProto()
                tensor.CopyFrom(next(a.t for a in node.attribute if a.name == "value"))
                tensor.name = node.output[0]
                self.graph.initializer.append(tensor)
            else:
                kept.append(node)
        del self.graph.node[:]
        self.graph.node.extend(kept)

    # --- which type

    def _decide(self, nodes: list[onnx.NodeProto]) -> list[bool]:
        """Per node, whether it computes in half precision. What is moved from weights alone may be either: it takes the
        type that all its readers want."""
        wants: list[bool] = []
        free = {name for name in self._stored if name in self._float}
        products: set[str] = set()
        for node in nodes:
            if any(a.type in (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS) for a in node.attribute):
                raise ValueError(f"{node.name}: a subgraph, expected a graph without control flow")
            floats = [i for i in node.input if i in self._float]
            bound = [i for i in floats if i not in free]
            # After inlining, what is left of our domain are plugins, which have kernels for half precision.
            if node.op_type in _HALF_KINDS or node.domain == OUR_DOMAIN or self._is_bias(node, products):
                want = True
                products.update(node.output)
            elif node.op_type in _MOVE_KINDS:
                want = bool(bound) and self.of[bound[0]]
                if floats and not bound:
                    free.update(node.output)
            else:
                want = False
            self.of.update({o: want for o in node.output if o in self._float})
            wants.append(want)
        self._settle(nodes, wants, free)
        return wants

    def _is_bias(self, node: onnx.NodeProto, products: set[str]) -> bool:
        """Of x @ W + b: an Add of a product and a vector of weights."""
        if node.op_type != "Add":
            return False
        vectors = [i for i in node.input if i in self._stored and len(self._stored[i].dims) == 1]
        return len(vectors) == 1 and any(i in products for i in node.input)

    def _settle(self, nodes: list[onnx.NodeProto], wants: list[bool], free: set[str]) -> None:
        readers: dict[str, list[bool]] = {}
        for i in reversed(range(len(nodes))):
            node = nodes[i]
            if node.op_type in _MOVE_KINDS and node.output[0] in free:
                wants[i] = all(r for o in node.output for r in readers.get(o, [False]))
                self.of.update(dict.fromkeys(node.output, wants[i]))
            for name in node.input:
                readers.setdefault(name, []).append(wants[i])

    # --- the nodes

    def _emit(self, node: onnx.NodeProto, want: bool, outputs: set[str]) -> None:
        kept = onnx.NodeProto()
        kept.CopyFrom(node)
        for at, name in enumerate(node.input):
            if name in self._stored:
                kept.input[at] = self._weight(name, want and name in self._float)
            elif name in self._float and self.of[name] != want:
                kept.input[at] = self._cast(name, want)
        self._nodes.append(kept)
        if want and self.emulated and node.op_type not in _MOVE_KINDS:
            self._round_outputs(kept)
        for at, name in enumerate(node.output):
            if name in outputs and name in self._float and self.of[name] != (name in self._borders):
                inner = f"{name}/inside"
                kept.output[at] = inner
                to = self.half.onnx_type if name in self._borders else FLOAT
                self._add("Cast", inner, name, to=FLOAT if self.emulated else to)
                self.of[name] = name in self._borders

    def _add(self, kind: str, source: str, result: str, **attributes: Any) -> None:
        name = f"/{result.lstrip('/')}/{kind}"
        self._nodes.append(helper.make_node(kind, [source], [result], name=name, **attributes))

    def _round(self, source: str, result: str) -> None:
        """fp32 -> the nearest number of the half type, in fp32."""
        self._add("Cast", source, f"{result}/{self.half.name}", to=self.half.onnx_type)
        self._add("Cast", f"{result}/{self.half.name}", result, to=FLOAT)

    def _round_outputs(self, node: onnx.NodeProto) -> None:
        for at, name in enumerate(node.output):
            if name in self._float:
                node.output[at] = f"{name}/exact"
                self._round(f"{name}/exact", name)

    def _cast(self, name: str, to_half: bool) -> str:
        if self.emulated and not to_half:
            return name  # it holds a rounded number already
        result = f"{name}/as_{self.half.name if to_half else 'fp32'}"
        if result not in self._casts:
            self._casts.add(result)
            if self.emulated:
                self._round(name, result)
            else:
                self._add("Cast", name, result, to=self.half.onnx_type if to_half else FLOAT)
        return result

    def _weight(self, name: str, in_half: bool) -> str:
        stored = self._stored[name]
        if not in_half:
            if name not in self._initializers:
                external = stored.data_location == TensorProto.EXTERNAL
                self._initializers[name] = self._weights.add(name, lambda: self._read(stored)) if external else stored
            return name
        rounded = f"{name}.{self.half.name}"
        if rounded not in self._initializers:
            tensor = self._initializers[rounded] = TensorProto()
            tensor.CopyFrom(self._weights.add(rounded, lambda: self._rounded(stored)))
            tensor.data_type = self.half.onnx_type  # the file has the same bytes as 16-bit integers
            del tensor.dims[:]
            tensor.dims.extend(stored.dims)  # a scalar's, which the file does not keep
            if self.emulated:
                self._add("Cast", rounded, f"{rounded}/as_fp32", to=FLOAT)
        return f"{rounded}/as_fp32" if self.emulated else rounded

    def _read(self, tensor: TensorProto) -> NDArray[Any]:
        return onnx.numpy_helper.to_array(tensor, str(self._read_from))

    def _rounded(self, tensor: TensorProto) -> NDArray[np.uint16]:
        x = self._read(tensor)
        top = float(np.abs(x).max(initial=0.0))
        if not top <= self.half.largest:
            raise InputError(
                f"{tensor.name}: a weight of {top:.3g}, {self.half.name} ends at {self.half.largest:.5g}; "
                "expected smaller ones: build this component in bf16 or fp32"
            )
        return x.astype(self.half.dtype).view(np.uint16)


def _to_opset(model: onnx.ModelProto) -> None:
    """Nothing that our graphs use means something else there."""
    model.ir_version = _IR_VERSION
    for imports in (model.opset_import, *(f.opset_import for f in model.functions)):
        for entry in imports:
            entry.version = OPSET if entry.domain == "" else entry.version


def _float_values(model: onnx.ModelProto) -> set[str]:
    """Names of every fp32 value, weights included."""
    return set(_names(onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True).graph))


def _names(graph: onnx.GraphProto) -> Iterator[str]:
    for value in (*graph.value_info, *graph.input, *graph.output):
        if value.type.tensor_type.elem_type == FLOAT:
            yield value.name
    for tensor in graph.initializer:
        if tensor.data_type == FLOAT:
            yield tensor.name
