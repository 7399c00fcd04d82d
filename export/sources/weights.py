"""Named tensors, one at a time: the one interface that every checkpoint source implements."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from wsi_rt.export.arch import ComponentConfig, Shapes
from wsi_rt.runtime.errors import CheckpointError

F32 = NDArray[np.float32]


class WeightSource(ABC):
    """Tensors by name, loaded on request. `label` is how messages name the source.

    A source never makes up a tensor: what it does not hold, it refuses.
    """

    label: str

    @abstractmethod
    def shapes(self) -> Shapes:
        """Every tensor's shape, without loading one."""

    @abstractmethod
    def get(self, name: str) -> F32:
        """The tensor as contiguous fp32; raises CheckpointError when there is none of that name, or when it holds
        values that are not finite."""

    @abstractmethod
    def digest(self) -> str:
        """SHA-256 hex that changes whenever a tensor does."""


class Derived(WeightSource):
    """Made of one other source, whose names, shapes and digest are its own unless a subclass says otherwise."""

    def __init__(self, source: WeightSource) -> None:
        self.label, self._source = source.label, source

    def shapes(self) -> Shapes:
        return self._source.shapes()

    def digest(self) -> str:
        return self._source.digest()


@dataclass(frozen=True)
class Part:
    """One component: what it is and where its weights come from. `ignored`: tensors of the source left out."""

    config: ComponentConfig
    source: WeightSource
    ignored: int = 0


class Renamed(Derived):
    """Part of another source under other names: `rename(name)` gives the new name, or None to leave it out.

    Raises CheckpointError when two of the source's names stand for one tensor.
    """

    def __init__(self, source: WeightSource, rename: Callable[[str], str | None]) -> None:
        super().__init__(source)
        self._names: dict[str, str] = {}
        for old in source.shapes():
            new = rename(old)
            if new is None:
                continue
            if new in self._names:
                raise CheckpointError(
                    f"{self.label}: {self._names[new]} and {old} stand for the same tensor, {new}; keep one of them"
                )
            self._names[new] = old

    def shapes(self) -> Shapes:
        shapes = self._source.shapes()
        return {new: shapes[old] for new, old in self._names.items()}

    def get(self, name: str) -> F32:
        if name not in self._names:
            raise CheckpointError(f"{self.label}: no tensor named {name}")
        return self._source.get(self._names[name])


class Overlay(WeightSource):
    """Several sources as one; of tensors with the same name the first source's is used."""

    def __init__(self, *sources: WeightSource) -> None:
        self.label = " + ".join(s.label for s in sources)
        self._sources = sources

    def shapes(self) -> Shapes:
        out: Shapes = {}
        for source in reversed(self._sources):
            out |= source.shapes()
        return out

    def get(self, name: str) -> F32:
        for source in self._sources:
            if name in source.shapes():
                return source.get(name)
        raise CheckpointError(f"{self.label}: no tensor named {name}")

    def digest(self) -> str:
        return hashlib.sha256("".join(s.digest() for s in self._sources).encode()).hexdigest()


def check_tensors(source: WeightSource, expected: Shapes, component: str) -> None:
    """Raises CheckpointError naming missing, unexpected and misshapen tensors (all of them counted)."""
    shapes = source.shapes()
    problems = [
        ("missing", [n for n in expected if n not in shapes]),
        ("unexpected", [n for n in shapes if n not in expected]),
        (
            "misshapen",
            [f"{n} {list(shapes[n])}, expected {list(s)}" for n, s in expected.items() if shapes.get(n, s) != s],
        ),
    ]
    told = [f"{len(names)} {kind} ({few(names)})" for kind, names in problems if names]
    if told:
        raise CheckpointError(f"{source.label}: {component} has {len(expected)} tensors, but {'; '.join(told)}")


def require_finite(x: F32, name: str, label: str) -> F32:
    """`x` itself. A damaged file or an overflow shows as NaN or infinity: CheckpointError with the tensor's name and
    how many values are not finite."""
    with np.errstate(all="ignore"):
        suspicious = not np.isfinite(x.sum())  # one pass at memory speed; NaN and infinity survive any sum
    bad = x.size - int(np.count_nonzero(np.isfinite(x))) if suspicious else 0
    if bad:
        raise CheckpointError(
            f"{label}: {bad} of the {x.size} values of {name} are not finite (NaN or infinity), expected numbers; "
            "the file is damaged: download it again"
        )
    return x


def plain(error: Exception, most: int = 160) -> str:
    """What another library says, as part of one line."""
    return " ".join(str(error).split())[:most] or type(error).__name__


def few(names: list[str], most: int = 4) -> str:
    """The first of a list of names, for a message."""
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")
