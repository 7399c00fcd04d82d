"""Tile encoder for TensorRT and TensorRT-RTX: as the portable graph, with fused attention."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from wsi_rt.export.arch import ViTConfig
from wsi_rt.export.graphs.attention_rtx import fused_attention
from wsi_rt.export.graphs.builder import WeightFile
from wsi_rt.export.graphs.layers import FLOAT, Style, reshape
from wsi_rt.export.graphs.tile_encoder import TileEncoderGraph
from wsi_rt.export.sources.weights import WeightSource
from wsi_rt.runtime.types import TILE_PX


def build(c: ViTConfig, source: WeightSource, weights: WeightFile, path: Path, style: Style) -> None:
    """As `tile_encoder.build`."""
    TensorRtTileEncoderGraph(c, source, weights, style).build(path)


class TensorRtTileEncoderGraph(TileEncoderGraph):
    def _preprocess(self, tiles: str) -> str:
        """As the portable one, but bytes become numbers first: TensorRT takes bytes as an input of Cast alone."""
        b, c = self.b, self.c
        at = (TILE_PX - c.image_px) // 2
        with b.scope("preprocess"):
            x = b.op("Cast", [tiles], to=FLOAT)
            x = b.op("Slice", [x, b.constant([at, at]), b.constant([at + c.image_px] * 2), b.constant([1, 2])])
            x = b.op("Div", [b.op("Transpose", [x], perm=[0, 3, 1, 2]), b.constant(255.0, np.float32)])
            mean, std = (np.array(x, np.float32).reshape(1, 3, 1, 1) for x in (c.mean, c.std))
            x = b.op("Sub", [x, b.weight("preprocess.mean", lambda: mean)])
            return str(b.op("Div", [x, b.weight("preprocess.std", lambda: std)]))

    def _heads(self, qkv: str) -> list[str]:
        b, c = self.b, self.c
        return [
            b.op("Transpose", [reshape(b, part, [0, 0, c.heads, c.width // c.heads])], perm=[0, 2, 1, 3])
            for part in b.op("Split", [qkv], axis=-1, num_outputs=3, outputs=3)
        ]

    def _attend(self, q: str, k: str, v: str, scale: float) -> str:
        return fused_attention(self.b, q, k, v, scale)
