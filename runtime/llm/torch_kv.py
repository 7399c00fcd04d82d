"""Keys and values of the torch decoder, and attention over them."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from wsi_rt.runtime.llm.decoder import F32, KV, PrefixKV

GROWTH = 64  # tokens; a slab grows by copying, and what is held beyond the tokens is at most this much


class TorchPrefix(PrefixKV):
    """slabs: per layer f32 [2, length, kv_heads, head_width]."""

    def __init__(self, slabs: Sequence[Tensor]) -> None:
        self.slabs, self.length = slabs, slabs[0].shape[1]

    @classmethod
    def of(cls, layers: Sequence[F32]) -> TorchPrefix:
        """Arrays, read-only ones too, without a copy."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*not writable.*")  # nothing here writes to a prefix
            return cls([torch.from_numpy(np.asarray(x)) for x in layers])

    @property
    def nbytes(self) -> int:
        return sum(slab.numel() * slab.element_size() for slab in self.slabs)

    def layers(self) -> Sequence[F32]:
        return [slab.numpy() for slab in self.slabs]


class TorchKV(KV):
    """Per layer one slab f32 [2, room, kv_heads, head_width] of the tokens after the prefix."""

    def __init__(
        self, layers: int, kv_heads: int, head_width: int, capacity: int, prefix: TorchPrefix | None = None
    ) -> None:
        self.prefix, self.capacity = prefix, capacity
        self.length = self.shared
        self.slabs = [torch.empty((2, 0, kv_heads, head_width)) for _ in range(layers)]

    @property
    def own_length(self) -> int:
        return self.length - self.shared

    @property
    def nbytes(self) -> int:
        return sum(8 * self.own_length * math.prod(slab.shape[2:]) for slab in self.slabs)

    def reserve(self, new: int) -> None:
        """Room for `new` more tokens."""
        needed = self.own_length + new
        if needed <= self.slabs[0].shape[1]:
            return
        room = min(-(-needed // GROWTH) * GROWTH, self.capacity - self.shared)
        grown = []
        for slab in self.slabs:
            larger = slab.new_empty((2, room, *slab.shape[2:]))
            larger[:, : self.own_length] = slab[:, : self.own_length]
            grown.append(larger)
        self.slabs = grown

    def append(self, layer: int, k: Tensor, v: Tensor) -> Tensor:
        """Write k, v [T, kv_heads, head_width] behind the tokens held -> those and these, [2, own + T, ...]. The length
        stays as it is: the same tokens are written in every layer."""
        start, end = self.own_length, self.own_length + len(k)
        slab = self.slabs[layer]
        slab[0, start:end], slab[1, start:end] = k, v
        return slab[:, :end]


def attend(q: Tensor, slab: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """Softmax attention and the logarithm of its denominator, with which two key sets are joined by `join`.

    q: [T, heads, D]; slab: [2, S, kv_heads, D]; causal: the queries are those of the last T keys, and see no later
    one. -> [T, heads, D], [T, heads, 1].
    """
    tokens, heads, width = q.shape
    keys, kv_heads = slab.shape[1:3]
    groups = heads // kv_heads
    rows = q.view(tokens, kv_heads, groups, width).permute(1, 2, 0, 3).reshape(kv_heads, groups * tokens, width)
    scores = rows @ slab[0].permute(1, 2, 0) * width**-0.5  # [kv_heads, groups * T, S]
    if causal and tokens > 1:
        hidden = torch.ones((tokens, keys), dtype=torch.bool).triu(keys - tokens + 1)
        scores.view(kv_heads, groups, tokens, keys).masked_fill_(hidden, -torch.inf)
    lse = scores.logsumexp(-1, keepdim=True)
    out = scores.sub_(lse).exp_() @ slab[1].permute(1, 0, 2)

    def by_token(x: Tensor) -> Tensor:
        return x.view(kv_heads, groups, tokens, -1).permute(2, 0, 1, 3).reshape(tokens, heads, -1)

    return by_token(out), by_token(lse)


def join(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> Tensor:
    """Attention over the union of two key sets, from `attend` over each: one softmax."""
    (a, lse_a), (b, lse_b) = one, other
    lse = torch.logaddexp(lse_a, lse_b)
    return a * (lse_a - lse).exp() + b * (lse_b - lse).exp()
