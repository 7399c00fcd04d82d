"""ONNX Runtime on an NVIDIA GPU: the CUDA or the TensorRT execution provider, whichever was asked for, or an error."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from wsi_rt.runtime import devices
from wsi_rt.runtime.engines.base import Array, Engine
from wsi_rt.runtime.engines.ort import plain_failure
from wsi_rt.runtime.engines.ort_provider import Provider
from wsi_rt.runtime.errors import InputError, MachineError, WsiRtError
from wsi_rt.runtime.features.store_place import default_root
from wsi_rt.runtime.hashing import sha256_json
from wsi_rt.runtime.manifest import Compiled, EngineManifest
from wsi_rt.runtime.packages import installed_version

if TYPE_CHECKING:
    import onnxruntime

TARGET = "ort-cuda"
ENVIRONMENT = "WSI_RT_ORT_PROVIDER"  # which of these runs `ort-cuda` engines
CUDA, TENSORRT = "CUDAExecutionProvider", "TensorrtExecutionProvider"
PROVIDERS = {"cuda": CUDA, "tensorrt": TENSORRT}
_REPLACE = "pip uninstall -y onnxruntime onnxruntime-gpu && pip install onnxruntime-gpu"
_CACHE = "ort-tensorrt"  # below the user's cache folder


class OrtCudaEngine(Engine):
    """One ONNX graph in one session, its inputs and outputs in the GPU's memory."""

    def __init__(
        self, manifest: EngineManifest, precision: str, session: onnxruntime.InferenceSession, provider: Provider
    ) -> None:
        super().__init__(manifest, precision)
        self._session: onnxruntime.InferenceSession | None = session
        self._provider = provider

    @classmethod
    def open(cls, root: Path, manifest: EngineManifest, compiled: Compiled, threads: int) -> OrtCudaEngine:
        """Raises MachineError, naming what is missing, where onnxruntime cannot use the GPU."""
        return cls.on(gpu_provider(manifest, compiled, threads), root, manifest, compiled)

    @classmethod
    def on(cls, provider: Provider, root: Path, manifest: EngineManifest, compiled: Compiled) -> OrtCudaEngine:
        session = provider.open(root / compiled.graphs["model"], root / compiled.weights_dir)
        return cls(manifest, compiled.precision, session, provider)

    def _run(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> dict[str, Array]:
        names = list(outputs) or [s.name for s in self.manifest.outputs]
        found = self.run_device({name: self._provider.put(x) for name, x in inputs.items()}, names)
        with plain_failure(self.manifest.name):
            arrays = {name: x.numpy() for name, x in found.items()}
        for name, x in outputs.items():
            np.copyto(x, arrays[name], casting="no")
        return dict(outputs) or arrays

    def run_device(
        self, inputs: Mapping[str, onnxruntime.OrtValue], names: list[str]
    ) -> dict[str, onnxruntime.OrtValue]:
        """The same on values that lie on the device, where its outputs stay. Names and shapes are the caller's."""
        if self._session is None:
            raise WsiRtError(f"{self.manifest.name}: this engine is closed")
        with plain_failure(self.manifest.name):
            return self._provider.run(self._session, inputs, names)

    def close(self) -> None:
        self._session = None


def gpu_provider(manifest: EngineManifest, compiled: Compiled, threads: int) -> Provider:
    """What $WSI_RT_ORT_PROVIDER asks for (default: cuda). Raises InputError, MachineError."""
    asked = os.environ.get(ENVIRONMENT, "cuda")
    if asked not in PROVIDERS:
        raise InputError(f"{ENVIRONMENT} is {asked!r}, expected one of: {', '.join(PROVIDERS)}")
    gpu = devices.require_gpu(TARGET)
    problem = onnxruntime_problem(PROVIDERS[asked])
    if problem is not None:
        raise MachineError(f"{TARGET}: {problem}")
    # TF32 rounds the factors of a product to 10 bits: 1e-3 off, twenty times what fp32 may be.
    cuda = {"device_id": str(gpu.index), "use_tf32": "0"}
    if asked == "cuda":
        return Provider((CUDA,), (cuda,), "cuda", gpu.index, threads)
    os.environ["NVIDIA_TF32_OVERRIDE"] = "0"  # the TensorRT provider has no option for it
    return Provider((TENSORRT, CUDA), (tensorrt_options(manifest, compiled, gpu), cuda), "cuda", gpu.index, threads)


def tensorrt_options(manifest: EngineManifest, compiled: Compiled, gpu: devices.Gpu) -> dict[str, str]:
    """Of the TensorRT provider, which compiles at the first run: what it made is kept for the same files, architecture
    and versions, and for no others."""
    key = {
        "engines": manifest.digest,
        "precision": compiled.precision,
        "sm": gpu.sm,
        "gpu": gpu.name,
        "driver": devices.driver_version(),
        "versions": {name: installed_version(name) for name in ("onnxruntime-gpu", "tensorrt")},
    }
    folder = default_root() / _CACHE / f"{manifest.name}-sm{gpu.sm}-{sha256_json(key)[:24]}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise MachineError(f"{folder}: {e.strerror}; set WSI_RT_CACHE to a folder that can be written") from e
    return {
        "device_id": str(gpu.index),
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": str(folder),
        "trt_timing_cache_enable": "1",
        "trt_timing_cache_path": str(folder),
    }


def onnxruntime_problem(provider: str = CUDA) -> str | None:
    """What keeps the installed onnxruntime from `provider`, with the command that fixes it; None: nothing is known to.
    Loads CUDA's libraries as onnxruntime would."""
    if installed_version("onnxruntime") and installed_version("onnxruntime-gpu"):
        return f"onnxruntime and onnxruntime-gpu are both installed and overwrite each other: {_REPLACE}"
    try:
        import onnxruntime as ort
    except ImportError as e:
        return f"onnxruntime does not import ({e}): pip install onnxruntime-gpu"
    if provider not in ort.get_available_providers():
        return f"onnxruntime {ort.__version__} is a build without {provider}: {_REPLACE}"
    wanted, driver = str(getattr(ort, "cuda_version", "") or ""), devices.cuda_version()
    if driver and wanted and int(wanted.split(".")[0]) > driver[0]:
        return (
            f"onnxruntime-gpu {ort.__version__} is built for CUDA {wanted}, the driver supports "
            f"{driver[0]}.{driver[1]}: install a newer driver, or an onnxruntime-gpu for that CUDA"
        )
    told = _loaded(ort)
    if told:
        packages = f"onnxruntime-gpu[cuda,cudnn]=={ort.__version__}"
        return f"CUDA libraries that onnxruntime needs do not load ({told}): pip install '{packages}'"
    return None


def _loaded(ort: object) -> str:
    """What `onnxruntime.preload_dlls`, which prints, says of libraries that it could not load."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        ort.preload_dlls()  # type: ignore[attr-defined]
    failed = [line for line in said.getvalue().splitlines() if line.startswith("Failed to load")]
    return failed[0].removeprefix("Failed to load ") if failed else ""
