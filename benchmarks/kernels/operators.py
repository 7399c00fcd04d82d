"""Inputs, exact answers and providers of every operator, at the published sizes. Needs torch.

Those of the language model are in `decoding.py`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from wsi_rt.benchmarks.kernels.branches import attend_per_branch, flash_attn, torch_sdpa
from wsi_rt.benchmarks.kernels.decoding import ADD_NORM, GATE, LINEAR, ROTATE, SHARED_PREFIX
from wsi_rt.benchmarks.kernels.operator import Inputs, Operator, Run, random_tensors
from wsi_rt.kernels.dilated_attention import dilated_attention
from wsi_rt.kernels.dilated_attention.cost import DILATED_RATIOS, HEAD_WIDTH, HEADS, SEGMENT_LENGTHS
from wsi_rt.kernels.dilated_attention.reference import dilated_attention_reference
from wsi_rt.kernels.pool_norm_pad import pool_norm_pad
from wsi_rt.kernels.pool_norm_pad.cost import CHANNELS, PADDED, POOLED
from wsi_rt.kernels.pool_norm_pad.reference import pool_norm_pad_reference
from wsi_rt.kernels.slide_embed import GRID, slide_embed
from wsi_rt.kernels.slide_embed.reference import position_embedding, slide_embed_reference
from wsi_rt.kernels.tile_normalize import tile_normalize
from wsi_rt.kernels.tile_normalize.reference import tile_normalize_reference

BRANCHES = (SEGMENT_LENGTHS, DILATED_RATIOS)
NORM_EPS = 1e-6
MEAN, STD, CROP = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 224

# --- dilated attention: one slide of tiles + 1 tokens, q, k, v views of one projection


def _attention_inputs(tiles: int, dtype: torch.dtype, device: torch.device) -> Inputs:
    qkv = random_tensors({"qkv": (tiles + 1, 3, HEADS, HEAD_WIDTH)}, dtype, device)["qkv"]
    return dict(zip("qkv", qkv.unbind(1), strict=True))


def _flash_attention(x: Inputs) -> Run:
    attend = flash_attn()
    return lambda: attend_per_branch(x["q"], x["k"], x["v"], *BRANCHES, attend)


ATTENTION = Operator(
    inputs=_attention_inputs,
    exact=lambda x: attend_per_branch(x["q"].float(), x["k"].float(), x["v"].float(), *BRANCHES, torch_sdpa),
    scale=lambda x: x["v"].abs().max().item(),
    providers={
        "wsi-rt": lambda x: lambda: dilated_attention(x["q"], x["k"], x["v"], *BRANCHES),
        "flash-attn": _flash_attention,
        "torch-sdpa": lambda x: lambda: attend_per_branch(x["q"], x["k"], x["v"], *BRANCHES, torch_sdpa),
        "reference": lambda x: lambda: dilated_attention_reference(x["q"], x["k"], x["v"], *BRANCHES).to(x["q"].dtype),
    },
    eager="torch-sdpa",
)

# --- pooling: norm then pad


def _pool_inputs(tiles: int, dtype: torch.dtype, device: torch.device) -> Inputs:
    return random_tensors({"tokens": (tiles, CHANNELS), "weight": (CHANNELS,), "bias": (CHANNELS,)}, dtype, device)


def _pool_reference(x: Inputs) -> Tensor:
    return pool_norm_pad_reference(x["tokens"], x["weight"], x["bias"], NORM_EPS, POOLED, PADDED)


POOL = Operator(
    inputs=_pool_inputs,
    exact=_pool_reference,
    scale=lambda x: _pool_reference(x).abs().max().item(),
    providers={
        "wsi-rt": lambda x: lambda: pool_norm_pad(x["tokens"], x["weight"], x["bias"], NORM_EPS, POOLED, PADDED),
        "reference": lambda x: lambda: _pool_reference(x).to(x["tokens"].dtype),
    },
    eager="reference",
)

# --- positions: tiles on a square grid


def _embed_inputs(tiles: int, dtype: torch.dtype, device: torch.device) -> Inputs:
    index = torch.arange(tiles)
    side = math.isqrt(tiles - 1) + 1
    positions = torch.stack([index % side, index // side], dim=1)
    shapes: dict[str, tuple[int, ...]] = {
        "projected": (tiles, CHANNELS), "bias": (CHANNELS,), "cls_token": (CHANNELS,),
    }  # fmt: skip
    return {**random_tensors(shapes, dtype, device), "positions": positions.to(device)}


def _embed_exact(x: Inputs) -> Tensor:
    """On the CPU, where the reference's float64 angles are."""
    device = x["projected"].device
    exact = slide_embed_reference(*(x[n].cpu() for n in ("projected", "positions", "bias", "cls_token")))
    return exact.to(device)


def _embed_by_table(x: Inputs) -> Run:
    """The published way: rows of a table, which holds here what the slide's grid reaches (0.7 GB at 50,000 tiles)."""
    projected, positions = x["projected"], x["positions"]
    indices = positions[:, 0] * GRID + positions[:, 1] + 1
    used = torch.arange(int(indices.max()))
    rows = position_embedding(torch.stack([used // GRID, used % GRID], dim=1), CHANNELS)
    table = torch.cat([torch.zeros(1, CHANNELS), rows]).to(projected.device, projected.dtype)

    def run() -> Tensor:
        tiles = projected + x["bias"] + table[positions[:, 0] * GRID + positions[:, 1] + 1]
        return torch.cat([x["cls_token"][None] + table[:1], tiles])

    return run


EMBED = Operator(
    inputs=_embed_inputs,
    exact=_embed_exact,
    scale=lambda x: _embed_exact(x).abs().max().item(),
    providers={
        "wsi-rt": lambda x: lambda: slide_embed(x["projected"], x["positions"], x["bias"], x["cls_token"]),
        "reference": _embed_by_table,
    },
    eager="reference",
)

# --- tiles as a decoder gives them


def _tile_inputs(tiles: int, dtype: torch.dtype, device: torch.device) -> Inputs:
    generator = torch.Generator().manual_seed(tiles)
    pixels = torch.randint(0, 256, (tiles, 256, 256, 3), dtype=torch.uint8, generator=generator)
    return {"tiles": pixels.to(device), "like": torch.empty(0, dtype=dtype)}


def _tile_reference(x: Inputs) -> Tensor:
    return tile_normalize_reference(x["tiles"], MEAN, STD, CROP)


NORMALIZE = Operator(
    inputs=_tile_inputs,
    exact=_tile_reference,
    scale=lambda x: max(max(m, 1 - m) / s for m, s in zip(MEAN, STD, strict=True)),
    providers={
        "wsi-rt": lambda x: lambda: tile_normalize(x["tiles"], MEAN, STD, CROP, dtype=x["like"].dtype),
        "reference": lambda x: lambda: _tile_reference(x).to(x["like"].dtype),
    },
    eager="reference",
)

OPERATORS = {
    "block_linear": LINEAR,
    "dilated_attention": ATTENTION,
    "pool_norm_pad": POOL,
    "rms_norm": ADD_NORM,
    "rope_kv_write": ROTATE,
    "shared_prefix_attention": SHARED_PREFIX,
    "slide_embed": EMBED,
    "swiglu": GATE,
    "tile_normalize": NORMALIZE,
}
