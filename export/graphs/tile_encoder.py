"""Tile encoder -> ONNX: uint8 tiles in, crop and normalisation inside, one feature row per tile out (SPEC 2)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from onnx import TensorProto

from wsi_rt.export.arch import ViTConfig
from wsi_rt.export.graphs.builder import GraphBuilder, WeightFile
from wsi_rt.export.graphs.layers import FLOAT, activation, attention, layer_norm, linear, reshape
from wsi_rt.export.sources.weights import WeightSource
from wsi_rt.runtime.types import TILE_PX


def build(c: ViTConfig, source: WeightSource, path: Path) -> None:
    """Writes `path` and its weights; input `tiles` u8 [batch, 256, 256, 3], output `features` f32 [batch, C]."""
    b = GraphBuilder("tile_encoder", WeightFile(path.with_name("weights.data")))
    tiles = b.input("tiles", TensorProto.UINT8, ["batch", TILE_PX, TILE_PX, 3])
    x = _embed(b, c, source, _preprocess(b, c, tiles))
    if c.pre_norm:
        x = layer_norm(b, source, x, "norm_pre", c.norm_eps)
    for i in range(c.depth):
        with b.scope(f"blocks.{i}"):
            x = _block(b, c, source, x, f"blocks.{i}")
    if not c.fc_norm:
        x = layer_norm(b, source, x, "norm", c.norm_eps)
    with b.scope("pool"):
        if c.pool == "token":
            x = b.op("Gather", [x, b.constant(0)], axis=1)
        else:
            patches = b.op("Slice", [x, b.constant([c.prefix_tokens]), b.constant([2**31]), b.constant([1])])
            x = b.op("ReduceMean", [patches, b.constant([1])], keepdims=0)
    if c.fc_norm:
        x = layer_norm(b, source, x, "fc_norm", c.norm_eps)
    b.output(x, "features", FLOAT, ["batch", c.width])
    b.save(path)


def _preprocess(b: GraphBuilder, c: ViTConfig, tiles: str) -> str:
    """u8 [B, S, S, 3] -> centre crop, /255, (x - mean) / std -> [B, 3, image_px, image_px]."""
    at = (TILE_PX - c.image_px) // 2
    with b.scope("preprocess"):
        x = b.op("Slice", [tiles, b.constant([at, at]), b.constant([at + c.image_px] * 2), b.constant([1, 2])])
        x = b.op("Cast", [b.op("Transpose", [x], perm=[0, 3, 1, 2])], to=FLOAT)
        x = b.op("Div", [x, b.constant(255.0, np.float32)])
        x = b.op("Sub", [x, b.weight("preprocess.mean", np.array(c.mean, np.float32).reshape(1, 3, 1, 1))])
        return b.op("Div", [x, b.weight("preprocess.std", np.array(c.std, np.float32).reshape(1, 3, 1, 1))])


def _embed(b: GraphBuilder, c: ViTConfig, source: WeightSource, x: str) -> str:
    """[B, 3, H, W] -> tokens [B, T, C] with class and register tokens in front and positions added."""
    with b.scope("embed"):
        name = "patch_embed.proj"
        weights = [b.weight(f"{name}.weight", source.get(f"{name}.weight"))]
        if c.patch_bias:
            weights.append(b.weight(f"{name}.bias", source.get(f"{name}.bias")))
        x = b.op("Conv", [x, *weights], kernel_shape=[c.patch_px] * 2, strides=[c.patch_px] * 2)
        x = b.op("Transpose", [reshape(b, x, [0, c.width, c.grid**2])], perm=[0, 2, 1])
        positions = b.weight("pos_embed", source.get("pos_embed"))
        if c.no_embed_class:
            x = b.op("Add", [x, positions])
        prefix = [_prefix_token(b, c, source, x, n) for n in ("cls_token", "reg_token") if n in c.tensors()]
        x = b.op("Concat", [*prefix, x], axis=1) if prefix else x
        return x if c.no_embed_class else b.op("Add", [x, positions])


def _prefix_token(b: GraphBuilder, c: ViTConfig, source: WeightSource, x: str, name: str) -> str:
    """[1, n, C] repeated over the batch of x."""
    array = source.get(name)
    batch = b.op("Shape", [x], start=0, end=1)
    dims = b.op("Concat", [batch, b.constant(list(array.shape[1:]))], axis=0)
    return b.op("Expand", [b.weight(name, array), dims])


def _block(b: GraphBuilder, c: ViTConfig, source: WeightSource, x: str, p: str) -> str:
    y = layer_norm(b, source, x, f"{p}.norm1", c.norm_eps)
    with b.scope("attn"):
        y = _scaled(b, c, source, _attention(b, c, source, y, f"{p}.attn"), f"{p}.ls1")
    x = b.op("Add", [x, y])
    y = layer_norm(b, source, x, f"{p}.norm2", c.norm_eps)
    with b.scope("mlp"):
        y = _scaled(b, c, source, _mlp(b, c, source, y, f"{p}.mlp"), f"{p}.ls2")
    return b.op("Add", [x, y])


def _scaled(b: GraphBuilder, c: ViTConfig, source: WeightSource, y: str, name: str) -> str:
    """LayerScale."""
    if not c.layer_scale:
        return y
    return b.op("Mul", [y, b.weight(f"{name}.gamma", source.get(f"{name}.gamma"))])


def _attention(b: GraphBuilder, c: ViTConfig, source: WeightSource, x: str, p: str) -> str:
    head = c.width // c.heads
    qkv = reshape(b, linear(b, source, x, f"{p}.qkv", c.qkv_bias), [0, 0, 3, c.heads, head])
    parts = b.op("Split", [b.op("Transpose", [qkv], perm=[2, 0, 3, 1, 4])], axis=0, num_outputs=3, outputs=3)
    q, k, v = (b.op("Squeeze", [part, b.constant([0])]) for part in parts)  # [B, H, T, D]
    if c.qk_norm:
        q = layer_norm(b, source, q, f"{p}.q_norm", c.norm_eps)
        k = layer_norm(b, source, k, f"{p}.k_norm", c.norm_eps)
    y = attention(b, q, b.op("Transpose", [k], perm=[0, 1, 3, 2]), v, head**-0.5)
    y = reshape(b, b.op("Transpose", [y], perm=[0, 2, 1, 3]), [0, 0, c.width])
    return linear(b, source, y, f"{p}.proj", c.proj_bias)


def _mlp(b: GraphBuilder, c: ViTConfig, source: WeightSource, x: str, p: str) -> str:
    if c.mlp == "mlp":
        y = activation(b, linear(b, source, x, f"{p}.fc1", c.proj_bias), c.act)
    else:
        if c.mlp == "swiglu":
            gate = linear(b, source, x, f"{p}.fc1_g", c.proj_bias)
            value = linear(b, source, x, f"{p}.fc1_x", c.proj_bias)
        else:
            packed = linear(b, source, x, f"{p}.fc1", c.proj_bias)
            gate, value = b.op("Split", [packed], axis=-1, num_outputs=2, outputs=2)
        y = b.op("Mul", [activation(b, gate, c.act), value])
    return linear(b, source, y, f"{p}.fc2", c.proj_bias)
