"""The slide encoder in torch: LongNetViT (SPEC 3) on the operators of wsi_rt.kernels, which are Triton on a GPU and
plain torch on the CPU."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from wsi_rt.kernels.dilated_attention import dilated_attention
from wsi_rt.kernels.pool_norm_pad import pool_norm_pad
from wsi_rt.kernels.slide_embed import slide_embed
from wsi_rt.runtime.engines.torch_layers import Layer, Layers
from wsi_rt.runtime.manifest import EngineManifest


class TorchSlideEncoder:
    """features f32 [tiles, in_width], positions i64 [tiles, 2] (col, row) -> `tokens` f32 [pooled, padded] and, when
    the norm is as wide as C, the heads `cls` and `mean` f32 [C].

    No CUDA graph: no two slides have the same number of tiles. Reading the positions waits for the GPU once a slide.
    """

    def __init__(self, manifest: EngineManifest, layers: Layers) -> None:
        c = self._c = manifest.config
        self.facts: dict[str, str] = {}
        self._device, self._dtype = layers.device, layers.dtype
        self._project = layers.linear("patch_embed.proj", bias=False)  # its bias is added with the positions
        self._bias, self._cls = layers.tensor("patch_embed.proj.bias"), layers.tensor("cls_token").flatten()
        self._layers = [LongNetLayer(c, layers, f"encoder.layers.{i}") for i in range(c["depth"])]
        self._last_norm = layers.norm("encoder.layer_norm", c["eps"])
        self._weight, self._offset = layers.tensor("norm.weight"), layers.tensor("norm.bias")

    def __call__(self, inputs: Mapping[str, Tensor], wanted: Collection[str]) -> dict[str, Tensor]:
        c = self._c
        x = self.hidden(inputs["features"], inputs["positions"])
        out = {}
        if "tokens" in wanted:
            pooling = (c["pool_eps"], c["pooled"], c["padded"])
            out["tokens"] = pool_norm_pad(x, self._weight, self._offset, *pooling, leading=1, dtype=torch.float32)
        if "cls" in wanted:
            out["cls"] = self._head(x[0].float())
        if "mean" in wanted:
            out["mean"] = self._head(x[1:].mean(dim=0, dtype=torch.float32))
        return out

    def hidden(self, features: Tensor, positions: Tensor) -> Tensor:
        """-> the encoder's output [tiles + 1, C], CLS first, in the engine's type."""
        features = features.to(self._device, self._dtype, non_blocking=True)
        positions = positions.to(self._device, non_blocking=True)
        x = slide_embed(self._project(features), positions, self._bias, self._cls)
        for layer in self._layers:
            x = layer(x)
        return self._last_norm(x)

    def _head(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape, self._weight.float(), self._offset.float(), self._c["pool_eps"])


class LongNetLayer:
    """x [L, C] -> the same: dilated attention, then the feed-forward part, each behind its norm and with another inside
    (sub-LayerNorm)."""

    def __init__(self, c: Mapping[str, Any], layers: Layers, name: str) -> None:
        self._c, eps, attn, ffn = c, c["eps"], f"{name}.self_attn", f"{name}.ffn"
        self._projections: list[Layer] = [layers.linear(f"{attn}.{n}_proj", bias=True) for n in "qkv"]
        self._out = layers.linear(f"{attn}.out_proj", bias=True)
        self._fc1, self._fc2 = (layers.linear(f"{ffn}.fc{i}", bias=True) for i in (1, 2))
        self._norm1, self._norm2 = (layers.norm(f"{name}.{n}_layer_norm", eps) for n in ("self_attn", "final"))
        self._inner1, self._inner2 = layers.norm(f"{attn}.inner_attn_ln", eps), layers.norm(f"{ffn}.ffn_layernorm", eps)

    def __call__(self, x: Tensor) -> Tensor:
        c, y = self._c, self._norm1(x)
        q, k, v = (project(y).unflatten(-1, (c["heads"], -1)) for project in self._projections)  # [L, H, D] each
        y = dilated_attention(q, k, v, c["segment_lengths"], c["dilated_ratios"])
        x = x + self._out(self._inner1(y.flatten(1)))
        return x + self._fc2(self._inner2(F.gelu(self._fc1(self._norm2(x)))))
