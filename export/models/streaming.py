"""Weights that are in memory only while the part of a module that needs them runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import nn


def stream_weights(module: nn.Module, units: Sequence[str], get: Callable[[str], NDArray[np.float32]]) -> None:
    """Give a module built on the meta device its weights: those of the submodules `units` before each of their
    forwards, taken back after it; all others now, for good. `get`: state-dict name -> fp32 array.
    """
    streamed = tuple(f"{unit}." for unit in units)
    for name in [n for n, _ in module.named_parameters(remove_duplicate=False) if not n.startswith(streamed)]:
        owner, _, leaf = name.rpartition(".")
        _assign(module.get_submodule(owner), {leaf: get(name)})
    for unit in units:
        _stream_unit(module.get_submodule(unit), unit, get)


def _stream_unit(part: nn.Module, prefix: str, get: Callable[[str], NDArray[np.float32]]) -> None:
    import torch

    names = [n for n, _ in part.named_parameters(remove_duplicate=False)]

    def load(*_: object) -> None:
        _assign(part, {n: get(f"{prefix}.{n}") for n in names})

    def unload(*_: object) -> None:
        part.load_state_dict({n: torch.empty_like(p, device="meta") for n, p in part.state_dict().items()}, assign=True)

    part.register_forward_pre_hook(load)
    part.register_forward_hook(unload, always_call=True)


def _assign(part: nn.Module, arrays: dict[str, NDArray[np.float32]]) -> None:
    """Raises RuntimeError when a tensor is not as the module has it."""
    import torch

    part.load_state_dict({n: torch.from_numpy(x) for n, x in arrays.items()}, assign=True, strict=False)
