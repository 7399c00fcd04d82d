"""Attention over a shared prefix and an own suffix in plain fp32 torch: one softmax over both."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor


def shared_prefix_attention_reference(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    prefix_table: Tensor,
    prefix_lengths: Tensor,
    group_starts: Tensor,
    suffix_table: Tensor,
    suffix_lengths: Tensor,
    scale: float,
) -> Tensor:
    """The public operator's arguments, q [B, H, D] -> [B, H, D] fp32."""
    out = torch.zeros(q.shape, device=q.device)
    for group, (start, end) in enumerate(pairwise(group_starts.tolist())):
        prefix = [_tokens(cache, prefix_table[group], int(prefix_lengths[group])) for cache in (k_cache, v_cache)]
        for b in range(start, end):
            suffix = [_tokens(cache, suffix_table[b], int(suffix_lengths[b])) for cache in (k_cache, v_cache)]
            out[b] = _attend(q[b].float(), prefix, suffix, scale)
    return out


def _tokens(cache: Tensor, table: Tensor, length: int) -> Tensor:
    """The first `length` tokens of the pages of a table: [Hkv, length, D] fp32."""
    pages = table[: -(-length // cache.shape[1])].long()
    return cache[pages].flatten(0, 1)[:length].transpose(0, 1).float()


def _attend(q: Tensor, prefix: list[Tensor], suffix: list[Tensor], scale: float) -> Tensor:
    """q [H, D]; (keys, values) of both parts [Hkv, tokens, D] -> [H, D]; zeros where there is no token."""
    (k, v), (own_k, own_v) = prefix, suffix
    rows = q.reshape(k.shape[0], -1, q.shape[1])  # [Hkv, H / Hkv, D]
    scores = torch.cat([rows @ k.mT, rows @ own_k.mT], dim=-1) * scale  # [Hkv, H / Hkv, tokens]
    weights = torch.softmax(scores, dim=-1)
    return (weights[..., : k.shape[1]] @ v + weights[..., k.shape[1] :] @ own_v).view(q.shape)
