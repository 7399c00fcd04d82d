"""Tile encoder in fp32 torch: a timm VisionTransformer under its own key names (SPEC 2).

Written out here so that parity needs no timm (whose torchvision must match torch); tests hold it
against timm itself.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wsi_rt.export.arch import ViTConfig

# timm's activations by their module names; "gelu" is the exact (erf) one.
ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "silu": F.silu,
    "relu": F.relu,
}


class LayerScale(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Attention(nn.Module):
    def __init__(self, c: ViTConfig) -> None:
        super().__init__()
        self.heads = c.heads
        head = c.width // c.heads
        self.qkv = nn.Linear(c.width, 3 * c.width, bias=c.qkv_bias)
        self.q_norm = nn.LayerNorm(head, eps=c.norm_eps) if c.qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(head, eps=c.norm_eps) if c.qk_norm else nn.Identity()
        self.proj = nn.Linear(c.width, c.width, bias=c.proj_bias)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # [B, H, T, D] each
        x = F.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v)
        return self.proj(x.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self, c: ViTConfig) -> None:
        super().__init__()
        self.kind, self.act = c.mlp, ACTIVATIONS[c.act]
        if c.mlp == "swiglu":
            self.fc1_g = nn.Linear(c.width, c.mlp_hidden, bias=c.proj_bias)
            self.fc1_x = nn.Linear(c.width, c.mlp_hidden, bias=c.proj_bias)
        else:
            packed = 2 if c.mlp == "swiglu_packed" else 1
            self.fc1 = nn.Linear(c.width, packed * c.mlp_hidden, bias=c.proj_bias)
        self.fc2 = nn.Linear(c.mlp_hidden, c.width, bias=c.proj_bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "mlp":
            return self.fc2(self.act(self.fc1(x)))
        gate, value = (self.fc1_g(x), self.fc1_x(x)) if self.kind == "swiglu" else self.fc1(x).chunk(2, dim=-1)
        return self.fc2(self.act(gate) * value)


class Block(nn.Module):
    def __init__(self, c: ViTConfig) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(c.width, eps=c.norm_eps) for _ in range(2))
        self.attn, self.mlp = Attention(c), Mlp(c)
        self.ls1, self.ls2 = (LayerScale(c.width) if c.layer_scale else nn.Identity() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class TileEncoder(nn.Module):
    """tiles u8 [B, 256, 256, 3] RGB -> [B, C] fp32; crop and normalisation included."""

    def __init__(self, c: ViTConfig) -> None:
        super().__init__()
        self.config = c
        if c.class_token:
            self.cls_token = nn.Parameter(torch.empty(1, 1, c.width))
        if c.reg_tokens:
            self.reg_token = nn.Parameter(torch.empty(1, c.reg_tokens, c.width))
        self.pos_embed = nn.Parameter(torch.empty(c.tensors()["pos_embed"]))
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(3, c.width, c.patch_px, c.patch_px, bias=c.patch_bias)
        self.norm_pre = nn.LayerNorm(c.width, eps=c.norm_eps) if c.pre_norm else nn.Identity()
        self.blocks = nn.Sequential(*(Block(c) for _ in range(c.depth)))
        norm = nn.LayerNorm(c.width, eps=c.norm_eps)
        self.norm = nn.Identity() if c.fc_norm else norm
        self.fc_norm = norm if c.fc_norm else nn.Identity()

    def forward(self, tiles: Tensor) -> Tensor:
        return self.features(preprocess(tiles, self.config))

    def features(self, x: Tensor) -> Tensor:
        """x: [B, 3, image_px, image_px] fp32, normalised -> [B, C]."""
        c = self.config
        x = self.patch_embed.proj(x).flatten(2).transpose(1, 2)  # [B, patches, C]
        tokens = [self.cls_token] if c.class_token else []
        tokens = tokens + ([self.reg_token] if c.reg_tokens else [])
        prefix = [t.expand(x.shape[0], -1, -1) for t in tokens]
        if c.no_embed_class:
            x = torch.cat([*prefix, x + self.pos_embed], dim=1)
        else:
            x = torch.cat([*prefix, x], dim=1) + self.pos_embed
        x = self.norm(self.blocks(self.norm_pre(x)))
        x = x[:, 0] if c.pool == "token" else x[:, c.prefix_tokens :].mean(dim=1)
        return self.fc_norm(x)


def preprocess(tiles: Tensor, c: ViTConfig) -> Tensor:
    """u8 [B, S, S, 3] -> centre crop -> /255 -> (x - mean) / std -> [B, 3, image_px, image_px] fp32."""
    at = (tiles.shape[1] - c.image_px) // 2
    x = tiles[:, at : at + c.image_px, at : at + c.image_px].permute(0, 3, 1, 2).float() / 255.0
    mean, std = (torch.tensor(v, dtype=torch.float32).reshape(1, 3, 1, 1) for v in (c.mean, c.std))
    return (x - mean) / std
