"""Weights in `.safetensors` files, and the JSON beside them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from wsi_rt.export.arch import Shapes
from wsi_rt.export.sources.weights import F32, WeightSource
from wsi_rt.runtime.errors import CheckpointError, MachineError
from wsi_rt.runtime.hashing import sha256_file


class SafetensorsSource(WeightSource):
    """One `.safetensors` file, or the shards named by a `*.safetensors.index.json` of a directory."""

    def __init__(self, files: Iterable[Path], label: str) -> None:
        self.label = label
        self._files = tuple(files)
        self._where: dict[str, Path] = {}
        self._shapes: Shapes = {}
        self._digest: str | None = None
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
        if self._digest is None:  # two components may share the files: 13 GB are not read twice
            self._digest = hashlib.sha256("".join(map(sha256_file, self._files)).encode()).hexdigest()
        return self._digest


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
        raise MachineError(f"reading {path} needs safetensors: pip install '.[export]' in a checkout of wsi-rt") from e
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as e:
        raise CheckpointError(f"{path}: not a readable safetensors file ({e}); download it again") from e


def _safetensors_shapes(path: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
    with _open_safetensors(path) as f:
        for name in f.keys():  # noqa: SIM118 (not a dict)
            yield name, tuple(f.get_slice(name).get_shape())


def read_json_object(path: Path, optional: bool = False) -> dict[str, Any]:
    """A configuration file; an `optional` one that is missing is empty.

    Raises CheckpointError when it is missing or holds anything but an object.
    """
    if optional and not path.is_file():
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise CheckpointError(f"{path}: not readable ({e.strerror}), expected the checkpoint's configuration") from e
    except ValueError as e:
        raise CheckpointError(f"{path}: corrupt ({e}), expected JSON; download it again") from e
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: a JSON {type(data).__name__}, expected an object; download it again")
    return data
