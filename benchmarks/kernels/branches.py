"""Dilated attention as the published code and its peers compute it: one attention per branch, then a merge.

Each branch gathers what it keeps into dense segments, attends, and scatters output and log-sum-exp back; the merge
weights the branches by their log-sum-exp (SPEC 3). The attention itself is the peer's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

# q, k, v [S, H, m, D] -> output [S, H, m, D], log-sum-exp [S, H, m]
Attend = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


class UnavailableError(Exception):
    """A provider that cannot run here; the message says why."""


def attend_per_branch(
    q: Tensor, k: Tensor, v: Tensor, segment_lengths: Sequence[int], dilated_ratios: Sequence[int], attend: Attend
) -> Tensor:
    """q, k, v: [L, H, D] -> [L, H, D] of their dtype, merged in fp32."""
    length, heads, _ = q.shape
    outs, lses = [], []
    for w, r in zip(segment_lengths, dilated_ratios, strict=True):
        w = min(w, length)
        out, lse = attend(*(_gather(x, w, r) for x in (q, k, v)))
        outs.append(_scatter(out, w, r, 0.0)[:length, :heads])
        lses.append(_scatter(lse[..., None].float(), w, r, -1e30)[:length, :heads, 0])  # not kept: weight 0
    weights = torch.softmax(torch.stack(lses), dim=0)  # [branches, L, H]
    merged = (weights[..., None] * torch.stack(outs)).sum(dim=0)
    return merged.to(q.dtype)


def _gather(x: Tensor, w: int, r: int) -> Tensor:
    """[L, H, D] -> [S, H', m, D]: of each segment of w, head group g keeps positions g, g + r, ...; zeros beyond."""
    segments, m = math.ceil(x.shape[0] / w), math.ceil(w / r)
    x = F.pad(x, (0, 0, 0, -x.shape[1] % r, 0, segments * w - x.shape[0])).unflatten(0, (segments, w))
    x = F.pad(x, (0, 0, 0, 0, 0, m * r - w))  # [S, m r, H', D]
    x = x.unflatten(2, (r, -1)).unflatten(1, (m, r))  # [S, m, residue, group, H' / r, D]
    kept = x.diagonal(dim1=2, dim2=3)  # [S, m, H' / r, D, group]
    return kept.permute(0, 4, 2, 1, 3).flatten(1, 2).contiguous()


def _scatter(x: Tensor, w: int, r: int, fill: float) -> Tensor:
    """[S, H', m, C] -> [S w, H', C], `fill` where a head does not keep a position."""
    segments, heads, m, channels = x.shape
    full = x.new_full((segments, m, r, r, heads // r, channels), fill)
    full.diagonal(dim1=2, dim2=3).copy_(x.unflatten(1, (r, -1)).permute(0, 3, 2, 4, 1))
    return full.flatten(3, 4).flatten(1, 2)[:, :w].flatten(0, 1)


def torch_sdpa(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The kernels behind `scaled_dot_product_attention`, which itself keeps the log-sum-exp to itself."""
    aten = torch.ops.aten
    if not q.is_cuda:
        return tuple(aten._scaled_dot_product_flash_attention_for_cpu(q, k, v))  # type: ignore[return-value]
    if q.dtype == torch.float32:
        out, lse, *_ = aten._scaled_dot_product_efficient_attention(q, k, v, None, True)
    else:
        out, lse, *_ = aten._scaled_dot_product_flash_attention(q, k, v)
    return out, lse[..., : q.shape[2]]  # rows of the log-sum-exp are padded


def flash_attn() -> Attend:
    """flash-attn 2's forward. Raises UnavailableError where it is not installed."""
    try:
        from flash_attn import flash_attn_func
    except (ImportError, OSError) as e:
        raise UnavailableError(f"flash-attn does not load ({str(e).splitlines()[0]}): pip install flash-attn") from e

    def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, lse, _ = flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v)), return_attn_probs=True)  # [S, m, H, D]
        return out.transpose(1, 2), lse[..., : q.shape[2]]

    return attend
