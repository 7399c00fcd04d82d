"""TensorRT and TensorRT-RTX engines behind the engine seam: encoders and projector.

Has not run on a GPU: everything that needs none (which profile, sizes, checks, the order of copies and launches) is
tested with a stand-in for the modules that computes with onnxruntime.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from wsi_rt.kernels.dilated_attention.programs import program_table
from wsi_rt.runtime.engines.base import Array, Engine
from wsi_rt.runtime.engines.tensorrt_session import Session
from wsi_rt.runtime.engines.tensorrt_sidecar import sizes
from wsi_rt.runtime.errors import WsiRtError
from wsi_rt.runtime.manifest import Compiled, EngineManifest


class TensorRtEngine(Engine):
    """Arrays are the host's: a run copies them in, launches, and copies the outputs out."""

    def __init__(self, manifest: EngineManifest, precision: str, session: Session) -> None:
        super().__init__(manifest, precision)
        self._session: Session | None = session

    @classmethod
    def open(cls, root: Path, manifest: EngineManifest, compiled: Compiled, threads: int) -> TensorRtEngine:
        """threads: not used. Raises what `Session` raises."""
        return cls(manifest, compiled.precision, Session(root / compiled.graphs["model"], manifest.name))

    def _run(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> dict[str, Array]:
        session = self._session
        if session is None:
            raise WsiRtError(f"{self.manifest.name}: this engine is closed")
        sidecar, device = session.sidecar, session.device
        given = {**inputs, **self._tables(inputs)}
        dims = sizes(sidecar.inputs, {n: x.shape for n, x in given.items()}, self.manifest.name)
        profile = sidecar.profile_for(dims, self.manifest.name)
        addresses = {}
        for name, x in given.items():
            contiguous = np.ascontiguousarray(x)
            addresses[name] = session.buffers.take(name, contiguous.nbytes)
            device.write(addresses[name], contiguous)
        made = self._outputs(dims, outputs)
        for name, x in made.items():
            addresses[name] = session.buffers.take(name, x.nbytes)
        session.launch(profile, {n: x.shape for n, x in given.items()}, addresses)
        wanted = {n: x for n, x in made.items() if not outputs or n in outputs or n in sidecar.least}
        for name, x in wanted.items():
            device.read(x, addresses[name])
        device.wait()
        self._require_range(wanted)
        return {n: x for n, x in wanted.items() if n not in sidecar.least}

    def close(self) -> None:
        if self._session is not None:
            self._session.close()
            self._session = None

    def _tables(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Inputs of the engine that follow from the others: the programs of the dilated-attention plugin."""
        found: dict[str, Array] = {}
        for name, table in self._opened().sidecar.tables.items():
            if table["kind"] != "dilated_programs":
                raise WsiRtError(f"{self.manifest.name}: no table of kind {table['kind']!r}; use a newer wsi-rt")
            lists = table["segment_lengths"], table["dilated_ratios"], table["heads"], table["block_m"]
            found[name] = program_table((len(inputs["features"]) + 1,), *lists)
        return found

    def _outputs(self, dims: Mapping[str, int], told: Mapping[str, Array]) -> dict[str, Array]:
        """The caller's arrays, and fresh ones for what the engine gives beside: it writes all its outputs."""
        made: dict[str, Array] = {}
        for spec in self._opened().sidecar.outputs:
            x = told.get(spec.name)
            if x is None:
                x = np.empty([d if isinstance(d, int) else dims[d] for d in spec.dims], spec.dtype)
            made[spec.name] = x
        return made

    def _require_range(self, outputs: Mapping[str, Any]) -> None:
        for name, least in self._opened().sidecar.least.items():
            if not float(outputs[name]) >= least:  # NaN fails
                raise WsiRtError(
                    f"{self.manifest.name}: sums of exponentials leave the range of {self.precision} on this input "
                    f"({name} is {float(outputs[name]):.3g}, at least {least:g}); build it with --precision "
                    f"{self.manifest.name}=bf16"
                )

    def _opened(self) -> Session:
        if self._session is None:
            raise WsiRtError(f"{self.manifest.name}: this engine is closed")
        return self._session
