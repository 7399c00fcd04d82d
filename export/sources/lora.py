"""LoRA adapters merged into their base, tensor by tensor: W + scale * B @ A in fp32 (SPEC 6 b).

The same operations in the same order as peft's `merge_and_unload`, which the tests hold it against bit by bit.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator
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

    Tensors of a module that the configuration saves whole may be new to the base: LLaVA's projector over Vicuna.
    Raises CheckpointError when it is made: other tensors of the adapter that belong to none of the base, one factor
    without the other, a rank that is not the configuration's, layers left out.
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
            if own is None and not factor and self._saves(_bare(target)):
                own = _bare(target)
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

    def _saves(self, name: str) -> bool:
        """Whether the tensor is one of a module that the configuration saves whole, or of a module within it."""
        return _is_within(name, self._config.saved)

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
        """Half an adapter would merge without a word: every module that the configuration takes must be there. Where
        it takes none that we know, what is changed in one decoder layer must be in all of them."""
        linears = [n.removesuffix(".weight") for n, s in self._shapes.items() if _LAYER.search(n) and len(s) == 2]
        changed = {n.removesuffix(".weight") for n in self._deltas}
        wanted, why = [m for m in linears if self._config.targets.take(m) and not self._saves(f"{m}.weight")], "names"
        if not wanted and self._config.targets.layers is None:
            kinds = {_LAYER.sub("", m) for m in changed if _LAYER.search(m)}
            wanted, why = [m for m in linears if _LAYER.sub("", m) in kinds], "means (others of their kind are changed)"
        missing = [m for m in wanted if m not in changed]
        absent = [m for m in self._config.saved if not any(_is_within(name, (m,)) for name in self._replaced)]
        saved = [n for n in self._shapes if self._saves(n) and not _is_within(n, absent)]
        missing += absent + [n for n in saved if n not in self._replaced]
        if missing:
            raise CheckpointError(
                f"{self._adapter.label}: {len(missing)} modules that {self._config.label} {why} have no tensors "
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


def _is_within(name: str, modules: Iterable[str]) -> bool:
    """Whether a tensor belongs to one of these modules, or to a module within it."""
    return any(f".{module}." in f".{name}" for module in modules)


def _bare(name: str) -> str:
    """The name that a tensor new to the base had before peft wrapped the model, each time `base_model.model.`."""
    while name.startswith("base_model."):
        name = name.removeprefix("base_model.").removeprefix("model.")
    while name.startswith("model.model."):
        name = name.removeprefix("model.")
    return name
