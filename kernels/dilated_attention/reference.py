"""LongNet dilated attention in plain fp32 torch, following the published rules word for word (SPEC 3).

Source: LongNet (arXiv 2307.02486) as Prov-GigaPath's slide encoder uses it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

NOT_KEPT = -1e30  # log-sum-exp of a (position, head) that a branch does not keep; exp() of it is 0


def dilated_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, segment_lengths: Sequence[int], dilated_ratios: Sequence[int]
) -> Tensor:
    """q, k, v: [L, H, D] -> [L, H, D] in fp32.

    A (position, head) that no branch keeps is 0.
    """
    branches = [
        _branch(q.float(), k.float(), v.float(), w, r) for w, r in zip(segment_lengths, dilated_ratios, strict=True)
    ]
    out = torch.stack([o for o, _ in branches])  # [branch, L, H, D]
    lse = torch.stack([s for _, s in branches])  # [branch, L, H]
    weight = torch.exp(lse - lse.amax(dim=0))
    weight = weight / weight.sum(dim=0)
    return (weight[..., None] * out).sum(dim=0)


def _branch(q: Tensor, k: Tensor, v: Tensor, w: int, r: int) -> tuple[Tensor, Tensor]:
    """One (segment length, ratio) branch: output [L, H, D] (0 where not kept), log-sum-exp [L, H]."""
    length, heads, _ = q.shape
    w = min(w, length)
    q, k, v = (_dilate(_segments(x, w, r), r) for x in (q, k, v))  # [S, H', m, D]
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5  # zero-padded keys take part with score 0
    lse = torch.logsumexp(scores, dim=-1)  # [S, H', m]
    out = torch.softmax(scores, dim=-1) @ v
    out = _undilate(out, r, 0.0)[:, :w, :heads].flatten(0, 1)[:length]
    lse = _undilate(lse[..., None], r, NOT_KEPT)[:, :w, :heads].flatten(0, 1)[:length]
    return out, lse[..., 0]


def _segments(x: Tensor, w: int, r: int) -> Tensor:
    """[L, H, D] -> [S, m * r, H', D]: segments of w, each zero-padded to a multiple of r; H' = multiple of r."""
    length, heads, _ = x.shape
    segments = math.ceil(length / w)
    x = F.pad(x, (0, 0, 0, -heads % r, 0, segments * w - length)).unflatten(0, (segments, w))
    return F.pad(x, (0, 0, 0, 0, 0, -w % r))


def _dilate(x: Tensor, r: int) -> Tensor:
    """[S, m * r, H', D] -> [S, H', m, D]: head group g keeps positions g, g + r, g + 2r, ..."""
    groups = x.chunk(r, dim=2)
    return torch.cat([group[:, g::r] for g, group in enumerate(groups)], dim=2).transpose(1, 2)


def _undilate(x: Tensor, r: int, fill: float) -> Tensor:
    """[S, H', m, C] -> [S, m * r, H', C], `fill` where a head does not keep a position."""
    segments, heads, m, channels = x.shape
    full = x.new_full((segments, m * r, heads, channels), fill)
    size = heads // r
    for g in range(r):
        full[:, g::r, g * size : (g + 1) * size] = x[:, g * size : (g + 1) * size].transpose(1, 2)
    return full
