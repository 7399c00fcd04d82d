"""What more than one component's graph is made of: `Graph` makes layers with weights, functions those without."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from onnx import TensorProto

from wsi_rt.export.graphs.builder import Dims, GraphBuilder, WeightFile
from wsi_rt.export.graphs.linears import Linears, PlainLinears
from wsi_rt.export.sources.weights import WeightSource

FLOAT = TensorProto.FLOAT


@dataclass(frozen=True)
class Style:
    """How a graph is written, whatever it computes. probe: it also gives `probe.0`, the input of the first layer, and
    after each layer `probe.1`, ..., so that a reference can be held against it layer by layer."""

    linears: Linears = field(default_factory=PlainLinears)
    probe: bool = False


class Graph:
    """What every component's graph is built with: a builder, the checkpoint it draws tensors from, and a style."""

    def __init__(self, name: str, source: WeightSource, weights: WeightFile, style: Style) -> None:
        self.b, self.source, self.style = GraphBuilder(name, weights), source, style

    def tensor(self, name: str) -> str:
        """A tensor of the checkpoint under its own name."""
        return self.b.weight(name, lambda: self.source.get(name))

    def make_linear(self, x: str, name: str, bias: bool = False) -> str:
        """x [..., in] -> [..., out]."""
        with self.b.scope(name.rsplit(".", 1)[-1]):
            return self.style.linears.make(self, x, name, bias)

    def layer_boundary(self, x: str, dims: Dims) -> None:
        """`x` goes into the first layer, or came out of the next one."""
        if self.style.probe:
            self.b.output(x, f"probe.{len(self.b.boundaries)}", FLOAT, dims)
        self.b.boundaries.append(x)

    def make_layer_norm(self, x: str, name: str, eps: float) -> str:
        with self.b.scope(name.rsplit(".", 1)[-1]):
            inputs = [x, self.tensor(f"{name}.weight"), self.tensor(f"{name}.bias")]
            return self.b.op("LayerNormalization", inputs, axis=-1, epsilon=eps)


def activation(b: GraphBuilder, x: str, kind: str) -> str:
    if kind == "gelu":
        return b.op("Gelu", [x])
    if kind == "gelu_tanh":
        return b.op("Gelu", [x], approximate="tanh")
    if kind == "relu":
        return b.op("Relu", [x])
    gate = x if kind == "silu" else b.op("Mul", [x, b.constant(1.702, np.float32)])  # else quick_gelu
    return b.op("Mul", [x, b.op("Sigmoid", [gate])])


def attention(b: GraphBuilder, q: str, k_transposed: str, v: str, scale: float, mask: str | None = None) -> str:
    """Plain softmax attention: q [..., M, D], k_transposed [..., D, N], v [..., N, D] -> [..., M, D].

    `mask` is boolean, broadcast to [..., M, N], true where attention is allowed.
    """
    scores = b.op("MatMul", [b.op("Mul", [q, b.constant(scale, np.float32)]), k_transposed])
    if mask is not None:
        scores = b.op("Where", [mask, scores, b.constant(np.finfo(np.float32).min, np.float32)])
    return b.op("MatMul", [b.op("Softmax", [scores], axis=-1), v])


def reshape(b: GraphBuilder, x: str, dims: list[int]) -> str:
    """Reshape to constant dims; 0 copies the input's, -1 is inferred."""
    return b.op("Reshape", [x, b.constant(dims)])
