"""Slide encoder in fp32 torch: LongNetViT under the published key names (SPEC 3)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wsi_rt.export.arch import LongNetConfig
from wsi_rt.kernels.dilated_attention import dilated_attention
from wsi_rt.kernels.pool_norm_pad import pool_norm_pad
from wsi_rt.kernels.slide_embed import slide_embed


class SelfAttention(nn.Module):
    def __init__(self, c: LongNetConfig) -> None:
        super().__init__()
        self.config = c
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(c.width, c.width) for _ in range(4))
        self.inner_attn_ln = nn.LayerNorm(c.width, eps=c.eps)

    def forward(self, x: Tensor) -> Tensor:
        c = self.config
        q, k, v = (p(x).unflatten(-1, (c.heads, -1)) for p in (self.q_proj, self.k_proj, self.v_proj))  # [L, H, D]
        x = dilated_attention(q, k, v, c.segment_lengths, c.dilated_ratios)
        return self.out_proj(self.inner_attn_ln(x.flatten(1)))


class FeedForward(nn.Module):
    def __init__(self, c: LongNetConfig) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(c.width, c.ffn), nn.Linear(c.ffn, c.width)
        self.ffn_layernorm = nn.LayerNorm(c.ffn, eps=c.eps)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.ffn_layernorm(F.gelu(self.fc1(x))))


class Layer(nn.Module):
    def __init__(self, c: LongNetConfig) -> None:
        super().__init__()
        self.self_attn, self.ffn = SelfAttention(c), FeedForward(c)
        self.self_attn_layer_norm, self.final_layer_norm = (nn.LayerNorm(c.width, eps=c.eps) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.self_attn_layer_norm(x))
        return x + self.ffn(self.final_layer_norm(x))


class SlideEncoder(nn.Module):
    """features [N, in_width] fp32, positions [N, 2] int64 (col, row) -> a dict of fp32 tensors:

    encoder_out [N + 1, C]; tokens [576, padded]; and, when the norm is as wide as C, the heads
    cls [C] and mean [C].
    """

    def __init__(self, c: LongNetConfig) -> None:
        super().__init__()
        self.config = c
        self.cls_token = nn.Parameter(torch.empty(1, 1, c.width))
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Linear(c.in_width, c.width)
        self.encoder = nn.Module()
        self.encoder.layers = nn.ModuleList(Layer(c) for _ in range(c.depth))
        self.encoder.layer_norm = nn.LayerNorm(c.width, eps=c.eps)
        self.norm = nn.LayerNorm(c.norm_width, eps=c.pool_eps)

    def forward(self, features: Tensor, positions: Tensor) -> dict[str, Tensor]:
        c, proj = self.config, self.patch_embed.proj
        x = slide_embed(features @ proj.weight.T, positions, proj.bias, self.cls_token.flatten())
        for layer in self.encoder.layers:
            x = layer(x)
        x = self.encoder.layer_norm(x)
        tokens = pool_norm_pad(x[1:], self.norm.weight, self.norm.bias, c.pool_eps, c.pooled, c.padded)
        out = {"encoder_out": x, "tokens": tokens}
        if c.norm_width == c.width:
            out |= {"cls": self.norm(x[0]), "mean": self.norm(x[1:].mean(dim=0))}
        return out
