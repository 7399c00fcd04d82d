"""LoRA adapters merged into their base, tensor by tensor: W + scale * B @ A in fp32 (SPEC 6 b).

The same operations in the same order as peft's `merge_and_unload`, which the tests hold it against bit by bit.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from wsi_rt.export.arch import Shapes
from wsi_rt.export.sources.adapter import AdapterConfig
from wsi_rt.export.sources.weights import F32, WeightSource, few, require_finite
from wsi_rt.runtime.errors import CheckpointError

_FACTOR = re.compile(
    r"(?P<module>.+)\.(?:lora_(?P<linear>[AB])(?:\.default)?\.weight|lora_embedding_(?P<embedding>[AB])(?:\.default)?)$"
)
_WRAPPED = re.compile(r"\.(?:base_layer|modules_to_save(?:\.default)?)\.(?=[^.]+$)")  # peft's names around a module
_LAYER = re.compile(r"(?:^|\.)model\.layers\.\d+\.")


@dataclass
class _Delta:
    """The two factors of one base tensor's change, by their names in the adapter."""

    embedding: bool
    names: dict[str, str] = field(default_factory=dict)  # "A" [r, in], "B" [out, r]
    scale: float = 0.0


class LoraSource(WeightSource):
    """`base` with an adapter's changes. Of the base, the adapter and the result one tensor is in memory at a time.

    Raises CheckpointError when it is made: tensors of the adapter that belong to none of the base, one factor without
    the other, a rank that is not the configuration's, layers left out.
    """

    def __init__(self, adapter: WeightSource, base: WeightSource, config: AdapterConfig) -> None:
        self.label = f"{adapter.label} over {base.label}"
        self._adapter, self._base, self._config = adapter, base, config
        self._shapes = base.shapes()
        self._deltas: dict[str, _Delta] = {}
        self._replaced: dict[str, str] = {}
        self._sort(adapter.shapes())
        for name, delta in self._deltas.items():
            self._check(name, delta)
        self._refuse_gaps()

    def _sort(self, shapes: Shapes) -> None:
        """Every tensor of the adapter to the base's tensor that it changes or replaces."""
        strangers = []
        for name in shapes:
            factor = _FACTOR.match(name)
            target = f"{factor['module']}.weight" if factor else _WRAPPED.sub(".", name)
            own = _in_base(target, self._shapes)
            if own is None:
                strangers.append(name)
            elif factor:
                side, embedding = factor["linear"] or factor["embedding"], bool(factor["embedding"])
                names = self._deltas.setdefault(own, _Delta(embedding)).names
                self._once(names, side, name)
            else:
                self._once(self._replaced, own, name)
        if strangers:
            raise CheckpointError(
                f"{self._adapter.label}: {len(strangers)} of {len(shapes)} tensors change nothing of "
                f"{self._base.label} ({few(strangers)}), expected factors lora_A and lora_B of its modules; give the "
                "base it was trained on"
            )

    def _once(self, names: dict[str, str], key: str, name: str) -> None:
        if key in names:
            raise CheckpointError(f"{self._adapter.label}: {names[key]} and {name} stand for the same tensor; keep one")
        names[key] = name

    def _check(self, name: str, delta: _Delta) -> None:
        """The factors fit each other, the configuration and the base's tensor."""
        shapes, module = self._adapter.shapes(), name.removesuffix(".weight")
        for side, other in (("A", "B"), ("B", "A")):
            if side not in delta.names:
                raise CheckpointError(
                    f"{self._adapter.label}: {delta.names[other]} has no lora_{side} beside it; download the "
                    "adapter again"
                )
        a, b, rank = shapes[delta.names["A"]], shapes[delta.names["B"]], self._config.rank_of(module)
        out, inp = self._shapes[name][::-1] if delta.embedding else self._shapes[name]
        if a != (rank, inp) or b != (out, rank):
            raise CheckpointError(
                f"{self._adapter.label}: {module} has lora_A {list(a)} and lora_B {list(b)}, expected {[rank, inp]} "
                f"and {[out, rank]} (rank {rank} of {self._config.label}, {name} {list(self._shapes[name])})"
            )
        if delta.embedding and "lm_head.weight" not in self._shapes:
            raise CheckpointError(
                f"{self._adapter.label}: changes {name}, which {self._base.label} ties to its output layer; that "
                "is not supported: merge it with peft first"
            )
        delta.scale = self._config.scale_of(module)

    def _refuse_gaps(self) -> None:
        """Half an adapter would merge without a word: each target in each decoder layer, each saved module."""
        targets = self._config.targets or ()
        wanted = (n for n in self._shapes if n.endswith(".weight") and _LAYER.search(n))
        missing = [n for n in wanted if n not in self._deltas and _is_module(n.removesuffix(".weight"), targets)]
        held = [n.rpartition(".")[0] for n in self._replaced]
        missing += [m for m in self._config.saved if not any(_is_module(h, (m,)) for h in held)]
        if missing:
            raise CheckpointError(
                f"{self._adapter.label}: {len(missing)} modules that {self._config.label} names have no tensors "
                f"({few(missing)}); download the adapter again"
            )

    def shapes(self) -> Shapes:
        adapter = self._adapter.shapes()
        return self._shapes | {own: adapter[name] for own, name in self._replaced.items()}

    def get(self, name: str) -> F32:
        x = self._adapter.get(self._replaced[name]) if name in self._replaced else self._base.get(name)
        delta = self._deltas.get(name)
        if delta is None:
            return x
        return require_finite(self._merged(x, delta), name, self.label)

    def _merged(self, x: F32, delta: _Delta) -> F32:
        import torch

        a, b = (torch.from_numpy(self._adapter.get(delta.names[side])) for side in "AB")
        change: Any = b @ a
        change = (change.T if delta.embedding else change) * delta.scale
        weight = torch.from_numpy(x)
        weight += change
        return weight.numpy()

    def digest(self) -> str:
        parts = (self._adapter.digest(), self._base.digest(), repr(self._config.arithmetic()))
        return hashlib.sha256("|".join(parts).encode()).hexdigest()


def _in_base(name: str, shapes: Shapes) -> str | None:
    """The base's name for a tensor of the adapter: each wrapping put a `base_model.` or a `model.` before it."""
    for candidate in _unwrapped(name):
        if candidate in shapes:
            return candidate
    return None


def _unwrapped(name: str) -> Iterator[str]:
    yield name
    while name.startswith(("base_model.", "model.")):
        name = name.partition(".")[2]
        yield name


def _is_module(module: str, names: tuple[str, ...]) -> bool:
    return any(module == n or module.endswith(f".{n}") for n in names)
