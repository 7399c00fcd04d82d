"""Stand-ins for a GPU: `cuda.bindings.runtime` on host memory, and TensorRT-RTX whose engines compute their own ONNX
file with onnxruntime. Every pointer, size, shape and profile is checked as the real ones would (or corrupt memory).

An engine file of the stand-in holds the path of its ONNX file.
"""

from __future__ import annotations

import ctypes
import json
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np

VERSION = "1.7.1.stand-in"
NUMPY = {"FLOAT": np.float32, "FLOAT16": np.float16, "INT64": np.int64, "INT32": np.int32, "UINT8": np.uint8}


class CudaError(int):
    name = "cudaErrorMemoryAllocation"


class Cuda(ModuleType):
    """Device memory is numpy's, full of NaN when it is new. limit: bytes that can be held at once. calls: what was
    asked for, in order."""

    H2D, D2H, D2D = 1, 2, 3

    def __init__(self, limit: int = 1 << 31) -> None:
        super().__init__("cuda.bindings.runtime")
        self.memory: dict[int, np.ndarray] = {}
        self.limit, self.next, self.calls = limit, 1 << 40, []
        kinds = {"HostToDevice": self.H2D, "DeviceToHost": self.D2H, "DeviceToDevice": self.D2D}
        self.cudaMemcpyKind = SimpleNamespace(**{f"cudaMemcpy{k}": v for k, v in kinds.items()})

    @property
    def held(self) -> int:
        return sum(len(m) for m in self.memory.values())

    def view(self, pointer: int, nbytes: int) -> np.ndarray:
        """The bytes there. Fails beyond what was given out, and in what was freed."""
        base = max((b for b in self.memory if b <= pointer), default=None)
        assert base is not None, f"{pointer:#x} is no device memory"
        at = pointer - base
        assert at + nbytes <= len(self.memory[base]), f"{nbytes} bytes at {at} of {len(self.memory[base])}"
        return self.memory[base][at : at + nbytes]

    def cudaSetDevice(self, index: int) -> tuple[int]:  # noqa: N802
        self.calls.append(("device", index))
        return (0,)

    def cudaStreamCreate(self) -> tuple[int, int]:  # noqa: N802
        return 0, 7

    def cudaStreamDestroy(self, stream: int) -> tuple[int]:  # noqa: N802
        assert stream == 7
        return (0,)

    def cudaStreamSynchronize(self, stream: int) -> tuple[int]:  # noqa: N802
        assert stream == 7
        self.calls.append(("wait",))
        return (0,)

    def cudaMalloc(self, nbytes: int) -> tuple[int, int]:  # noqa: N802
        if self.held + nbytes > self.limit:
            return CudaError(2), 0
        pointer, self.next = self.next, self.next + nbytes + (-nbytes % 256) + 4096
        self.memory[pointer] = np.full(nbytes, 0xFF, np.uint8)
        return 0, pointer

    def cudaFree(self, pointer: int) -> tuple[int]:  # noqa: N802
        del self.memory[pointer]
        return (0,)

    def cudaMemsetAsync(self, pointer: int, value: int, nbytes: int, stream: int) -> tuple[int]:  # noqa: N802
        assert stream == 7
        self.view(pointer, nbytes)[:] = value
        return (0,)

    def cudaMemcpyAsync(self, to: int, source: int, nbytes: int, kind: int, stream: int) -> tuple[int]:  # noqa: N802
        assert stream == 7
        self._bytes(to, nbytes, kind != self.D2H)[:] = self._bytes(source, nbytes, kind != self.H2D)
        self.calls.append(({self.H2D: "in", self.D2H: "out", self.D2D: "copy"}[kind], nbytes))
        return (0,)

    def cudaMemcpy2DAsync(  # noqa: N802
        self, to: int, to_pitch: int, source: int, source_pitch: int, width: int, height: int, kind: int, stream: int
    ) -> tuple[int]:
        assert (kind, stream) == (self.D2D, 7)
        assert width <= min(to_pitch, source_pitch) < 2**31
        for row in range(height):
            self.view(to + row * to_pitch, width)[:] = self.view(source + row * source_pitch, width)
        self.calls.append(("rows", width, height))
        return (0,)

    def _bytes(self, pointer: int, nbytes: int, on_device: bool) -> np.ndarray:
        if on_device:
            return self.view(pointer, nbytes)
        return np.frombuffer((ctypes.c_uint8 * nbytes).from_address(pointer), np.uint8)


class TensorRt(ModuleType):
    """refuse: the next call of this name fails, and says so in the log."""

    def __init__(self, cuda: Cuda, name: str = "tensorrt_rtx") -> None:
        super().__init__(name)
        self.cuda, self.refuse, self.log = cuda, "", None
        self.launches: list[dict[str, Any]] = []
        self.__version__ = VERSION
        self.ILogger = type("ILogger", (), {"__init__": lambda self: None})
        self.IStreamWriter = type("IStreamWriter", (), {"__init__": lambda self: None})
        self.INetworkDefinition = SimpleNamespace(add_attention=1, add_kv_cache_update=1)
        self.ExecutionContextAllocationStrategy = SimpleNamespace(USER_MANAGED="user")
        self.Runtime = lambda log: Runtime(self, log)

    def refused(self, name: str) -> bool:
        if self.refuse == name:
            self.log.log("Severity.ERROR", f"stand-in refuses\n{name}")
        return self.refuse == name


class Runtime:
    def __init__(self, module: TensorRt, log: Any) -> None:
        self.module = module
        module.log = log

    def deserialize_cuda_engine(self, data: bytes) -> Engine | None:
        return None if self.module.refused("deserialize") else Engine(self.module, Path(data.decode()))


class RuntimeCache:
    def __init__(self) -> None:
        self.content = b""

    def deserialize(self, data: bytes) -> bool:
        self.content = data
        return True

    def serialize(self) -> bytes:
        return self.content + b"kernels;"


class Engine:
    def __init__(self, module: TensorRt, onnx: Path) -> None:
        import onnxruntime as ort

        self.module = module
        self.session = ort.InferenceSession(str(onnx), providers=["CPUExecutionProvider"])
        self.values = {v.name: v for v in (*self.session.get_inputs(), *self.session.get_outputs())}
        self.inputs = [v.name for v in self.session.get_inputs()]
        sidecar = json.loads(onnx.with_suffix(".json").read_text())
        self.profiles, self.dims = sidecar["profiles"], {s["name"]: s["dims"] for s in sidecar["inputs"]}

    def create_runtime_config(self) -> Any:
        config = SimpleNamespace(set_execution_context_allocation_strategy=lambda how: None)
        if self.module.__name__ == "tensorrt_rtx":
            config.create_runtime_cache = RuntimeCache
            config.set_runtime_cache = lambda cache: setattr(config, "cache", cache)
        return config

    def create_execution_context(self, config: Any) -> Context | None:
        return None if self.module.refused("context") else Context(self)


class Context:
    def __init__(self, engine: Engine) -> None:
        self.engine, self.module = engine, engine.module
        self.profile: int | None = None
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.memory = 0

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        assert stream == 7
        self.profile = profile
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        """As TensorRT: False outside the profile."""
        assert self.profile is not None
        self.shapes[name] = shape
        bounds = self.engine.profiles[self.profile]
        fits = [
            size == dim if isinstance(dim, int) else bounds[dim][0] <= size <= bounds[dim][2]
            for size, dim in zip(shape, self.engine.dims[name], strict=True)
        ]
        return all(fits) and not self.module.refused("shape")

    def set_tensor_address(self, name: str, pointer: int) -> bool:
        self.addresses[name] = pointer
        return name in self.engine.values

    def infer_shapes(self) -> list[str]:
        return [n for n in self.engine.inputs if n not in self.shapes]

    def update_device_memory_size_for_shapes(self) -> int:
        return sum(int(np.prod(s)) for s in self.shapes.values())

    def set_device_memory(self, pointer: int, nbytes: int) -> None:
        self.module.cuda.view(pointer, nbytes)
        self.memory = nbytes

    def execute_async_v3(self, stream: int) -> bool:
        assert stream == 7
        assert self.memory >= self.update_device_memory_size_for_shapes()
        assert set(self.addresses) == set(self.engine.values), "every tensor has an address"
        if self.module.refused("execute"):
            return False
        self.module.launches.append({"profile": self.profile, "shapes": dict(self.shapes)})
        self.module.cuda.calls.append(("launch", self.profile))
        feeds = {n: self._array(n, self.shapes[n]).copy() for n in self.engine.inputs}
        names = [n for n in self.engine.values if n not in feeds]
        for name, x in zip(names, self.engine.session.run(names, feeds), strict=True):
            self._array(name, x.shape)[...] = x
        return True

    def _array(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        kind = self.engine.values[name].type[len("tensor(") : -1].upper()
        dtype = np.dtype(NUMPY[kind])
        view = self.module.cuda.view(self.addresses[name], int(np.prod(shape)) * dtype.itemsize)
        return view.view(dtype).reshape(shape)
