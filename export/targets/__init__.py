"""Target -> how the export compiles a component for it, imported when it is asked for. What the runtime opens for a
target is in `runtime.engines.registry`; a target can be built only when it is in both.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module

from wsi_rt.export.targets.base import Lowered, Lowering, Order
from wsi_rt.runtime.engines.registry import TARGETS
from wsi_rt.runtime.errors import InputError

__all__ = ["LOWERINGS", "Lowered", "Lowering", "Order", "lowering"]


def _of(module: str) -> Lowering:
    """`lower` of a module of this package."""

    def lower(order: Order) -> Mapping[str, Lowered]:
        return import_module(f"{__name__}.{module}").lower(order)

    return lower


LOWERINGS: dict[str, Lowering] = {
    "ort-cpu": _of("ort_cpu"),
    "ort-cuda": _of("ort_cuda"),
    "torch": _of("torch"),
    "tensorrt": _of("tensorrt"),
    "tensorrt-rtx": _of("tensorrt"),
}


def lowering(target: str) -> Lowering:
    """Raises InputError naming what can be built when `target` is not among it."""
    if target not in LOWERINGS:
        known = " (this wsi-rt opens it, but does not build it)" if target in TARGETS else ""
        raise InputError(f"--target is {target!r}{known}, expected one of: {', '.join(LOWERINGS)}")
    return LOWERINGS[target]
