"""Whether this machine can run what was compiled for a target."""

from __future__ import annotations

import platform
from collections.abc import Mapping

from wsi_rt.runtime import devices
from wsi_rt.runtime.engines.registry import TARGETS, family_of

NO_GPU = "no GPU"


def lacking(target: str, requires: Mapping[str, str]) -> str | None:
    """What is missing: NO_GPU, or "built for sm_90, this machine is sm_89"; None: nothing. requires: of what was
    compiled for the target (`Compiled.requires`)."""
    family = TARGETS.get(family_of(target))
    this = {"isa": platform.machine()}
    if family is not None and family.needs_gpu:
        if not devices.gpus():
            return NO_GPU
        this["sm"] = str(devices.require_gpu(target).sm)
    for what, needed in requires.items():
        if this.get(what) != needed:
            unit = "sm_" if what == "sm" else ""
            return f"built for {unit}{needed}, this machine is {unit}{this.get(what)}"
    return None
