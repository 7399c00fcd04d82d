"""Tile encoder -> ONNX: uint8 tiles in, crop and normalisation inside, one feature row per tile out (SPEC 2)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from onnx import TensorProto

from wsi_rt.export.arch import ViTConfig
from wsi_rt.export.graphs.builder import WeightFile
from wsi_rt.export.graphs.layers import FLOAT, Graph, Style, activation, attention, reshape
from wsi_rt.export.sources.weights import WeightSource
from wsi_rt.runtime.types import TILE_PX


def build(c: ViTConfig, source: WeightSource, weights: WeightFile, path: Path, style: Style) -> None:
    """Writes `path`; input `tiles` u8 [batch, 256, 256, 3], output `features` f32 [batch, C]."""
    TileEncoderGraph(c, source, weights, style).build(path)


class TileEncoderGraph(Graph):
    def __init__(self, c: ViTConfig, source: WeightSource, weights: WeightFile, style: Style) -> None:
        super().__init__("tile_encoder", source, weights, style)
        self.c = c

    def build(self, path: Path) -> None:
        b, c = self.b, self.c
        tiles = b.input("tiles", TensorProto.UINT8, ["batch", TILE_PX, TILE_PX, 3])
        x = self._embed(self._preprocess(tiles))
        if c.pre_norm:
            x = self.make_layer_norm(x, "norm_pre", c.norm_eps)
        tokens: list[int | str] = ["batch", c.prefix_tokens + c.grid**2, c.width]
        self.layer_boundary(x, tokens)
        for i in range(c.depth):
            with b.scope(f"blocks.{i}"):
                x = self._block(x, f"blocks.{i}")
            self.layer_boundary(x, tokens)
        if not c.fc_norm:
            x = self.make_layer_norm(x, "norm", c.norm_eps)
        with b.scope("pool"):
            if c.pool == "token":
                x = b.op("Gather", [x, b.constant(0)], axis=1)
            else:
                patches = b.op("Slice", [x, b.constant([c.prefix_tokens]), b.constant([2**31]), b.constant([1])])
                x = self._mean(patches)
        if c.fc_norm:
            x = self.make_layer_norm(x, "fc_norm", c.norm_eps)
        b.output(x, "features", FLOAT, ["batch", c.width])
        b.save(path)

    def _mean(self, patches: str) -> str:
        """[B, P, C] -> [B, C]."""
        return str(self.b.op("ReduceMean", [patches, self.b.constant([1])], keepdims=0))

    def _preprocess(self, tiles: str) -> str:
        """u8 [B, S, S, 3] -> centre crop, /255, (x - mean) / std -> [B, 3, image_px, image_px]."""
        b, c = self.b, self.c
        at = (TILE_PX - c.image_px) // 2
        with b.scope("preprocess"):
            x = b.op("Slice", [tiles, b.constant([at, at]), b.constant([at + c.image_px] * 2), b.constant([1, 2])])
            x = b.op("Cast", [b.op("Transpose", [x], perm=[0, 3, 1, 2])], to=FLOAT)
            x = b.op("Div", [x, b.constant(255.0, np.float32)])
            mean, std = (np.array(x, np.float32).reshape(1, 3, 1, 1) for x in (c.mean, c.std))
            x = b.op("Sub", [x, b.weight("preprocess.mean", lambda: mean)])
            return b.op("Div", [x, b.weight("preprocess.std", lambda: std)])

    def _embed(self, x: str) -> str:
        """[B, 3, H, W] -> tokens [B, T, C] with class and register tokens in front and positions added."""
        b, c = self.b, self.c
        with b.scope("embed"):
            name = "patch_embed.proj"
            weights = [self.tensor(f"{name}.weight")]
            if c.patch_bias:
                weights.append(self.tensor(f"{name}.bias"))
            x = b.op("Conv", [x, *weights], kernel_shape=[c.patch_px] * 2, strides=[c.patch_px] * 2)
            x = b.op("Transpose", [reshape(b, x, [0, c.width, c.grid**2])], perm=[0, 2, 1])
            positions = self.tensor("pos_embed")
            if c.no_embed_class:
                x = b.op("Add", [x, positions])
            prefix = [self._prefix_token(x, n) for n in ("cls_token", "reg_token") if n in c.tensors()]
            x = b.op("Concat", [*prefix, x], axis=1) if prefix else x
            return x if c.no_embed_class else b.op("Add", [x, positions])

    def _prefix_token(self, x: str, name: str) -> str:
        """[1, n, C] repeated over the batch of x."""
        b, c = self.b, self.c
        batch = b.op("Shape", [x], start=0, end=1)
        dims = b.op("Concat", [batch, b.constant(list(c.tensors()[name][1:]))], axis=0)
        return b.op("Expand", [self.tensor(name), dims])

    def _block(self, x: str, p: str) -> str:
        b, c = self.b, self.c
        y = self.make_layer_norm(x, f"{p}.norm1", c.norm_eps)
        with b.scope("attn"):
            y = self._scaled(self._attention(y, f"{p}.attn"), f"{p}.ls1")
        x = b.op("Add", [x, y])
        y = self.make_layer_norm(x, f"{p}.norm2", c.norm_eps)
        with b.scope("mlp"):
            y = self._scaled(self._mlp(y, f"{p}.mlp"), f"{p}.ls2")
        return b.op("Add", [x, y])

    def _scaled(self, y: str, name: str) -> str:
        """LayerScale."""
        b, c = self.b, self.c
        if not c.layer_scale:
            return y
        return b.op("Mul", [y, self.tensor(f"{name}.gamma")])

    def _attention(self, x: str, p: str) -> str:
        b, c = self.b, self.c
        q, k, v = self._heads(self.make_linear(x, f"{p}.qkv", c.qkv_bias))
        if c.qk_norm:
            q = self.make_layer_norm(q, f"{p}.q_norm", c.norm_eps)
            k = self.make_layer_norm(k, f"{p}.k_norm", c.norm_eps)
        y = self._attend(q, k, v, (c.width // c.heads) ** -0.5)
        y = reshape(b, b.op("Transpose", [y], perm=[0, 2, 1, 3]), [0, 0, c.width])
        return self.make_linear(y, f"{p}.proj", c.proj_bias)

    def _heads(self, qkv: str) -> list[str]:
        """[B, T, 3 * C] -> queries, keys and values [B, H, T, D]."""
        b, c = self.b, self.c
        qkv = reshape(b, qkv, [0, 0, 3, c.heads, c.width // c.heads])
        parts = b.op("Split", [b.op("Transpose", [qkv], perm=[2, 0, 3, 1, 4])], axis=0, num_outputs=3, outputs=3)
        return [b.op("Squeeze", [part, b.constant([0])]) for part in parts]

    def _attend(self, q: str, k: str, v: str, scale: float) -> str:
        """[B, H, T, D] each -> [B, H, T, D]."""
        return attention(self.b, q, self.b.op("Transpose", [k], perm=[0, 1, 3, 2]), v, scale)

    def _activation(self, x: str) -> str:
        return activation(self.b, x, self.c.act)

    def _mlp(self, x: str, p: str) -> str:
        b, c = self.b, self.c
        if c.mlp == "mlp":
            y = self._activation(self.make_linear(x, f"{p}.fc1", c.proj_bias))
        else:
            if c.mlp == "swiglu":
                gate = self.make_linear(x, f"{p}.fc1_g", c.proj_bias)
                value = self.make_linear(x, f"{p}.fc1_x", c.proj_bias)
            else:
                packed = self.make_linear(x, f"{p}.fc1", c.proj_bias)
                gate, value = b.op("Split", [packed], axis=-1, num_outputs=2, outputs=2)
            y = b.op("Mul", [self._activation(gate), value])
        return self.make_linear(y, f"{p}.fc2", c.proj_bias)
