"""What an operator hands to the ahead-of-time harness: the configurations it ships, and what they cost.

Each `kernels/<op>/triton.py` (imported only on request: Triton is optional) has `aot_cases() -> list[AotCase]`;
each `kernels/<op>/cost.py` has `cost(size: int, dtype_bytes: int) -> Cost` at the published sizes, where size counts
what `aot.OPS` says: tiles of a slide, tokens, sequences.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

SHIPPED_SM = (80, 86, 89, 90, 100, 120)  # Ampere, Ada, Hopper, Blackwell: data centre and consumer


@dataclass(frozen=True)
class AotCase:
    """One kernel configuration as it is launched: enough to compile it without a GPU.

    Every parameter of `kernel` is a key of `signature`; those of type "constexpr" are keys of `constexprs`.
    """

    op: str  # "dilated_attention"
    variant: str  # "fp16-D48": unique together with op and sm
    sm: int  # one of SHIPPED_SM
    kernel: Any  # the @triton.jit function
    signature: Mapping[str, str]  # parameter name -> Triton type: "*fp16", "i32", "constexpr"
    constexprs: Mapping[str, Any]
    divisible: tuple[str, ...]  # parameters promised to be multiples of 16 (pointer alignment, strides)
    num_warps: int
    num_stages: int
    matrix: bool  # a matrix-product kernel: must show tensor-core instructions

    @property
    def name(self) -> str:
        """ "dilated_attention/fp16-D48/sm90": the key of the committed table."""
        return f"{self.op}/{self.variant}/sm{self.sm}"


@dataclass(frozen=True)
class Sizes:
    """What a call of an operator grows with, and how much of it its roofline is shown for."""

    unit: str  # "tiles", "tokens", "sequences"
    shown: tuple[int, ...]


@dataclass(frozen=True)
class Cost:
    """Work of one call at the published sizes."""

    flops: float
    bytes: float  # global memory, each datum counted once
