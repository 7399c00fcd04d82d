"""The tensors of a bundle's portable language model graphs as torch tensors, memory-mapped, and the Linear layers that
they make."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wsi_rt.runtime.errors import EngineMismatchError, MachineError

_BLOCKS = re.compile(r"(?P<linear>.+)\.weight\.int(?P<bits>[48])x(?P<block>\d+)\.codes")
_FP32 = 1  # onnx.TensorProto.FLOAT
_DEQUANTISED_VALUES = 1 << 24  # of a matrix at a time: 64 MB in fp32, where a 7 B model's largest takes 524


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
        """The Linear `name`, in fp32 or in blocks, as the bundle stores it."""
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
        if f"{kind}.zeros.dense" in self._found:  # rows that do not end at a byte
            packed = torch.from_numpy(self.bytes(f"{kind}.zeros.dense"))
            zeros = unpacked(packed, bits)[: out * blocks].reshape(out, blocks)
        elif f"{kind}.zeros" in self._found:
            packed = torch.from_numpy(self.bytes(f"{kind}.zeros")).reshape(out, -1)
            zeros = unpacked(packed, bits)[:, :blocks]
        else:
            zeros = torch.tensor(1 << (bits - 1), dtype=torch.uint8).expand(out, blocks)
        return BlockLinear(codes, scales, zeros, bits)


class Linear(ABC):
    """x f32 [rows, in] -> [rows, out], without bias."""

    @abstractmethod
    def __call__(self, x: Tensor) -> Tensor: ...


class PlainLinear(Linear):
    """weight: f32 [in, out]."""

    def __init__(self, weight: Tensor) -> None:
        self._weight = weight

    def __call__(self, x: Tensor) -> Tensor:
        return x @ self._weight


class BlockLinear(Linear):
    """Integer blocks along the inputs, made fp32 again some rows at a time whenever the layer is used: exact, in the
    memory of the integers, and as slow as writing the fp32 matrix out. A GPU target puts a fused kernel here.

    codes: u8 [out, blocks, block * bits / 8]; scales f32 and zeros u8 [out, blocks].
    """

    def __init__(self, codes: Tensor, scales: Tensor, zeros: Tensor, bits: int) -> None:
        self._codes, self._scales, self._zeros, self._bits = codes, scales, zeros, bits

    def __call__(self, x: Tensor) -> Tensor:
        out, inputs = len(self._codes), x.shape[-1]
        y = x.new_empty((*x.shape[:-1], out))
        step = max(1, _DEQUANTISED_VALUES // inputs)
        for rows in (slice(a, min(a + step, out)) for a in range(0, out, step)):
            y[..., rows] = x @ self._matrix(rows)[:, :inputs].T
        return y

    def _matrix(self, rows: slice) -> Tensor:
        """f32 [rows, blocks * block]: the last block may reach beyond the inputs."""
        codes = unpacked(self._codes[rows], self._bits).to(torch.float32)
        codes -= self._zeros[rows, :, None]
        codes *= self._scales[rows, :, None]
        return codes.flatten(1)


def unpacked(packed: Tensor, bits: int) -> Tensor:
    """u8 [..., n] -> one code to a byte; of two 4-bit ones in a byte, that in the low half is the first."""
    if bits == 8:
        return packed
    return torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2)
