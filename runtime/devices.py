"""NVIDIA GPUs of this machine, asked of the driver's own libraries: no torch, no CUDA toolkit, milliseconds."""

from __future__ import annotations

import ctypes
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

from wsi_rt.runtime.errors import MachineError

DRIVER = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"  # installed with the driver, never by a package
MANAGEMENT = "nvml.dll" if sys.platform == "win32" else "libnvidia-ml.so.1"
_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*, cuda.h
_NO_DEVICE = 100  # CUDA_ERROR_NO_DEVICE
_TEXT_BYTES = 96  # NVML_DEVICE_NAME_V2_BUFFER_SIZE; NVML's version buffer is 80
_ELSEWHERE = "or use engines of a target that runs on the CPU: wsi-rt build-engines --target ort-cpu"

Load = Callable[[str], Any]  # library name -> ctypes handle; OSError where there is none


@dataclass(frozen=True)
class Gpu:
    """One device in the driver's order, CUDA_VISIBLE_DEVICES applied. sm: compute capability, 89 for 8.9."""

    index: int
    name: str
    sm: int
    memory_bytes: int


@dataclass(frozen=True)
class Survey:
    """driver: its version, such as "580.65.06". cuda: the newest CUDA that it supports. problem: why there is no GPU,
    with what to do; None where there is one."""

    gpus: tuple[Gpu, ...] = ()
    driver: str | None = None
    cuda: tuple[int, int] | None = None
    problem: str | None = None


def survey(load: Load = ctypes.CDLL) -> Survey:
    """Look now. Never raises: a driver that answers with an error is a `problem`."""
    try:
        cuda = load(DRIVER)
    except OSError:
        return Survey(
            problem=f"no NVIDIA driver here ({DRIVER} does not load): install one, or in a container pass the GPU "
            "through (docker run --gpus all)"
        )
    version, driver = _call_int(cuda.cuDriverGetVersion), _driver_version(load)
    supported = (version // 1000, version % 1000 // 10) if version else None
    error = int(cuda.cuInit(0))
    gpus = () if error else tuple(_gpu(cuda, i) for i in range(_call_int(cuda.cuDeviceGetCount) or 0))
    return Survey(gpus, driver, supported, None if gpus else _why(error or _NO_DEVICE))


@cache
def found() -> Survey:
    """`survey`, once in a process."""
    return survey()


def gpus() -> tuple[Gpu, ...]:
    return found().gpus


def driver_version() -> str | None:
    return found().driver


def cuda_version() -> tuple[int, int] | None:
    """The newest CUDA that the driver supports."""
    return found().cuda


def require_gpu(target: str) -> Gpu:
    """The first GPU of the architecture that `target` names (`tensorrt-rtx-sm89`), else the first.

    Raises MachineError, with the reason and what to do, where there is none.
    """
    if not gpus():
        raise MachineError(f"{target} needs an NVIDIA GPU: {found().problem}; {_ELSEWHERE}")
    sm = sm_of(target)
    return next((gpu for gpu in gpus() if gpu.sm == sm), gpus()[0])


def sm_of(target: str) -> int | None:
    """The architecture in the name of a bundle's target."""
    match = re.fullmatch(r".*-sm(\d+)", target)
    return int(match[1]) if match else None


def _why(error: int) -> str:
    if error == _NO_DEVICE:
        return "the driver sees no GPU: check nvidia-smi and CUDA_VISIBLE_DEVICES"
    return f"the driver answers with CUDA error {error}: check nvidia-smi (803 asks for a restart after its update)"


def _gpu(cuda: Any, index: int) -> Gpu:
    device, memory, name = ctypes.c_int(), ctypes.c_size_t(), ctypes.create_string_buffer(_TEXT_BYTES)
    cuda.cuDeviceGet(ctypes.byref(device), index)
    cuda.cuDeviceGetName(name, _TEXT_BYTES, device)
    cuda.cuDeviceTotalMem_v2(ctypes.byref(memory), device)
    major, minor = (_call_int(cuda.cuDeviceGetAttribute, what, device) or 0 for what in (_MAJOR, _MINOR))
    return Gpu(index, name.value.decode(errors="replace"), 10 * major + minor, memory.value)


def _call_int(function: Any, *arguments: Any) -> int | None:
    """What a driver function writes into its first argument; None where it fails."""
    value = ctypes.c_int()
    return None if function(ctypes.byref(value), *arguments) else value.value


def _driver_version(load: Load) -> str | None:
    try:
        nvml = load(MANAGEMENT)
    except OSError:
        return None
    if nvml.nvmlInit_v2():
        return None
    text = ctypes.create_string_buffer(_TEXT_BYTES)
    failed = nvml.nvmlSystemGetDriverVersion(text, _TEXT_BYTES)
    nvml.nvmlShutdown()
    return None if failed else text.value.decode(errors="replace")
