"""One TensorRT or TensorRT-RTX engine on a GPU: profiles, memory, launches. Shared by the encoders and the decoder.

Has not run on a GPU: its order of calls, sizes and errors are tested with a stand-in for the modules.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from wsi_rt.runtime.atomic import atomic_write
from wsi_rt.runtime.devices import Gpu, require_gpu
from wsi_rt.runtime.engines.tensorrt_api import Family, Messages, collected, family, load, logger
from wsi_rt.runtime.engines.tensorrt_device import Device, Growing
from wsi_rt.runtime.engines.tensorrt_sidecar import Sidecar, read_sidecar
from wsi_rt.runtime.errors import EngineMismatchError, WsiRtError
from wsi_rt.runtime.features.store_place import default_root
from wsi_rt.runtime.hashing import sha256_json

Shapes = Mapping[str, Sequence[int]]
_SCRATCH = "\0scratch"  # no tensor has such a name


class Session:
    """device: with the stream that everything runs in. Activations get memory by the shapes of a call, one piece for
    all profiles."""

    def __init__(self, path: Path, name: str) -> None:
        """The engine at `path`, of the component `name`. Raises MachineError without the module, a GPU or memory,
        EngineMismatchError, with the command that rebuilds, when it is not for this machine."""
        self.sidecar = read_sidecar(path)
        of = family(self.sidecar.target)
        gpu = require_gpu(f"{of.name}-sm{self.sidecar.sms[0]}")
        self._module = load(of)
        _check_match(self.sidecar, gpu, self._module.__version__, path)
        self.name, self.device = name, Device(gpu.index)
        self.buffers = Growing(self.device)
        self._cache_path = _cache_path(of, self.sidecar, gpu, self._module.__version__)
        with collected(self._module) as messages:
            self._runtime = self._module.Runtime(logger(self._module))
            self._engine: Any = self._runtime.deserialize_cuda_engine(path.read_bytes())
        if self._engine is None:
            raise EngineMismatchError(
                f"{path}: {of.module} cannot open it ({messages.why()}); {_rebuild(self.sidecar, gpu)}"
            )
        self._config, self._kept = self._runtime_config()
        self._contexts: dict[int, Any] = {}

    def launch(self, profile: int, shapes: Shapes, addresses: Mapping[str, int]) -> None:
        """Enqueue one run. shapes: of the inputs. addresses: device memory of every input and output."""
        with collected(self._module) as messages:
            context = self._context(profile, messages)
            for name, shape in shapes.items():
                self._must(context.set_input_shape(name, tuple(shape)), f"shape {list(shape)} of `{name}`", messages)
            for name, pointer in addresses.items():
                self._must(context.set_tensor_address(name, pointer), f"memory of `{name}`", messages)
            missing = context.infer_shapes()
            self._must(not missing, f"a run without {', '.join(missing)}", messages)
            needed = int(context.update_device_memory_size_for_shapes())
            context.set_device_memory(self.buffers.take(_SCRATCH, needed), needed)
            self._must(context.execute_async_v3(self.device.stream), "the run", messages)

    def close(self) -> None:
        """Keep what was compiled for this machine, and release everything; closing twice is fine."""
        if self._engine is None:
            return
        self.device.wait()
        if self._kept is not None and self._contexts:
            with suppress(OSError, WsiRtError):  # a cache that cannot be written: compiled again next time
                self._cache_path.parent.mkdir(parents=True, exist_ok=True)
                with atomic_write(self._cache_path) as path:
                    path.write_bytes(bytes(self._kept.serialize()))
        self._contexts.clear()
        self._config = self._kept = self._engine = self._runtime = None
        self.buffers.close()
        self.device.close()

    def _runtime_config(self) -> tuple[Any, Any]:
        """TensorRT-RTX compiles kernels here, when shapes are first met, and its runtime cache keeps them for the next
        process; one that does not fit this machine it rejects, and compiles again."""
        config = self._engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(self._module.ExecutionContextAllocationStrategy.USER_MANAGED)
        if not hasattr(config, "create_runtime_cache"):
            return config, None
        cache = config.create_runtime_cache()
        if self._cache_path.is_file():
            cache.deserialize(self._cache_path.read_bytes())
        config.set_runtime_cache(cache)
        return config, cache

    def _context(self, profile: int, messages: Messages) -> Any:
        if self._engine is None:
            raise WsiRtError(f"{self.name}: this engine is closed")
        if profile not in self._contexts:
            context = self._engine.create_execution_context(self._config)
            self._must(context is not None, "an execution context", messages)
            chosen = context.set_optimization_profile_async(profile, self.device.stream)
            self._must(chosen, f"profile {profile}", messages)
            self._contexts[profile] = context
        return self._contexts[profile]

    def _must(self, done: Any, what: str, messages: Messages) -> None:
        if not done:
            raise WsiRtError(
                f"{self.name}: {self._module.__name__} refuses {what} ({messages.why()}); check the bundle with "
                "wsi-rt verify"
            )


def _check_match(sidecar: Sidecar, gpu: Gpu, version: str, path: Path) -> None:
    if gpu.sm not in sidecar.sms:
        built_for = ", ".join(f"sm_{sm}" for sm in sidecar.sms)
        raise EngineMismatchError(
            f"{path}: built for {built_for}, this GPU ({gpu.name}) is sm_{gpu.sm}; {_rebuild(sidecar, gpu)}"
        )
    if version != sidecar.version:
        raise EngineMismatchError(
            f"{path}: built by {sidecar.target} {sidecar.version}, installed is {version}; "
            f"pip install {family(sidecar.target).package}=={sidecar.version}, or {_rebuild(sidecar, gpu)}"
        )


def _rebuild(sidecar: Sidecar, gpu: Gpu) -> str:
    sms = f" --sm {gpu.sm}" if family(sidecar.target).ahead_of_time else ""
    return (
        f"rebuild it from its checkpoint: wsi-rt build-engines --checkpoint SRC --target {sidecar.target}{sms} "
        f"--precision {sidecar.precision} --out DIR"
    )


def _cache_path(of: Family, sidecar: Sidecar, gpu: Gpu, version: str) -> Path:
    """Of one engine on one kind of GPU; the bundle's own folder may be read-only."""
    made_of = sha256_json(dict(sidecar.onnx))[:16]
    return default_root() / of.name / f"{made_of}-sm{gpu.sm}-{version}.runtime-cache"
