"""How an operator is fed and answered. Needs torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}

Inputs = Mapping[str, Tensor]
Run = Callable[[], Tensor]


@dataclass(frozen=True)
class Operator:
    """How one operator is fed and answered.

    inputs: (size, dtype, device) -> tensors, size as `kernels.aot.OPS` counts it; exact: inputs -> the answer in fp32;
    scale: inputs -> the largest value that rounding is relative to; providers: name -> inputs -> what is timed (raises
    UnavailableError); eager: the provider whose error is the yardstick of the others.
    """

    inputs: Callable[[int, torch.dtype, torch.device], Inputs]
    exact: Callable[[Inputs], Tensor]
    scale: Callable[[Inputs], float]
    providers: Mapping[str, Callable[[Inputs], Run]]
    eager: str


def random_tensors(
    shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, device: torch.device
) -> dict[str, Tensor]:
    """Normal, each tensor its own, the same on every device."""
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator).to(device, dtype) for name, shape in shapes.items()}
