"""The tile encoder in torch: a timm VisionTransformer (SPEC 2) as the manifest's configuration says, crop and
normalisation inside."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from wsi_rt.kernels.swiglu import swiglu
from wsi_rt.kernels.tile_normalize import tile_normalize
from wsi_rt.runtime.engines.torch_attention import Attention, choose_attention
from wsi_rt.runtime.engines.torch_graphs import GraphedCall, doubling
from wsi_rt.runtime.engines.torch_layers import ACTIVATIONS, Layer, Layers
from wsi_rt.runtime.manifest import EngineManifest
from wsi_rt.runtime.types import TILE_PX


class TorchTileEncoder:
    """tiles u8 [batch, 256, 256, 3] RGB -> features f32 [batch, C]; or from tiles that are normalised already.

    On a GPU one CUDA graph for each bucket of tiles (1, 2, 4, ... up to the most of the profile), captured when a batch
    first needs it.
    """

    def __init__(self, manifest: EngineManifest, layers: Layers) -> None:
        c, buckets = manifest.config, doubling(manifest.profile["batch"][2])
        vit, self._layers, self._image_px = ViT(c, layers), layers, c["image_px"]
        self._normalise = partial(tile_normalize, mean=c["mean"], std=c["std"], crop=self._image_px, resize=TILE_PX)
        graphs = f"CUDA graphs of {buckets[0]} to {buckets[-1]} tiles" if layers.device.type == "cuda" else "no graphs"
        self.facts = {"attention": vit.attention, "tiles": graphs}
        self._call = GraphedCall(vit, buckets, layers.device, {"pixels": 0})

    def __call__(self, inputs: Mapping[str, Tensor], wanted: Collection[str]) -> dict[str, Tensor]:
        tiles = inputs["tiles"].to(self._layers.device, non_blocking=True)
        return {"features": self.features(self._normalise(tiles, dtype=self._layers.dtype))}

    def features(self, pixels: Tensor) -> Tensor:
        """[b, 3, image_px, image_px] on the device, normalised, in the engine's type -> f32 [b, C] there."""
        return self._call(pixels=pixels)

    def prepare(self, counts: Sequence[int]) -> None:
        """Captures the graphs for so many tiles."""
        shape = (1, 3, self._image_px, self._image_px)
        self._call.prepare(counts, pixels=torch.zeros(shape, device=self._layers.device, dtype=self._layers.dtype))


class ViT:
    """pixels [B, 3, image_px, image_px], normalised -> f32 [B, C], in one pass that waits for nothing on the host."""

    def __init__(self, config: Mapping[str, Any], layers: Layers) -> None:
        c = self._c = config
        self._grid = c["image_px"] // c["patch_px"]
        # One product, not a convolution: cuDNN rounds fp32 to TF32 by default.
        self._patches = layers.tensor("patch_embed.proj.weight").flatten(1)  # [C, 3 * patch_px ** 2]
        self._patch_bias = layers.tensor("patch_embed.proj.bias") if c["patch_bias"] else None
        self._prefix, self._positions = self._embeddings(layers)
        self._norm_pre = layers.norm("norm_pre", c["norm_eps"]) if c["pre_norm"] else _same
        self.attention, attend = choose_attention(layers.device, layers.dtype)
        self._blocks = [Block(c, layers, f"blocks.{i}", attend) for i in range(c["depth"])]
        self._norm = layers.norm("fc_norm" if c["fc_norm"] else "norm", c["norm_eps"])

    def __call__(self, pixels: Tensor) -> Tensor:
        c = self._c
        x = torch.nn.functional.linear(self._cut(pixels), self._patches, self._patch_bias) + self._positions
        x = self._norm_pre(torch.cat([self._prefix.expand(len(x), -1, -1), x], dim=1))  # [B, T, C]
        for block in self._blocks:
            x = block(x)
        if not c["fc_norm"]:
            x = self._norm(x[:, :1] if c["pool"] == "token" else x)
        x = x[:, 0] if c["pool"] == "token" else x[:, self._prefix.shape[1] :].mean(dim=1)
        return (self._norm(x) if c["fc_norm"] else x).float()

    def _cut(self, x: Tensor) -> Tensor:
        """[B, 3, image_px, image_px] -> patches in row-major order [B, grid ** 2, 3 * patch_px ** 2]; what is left over
        at the right and the bottom is cut off, as a convolution does."""
        g, p = self._grid, self._c["patch_px"]
        x = x[:, :, : g * p, : g * p].unflatten(3, (g, p)).unflatten(2, (g, p))  # [B, 3, g, p, g, p]
        return x.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)

    def _embeddings(self, layers: Layers) -> tuple[Tensor, Tensor]:
        """What goes in front of the patches, class and register tokens [1, P, C], and what is added to the patches
        [1, grid ** 2, C]."""
        c = self._c
        names = [name for name, there in (("cls_token", c["class_token"]), ("reg_token", c["reg_tokens"])) if there]
        positions = layers.tensor("pos_embed")
        prefix = torch.cat([layers.tensor(name) for name in names], dim=1) if names else positions[:, :0]
        if c["no_embed_class"]:
            return prefix, positions
        return prefix + positions[:, : prefix.shape[1]], positions[:, prefix.shape[1] :]


class Block:
    """x [B, T, C] -> the same: attention, then the MLP, each behind its norm and scaled (LayerScale) where told."""

    def __init__(self, c: Mapping[str, Any], layers: Layers, name: str, attend: Attention) -> None:
        self._heads, self._attend, eps = c["heads"], attend, c["norm_eps"]
        self._norm1, self._norm2 = (layers.norm(f"{name}.norm{i}", eps) for i in (1, 2))
        self._qkv = layers.linear(f"{name}.attn.qkv", c["qkv_bias"])
        self._head_norms = [layers.norm(f"{name}.attn.{n}_norm", eps) for n in "qk"] if c["qk_norm"] else [_same] * 2
        self._proj = layers.linear(f"{name}.attn.proj", c["proj_bias"])
        self._mlp = _mlp(c, layers, f"{name}.mlp")
        self._scales = [layers.tensor(f"{name}.ls{i}.gamma") for i in (1, 2)] if c["layer_scale"] else None

    def __call__(self, x: Tensor) -> Tensor:
        x = x + self._scaled(0, self._attention(self._norm1(x)))
        return x + self._scaled(1, self._mlp(self._norm2(x)))

    def _attention(self, x: Tensor) -> Tensor:
        q, k, v = self._qkv(x).unflatten(-1, (3, self._heads, -1)).unbind(2)  # [B, T, H, D] each
        q, k = (norm(part) for norm, part in zip(self._head_norms, (q, k), strict=True))
        return self._proj(self._attend(q, k, v).flatten(2))

    def _scaled(self, i: int, y: Tensor) -> Tensor:
        return y if self._scales is None else y * self._scales[i]


def _mlp(c: Mapping[str, Any], layers: Layers, name: str) -> Layer:
    act, bias = ACTIVATIONS[c["act"]], c["proj_bias"]
    last = layers.linear(f"{name}.fc2", bias)
    if c["mlp"] == "mlp":
        first = layers.linear(f"{name}.fc1", bias)
        return lambda x: last(act(first(x)))
    if c["mlp"] == "swiglu":
        gate, value = (layers.linear(f"{name}.fc1_{n}", bias) for n in "gx")
        return lambda x: last(act(gate(x)) * value(x))
    packed = layers.linear(f"{name}.fc1", bias)  # gate | value
    gated = _silu_gated if c["act"] == "silu" else partial(_gated, act)
    return lambda x: last(gated(packed(x)))


def _silu_gated(x: Tensor) -> Tensor:
    """[B, T, 2F] -> [B, T, F], one kernel on a GPU."""
    return swiglu(x.flatten(0, 1)).unflatten(0, x.shape[:2])


def _gated(act: Layer, x: Tensor) -> Tensor:
    gate, value = x.chunk(2, dim=-1)
    return act(gate) * value


def _same(x: Tensor) -> Tensor:
    return x
