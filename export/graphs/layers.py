"""Layers that more than one component's graph is made of: one `make` per layer, published names in, value out."""

from __future__ import annotations

import numpy as np
from onnx import TensorProto

from wsi_rt.export.graphs.builder import GraphBuilder
from wsi_rt.export.sources.weights import F32, WeightSource

FLOAT = TensorProto.FLOAT


def linear(b: GraphBuilder, source: WeightSource, x: str, name: str, bias: bool = True) -> str:
    """x [..., in] -> [..., out]; the weight is stored transposed, as MatMul wants it."""
    with b.scope(name.rsplit(".", 1)[-1]):
        y = b.op("MatMul", [x, b.weight(f"{name}.weight.T", _transposed(source, f"{name}.weight"))])
        return b.op("Add", [y, b.weight(f"{name}.bias", source.get(f"{name}.bias"))]) if bias else y


def _transposed(source: WeightSource, name: str) -> F32:
    return np.ascontiguousarray(source.get(name).T)


def layer_norm(b: GraphBuilder, source: WeightSource, x: str, name: str, eps: float) -> str:
    with b.scope(name.rsplit(".", 1)[-1]):
        weight = b.weight(f"{name}.weight", source.get(f"{name}.weight"))
        bias = b.weight(f"{name}.bias", source.get(f"{name}.bias"))
        return b.op("LayerNormalization", [x, weight, bias], axis=-1, epsilon=eps)


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
