"""Calls of one new token for each sequence: their shapes are the same from step to step, so that CUDA graphs replay
them.

To the device cross a step's embeddings f32, tables of pages, and a few integers for each sequence; back come its logits
f32. No graph has run on a GPU yet.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wsi_rt.kernels.rope_kv_write import PADDING
from wsi_rt.kernels.shared_prefix_attention import shared_prefix_attention
from wsi_rt.runtime.engines.torch_graphs import Capture, GraphedCall, Staging
from wsi_rt.runtime.llm.decoder import F32, Chunk
from wsi_rt.runtime.llm.torch_model import TorchLlama
from wsi_rt.runtime.llm.torch_pages import Groups, PagePool, TorchKV, by_prefix, pages_for

# Inputs of a decode step by row -> what rows of padding hold. Such a row is written nowhere and attends to nothing; the
# first group after the real ones takes all of them (its end is cut to the bucket).
_LAST = 1 << 30
DECODE_ROWS = {
    "x": 0,
    "positions": 0,
    "slots": PADDING,
    "suffix_table": 0,
    "suffix_lengths": 0,
    "prefix_table": 0,
    "prefix_lengths": 0,
    "group_ends": _LAST,
}


class DecodeSteps:
    """Calls of one new token for each of at most `largest` sequences. buckets: rows of the graphs; a step is padded to
    the next. capture: see GraphedCall."""

    def __init__(
        self,
        model: TorchLlama,
        pool: PagePool,
        context: int,
        staging: Staging,
        device: torch.device,
        buckets: Sequence[int],
        capture: Capture | None = None,
    ) -> None:
        self._model, self._pool, self._staging, self._width = model, pool, staging, pages_for(context)
        self._call = GraphedCall(self._run, buckets, device, DECODE_ROWS, capture)

    def take(self, chunks: Sequence[Chunk]) -> bool:
        """Whether a call is such a step."""
        return len(chunks) <= self._call.largest and all(len(c.embeds) == 1 for c in chunks)

    def __call__(self, chunks: Sequence[Chunk], kvs: Sequence[TorchKV]) -> list[F32]:
        """Room for the new tokens is reserved. -> per chunk the wanted logits [0 or 1, vocab]."""
        count, hidden = len(chunks), chunks[0].embeds.shape[1]
        shapes = {"x": (count, hidden), "suffix_table": (count, self._width), "prefix_table": (count, self._width)}
        types = {"x": torch.float32, "positions": torch.int64, "slots": torch.int64}
        sent = {n: self._staging.empty(n, shapes.get(n, (count,)), types.get(n, torch.int32)) for n in DECODE_ROWS}
        groups = by_prefix(kvs)
        order = [i for _, members in groups for i in members]
        fill_step({name: x.numpy() for name, x in sent.items()}, [chunks[i].embeds for i in order], groups, kvs)
        logits = self._call(**sent).to("cpu", copy=True).numpy()  # a graph's output is its own
        found = {i: logits[row : row + chunks[i].logits] for row, i in enumerate(order)}
        return [found[i] for i in range(count)]

    def _run(
        self,
        x: Tensor,
        positions: Tensor,
        slots: Tensor,
        suffix_table: Tensor,
        suffix_lengths: Tensor,
        prefix_table: Tensor,
        prefix_lengths: Tensor,
        group_ends: Tensor,
    ) -> Tensor:
        """-> logits f32 [rows, vocab]. Shapes follow from the number of rows alone."""
        group_starts = torch.cat([group_ends.new_zeros(1), group_ends.clamp(max=len(x))])

        def attend(layer: int, q: Tensor) -> Tensor:
            tables = (prefix_table, prefix_lengths, group_starts, suffix_table, suffix_lengths)
            return shared_prefix_attention(q, *self._pool.layer(layer), *tables)

        return self._model(x, positions, slots, self._pool, attend)


def fill_step(step: dict[str, NDArray], embeds: Sequence[F32], groups: Groups, kvs: Sequence[TorchKV]) -> None:
    """A decode step's inputs, in the order of `groups`. Those without a prefix are a group with one of no tokens, and
    so are all that are left of as many groups as there are rows, which have no rows."""
    np.concatenate(embeds, out=step["x"])
    for name in ("suffix_table", "prefix_table", "prefix_lengths"):
        step[name][:] = 0
    step["group_ends"][:] = len(kvs)
    row = 0
    for g, (prefix, members) in enumerate(groups):
        if prefix is not None:
            step["prefix_table"][g, : len(prefix.pages.numbers)] = prefix.pages.numbers
            step["prefix_lengths"][g] = prefix.length
        for i in members:
            kv = kvs[i]
            step["positions"][row] = kv.length
            step["slots"][row] = kv.pages.slots(kv.own_length, kv.own_length + 1)[0]
            step["suffix_table"][row, : len(kv.pages.numbers)] = kv.pages.numbers
            step["suffix_lengths"][row] = kv.own_length + 1
            row += 1
        step["group_ends"][g] = row
