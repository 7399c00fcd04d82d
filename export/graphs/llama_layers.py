"""Llama for onnxruntime on the CPU: a graph for each layer's linear part, and attention in graphs of its own.

A layer's graph ends before its attention and the next one begins behind it, so what runs between them is free to treat
each sequence as it needs: `runtime.llm.ort_layers` lets all sequences share a slide's keys and values and keeps their
own in slabs. onnxruntime's GroupQueryAttention cannot: it refuses several sequences with several new tokens each, and
wants a slide's keys copied in front of every sequence's.

Rows are tokens, of any sequences: nothing here mixes them.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from onnx import TensorProto

from wsi_rt.export.arch import LM_HEAD, LlamaConfig
from wsi_rt.export.graphs.builder import ORT_DOMAIN, GraphBuilder, WeightFile
from wsi_rt.export.graphs.layers import FLOAT, Graph, Style, activation, reshape
from wsi_rt.export.graphs.llama import rope_tables
from wsi_rt.export.sources.stored import with_head
from wsi_rt.export.sources.weights import WeightSource
from wsi_rt.runtime.llm.ort_layers import HEAD, OWN, PREFIX, layer_role


def build_attention(c: LlamaConfig, weights: WeightFile, folder: Path) -> dict[str, Path]:
    """Writes attention's two graphs; by role."""
    paths = {role: folder / f"{role}.onnx" for role in (PREFIX, OWN)}
    build_prefix_attention(c, weights, paths[PREFIX])
    build_own_attention(c, weights, paths[OWN])
    return paths


def build_layers(
    c: LlamaConfig, source: WeightSource, weights: WeightFile, folder: Path, style: Style
) -> dict[str, Path]:
    """Writes the layers' graphs and the head's; by role."""
    paths = {role: folder / f"{role}.onnx" for role in (HEAD, *map(layer_role, range(c.layers + 1)))}
    source = with_head(c, source)
    for i in range(c.layers + 1):
        LayerGraph(c, source, weights, style, i).build(paths[layer_role(i)])
    HeadGraph("head", source, weights, style).build(c, paths[HEAD])
    return paths


class RowsGraph(Graph):
    """x f32 [rows, hidden] in; onnxruntime's fused norm."""

    def make_rms_norm(self, x: str, name: str, eps: float) -> str:
        with self.b.scope(name.rsplit(".", 1)[-1]):
            weight = self.tensor(f"{name}.weight")
            return self.b.op("SimplifiedLayerNormalization", [x, weight], axis=-1, epsilon=eps)


class LayerGraph(RowsGraph):
    """What lies between two attentions. Inputs: `x` f32 [rows, hidden], what went into layer i - 1, and but for the
    first graph `attended` f32 [rows, heads * D], that layer's attention of it. Output, but for the first: `y` f32
    [rows, hidden], what goes into layer i. But for the last, also input `position` i64 [rows] and outputs `q` f32
    [rows, heads * D], `k`, `v` f32 [rows, kv_heads * D] of layer i, rotated.
    """

    def __init__(self, c: LlamaConfig, source: WeightSource, weights: WeightFile, style: Style, i: int) -> None:
        super().__init__(layer_role(i), source, weights, style)
        self.c, self.i = c, i

    def build(self, path: Path) -> None:
        b, c = self.b, self.c
        x = b.input("x", FLOAT, ["rows", c.hidden])
        if self.i > 0:
            with b.scope(f"layers.{self.i - 1}"):
                x = self.make_second_half(x, b.input("attended", FLOAT, ["rows", c.heads * c.head_width]))
            b.output(x, "y", FLOAT, ["rows", c.hidden])
        if self.i < c.layers:
            with b.scope(f"layers.{self.i}"):
                self.make_first_half(x)
        b.save(path)

    def make_first_half(self, x: str) -> None:
        b, c, p = self.b, self.c, f"model.layers.{self.i}"
        position = b.op("Unsqueeze", [b.input("position", TensorProto.INT64, ["rows"]), b.constant([0])])
        y = self.make_rms_norm(x, f"{p}.input_layernorm", c.rms_eps)
        with b.scope("attn"):
            for n, heads in (("q", c.heads), ("k", c.kv_heads), ("v", c.kv_heads)):
                out = self.make_linear(y, f"{p}.self_attn.{n}_proj")
                out = out if n == "v" else self._rotate(out, position, heads)
                b.output(out, n, FLOAT, ["rows", heads * c.head_width])

    def make_second_half(self, x: str, attended: str) -> str:
        b, c, p = self.b, self.c, f"model.layers.{self.i - 1}"
        with b.scope("attn"):
            x = b.op("Add", [x, self.make_linear(attended, f"{p}.self_attn.o_proj")])
        y = self.make_rms_norm(x, f"{p}.post_attention_layernorm", c.rms_eps)
        with b.scope("mlp"):
            gate = activation(b, self.make_linear(y, f"{p}.mlp.gate_proj"), "silu")
            up = self.make_linear(y, f"{p}.mlp.up_proj")
            return b.op("Add", [x, self.make_linear(b.op("Mul", [gate, up]), f"{p}.mlp.down_proj")])

    def _rotate(self, x: str, position: str, heads: int) -> str:
        """x [rows, heads * D], position [1, rows] -> rotated, in the rotate-half layout."""
        b = self.b
        cos, sin = rope_tables(self.c)
        tables = [b.weight("rope.cos", lambda: cos), b.weight("rope.sin", lambda: sin)]
        x = b.op("Unsqueeze", [x, b.constant([0])])
        x = b.op("RotaryEmbedding", [x, position, *tables], domain=ORT_DOMAIN, num_heads=heads)
        return b.op("Squeeze", [x, b.constant([0])])


class HeadGraph(RowsGraph):
    """`x` f32 [rows, hidden] -> `logits` f32 [rows, vocab]."""

    def build(self, c: LlamaConfig, path: Path) -> None:
        x = self.b.input("x", FLOAT, ["rows", c.hidden])
        x = self.make_rms_norm(x, "model.norm", c.rms_eps)
        self.b.output(self.make_linear(x, LM_HEAD), "logits", FLOAT, ["rows", c.vocab])
        self.b.save(path)


def build_prefix_attention(c: LlamaConfig, weights: WeightFile, path: Path) -> None:
    """Attention to keys that every row sees, one part of a softmax: `q` f32 [rows, heads * D], `k`, `v` f32
    [keys, kv_heads, D] -> `weighted` f32 [kv_heads, rows * groups, D], `top` and `total` [kv_heads, rows * groups, 1]:
    sum of exp(score - top) * v, the largest score, sum of exp(score - top)."""
    b = GraphBuilder(PREFIX, weights)
    parts = _partial(b, c, mask=None)
    for name, value, width in zip(("weighted", "top", "total"), parts, (c.head_width, 1, 1), strict=True):
        b.output(value, name, FLOAT, [c.kv_heads, "q_rows", width])
    b.save(path)


def build_own_attention(c: LlamaConfig, weights: WeightFile, path: Path) -> None:
    """Attention of consecutive tokens of one sequence to its own keys, joined with what they get from a prefix.

    Inputs: `q`, `k`, `v` as above; `seen` i64 [1], how many of the keys the first row sees (each next row one more);
    `weighted`, `top`, `total` of the prefix (without one: 0, a number below any score, 0). Output: `attended` f32
    [rows, heads * D].

    Keys behind the last one seen change no bit, whatever finite numbers they are, as long as their count is a multiple
    of 64: exp gives them 0, and sums take the same order. So a token's attention does not depend on how many tokens
    came with it.
    """
    b = GraphBuilder(OWN, weights)
    seen = b.input("seen", TensorProto.INT64, [1])
    weighted, top, total = _partial(b, c, mask=seen)
    names = (("weighted", c.head_width), ("top", 1), ("total", 1))
    shared = [b.input(name, FLOAT, [c.kv_heads, "q_rows", width]) for name, width in names]
    both = b.op("Max", [shared[1], top])
    old, new = (b.op("Exp", [b.op("Sub", [t, both])]) for t in (shared[1], top))
    sums = [
        b.op("Add", [b.op("Mul", [old, s]), b.op("Mul", [new, own])])
        for s, own in ((shared[0], weighted), (shared[2], total))
    ]
    y = b.op("Transpose", [b.op("Div", sums)], perm=[1, 0, 2])  # [rows * groups, kv_heads, D]
    groups = c.heads // c.kv_heads
    if groups > 1:
        y = b.op("Transpose", [reshape(b, y, [-1, groups, c.kv_heads, c.head_width])], perm=[0, 2, 1, 3])
    b.output(reshape(b, y, [-1, c.heads * c.head_width]), "attended", FLOAT, ["rows", c.heads * c.head_width])
    b.save(path)


def _partial(b: GraphBuilder, c: LlamaConfig, mask: str | None) -> tuple[str, str, str]:
    """Weighted values, largest score and sum of the inputs `q`, `k`, `v`; mask: how many keys the first row sees."""
    groups = c.heads // c.kv_heads
    q = b.input("q", FLOAT, ["rows", c.heads * c.head_width])
    k, v = (b.input(n, FLOAT, ["keys", c.kv_heads, c.head_width]) for n in ("k", "v"))
    if groups > 1:  # a KV head serves its whole group: [rows, kv_heads, groups, D] -> [rows * groups, kv_heads, D]
        q = b.op("Transpose", [reshape(b, q, [-1, c.kv_heads, groups, c.head_width])], perm=[0, 2, 1, 3])
    q = reshape(b, q, [-1, c.kv_heads, c.head_width])
    turned, scale = {"transBatchA": 1, "transBatchB": 1, "transB": 1}, c.head_width**-0.5
    scores = b.op("FusedMatMul", [q, k], domain=ORT_DOMAIN, alpha=scale, **turned)  # [kv_heads, rows * groups, keys]
    if mask is not None:
        scores = b.op("Where", [_visible(b, q, k, mask, groups), scores, b.constant(_HIDDEN, np.float32, "hidden")])
    top = b.op("ReduceMax", [scores, b.constant([-1])], keepdims=1)
    p = b.op("Exp", [b.op("Sub", [scores, top])])
    # Not ReduceSum, nor a single column: their order depends on where a row lies, and among how many.
    dims = b.op("Concat", [b.constant([c.kv_heads]), b.op("Shape", [k], start=0, end=1), b.constant([2])], axis=0)
    sums = b.op("MatMul", [p, b.op("Expand", [b.constant(1, np.float32), dims])])  # [kv_heads, rows * groups, 2]
    total = b.op("Slice", [sums, b.constant([0]), b.constant([1]), b.constant([2])])
    return b.op("FusedMatMul", [p, v], domain=ORT_DOMAIN, transBatchB=1), top, total


_HIDDEN = -1e30  # a score whose exponential is 0 beside any real one


def _visible(b: GraphBuilder, q: str, k: str, seen: str, groups: int) -> str:
    """bool [rows * groups, keys]: key j is seen by row r when j < seen + r."""
    zero, one = b.constant(0), b.constant(1)
    rows, keys = (b.op("Squeeze", [b.op("Shape", [x], start=0, end=1), b.constant([0])]) for x in (q, k))
    row = b.op("Div", [b.op("Range", [zero, rows, one]), b.constant(groups)])
    end = b.op("Unsqueeze", [b.op("Add", [row, seen]), b.constant([1])])
    return b.op("Less", [b.op("Range", [zero, keys, one]), end])
