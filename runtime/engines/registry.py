"""Targets and what opens them, imported only when asked for."""

from __future__ import annotations

from dataclasses import dataclass
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
    Opening raises InputError when the component is not compiled for the target."""

    target: str
    engine: str
    decoder: str

    def open_engine(self, root: Path, manifest: EngineManifest, threads: int) -> Engine:
        return _load(self.engine).open(root, manifest, manifest.compiled(self.target), threads)

    def open_decoder(self, root: Path, manifest: EngineManifest, threads: int, fast: bool = False) -> Decoder:
        return self.decoder_class().open(root, manifest, manifest.compiled(self.target), threads, fast)

    def decoder_class(self) -> type[Decoder]:
        return _load(self.decoder)


_BACKENDS = (Backend("ort-cpu", "wsi_rt.runtime.engines.ort:OrtEngine", "wsi_rt.runtime.llm.ort_decoder:OrtDecoder"),)
TARGETS = {b.target: b for b in _BACKENDS}


def backend(target: str) -> Backend:
    """Raises InputError listing the targets when there is none of that name."""
    if target not in TARGETS:
        raise InputError(f"target is {target!r}, expected one of: {', '.join(TARGETS)}")
    return TARGETS[target]


def _load(where: str):
    module, name = where.split(":")
    return getattr(import_module(module), name)
