"""Memory and copies on one GPU, by cuda-bindings alone. Has not run on a GPU: a stand-in for the bindings tests it."""

from __future__ import annotations

import weakref
from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wsi_rt.runtime.errors import MachineError

_ALIGN = 256  # of what cudaMalloc gives, and TensorRT wants


def bindings() -> Any:
    """`cuda.bindings.runtime`. Raises MachineError, naming the pip command, when it is not there."""
    try:
        return import_module("cuda.bindings.runtime")
    except ImportError as e:
        raise MachineError(f"GPU memory needs cuda-bindings ({e}): pip install cuda-bindings") from e


class Device:
    """A GPU and one stream on it; everything below is in the stream's order. index: the driver's.

    Methods raise MachineError with CUDA's name of what went wrong.
    """

    def __init__(self, index: int = 0) -> None:
        self._cuda = bindings()
        self._do("cudaSetDevice", index)
        self.stream: int = int(self._do("cudaStreamCreate"))

    def _do(self, name: str, *arguments: Any) -> Any:
        error, *found = getattr(self._cuda, name)(*arguments)
        if int(error):
            told = getattr(error, "name", str(error))
            hint = "; free GPU memory, or use a GPU with more" if "Memory" in told else ""
            raise MachineError(f"{name} failed with {told}{hint}")
        return found[0] if found else None

    def alloc(self, nbytes: int) -> Buffer:
        """Not initialised."""
        return Buffer(self, int(self._do("cudaMalloc", max(nbytes, _ALIGN))), nbytes)

    def free(self, pointer: int) -> None:
        """Waits for what still uses it."""
        self._do("cudaFree", pointer)

    def write(self, pointer: int, array: NDArray[Any]) -> None:
        """Host -> device. The array may be changed when this returns: pageable memory is staged first."""
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._do("cudaMemcpyAsync", pointer, array.ctypes.data, array.nbytes, kind, self.stream)

    def read(self, array: NDArray[Any], pointer: int) -> None:
        """Device -> host; complete after `wait`."""
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._do("cudaMemcpyAsync", array.ctypes.data, pointer, array.nbytes, kind, self.stream)

    def copy(self, to: int, source: int, nbytes: int) -> None:
        """Device -> device."""
        self._do("cudaMemcpyAsync", to, source, nbytes, self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToDevice, self.stream)

    def copy_rows(self, to: int, to_pitch: int, source: int, source_pitch: int, row_bytes: int, rows: int) -> None:
        """Device -> device: rows of bytes, each so many bytes behind the one before."""
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        self._do("cudaMemcpy2DAsync", to, to_pitch, source, source_pitch, row_bytes, rows, kind, self.stream)

    def clear(self, pointer: int, nbytes: int) -> None:
        self._do("cudaMemsetAsync", pointer, 0, nbytes, self.stream)

    def wait(self) -> None:
        self._do("cudaStreamSynchronize", self.stream)

    def close(self) -> None:
        self._do("cudaStreamDestroy", self.stream)


class Buffer:
    """Device memory, freed with the object."""

    def __init__(self, device: Device, pointer: int, nbytes: int) -> None:
        self.device, self.pointer, self.nbytes = device, pointer, nbytes
        self._free = weakref.finalize(self, device.free, pointer)

    def free(self) -> None:
        """Freeing twice is fine."""
        self._free()


class Growing:
    """One buffer for each name, replaced by a larger one when it is too small."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._buffers: dict[str, Buffer] = {}

    def take(self, name: str, nbytes: int) -> int:
        """A pointer to at least so many bytes; what was in them is lost when it grows."""
        held = self._buffers.get(name)
        if held is None or held.nbytes < nbytes:
            if held is not None:
                self._device.wait()
                held.free()
            held = self._buffers[name] = self._device.alloc(nbytes)
        return held.pointer

    def close(self) -> None:
        for buffer in self._buffers.values():
            buffer.free()
        self._buffers.clear()


def to_half(x: NDArray[np.float32], dtype: str) -> NDArray[np.uint16]:
    """Nearest float16 or bfloat16 of fp32, ties to even, as bits; numpy has no bfloat16."""
    x = np.ascontiguousarray(x)
    if dtype == "float16":
        return x.astype(np.float16).view(np.uint16)
    bits = x.view(np.uint32)
    rounded = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
    return np.where(np.isnan(x), np.uint32(0x7FC0), rounded).astype(np.uint16)


def from_half(bits: NDArray[np.uint16], dtype: str) -> NDArray[np.float32]:
    if dtype == "float16":
        return bits.view(np.float16).astype(np.float32)
    return (bits.astype(np.uint32) << 16).view(np.float32)
