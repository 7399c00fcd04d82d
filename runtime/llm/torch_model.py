"""A Llama's layers in torch on our operators: fused kernels on a GPU, plain torch on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from wsi_rt.kernels.rms_norm import add_rms_norm, rms_norm
from wsi_rt.kernels.rope_kv_write import rope_kv_write
from wsi_rt.kernels.swiglu import swiglu
from wsi_rt.runtime.llm.torch_pages import PagePool
from wsi_rt.runtime.llm.torch_weights import Linear, StoredTensors, joined

# (layer, q [rows, heads, D] rotated; the rows' own keys and values are in the pool) -> [rows, heads, D]
Attend = Callable[[int, Tensor], Tensor]


class TorchLlama:
    """SPEC 5: RMSNorm, rotate-half positions, grouped KV heads, SiLU-gated MLP.

    Activations are of `dtype`, but the sum that runs through the layers is fp32, as is all arithmetic within an
    operator. q, k and v are one matrix, as are gate and up, where they are stored alike.
    """

    def __init__(self, c: Mapping[str, Any], tensors: StoredTensors, dtype: torch.dtype, device: torch.device) -> None:
        self._eps, self._vocab, self._dtype = c["rms_eps"], c["vocab"], dtype
        self._heads = (c["heads"], c["kv_heads"], c["kv_heads"])
        self._widths = [n * c["head_width"] for n in self._heads]
        self._cos, self._sin = (tensors.floats(f"rope.{x}").to(device) for x in ("cos", "sin"))  # f32 [context, D / 2]
        weights = Weights(tensors, dtype, device)
        self._layers = [LlamaLayer(weights, f"model.layers.{i}") for i in range(c["layers"])]
        self._last_norm, self._head = weights.norm("model.norm"), weights.linear("lm_head")

    def __call__(
        self, x: Tensor, positions: Tensor, slots: Tensor, pool: PagePool, attend: Attend, wanted: Tensor | None = None
    ) -> Tensor:
        """x: f32 [rows, hidden], at positions [rows] int64 of their sequences; their keys and values are written to the
        flat slots [rows] int64 of the pool, nothing for -1. wanted: the rows whose logits are, int64 (None: all).
        -> f32 [wanted rows, vocab]."""
        h = rms_norm(x, self._layers[0].norm, self._eps).to(self._dtype)
        for i, layer in enumerate(self._layers):
            parts = layer.qkv(h).split(self._widths, dim=-1)
            q, k, v = (part.unflatten(-1, (n, -1)) for part, n in zip(parts, self._heads, strict=True))
            q = rope_kv_write(q, k, v, self._cos, self._sin, positions, slots, *pool.layer(i))
            h, x = add_rms_norm(layer.o(attend(i, q).flatten(1)), x, layer.mlp_norm, self._eps)
            h = layer.down(swiglu(layer.gate_up(h)))
            if i + 1 < len(self._layers):
                h, x = add_rms_norm(h, x, self._layers[i + 1].norm, self._eps)
        if wanted is not None:
            h, x = h[wanted], x[wanted]
        if not len(h):
            return h.new_empty((0, self._vocab), dtype=torch.float32)
        h, _ = add_rms_norm(h, x, self._last_norm, self._eps)
        return self._head(h).float()


class LlamaLayer:
    """The weights of one layer."""

    def __init__(self, weights: Weights, name: str) -> None:
        self.norm, self.mlp_norm = (
            weights.norm(f"{name}.{n}") for n in ("input_layernorm", "post_attention_layernorm")
        )
        self.qkv = joined(weights.linear(f"{name}.self_attn.{n}_proj") for n in "qkv")
        self.gate_up = joined(weights.linear(f"{name}.mlp.{n}_proj") for n in ("gate", "up"))
        self.o, self.down = weights.linear(f"{name}.self_attn.o_proj"), weights.linear(f"{name}.mlp.down_proj")


class Weights:
    """A bundle's tensors where they are to run, and in that type."""

    def __init__(self, tensors: StoredTensors, dtype: torch.dtype, device: torch.device) -> None:
        self._tensors, self._dtype, self._device = tensors, dtype, device

    def norm(self, name: str) -> Tensor:
        return self._tensors.floats(f"{name}.weight").to(self._device, self._dtype)

    def linear(self, name: str) -> Linear:
        return self._tensors.linear(name).to(self._device, self._dtype)
