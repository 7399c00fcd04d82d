"""Targets and what opens them, imported only when asked for."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from wsi_rt.runtime.errors import InputError
from wsi_rt.runtime.manifest import EngineManifest

if TYPE_CHECKING:
    from wsi_rt.runtime.engines.base import Engine
    from wsi_rt.runtime.llm.decoder import Decoder


@dataclass(frozen=True)
class Backend:
    """Where a target's engine and decoder live: "module:class", each with `open(root, manifest, compiled, threads)`.
    Opening raises InputError when the component is not compiled for the target.

    needs_gpu: it does not run without one. per_sm: compiled for one GPU architecture, which a bundle's name of the
    target then ends with (`tensorrt-rtx-sm89`).
    """

    target: str
    engine: str
    decoder: str
    needs_gpu: bool = False
    per_sm: bool = False

    def open_engine(self, root: Path, manifest: EngineManifest, threads: int) -> Engine:
        return _load(self.engine).open(root, manifest, manifest.compiled(self.target), threads)

    def open_decoder(self, root: Path, manifest: EngineManifest, threads: int, fast: bool = False) -> Decoder:
        return self.decoder_class().open(root, manifest, manifest.compiled(self.target), threads, fast)

    def decoder_class(self) -> type[Decoder]:
        return _load(self.decoder)


_BACKENDS = (
    Backend("ort-cpu", "wsi_rt.runtime.engines.ort:OrtEngine", "wsi_rt.runtime.llm.ort_decoder:OrtDecoder"),
    Backend(
        "ort-cuda",
        "wsi_rt.runtime.engines.ort_cuda:OrtCudaEngine",
        "wsi_rt.runtime.llm.ort_cuda_decoder:OrtCudaDecoder",
        needs_gpu=True,
    ),
    Backend(
        "torch",
        "wsi_rt.runtime.engines.torch_engine:TorchEngine",
        "wsi_rt.runtime.llm.torch_decoder:TorchDecoder",
    ),
    *(
        Backend(
            target,
            "wsi_rt.runtime.engines.tensorrt:TensorRtEngine",
            "wsi_rt.runtime.llm.tensorrt_decoder:TensorRtDecoder",
            needs_gpu=True,
            per_sm=True,
        )
        for target in ("tensorrt", "tensorrt-rtx")
    ),
)
TARGETS = {b.target: b for b in _BACKENDS}


def family_of(target: str) -> str:
    """A bundle's name of a target without the architecture: what --target takes."""
    return re.sub(r"-sm\d+$", "", target)


def backend(target: str) -> Backend:
    """Raises InputError listing the targets when there is none of that name."""
    found = TARGETS.get(family_of(target))
    if found is None or (target != found.target and not found.per_sm):
        raise InputError(f"target is {target!r}, expected one of: {', '.join(TARGETS)}")
    return replace(found, target=target)


def _load(where: str):
    module, name = where.split(":")
    return getattr(import_module(module), name)
