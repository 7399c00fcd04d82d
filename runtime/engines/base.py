"""The engine seam: open -> run* -> close. One small file per backend implements `_run`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from wsi_rt.runtime.errors import InputError
from wsi_rt.runtime.manifest import EngineManifest, TensorSpec

Array = NDArray  # numpy on the CPU


class Engine(ABC):
    """A compiled function of named arrays. Context manager; `close` may be called twice. `precision`: as compiled.
    facts: where and how it runs, as far as its target does not say (Pipeline tells them in `settings`)."""

    facts: Mapping[str, str] = MappingProxyType({})

    def __init__(self, manifest: EngineManifest, precision: str) -> None:
        self.manifest, self.precision = manifest, precision

    def run(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array] | None = None) -> dict[str, Array]:
        """Compute every output, or only `outputs`, which are filled in place without a copy.

        Inputs must match the manifest in name, dtype and shape (one size per symbolic dimension, within
        its profile); memory to fill is contiguous. Raises InputError naming given and expected.
        """
        dims: dict[str, int] = {}
        self._check(self.manifest.inputs, inputs, dims, complete=True)
        self._check(self.manifest.outputs, outputs or {}, dims, complete=False)
        self._check_memory(outputs or {})
        return self._run(inputs, outputs or {})

    @abstractmethod
    def _run(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> dict[str, Array]:
        """Inputs and outputs are checked; an empty `outputs` means all of them, freshly allocated."""

    @abstractmethod
    def close(self) -> None:
        """Release what the backend holds."""

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check(
        self, specs: tuple[TensorSpec, ...], arrays: Mapping[str, Array], dims: dict[str, int], complete: bool
    ) -> None:
        name = self.manifest.name
        expected = {s.name for s in specs}
        wrong = set(arrays) ^ expected if complete else set(arrays) - expected
        if wrong:
            raise InputError(f"{name}: given {sorted(arrays)}, expected {sorted(expected)}")
        for spec in specs:
            if spec.name in arrays:
                self._check_one(spec, arrays[spec.name], dims)

    def _check_memory(self, outputs: Mapping[str, Array]) -> None:
        for name, x in outputs.items():
            if not (x.flags.c_contiguous and x.flags.writeable):
                what = "read-only" if x.flags.c_contiguous else "not contiguous"
                raise InputError(f"{self.manifest.name}: `{name}` is {what}, expected memory to fill in place")

    def _check_one(self, spec: TensorSpec, array: Array, dims: dict[str, int]) -> None:
        told = f"{self.manifest.name}: `{spec.name}` is {array.dtype}{list(array.shape)}"
        wanted = f"expected {spec.dtype}{list(spec.dims)}"
        if array.dtype != np.dtype(spec.dtype) or array.ndim != len(spec.dims):
            raise InputError(f"{told}, {wanted}")
        for size, dim in zip(array.shape, spec.dims, strict=True):
            if isinstance(dim, int):
                if size != dim:
                    raise InputError(f"{told}, {wanted}")
                continue
            if dims.setdefault(dim, size) != size:
                raise InputError(f"{told}, {wanted} with {dim} = {dims[dim]} as in the other arrays")
            low, _, high = self.manifest.profile.get(dim, (0, 0, size))
            if not low <= size <= high:
                raise InputError(f"{told}, {wanted} with {dim} between {low} and {high}")
