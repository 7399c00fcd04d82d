"""ONNX's Attention (opset 23): TensorRT and TensorRT-RTX make one fused kernel of it, without a matrix of scores."""

from __future__ import annotations

from wsi_rt.export.graphs.builder import GraphBuilder


def fused_attention(b: GraphBuilder, q: str, k: str, v: str, scale: float, mask: str | None = None) -> str:
    """q [B, H, M, D], k, v [B, H / groups, N, D] -> [B, H, M, D]. mask: boolean, broadcast to [B, H, M, N], true where
    attention is allowed. All of one type; softmax and sums are fp32 inside."""
    return str(b.op("Attention", [q, k, v, *([mask] if mask is not None else [])], scale=scale))
