"""Attention of calls with sequences of any lengths: two sets of keys for a row, its slide prefix and its own, each with
the logarithm of its softmax's denominator, with which they are joined.

None of it has run on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from inspect import signature

import numpy as np
import torch
from torch import Tensor

Parts = tuple[Tensor, Tensor]  # out [T, heads, D], lse f32 [T, heads, 1]


class Spans:
    """Which rows attend to which keys: span i is queries[i] rows behind those of the spans before it, and keys[i] keys
    likewise."""

    def __init__(self, queries: Sequence[int], keys: Sequence[int], device: torch.device) -> None:
        self.queries, self.keys, self._device = list(queries), list(keys), device

    @cached_property
    def sums(self) -> tuple[Tensor, Tensor]:
        """Where each span's queries and keys begin, and the last ones end: int32 [spans + 1] on the device."""
        queries, keys = (
            torch.from_numpy(np.cumsum([0, *n], dtype=np.int32)).to(self._device) for n in (self.queries, self.keys)
        )
        return queries, keys


# (q [T, heads, D], k [S, kv_heads, D], v likewise, spans, causal: a span's queries are those of its last keys, and see
# no later one) -> Parts
Attention = Callable[[Tensor, Tensor, Tensor, Spans, bool], Parts]


def choose_attention(device: torch.device, dtype: torch.dtype) -> tuple[Attention, str]:
    """And how it is told: torch's own FlashAttention (torch.nn.attention.varlen) where it runs, on a GPU in fp16 or
    bf16 and in a torch that has it; else plain torch."""
    if device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16):
        return plain_attention, f"plain torch ({device.type}, {str(dtype).removeprefix('torch.')})"
    try:
        from torch.nn.attention import varlen
    except ImportError:
        return plain_attention, f"plain torch (torch {torch.__version__} has no torch.nn.attention.varlen)"
    if not {"window_size", "enable_gqa"} <= signature(varlen.varlen_attn).parameters.keys():
        return plain_attention, f"plain torch (torch.nn.attention.varlen of torch {torch.__version__} is too old)"
    return flash_attention, "FlashAttention (torch.nn.attention.varlen)"


def plain_attention(q: Tensor, k: Tensor, v: Tensor, spans: Spans, causal: bool) -> Parts:
    """Span by span, in fp32."""
    parts = zip(q.split(spans.queries), k.split(spans.keys), v.split(spans.keys), strict=True)
    found = [attend(*part, causal) for part in parts]
    return torch.cat([out for out, _ in found]), torch.cat([lse for _, lse in found])


def flash_attention(q: Tensor, k: Tensor, v: Tensor, spans: Spans, causal: bool) -> Parts:
    """All spans in one kernel, in the inputs' type with sums in fp32. Not run on a GPU yet."""
    from torch.nn.attention.varlen import AuxRequest, varlen_attn

    out, lse = varlen_attn(
        q,
        k,
        v,
        *spans.sums,
        max(spans.queries),
        max(spans.keys),
        return_aux=AuxRequest(lse=True),
        window_size=(-1, 0) if causal else (-1, -1),
        enable_gqa=True,  # else torch may choose cuDNN, which plans anew for every shape
    )
    return out, lse.T[..., None]  # [heads, T] -> [T, heads, 1]


def attend(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Parts:
    """Softmax attention in fp32 and the logarithm of its denominator.

    q: [T, heads, D]; k, v: [S, kv_heads, D]; causal: the queries are those of the last T keys, and see no later one.
    -> f32 [T, heads, D], [T, heads, 1].
    """
    (tokens, heads, width), (keys, kv_heads) = q.shape, k.shape[:2]
    groups = heads // kv_heads
    rows = q.float().view(tokens, kv_heads, groups, width).permute(1, 2, 0, 3).reshape(kv_heads, -1, width)
    scores = rows @ k.float().permute(1, 2, 0) * width**-0.5  # [kv_heads, groups * T, S]
    if causal and tokens > 1:
        hidden = torch.ones((tokens, keys), dtype=torch.bool, device=q.device).triu(keys - tokens + 1)
        scores.view(kv_heads, groups, tokens, keys).masked_fill_(hidden, -torch.inf)
    lse = scores.logsumexp(-1, keepdim=True)
    out = scores.sub_(lse).exp_() @ v.float().permute(1, 0, 2)

    def by_token(x: Tensor) -> Tensor:
        return x.view(kv_heads, groups, tokens, -1).permute(2, 0, 1, 3).reshape(tokens, heads, -1)

    return by_token(out), by_token(lse)


def join(one: Parts, other: Parts) -> Tensor:
    """Attention over the union of two key sets, from those over each: one softmax, in fp32."""
    (a, lse_a), (b, lse_b) = one, other
    lse = torch.logaddexp(lse_a, lse_b)
    return a * (lse_a - lse).exp() + b * (lse_b - lse).exp()
