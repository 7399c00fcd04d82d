"""Calls of any chunks, operator by operator: prompts, and what decodes beside them.

To the device cross a call's embeddings f32 and its slots and positions; back come the logits f32 that are wanted. None
of it has run on a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wsi_rt.runtime.engines.torch_graphs import Staging
from wsi_rt.runtime.llm.decoder import F32, Chunk
from wsi_rt.runtime.llm.torch_attention import Attention, Parts, Spans, join
from wsi_rt.runtime.llm.torch_model import TorchLlama
from wsi_rt.runtime.llm.torch_pages import PagePool, TorchKV, by_prefix


class MixedRows:
    def __init__(
        self, model: TorchLlama, pool: PagePool, attention: Attention, staging: Staging, device: torch.device
    ) -> None:
        self._model, self._pool, self._attention, self._staging, self._device = model, pool, attention, staging, device

    def __call__(self, chunks: Sequence[Chunk], kvs: Sequence[TorchKV]) -> list[F32]:
        """Room for the new tokens is reserved. -> per chunk the wanted logits [k, vocab]."""
        rows = [len(c.embeds) for c in chunks]
        ends = np.cumsum(rows)
        x = self._staging.empty("embeds", (sum(rows), chunks[0].embeds.shape[1]), torch.float32)
        np.concatenate([c.embeds for c in chunks], out=x.numpy())
        starts, own = [kv.length for kv in kvs], [kv.own_length for kv in kvs]
        positions, slots, wanted = self._sent(
            [np.arange(a, a + n) for a, n in zip(starts, rows, strict=True)],
            [kv.pages.slots(a, a + n) for kv, a, n in zip(kvs, own, rows, strict=True)],
            [np.arange(end - c.logits, end) for c, end in zip(chunks, ends, strict=True)],
        )
        attend = _Attend(self._attention, self._pool, self._own_keys(kvs, rows), self._prefix_keys(kvs, rows))
        logits = self._model(x.to(self._device, non_blocking=True), positions, slots, self._pool, attend, wanted)
        return np.split(logits.cpu().numpy(), np.cumsum([c.logits for c in chunks])[:-1])

    def _own_keys(self, kvs: Sequence[TorchKV], rows: Sequence[int]) -> _Keys:
        """The new tokens' are among them."""
        lengths = [kv.own_length + n for kv, n in zip(kvs, rows, strict=True)]
        (slots,) = self._sent([kv.pages.slots(0, n) for kv, n in zip(kvs, lengths, strict=True)])
        return _Keys(slots, Spans(rows, lengths, self._device))

    def _prefix_keys(self, kvs: Sequence[TorchKV], rows: Sequence[int]) -> tuple[_Keys, Tensor] | None:
        """Each prefix once, for all rows that have it: and those rows, prefix by prefix. None without any."""
        groups = [(prefix, members) for prefix, members in by_prefix(kvs) if prefix is not None]
        if not groups:
            return None
        ends = np.cumsum(rows)
        slots, members = self._sent(
            [prefix.pages.slots(0, prefix.length) for prefix, _ in groups],
            [np.arange(ends[i] - rows[i], ends[i]) for _, group in groups for i in group],
        )
        queries = [sum(rows[i] for i in group) for _, group in groups]
        return _Keys(slots, Spans(queries, [prefix.length for prefix, _ in groups], self._device)), members

    def _sent(self, *parts: list[NDArray[np.int64]]) -> tuple[Tensor, ...]:
        """Each list as one int64 tensor on the device."""
        flat = [np.concatenate(arrays) for arrays in parts]
        return torch.from_numpy(np.concatenate(flat)).to(self._device).split([len(x) for x in flat])


@dataclass(frozen=True)
class _Keys:
    """Flat slots [S] of keys, and which rows attend to which of them."""

    slots: Tensor
    spans: Spans


@dataclass(frozen=True)
class _Attend:
    """One layer's attention. shared: prefixes, and the rows [M] int64 that have one."""

    attention: Attention
    pool: PagePool
    own: _Keys
    shared: tuple[_Keys, Tensor] | None

    def __call__(self, layer: int, q: Tensor) -> Tensor:
        """q [rows, heads, D] -> [rows, heads, D]."""
        parts = self._over(self.own, layer, q, causal=True)
        if self.shared is None:
            return parts[0].to(q.dtype)
        keys, members = self.shared
        out, lse = self._over(keys, layer, q[members], causal=False)
        every_out = out.new_zeros(q.shape).index_copy_(0, members, out)
        every_lse = lse.new_full((*q.shape[:2], 1), -torch.inf).index_copy_(0, members, lse)
        return join((every_out, every_lse), parts).to(q.dtype)

    def _over(self, keys: _Keys, layer: int, q: Tensor, causal: bool) -> Parts:
        return self.attention(q, *self.pool.rows(layer, keys.slots), keys.spans, causal)
