"""Llama for TensorRT and TensorRT-RTX: keys and values stay in the caller's memory and grow in place.

A cache is a slot per sequence, [batch, kv_heads, capacity, D] of a layer. TensorScatter writes the new tokens' keys and
values where each sequence ends; TensorRT compiles it to a KVCacheUpdate layer, whose output is its input's memory, and
which wants the capacity to be a constant of the engine. Attention reads the first `keys` tokens of every slot alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from onnx import TensorProto

from wsi_rt.export.arch import LM_HEAD, LlamaConfig
from wsi_rt.export.graphs.attention_rtx import fused_attention
from wsi_rt.export.graphs.builder import WeightFile
from wsi_rt.export.graphs.layers import FLOAT, Style, reshape
from wsi_rt.export.graphs.llama import LlamaGraph
from wsi_rt.export.sources.weights import WeightSource

PARTS = ("key", "value")


def cache_names(layers: int) -> list[str]:
    return [f"cache.{i}.{part}" for i in range(layers) for part in PARTS]


def updated_names(layers: int) -> list[str]:
    return [f"updated.{i}.{part}" for i in range(layers) for part in PARTS]


def build(c: LlamaConfig, source: WeightSource, weights: WeightFile, path: Path, style: Style, capacity: int) -> None:
    """Writes `path`; capacity: tokens of a slot."""
    TensorRtLlamaGraph(c, source, weights, style, capacity).build(path)


class TensorRtLlamaGraph(LlamaGraph):
    """Inputs: `inputs_embeds` f32 [batch, tokens, hidden], the new tokens; `start` i64 [batch], how many tokens each
    slot holds already; `keys` i64 [keys], 0, 1, ..., at least as many as the fullest slot will hold; `rows` i64 [rows],
    of batch * tokens those whose logits are wanted; `cache.{i}.key`, `cache.{i}.value` [batch, kv_heads, capacity, D].
    Outputs: `logits` f32 [rows, vocab]; `updated.{i}.key`, `updated.{i}.value`, the caches with the new tokens.

    A slot's tokens beyond what it holds are hidden by the mask, whatever finite numbers they are.
    """

    def __init__(self, c: LlamaConfig, source: WeightSource, weights: WeightFile, style: Style, capacity: int) -> None:
        super().__init__(c, source, weights, style)
        self.capacity = capacity

    def build(self, path: Path) -> None:
        b, c = self.b, self.c
        x = b.input("inputs_embeds", FLOAT, ["batch", "tokens", c.hidden])
        self.make_shared(x)
        rows = b.input("rows", TensorProto.INT64, ["rows"])
        x = self.make_layers(x)
        with b.scope("head"):
            wanted = b.op("Gather", [reshape(b, x, [-1, c.hidden]), rows], axis=0)
            b.output(
                self.make_linear(self.make_norm(wanted, "model.norm"), LM_HEAD), "logits", FLOAT, ["rows", c.vocab]
            )
        b.save(path)

    def make_shared(self, x: str) -> None:
        """Every layer's rotary cos and sin [batch, 1, tokens, D / 2] and mask [batch, 1, tokens, keys]."""
        b = self.b
        start = self.shared["start"] = b.input("start", TensorProto.INT64, ["batch"])
        keys = b.input("keys", TensorProto.INT64, ["keys"])
        with b.scope("shared"):
            tokens = b.op("Squeeze", [b.op("Shape", [x], start=1, end=2), b.constant([0])])
            offset = b.op("Range", [b.constant(0), tokens, b.constant(1)])
            position = b.op("Add", [b.op("Unsqueeze", [start, b.constant([1])]), offset])  # [batch, tokens]
            for name, table in self.rope().items():
                self.shared[name] = b.op("Unsqueeze", [b.op("Gather", [table, position]), b.constant([1])])
            self.shared["mask"] = b.op("LessOrEqual", [keys, b.op("Unsqueeze", [position, b.constant([1, 3])])])
            self.shared["end"] = b.op("Shape", [keys])

    def make_attention(self, q: str, k: str, v: str, i: int) -> str:
        b, c = self.b, self.c
        q = self._rotate(self._split_heads(q, c.heads))
        k = self._rotate(self._split_heads(k, c.kv_heads))
        v = self._split_heads(v, c.kv_heads)
        k, v = (self._seen(part, new, i) for part, new in zip(PARTS, (k, v), strict=True))
        y = fused_attention(b, q, k, v, c.head_width**-0.5, self.shared["mask"])
        return reshape(b, b.op("Transpose", [y], perm=[0, 2, 1, 3]), [0, 0, c.heads * c.head_width])

    def _seen(self, part: str, new: str, i: int) -> str:
        """new [batch, kv_heads, tokens, D], written to its cache -> the first tokens of that."""
        b, c = self.b, self.c
        dims: list[Any] = ["batch", c.kv_heads, self.capacity, c.head_width]
        cache = b.input(f"cache.{i}.{part}", FLOAT, dims)
        name = b.bind_output(f"updated.{i}.{part}", FLOAT, dims)
        b.op("TensorScatter", [cache, new, self.shared["start"]], outputs=[name])
        return b.op("Slice", [name, b.constant([0]), self.shared["end"], b.constant([2])])
