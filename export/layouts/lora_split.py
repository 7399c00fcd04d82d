"""Weights taken apart into a LoRA adapter and its base, so that merging them gives every bit back.

Adding a product of factors to a base is exact in fp32 only where the sum needs no rounding. Here B has one power of
two in a column, so a row of B @ A is a row of A, doubled or halved; the base's row is the wanted one with its sign
turned, and the adapter adds twice the wanted row: -w + 2 w = w, exactly, for any w in any of the stored formats. Each
of the r rows per projection is wrong without the adapter, so a merge that fails shows.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from wsi_rt.export.arch import LlamaConfig, Shapes
from wsi_rt.export.sources.weights import F32, Derived, WeightSource

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_SCALE = 2  # lora_alpha / r, as in the published training script (256 / 128)
_PREFIX = "base_model.model."


def rank_for(c: LlamaConfig) -> int:
    """The published 128, less for small models."""
    return max(1, min(128, c.hidden // 8, c.kv_heads * c.head_width))


def alpha_for(c: LlamaConfig) -> int:
    return _SCALE * rank_for(c)


class Taken(Derived):
    """Tensors computed from another source's: the base of the split, or its adapter."""

    def __init__(self, source: WeightSource, shapes: Shapes, make: Callable[[str], F32]) -> None:
        super().__init__(source)
        self._shapes, self._make = shapes, make

    def shapes(self) -> Shapes:
        return dict(self._shapes)

    def get(self, name: str) -> F32:
        return self._make(name)


def split(source: WeightSource, c: LlamaConfig, dtype: torch.dtype) -> tuple[Taken, Taken]:
    """(base, adapter) of a language model that will be stored as `dtype`."""
    rank, shapes = rank_for(c), source.shapes()
    targets = [n for n in shapes if n.split(".")[-2] in TARGETS]

    def wanted(name: str) -> F32:
        """As the merged layout stores it: rounded before it is taken apart."""
        return torch.from_numpy(source.get(name)).to(dtype).float().numpy()

    def base(name: str) -> F32:
        x = wanted(name)
        if name in targets:
            x[_rows(len(x), rank)] *= -1
        return x

    def factor(name: str) -> F32:
        own, _, side = name.removeprefix(_PREFIX).removesuffix(".weight").rpartition(".lora_")
        own += ".weight"
        out = shapes[own][0]
        # Columns of B are 1, 1/2, -1, -1/2, ...; A makes up for it. Doubling loses nothing, even below fp16's normals.
        gain = np.resize(np.array([1, 2, -1, -2], np.float32), rank)
        if side == "A":
            return wanted(own)[_rows(out, rank)] * gain[:, None]
        b = np.zeros((out, rank), np.float32)
        b[_rows(out, rank), np.arange(rank)] = 1 / gain
        return b

    adapter: Shapes = {}
    for name in targets:
        module = _PREFIX + name.removesuffix(".weight")
        adapter |= {
            f"{module}.lora_A.weight": (rank, shapes[name][1]),
            f"{module}.lora_B.weight": (shapes[name][0], rank),
        }
    return Taken(source, shapes, base), Taken(source, adapter, factor)


def _rows(count: int, rank: int) -> NDArray[np.int64]:
    """The rows that the adapter changes: `rank` of them, spread evenly."""
    return np.arange(rank) * count // rank
