"""Llama decoder -> ONNX (SPEC 5): embeddings and past KV in, the last position's logits and present KV out.

`LlamaGraph` is the portable form: standard operators, past and present as separate tensors. What onnxruntime runs is in
`llama_layers`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from wsi_rt.export.arch import EMBED_TOKENS, LM_HEAD, LlamaConfig
from wsi_rt.export.graphs.builder import GraphBuilder, WeightFile
from wsi_rt.export.graphs.layers import FLOAT, Graph, Style, activation, attention, reshape
from wsi_rt.export.sources.stored import with_head
from wsi_rt.export.sources.weights import WeightSource


def build_embed(c: LlamaConfig, source: WeightSource, weights: WeightFile, path: Path) -> None:
    """`input_ids` i64 [tokens] -> `embeds` f32 [tokens, hidden]."""
    b = GraphBuilder("embed", weights)
    ids = b.input("input_ids", TensorProto.INT64, ["tokens"])
    table = b.weight(f"{EMBED_TOKENS}.weight", lambda: source.get(f"{EMBED_TOKENS}.weight"))
    b.output(b.op("Gather", [table, ids], axis=0), "embeds", FLOAT, ["tokens", c.hidden])
    b.save(path)


def build_decoder(c: LlamaConfig, source: WeightSource, weights: WeightFile, path: Path, style: Style) -> None:
    """Writes `path`."""
    LlamaGraph(c, source, weights, style).build(path)


def rope_tables(c: LlamaConfig) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """cos and sin [context, head_width / 2], in fp32 by torch as transformers computes them: numpy's powers differ in
    the last bit, which a position of 4000 turns into 2e-4 of the cosine."""
    import torch

    inverse = 1.0 / c.rope_theta ** (torch.arange(0, c.head_width, 2, dtype=torch.float32) / c.head_width)
    angle = torch.arange(c.context, dtype=torch.float32)[:, None] * inverse
    return angle.cos().numpy(), angle.sin().numpy()


class LlamaGraph(Graph):
    """Portable decoder graph.

    Inputs: `inputs_embeds` f32 [batch, tokens, hidden]; `past.{i}.key`, `past.{i}.value` f32
    [batch, kv_heads, past, head_width]. Outputs: `logits` f32 [batch, vocab] of the last position;
    `present.{i}.key`, `present.{i}.value` [batch, kv_heads, total, head_width].
    """

    def __init__(self, c: LlamaConfig, source: WeightSource, weights: WeightFile, style: Style) -> None:
        super().__init__("decoder", with_head(c, source), weights, style)
        self.c = c
        self.shared: dict[str, str] = {}

    def build(self, path: Path) -> None:
        b, c = self.b, self.c
        x = b.input("inputs_embeds", FLOAT, ["batch", "tokens", c.hidden])
        self.make_shared(x)
        x = self.make_layers(x)
        with b.scope("head"):
            last = b.op("Slice", [x, b.constant([-1]), b.constant([2**62]), b.constant([1])])
            last = self.make_norm(b.op("Squeeze", [last, b.constant([1])]), "model.norm")
            b.output(self.make_linear(last, LM_HEAD), "logits", FLOAT, ["batch", c.vocab])
        b.save(path)

    def make_layers(self, x: str) -> str:
        dims: list[int | str] = ["batch", "tokens", self.c.hidden]
        self.layer_boundary(x, dims)
        for i in range(self.c.layers):
            with self.b.scope(f"layers.{i}"):
                x = self.make_layer(x, i)
            self.layer_boundary(x, dims)
        return x

    def make_layer(self, x: str, i: int) -> str:
        b, p = self.b, f"model.layers.{i}"
        y = self.make_norm(x, f"{p}.input_layernorm")
        with b.scope("attn"):
            q, k, v = (self.make_linear(y, f"{p}.self_attn.{n}_proj") for n in "qkv")
            y = self.make_attention(q, k, v, i)
            x = b.op("Add", [x, self.make_linear(y, f"{p}.self_attn.o_proj")])
        y = self.make_norm(x, f"{p}.post_attention_layernorm")
        with b.scope("mlp"):
            gate = activation(b, self.make_linear(y, f"{p}.mlp.gate_proj"), "silu")
            up = self.make_linear(y, f"{p}.mlp.up_proj")
            y = self.make_linear(b.op("Mul", [gate, up]), f"{p}.mlp.down_proj")
            return b.op("Add", [x, y])

    def make_shared(self, x: str) -> None:
        """Values every layer uses: rotary cos and sin of the new positions, the causal mask."""
        b = self.b
        past_key, _ = self.past(0)
        with b.scope("shared"):
            tokens = b.op("Squeeze", [b.op("Shape", [x], start=1, end=2), b.constant([0])])
            past = b.op("Squeeze", [b.op("Shape", [past_key], start=2, end=3), b.constant([0])])
            total = b.op("Add", [past, tokens])
            position = b.op("Range", [past, total, b.constant(1)])
            for name, table in self.rope().items():
                self.shared[name] = b.op("Gather", [table, position])  # [T, D / 2]
            keys = b.op("Range", [b.constant(0), total, b.constant(1)])
            query = b.op("Unsqueeze", [position, b.constant([1])])
            self.shared["mask"] = b.op("LessOrEqual", [keys, query])  # [T, total]

    def rope(self) -> dict[str, str]:
        """The rotary tables of the whole context."""
        cos, sin = rope_tables(self.c)
        return {"cos": self.b.weight("rope.cos", lambda: cos), "sin": self.b.weight("rope.sin", lambda: sin)}

    def past(self, i: int) -> tuple[str, str]:
        """Past key and value of layer i, declared as inputs when first asked for."""
        for part in ("key", "value"):
            name = f"past.{i}.{part}"
            if name not in self.shared:
                dims: list[Any] = ["batch", self.c.kv_heads, "past", self.c.head_width]
                self.shared[name] = self.b.input(name, FLOAT, dims)
        return self.shared[f"past.{i}.key"], self.shared[f"past.{i}.value"]

    def make_norm(self, x: str, name: str) -> str:
        """RMSNorm: x / sqrt(mean(x^2) + eps) * weight."""
        b = self.b
        with b.scope(name.rsplit(".", 1)[-1]):
            mean = b.op("ReduceMean", [b.op("Mul", [x, x]), b.constant([-1])], keepdims=1)
            root = b.op("Sqrt", [b.op("Add", [mean, b.constant(self.c.rms_eps, np.float32)])])
            return b.op("Mul", [b.op("Div", [x, root]), self.tensor(f"{name}.weight")])

    def make_attention(self, q: str, k: str, v: str, i: int) -> str:
        """q [B, T, heads * D], k and v [B, T, kv_heads * D] -> [B, T, heads * D]; writes present KV."""
        b, c = self.b, self.c
        q = self._rotate(self._split_heads(q, c.heads))
        k = self._rotate(self._split_heads(k, c.kv_heads))
        v = self._split_heads(v, c.kv_heads)
        past_key, past_value = self.past(i)
        k = b.op("Concat", [past_key, k], axis=2)  # [B, kv_heads, total, D]
        v = b.op("Concat", [past_value, v], axis=2)
        for part, value in (("key", k), ("value", v)):
            b.output(value, f"present.{i}.{part}", FLOAT, ["batch", c.kv_heads, "total", c.head_width])
        groups = c.heads // c.kv_heads
        q = b.op("Reshape", [q, b.constant([0, c.kv_heads, groups, -1, c.head_width])])
        k, v = (b.op("Unsqueeze", [x, b.constant([2])]) for x in (k, v))  # one KV head serves its whole group
        kt = b.op("Transpose", [k], perm=[0, 1, 2, 4, 3])
        y = attention(b, q, kt, v, c.head_width**-0.5, self.shared["mask"])
        y = b.op("Reshape", [y, b.constant([0, c.heads, -1, c.head_width])])
        return reshape(b, b.op("Transpose", [y], perm=[0, 2, 1, 3]), [0, 0, c.heads * c.head_width])

    def _split_heads(self, x: str, heads: int) -> str:
        """[B, T, heads * D] -> [B, heads, T, D]."""
        x = reshape(self.b, x, [0, 0, heads, self.c.head_width])
        return self.b.op("Transpose", [x], perm=[0, 2, 1, 3])

    def _rotate(self, x: str) -> str:
        """Rotary position, rotate-half layout: (a, b) -> (a cos - b sin, b cos + a sin)."""
        op, cos, sin = self.b.op, self.shared["cos"], self.shared["sin"]
        lo, hi = op("Split", [x], axis=-1, num_outputs=2, outputs=2)
        new_lo = op("Sub", [op("Mul", [lo, cos]), op("Mul", [hi, sin])])
        new_hi = op("Add", [op("Mul", [hi, cos]), op("Mul", [lo, sin])])
        return op("Concat", [new_lo, new_hi], axis=-1)
