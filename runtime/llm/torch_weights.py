"""The tensors of a bundle's portable graphs as torch tensors, memory-mapped, and the Linear layers that they make."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wsi_rt.kernels.block_linear import block_linear
from wsi_rt.kernels.block_linear.reference import unpacked
from wsi_rt.runtime.errors import EngineMismatchError, MachineError

_BLOCKS = re.compile(r"(?P<linear>.+)\.weight\.int(?P<bits>[48])x(?P<block>\d+)\.codes")
_FP32 = 1  # onnx.TensorProto.FLOAT


class StoredTensors:
    """Initializers of several ONNX files by name: bytes in their external files, or in the graphs themselves. Nothing
    is read before it is used; files are mapped copy-on-write, and nothing writes."""

    def __init__(self, graphs: Iterable[Path]) -> None:
        """Raises MachineError without onnx, EngineMismatchError for a file that is no graph."""
        try:
            import onnx
        except ImportError as e:
            raise MachineError(f"the torch decoder reads graphs with onnx ({e}); pip install onnx") from e
        self._found: dict[str, tuple[Path, Any]] = {}
        self._files: dict[Path, np.memmap] = {}
        for path in graphs:
            try:
                model = onnx.load(str(path), load_external_data=False)
            except Exception as e:  # protobuf's own classes
                raise EngineMismatchError(f"{path}: not readable as ONNX ({e}); rebuild the bundle") from e
            self._found |= {t.name: (path.parent, t) for t in model.graph.initializer}

    def names(self) -> Iterable[str]:
        return self._found.keys()

    def bytes(self, name: str) -> np.ndarray:
        """uint8 [n]. Raises EngineMismatchError when no graph has it."""
        if name not in self._found:
            raise EngineMismatchError(f"the portable graphs hold no tensor {name}; rebuild the bundle")
        folder, tensor = self._found[name]
        where = {e.key: e.value for e in tensor.external_data}
        if not where:
            return np.frombuffer(bytearray(tensor.raw_data), np.uint8)
        path, offset = (folder / where["location"]).resolve(), int(where["offset"])
        if path not in self._files:
            self._files[path] = np.memmap(path, np.uint8, mode="c")
        return self._files[path][offset : offset + int(where["length"])]

    def floats(self, name: str) -> Tensor:
        """An fp32 tensor in its own dimensions."""
        if name in self._found and self._found[name][1].data_type != _FP32:
            raise EngineMismatchError(
                f"{name} is of ONNX type {self._found[name][1].data_type}, expected {_FP32} (fp32)"
            )
        data = torch.from_numpy(self.bytes(name).view(np.float32))
        return data.reshape(tuple(self._found[name][1].dims))

    def linear(self, name: str) -> Linear:
        """The Linear `name`, in fp32 or in blocks, as the bundle stores it: mapped, on the CPU."""
        if f"{name}.weight.T" in self._found:
            return PlainLinear(self.floats(f"{name}.weight.T"))
        codes = next((m for n in self._found if (m := _BLOCKS.fullmatch(n)) and m["linear"] == name), None)
        if codes is None:
            raise EngineMismatchError(f"the portable graphs hold no weight of {name}; rebuild the bundle")
        return self._block_linear(codes.string.removesuffix(".codes"), int(codes["bits"]), int(codes["block"]))

    def _block_linear(self, kind: str, bits: int, block: int) -> BlockLinear:
        scales = self.floats(f"{kind}.scales")  # [out, blocks]
        out, blocks = scales.shape
        codes = torch.from_numpy(self.bytes(f"{kind}.codes")).reshape(out, blocks, block * bits // 8)
        zeros: Tensor | None = None
        if f"{kind}.zeros.dense" in self._found:  # rows that do not end at a byte
            packed = torch.from_numpy(self.bytes(f"{kind}.zeros.dense"))
            zeros = unpacked(packed, bits)[: out * blocks].reshape(out, blocks)
        elif f"{kind}.zeros" in self._found:
            packed = torch.from_numpy(self.bytes(f"{kind}.zeros")).reshape(out, -1)
            zeros = unpacked(packed, bits)[:, :blocks].contiguous()
        return BlockLinear(codes, scales, zeros, bits)


class Linear(ABC):
    """x [..., in] -> [..., out], without bias. kind: layers of one kind can be one matrix."""

    kind: tuple[object, ...]

    @abstractmethod
    def __call__(self, x: Tensor) -> Tensor: ...

    @abstractmethod
    def to(self, device: torch.device, dtype: torch.dtype) -> Linear:
        """On that device; weights stored as floats in that type. Copied only where one of the two is another."""

    @abstractmethod
    def joined(self, others: Sequence[Any]) -> Linear:
        """One layer from this and others of its kind, their outputs one after the other: a copy in memory."""


class PlainLinear(Linear):
    """weight: [in, out], of the type of x."""

    kind = ("plain",)

    def __init__(self, weight: Tensor) -> None:
        self._weight = weight

    def __call__(self, x: Tensor) -> Tensor:
        return x @ self._weight

    def to(self, device: torch.device, dtype: torch.dtype) -> PlainLinear:
        return PlainLinear(self._weight.to(device, dtype))

    def joined(self, others: Sequence[PlainLinear]) -> PlainLinear:
        return PlainLinear(torch.cat([p._weight for p in (self, *others)], dim=1))


class BlockLinear(Linear):
    """Integer blocks along the inputs, which stay integers: the arguments of `kernels.block_linear`."""

    def __init__(self, codes: Tensor, scales: Tensor, zeros: Tensor | None, bits: int) -> None:
        self._codes, self._scales, self._zeros, self._bits = codes, scales, zeros, bits
        self.kind = ("blocks", bits, *codes.shape[1:], zeros is None)

    def __call__(self, x: Tensor) -> Tensor:
        y = block_linear(x.reshape(-1, x.shape[-1]), self._codes, self._scales, self._zeros, self._bits)
        return y.view(*x.shape[:-1], -1)

    def to(self, device: torch.device, dtype: torch.dtype) -> BlockLinear:
        zeros = None if self._zeros is None else self._zeros.to(device)
        return BlockLinear(self._codes.to(device), self._scales.to(device), zeros, self._bits)

    def joined(self, others: Sequence[BlockLinear]) -> BlockLinear:
        parts = (self, *others)
        zeros = [p._zeros for p in parts if p._zeros is not None]  # of all of them, or none
        codes, scales = torch.cat([p._codes for p in parts]), torch.cat([p._scales for p in parts])
        return BlockLinear(codes, scales, torch.cat(zeros) if zeros else None, self._bits)


def joined(parts: Iterable[Linear]) -> Callable[[Tensor], Tensor]:
    """A layer whose outputs are those of `parts`, one after the other; neighbours stored alike are one matrix."""
    runs = [list(run) for _, run in groupby(parts, key=lambda part: part.kind)]
    whole = [first.joined(others) if others else first for first, *others in runs]
    return whole[0] if len(whole) == 1 else lambda x: torch.cat([part(x) for part in whole], dim=-1)
