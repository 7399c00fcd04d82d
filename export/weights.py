"""Named tensors, one at a time: the one interface that every checkpoint source implements."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wsi_rt.export.arch import Shapes
from wsi_rt.runtime.errors import CheckpointError, MissingDependencyError

F32 = NDArray[np.float32]


class WeightSource(ABC):
    """Tensors by name, loaded on request. `label` is how messages name the source."""

    label: str

    @abstractmethod
    def shapes(self) -> Shapes:
        """Every tensor's shape, without loading one."""

    @abstractmethod
    def get(self, name: str) -> F32:
        """The tensor as contiguous fp32; raises CheckpointError when there is none of that name."""

    @abstractmethod
    def digest(self) -> str:
        """SHA-256 hex that changes whenever a tensor does."""


class Renamed(WeightSource):
    """Part of another source under other names: `rename(name)` gives the new name, or None to leave it out."""

    def __init__(self, source: WeightSource, rename: Callable[[str], str | None]) -> None:
        self.label = source.label
        self._source = source
        pairs = ((rename(name), name) for name in source.shapes())
        self._names = {new: old for new, old in pairs if new is not None}

    def shapes(self) -> Shapes:
        shapes = self._source.shapes()
        return {new: shapes[old] for new, old in self._names.items()}

    def get(self, name: str) -> F32:
        if name not in self._names:
            raise CheckpointError(f"{self.label}: no tensor named {name}")
        return self._source.get(self._names[name])

    def digest(self) -> str:
        return self._source.digest()


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


class SafetensorsSource(WeightSource):
    """One `.safetensors` file, or the shards named by a `*.safetensors.index.json` of a directory."""

    def __init__(self, files: Iterable[Path], label: str) -> None:
        self.label = label
        self._files = tuple(files)
        self._where: dict[str, Path] = {}
        self._shapes: Shapes = {}
        for path in self._files:
            for name, shape in _safetensors_shapes(path):
                if name in self._where:
                    raise CheckpointError(f"{path}: tensor {name} stands in {self._where[name].name} too")
                self._where[name], self._shapes[name] = path, shape

    @classmethod
    def open(cls, path: Path) -> SafetensorsSource:
        """A file, or a directory holding `model.safetensors`, an index with its shards, or exactly one file."""
        if path.is_file():
            return cls([path], str(path))
        if not path.is_dir():
            raise CheckpointError(
                f"{path}: no such file or directory, expected a .safetensors file or a folder of them"
            )
        indices = sorted(path.glob("*.safetensors.index.json"))
        if indices:
            return cls(_shards(indices[0]), str(path))
        files = sorted(path.glob("*.safetensors"))
        if (path / "model.safetensors") in files:
            files = [path / "model.safetensors"]
        if len(files) != 1:
            raise CheckpointError(
                f"{path}: {len(files)} .safetensors files, expected model.safetensors, one file, or an index of shards"
            )
        return cls(files, str(path))

    def shapes(self) -> Shapes:
        return dict(self._shapes)

    def get(self, name: str) -> F32:
        if name not in self._where:
            raise CheckpointError(f"{self.label}: no tensor named {name}")
        with _open_safetensors(self._where[name]) as f:
            return np.ascontiguousarray(f.get_tensor(name).float().numpy())

    def digest(self) -> str:
        h = hashlib.sha256()
        for path in self._files:
            with path.open("rb") as f:
                h.update(hashlib.file_digest(f, "sha256").digest())
        return h.hexdigest()


def _shards(index: Path) -> list[Path]:
    try:
        names = sorted({str(n) for n in json.loads(index.read_text())["weight_map"].values()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise CheckpointError(f"{index}: not a shard index ({e}), expected a JSON object with `weight_map`") from e
    missing = [n for n in names if not (index.parent / n).is_file()]
    if missing:
        raise CheckpointError(
            f"{index}: shard {missing[0]} is missing ({len(missing)} of {len(names)}); download it again"
        )
    return [index.parent / n for n in names]


def _open_safetensors(path: Path) -> Any:
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as e:
        raise MissingDependencyError(f"reading {path} needs safetensors: pip install 'wsi-rt[export]'") from e
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as e:
        raise CheckpointError(f"{path}: not a readable safetensors file ({e}); download it again") from e


def _safetensors_shapes(path: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
    with _open_safetensors(path) as f:
        for name in f.keys():  # noqa: SIM118 (not a dict)
            yield name, tuple(f.get_slice(name).get_shape())


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
    told = [f"{len(names)} {kind} ({_few(names)})" for kind, names in problems if names]
    if told:
        raise CheckpointError(f"{source.label}: {component} has {len(expected)} tensors, but {'; '.join(told)}")


def _few(names: list[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")
