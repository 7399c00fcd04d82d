"""Slide encoder -> ONNX (SPEC 3): tile features and grid positions in, 576 slide tokens out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto

from wsi_rt.export.arch import LongNetConfig
from wsi_rt.export.graphs.builder import GraphBuilder, WeightFile
from wsi_rt.export.graphs.dilated_attention import dilated_attention
from wsi_rt.export.graphs.layers import FLOAT, Graph, Style, activation, reshape
from wsi_rt.export.sources.weights import WeightSource
from wsi_rt.kernels.slide_embed import GRID


def build(
    c: LongNetConfig,
    source: WeightSource,
    weights: WeightFile,
    path: Path,
    style: Style,
    *,
    expose_encoder_out: bool = False,
) -> None:
    """Writes `path`.

    Inputs `features` f32 [tiles, in_width], `positions` i64 [tiles, 2] (col, row, each 0..999).
    Outputs `tokens` f32 [576, padded] and, when the norm is as wide as C, `cls` and `mean` f32 [C];
    `encoder_out` f32 [tiles + 1, C] on request.
    """
    SlideEncoderGraph(c, source, weights, style).build(path, expose_encoder_out)


def axis_table(width: int) -> NDArray[np.float32]:
    """[1000, width]: the position encoding of one grid axis, in float64 then cast.

    Both halves of the published 1,000,001-row table index into these rows (1.5 MB at width 768, not 3 GB).
    """
    omega = 10000.0 ** (-np.arange(width // 2, dtype=np.float64) / (width / 2))
    angle = np.arange(GRID, dtype=np.float64)[:, None] * omega
    return np.concatenate([np.sin(angle), np.cos(angle)], axis=1).astype(np.float32)


class SlideEncoderGraph(Graph):
    def __init__(self, c: LongNetConfig, source: WeightSource, weights: WeightFile, style: Style) -> None:
        super().__init__("slide_encoder", source, weights, style)
        self.c = c

    def build(self, path: Path, expose_encoder_out: bool) -> None:
        b, c = self.b, self.c
        features = b.input("features", FLOAT, ["tiles", c.in_width])
        positions = b.input("positions", TensorProto.INT64, ["tiles", 2])
        x = self._embed(features, positions)
        x = self._layers(x)
        x = self.make_layer_norm(x, "encoder.layer_norm", c.eps)
        self._heads(x)
        if expose_encoder_out:
            b.output(x, "encoder_out", FLOAT, ["tokens", c.width])
        b.save(path)

    def _embed(self, features: str, positions: str) -> str:
        """-> [N + 1, C]: projected features plus positions (row first, then col), CLS (position zero) in front."""
        b, c = self.b, self.c
        with b.scope("embed"):
            x = self.make_linear(features, "patch_embed.proj", bias=True)
            table = b.weight("axis_table", lambda: axis_table(c.width // 2))
            col, row = (b.op("Gather", [positions, b.constant(axis)], axis=1) for axis in (0, 1))
            position = b.op("Concat", [b.op("Gather", [table, row]), b.op("Gather", [table, col])], axis=1)
            cls_token = b.weight("cls_token", lambda: self.source.get("cls_token").reshape(1, c.width))
            return b.op("Concat", [cls_token, b.op("Add", [x, position])], axis=0)

    def _layers(self, x: str) -> str:
        """[N + 1, C] -> the same after all layers."""
        self.layer_boundary(x, ["tokens", self.c.width])
        for i in range(self.c.depth):
            with self.b.scope(f"layers.{i}"):
                x = self._layer(x, f"encoder.layers.{i}")
            self.layer_boundary(x, ["tokens", self.c.width])
        return x

    def _layer(self, x: str, p: str) -> str:
        b, c = self.b, self.c
        head = c.width // c.heads
        q, k, v = (reshape(b, y, [-1, c.heads, head]) for y in self._project(x, p))
        with b.scope("attn"):
            y = dilated_attention(b, q, k, v, c.segment_lengths, c.dilated_ratios, c.heads, head)
            y = reshape(b, y, [-1, c.width])
        return self._rest(x, y, p)

    def _project(self, x: str, p: str) -> list[str]:
        """[L, C] -> queries, keys and values [L, C] of a layer."""
        y = self.make_layer_norm(x, f"{p}.self_attn_layer_norm", self.c.eps)
        with self.b.scope("attn"):
            return [self.make_linear(y, f"{p}.self_attn.{n}_proj", bias=True) for n in "qkv"]

    def _rest(self, x: str, y: str, p: str) -> str:
        """[L, C] and what is attended to, [L, C] -> the layer's output [L, C]."""
        b, c = self.b, self.c
        with b.scope("attn"):
            y = self.make_layer_norm(y, f"{p}.self_attn.inner_attn_ln", c.eps)
            x = b.op("Add", [x, self.make_linear(y, f"{p}.self_attn.out_proj", bias=True)])
        y = self.make_layer_norm(x, f"{p}.final_layer_norm", c.eps)
        with b.scope("ffn"):
            y = activation(b, self.make_linear(y, f"{p}.ffn.fc1", bias=True), "gelu")
            y = self.make_layer_norm(y, f"{p}.ffn.ffn_layernorm", c.eps)
            return b.op("Add", [x, self.make_linear(y, f"{p}.ffn.fc2", bias=True)])

    def _heads(self, x: str) -> None:
        """The outputs: pooled tokens and, where the norm allows, the CLS and mean heads."""
        b, c = self.b, self.c
        norm = [self.tensor(f"norm.{n}") for n in ("weight", "bias")]
        with b.scope("pool"):
            tiles = b.op("Slice", [x, b.constant([1]), b.constant([2**62]), b.constant([0])])
            tokens = b.call(_pool_norm_pad(c), [tiles, *norm], pooled=c.pooled, padded=c.padded)
        b.output(tokens, "tokens", FLOAT, [c.pooled, c.padded])
        if c.norm_width != c.width:
            return
        with b.scope("heads"):
            mean = b.op("ReduceMean", [tiles, b.constant([0])], keepdims=0)
            for name, value in (("cls", b.op("Gather", [x, b.constant(0)], axis=0)), ("mean", mean)):
                normed = b.op("LayerNormalization", [value, *norm], axis=-1, epsilon=c.pool_eps)
                b.output(normed, name, FLOAT, [c.width])


def _pool_norm_pad(c: LongNetConfig) -> onnx.FunctionProto:
    """`wsi_rt::PoolNormPad`: tokens [N, C], weight, bias -> [pooled, padded] (adaptive average, norm, pad).

    A bin is at most ceil(N / pooled) + 1 tokens wide: gather that window, mask, sum, divide. A running sum
    would need one add per token but loses bits over ten thousand of them.
    """
    b = GraphBuilder("PoolNormPad")
    n = b.op("Shape", ["tokens"], start=0, end=1)
    bins, one = b.constant([c.pooled]), b.constant([1])
    index = b.constant(np.arange(c.pooled).reshape(-1, 1), name="bins")  # [P, 1]
    start = b.op("Div", [b.op("Mul", [index, n]), bins])
    above = b.op("Mul", [b.op("Add", [index, one]), n])
    end = b.op("Div", [b.op("Add", [above, b.constant([c.pooled - 1])]), bins])  # ceil((i + 1) N / P)
    widest = b.op("Add", [b.op("Div", [n, bins]), b.constant([2])])
    offsets = b.op("Range", [b.constant(0), b.op("Squeeze", [widest, b.constant([0])]), b.constant(1)])
    window = b.op("Add", [start, offsets])  # [P, K]
    inside = b.op("Less", [window, end])
    rows = b.op("Gather", ["tokens", b.op("Min", [window, b.op("Sub", [n, one])])], axis=0)  # [P, K, C]
    mask = b.op("Cast", [b.op("Unsqueeze", [inside, b.constant([2])])], to=FLOAT)
    total = b.op("ReduceSum", [b.op("Mul", [rows, mask]), one], keepdims=0)
    x = b.op("Div", [total, b.op("Cast", [b.op("Sub", [end, start])], to=FLOAT)])
    pads = b.constant([0, 0, 0, c.padded - c.width], name="pads")
    if c.norm_width != c.width:
        x = b.op("Pad", [x, pads])
    x = b.op("LayerNormalization", [x, "weight", "bias"], axis=-1, epsilon=c.pool_eps)
    if c.norm_width == c.width and c.padded != c.width:
        x = b.op("Pad", [x, pads])
    return b.function(["tokens", "weight", "bias"], [x], ["pooled", "padded"])
