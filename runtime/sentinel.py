"""Values that are not finite: found as they come, computed once more in higher precision, named and counted.

A bundle of rounded weights holds a graph of higher precision for the same weights: the portable one, which multiplies
them with fp32 activations. An fp32 bundle has nothing higher, so there the first bad row ends the run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from wsi_rt.runtime.bundle import Bundle
from wsi_rt.runtime.engines.base import Array, Engine
from wsi_rt.runtime.engines.ort import OrtEngine
from wsi_rt.runtime.errors import WsiRtError
from wsi_rt.runtime.manifest import EngineManifest

OpenWider = Callable[[], Engine]
NAMED = 5  # in a note


def wider_engine(bundle: Bundle, name: str) -> OpenWider | None:
    """What opens a component's portable graph, on onnxruntime's CPU provider whatever the target; None where the
    component is fp32 already."""
    manifest = bundle.component(name)
    compiled = manifest.compiled(bundle.target)
    if compiled.precision == "fp32":
        return None
    portable = replace(compiled, graphs=manifest.portable, weights_dir=name, precision="fp32")

    def open_it() -> Engine:
        with bundle.unreplaced():
            return OrtEngine.open(bundle.root, manifest, portable, bundle.threads)

    return open_it


class Sentinel:
    """Watches the rows of one stage of one slide. `retried`: names of the rows that were computed again.

    what: how a row is called, slide first, such as "slide.svs: tile". Context manager: closes what it opened.
    """

    def __init__(self, what: str, engine: EngineManifest, wider: OpenWider | None = None) -> None:
        self._what, self._manifest, self._open = what, engine, wider
        self._wider: Engine | None = None
        self._stack = ExitStack()
        self.retried: list[object] = []

    def __enter__(self) -> Sentinel:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def mend(self, x: NDArray[np.float32], names: Sequence[object], again: Callable[[Engine, Array], Array]) -> None:
        """Computes the rows of x [N, C] that are not finite again, in place.

        again: (engine of higher precision, their indices [n]) -> their new values [n, C].
        Raises WsiRtError naming the first row for which that does not help.
        """
        bad = np.flatnonzero(~np.isfinite(x).all(axis=1))
        if not bad.size:
            return
        if self._open is not None:
            if self._wider is None:
                self._wider = self._stack.enter_context(self._open())
            x[bad] = again(self._wider, bad)
            self.retried += [names[int(i)] for i in bad]
        still = bad[~np.isfinite(x[bad]).all(axis=1)]
        if still.size:
            raise self._hopeless(names[int(still[0])], len(still), len(x))

    def _hopeless(self, name: object, count: int, total: int) -> WsiRtError:
        tried = "" if self._open is None else ", in fp32 too"
        fix = "check the engines with `wsi-rt verify DIR`, and report this if they pass"
        rounded = {compiled.precision for compiled in self._manifest.targets.values()} - {"fp32"}
        if rounded:
            wider = "bf16" if rounded == {"fp16"} else "fp32"  # fp16 ends at 65,504
            fix = f"rebuild the engines with --precision {self._manifest.name}={wider}; if they are that, {fix}"
        return WsiRtError(
            f"{self._what} {name} encodes to values that are not finite{tried} ({count} of {total} in this step do); "
            f"{fix}"
        )

    def notes(self) -> tuple[str, ...]:
        if not self.retried:
            return ()
        named = ", ".join(str(name) for name in self.retried[:NAMED])
        rest = f" and {len(self.retried) - NAMED} more" if len(self.retried) > NAMED else ""
        precision = next((c.precision for c in self._manifest.targets.values()), "reduced precision")
        what = "1 row" if len(self.retried) == 1 else f"{len(self.retried)} rows"
        return (
            f"{what} not finite in {precision} and computed again with fp32 activations: {self._what} {named}{rest}",
        )
