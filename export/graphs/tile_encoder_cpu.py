"""Tile encoder for onnxruntime on the CPU: its fused attention and gate.

Whatever a tile's neighbours, it gives the same bits: attention works head by head on blocks whose size is the CPU's,
layer norms and products row by row (a product of integers is exact; one in fp32 is the same for any number of rows but
one, and a tile has more).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from wsi_rt.export.arch import ViTConfig
from wsi_rt.export.graphs.builder import ORT_DOMAIN, WeightFile
from wsi_rt.export.graphs.layers import Style, reshape
from wsi_rt.export.graphs.tile_encoder import TileEncoderGraph
from wsi_rt.export.sources.weights import WeightSource


def build(c: ViTConfig, source: WeightSource, weights: WeightFile, path: Path, style: Style) -> None:
    """As `tile_encoder.build`."""
    OrtCpuTileEncoderGraph(c, source, weights, style).build(path)


class OrtCpuTileEncoderGraph(TileEncoderGraph):
    def _attention(self, x: str, p: str) -> str:
        """MultiHeadAttention takes [B, T, C] as the products leave it and holds no scores [T, T]."""
        b, c = self.b, self.c
        qkv = self.make_linear(x, f"{p}.qkv", c.qkv_bias)
        q, k, v = b.op("Split", [qkv], axis=-1, num_outputs=3, outputs=3)  # [B, T, C] each
        if c.qk_norm:
            q, k = self._head_norm(q, f"{p}.q_norm"), self._head_norm(k, f"{p}.k_norm")
        scale = (c.width // c.heads) ** -0.5
        y = b.op("MultiHeadAttention", [q, k, v], domain=ORT_DOMAIN, num_heads=c.heads, scale=scale)
        return self.make_linear(y, f"{p}.proj", c.proj_bias)

    def _head_norm(self, x: str, name: str) -> str:
        b, c = self.b, self.c
        heads = reshape(b, x, [0, 0, c.heads, c.width // c.heads])
        return reshape(b, self.make_layer_norm(heads, name, c.norm_eps), [0, 0, c.width])

    def _mean(self, patches: str) -> str:
        """A product with two rows of 1/P: ReduceMean over this axis adds in an order that depends on the batch."""
        b, count = self.b, self.c.grid**2
        shares = b.weight(f"mean.{count}", lambda: np.full((2, count), 1 / count, np.float32))
        return str(b.op("Gather", [b.op("MatMul", [shares, patches]), b.constant(0)], axis=1))

    def _activation(self, x: str) -> str:
        """x sigmoid(alpha x) in one pass."""
        alpha = {"silu": 1.0, "quick_gelu": 1.702}.get(self.c.act)
        if alpha is None:
            return super()._activation(x)
        return str(self.b.op("QuickGelu", [x], domain=ORT_DOMAIN, alpha=alpha))
