"""The torch target's encoders: torch on an NVIDIA GPU, with Triton kernels and CUDA graphs, or plain torch on the CPU.

Which of the two is chosen once, by `torch_device.choose_device`, and told: `TorchEngine.facts`. What is written for a
GPU here has not run on one yet; its tests are marked `gpu`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from wsi_rt.kernels.errors import KernelInputError
from wsi_rt.runtime.engines.base import Array, Engine
from wsi_rt.runtime.engines.torch_device import choose_device, compute_dtype, describe
from wsi_rt.runtime.engines.torch_graphs import Staging
from wsi_rt.runtime.engines.torch_layers import Layers
from wsi_rt.runtime.engines.torch_projector import TorchProjector
from wsi_rt.runtime.engines.torch_slide_encoder import TorchSlideEncoder
from wsi_rt.runtime.engines.torch_tile_encoder import TorchTileEncoder
from wsi_rt.runtime.errors import InputError, MachineError, WsiRtError
from wsi_rt.runtime.llm.torch_weights import StoredTensors
from wsi_rt.runtime.manifest import Compiled, EngineManifest


class Component(Protocol):
    """A component's arithmetic: (inputs on the host, names of wanted outputs) -> fp32 outputs on the device."""

    facts: dict[str, str]

    def __call__(self, inputs: Mapping[str, Tensor], wanted: Collection[str]) -> dict[str, Tensor]: ...


_COMPONENTS: Mapping[str, Callable[[EngineManifest, Layers], Component]] = {
    "tile_encoder": TorchTileEncoder,
    "slide_encoder": TorchSlideEncoder,
    "projector": TorchProjector,
}


class TorchEngine(Engine):
    """One component from the weights of its portable graph, whatever target that was built for.

    facts: where it runs, in which type, and what it chose to run on: the target alone does not say. A run waits for a
    GPU once, for its outputs.
    """

    def __init__(
        self, manifest: EngineManifest, precision: str, component: Component, device: torch.device, threads: int
    ) -> None:
        super().__init__(manifest, precision)
        self._component: Component | None = component
        self._device, self._threads, self._staging = device, threads, Staging(device)
        self._dtype = compute_dtype(precision)
        dtype = str(self._dtype).removeprefix("torch.")
        self.facts = {"device": describe(device), "dtype": dtype, **component.facts}

    @classmethod
    def open(
        cls,
        root: Path,
        manifest: EngineManifest,
        compiled: Compiled,
        threads: int,
        device: torch.device | None = None,
    ) -> TorchEngine:
        """device: another than `choose_device` says.

        Raises InputError for a component that is none of the encoders, MachineError without onnx, which reads the
        weights, and where they do not fit, EngineMismatchError when the graph lacks one.
        """
        if manifest.name not in _COMPONENTS:
            raise InputError(f"{manifest.name} is no encoder, expected one of: {', '.join(_COMPONENTS)}")
        device = device or choose_device()
        tensors = StoredTensors(root / path for path in manifest.portable.values())
        with plain_failure(manifest.name), torch.no_grad():
            layers = Layers(tensors, device, compute_dtype(compiled.precision))
            component = _COMPONENTS[manifest.name](manifest, layers)
        kind = TorchTileEngine if isinstance(component, TorchTileEncoder) else cls
        return kind(manifest, compiled.precision, component, device, threads)

    def _run(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> dict[str, Array]:
        component = self._opened()
        wanted = tuple(outputs) or tuple(s.name for s in self.manifest.outputs)
        with plain_failure(self.manifest.name), _threads(self._threads), torch.no_grad():
            computed = component({name: self._sent(name, x) for name, x in inputs.items()}, wanted)
            return self._received(computed, outputs)

    def _sent(self, name: str, x: Array) -> Tensor:
        """As memory that the device can copy from: the array's own where that is the CPU."""
        if self._device.type == "cpu":
            return torch.from_numpy(np.require(x, requirements=("C", "W")))  # W: torch warns of read-only memory
        staged = self._staging.empty(name, x.shape, getattr(torch, x.dtype.name))
        staged.numpy()[...] = x
        return staged

    def _received(self, computed: Mapping[str, Tensor], outputs: Mapping[str, Array]) -> dict[str, Array]:
        if self._device.type == "cuda":
            host = {n: self._staging.empty(f"{n} out", x.shape, x.dtype) for n, x in computed.items()}
            for name, x in computed.items():
                host[name].copy_(x, non_blocking=True)
            torch.cuda.current_stream(self._device).synchronize()
            computed = host
        filled = {}
        for name, x in computed.items():
            filled[name] = outputs[name] if name in outputs else np.empty(tuple(x.shape), np.float32)
            filled[name][...] = x.numpy()
        return filled

    def _opened(self) -> Component:
        if self._component is None:
            raise WsiRtError(f"{self.manifest.name}: this engine is closed")
        return self._component

    def close(self) -> None:
        self._component = None


class TorchTileEngine(TorchEngine):
    """The tile encoder, which also takes tiles that lie on its device (`slides.device.device.DeviceTileEngine`)."""

    @property
    def device(self) -> torch.device:
        return self._device

    @property
    def dtype(self) -> torch.dtype:
        """Of normalised tiles."""
        return self._dtype

    def prepare_device(self, rows: Sequence[int]) -> None:
        """Captures the graphs that batches of so many tiles need, and waits for it."""
        with plain_failure(self.manifest.name):
            self._tiles().prepare(rows)

    def run_device(self, batch: Tensor) -> Tensor:
        """[b, 3, image_px, image_px] normalised, in `dtype`, on `device` -> features f32 [b, C] there, queued on the
        current stream; whole until the next call."""
        with plain_failure(self.manifest.name), torch.no_grad():
            return self._tiles().features(batch)

    def _tiles(self) -> TorchTileEncoder:
        component = self._opened()
        assert isinstance(component, TorchTileEncoder)  # `TorchEngine.open` sees to it
        return component


@contextmanager
def plain_failure(component: str) -> Iterator[None]:
    """What torch and the kernels raise as one line: memory that ran out is the machine's (exit 3), numbers that a
    kernel refuses the input's, anything else the engine's."""
    try:
        yield
    except KernelInputError as e:
        raise InputError(f"{component}: {e}") from e
    except RuntimeError as e:
        reason = str(e).splitlines()[0] if str(e) else type(e).__name__
        if isinstance(e, torch.OutOfMemoryError) or "alloc" in reason.lower():
            raise MachineError(
                f"{component}: memory ran out ({reason}); use a machine with more, or a coarser --target-mpp"
            ) from e
        raise WsiRtError(f"{component}: torch failed ({reason}); check the bundle with wsi-rt verify") from e


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """torch's threads are the process's: as many as this engine has while it runs, then as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
