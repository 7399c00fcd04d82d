"""Tensors of a source -> `.safetensors` and `.bin` files, and their shards."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from wsi_rt.export.arch import Shapes
from wsi_rt.export.sources.weights import Renamed, WeightSource

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_HEADER_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


@dataclass(frozen=True)
class Piece:
    """One file of weights. `path` is relative to the checkpoint; its suffix decides the format. `wrapper`: the key
    that a `.pth` puts its tensors under."""

    path: str
    source: WeightSource
    wrapper: str | None = None

    def stored_bytes(self, dtype: torch.dtype) -> int:
        return sum(map(math.prod, self.source.shapes().values())) * dtype.itemsize

    def write(self, root: Path, dtype: torch.dtype) -> None:
        path = root / self.path
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".safetensors":
            _write_safetensors(path, self.source, dtype)
        else:
            tensors: Any = {name: _stored(self.source, name, dtype) for name in self.source.shapes()}
            torch.save(tensors if self.wrapper is None else {self.wrapper: tensors}, path)


def shards(folder: str, stem: str, suffix: str, source: WeightSource, most: int, dtype: torch.dtype) -> list[Piece]:
    """`<folder>/<stem>-00001-of-0000N<suffix>`, ..., of at most `most` bytes each (a larger tensor gets its own)."""
    groups = list(_groups(source.shapes(), most, dtype.itemsize))
    return [
        Piece(f"{folder}/{stem}-{i:05}-of-{len(groups):05}{suffix}", Renamed(source, {n: n for n in group}.get))
        for i, group in enumerate(groups, 1)
    ]


def _groups(shapes: Shapes, most: int, itemsize: int) -> Iterator[list[str]]:
    group: list[str] = []
    size = 0
    for name, shape in shapes.items():
        tensor = math.prod(shape) * itemsize
        if group and size + tensor > most:
            yield group
            group, size = [], 0
        group.append(name)
        size += tensor
    yield group


def index_of(pieces: list[Piece], dtype: torch.dtype) -> dict[str, Any]:
    """What `model.safetensors.index.json` and `pytorch_model.bin.index.json` hold."""
    return {
        "metadata": {"total_size": sum(p.stored_bytes(dtype) for p in pieces)},
        "weight_map": {name: Path(p.path).name for p in pieces for name in p.source.shapes()},
    }


def _stored(source: WeightSource, name: str, dtype: torch.dtype) -> torch.Tensor:
    return torch.from_numpy(source.get(name)).to(dtype)


def _write_safetensors(path: Path, source: WeightSource, dtype: torch.dtype) -> None:
    """Header first, then the data tensor by tensor: the library's own writer wants all of them in memory at once.

    Format: 8 bytes of header length, little-endian; JSON, padded with spaces to a multiple of 8; the tensors' bytes.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in source.shapes().items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _HEADER_NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as f:
        f.write(len(text).to_bytes(8, "little"))
        f.write(text)
        for name in source.shapes():
            f.write(_stored(source, name, dtype).contiguous().reshape(-1).view(torch.uint8).numpy().data)
