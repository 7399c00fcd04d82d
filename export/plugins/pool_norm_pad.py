"""The TensorRT plugin of pooling, LayerNorm and padding: tokens [L, C], weight, bias -> [pooled, padded].

One slide a launch. The kernel itself is launched: its parameters are inputs, integers, output already.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from wsi_rt.export.plugins.spec import Dim, Shape, check_architecture
from wsi_rt.kernels.aot_case import AotCase
from wsi_rt.kernels.errors import KernelInputError
from wsi_rt.kernels.pool_norm_pad import WIDEST


@dataclass(frozen=True)
class PoolNormPad:
    """Attributes of the plugin; the width of the norm decides the order (channels: norm then pad).

    Raises KernelInputError on sizes that the kernel does not compute.
    """

    sm: int
    channels: int
    norm: int
    padded: int
    pooled: int
    leading: int  # rows left out at the head of the tokens (1: CLS)
    eps: float

    inputs: ClassVar[tuple[str, ...]] = ("tokens", "weight", "bias")
    other_inputs: ClassVar[tuple[str, ...]] = ("*", "*")

    def __post_init__(self) -> None:
        check_architecture(self.sm)
        fits = 1 <= self.channels <= self.padded <= WIDEST and self.norm in (self.channels, self.padded)
        if not fits or self.pooled < 1 or self.leading < 0 or not 0 <= self.eps < math.inf:
            raise KernelInputError(
                f"{self}: expected 1 <= channels <= padded <= {WIDEST}, norm one of the two, pooled >= 1, "
                "leading >= 0, finite eps >= 0"
            )

    def dtypes(self) -> list[str]:
        return ["fp16", "bf16", "fp32"]

    def case(self, dtype: str) -> AotCase:
        """`pool_norm_pad_kernel` for one slide. Raises KernelInputError on another dtype."""
        from wsi_rt.kernels.pool_norm_pad.triton import launch_options, pool_norm_pad_kernel

        if dtype not in self.dtypes():
            raise KernelInputError(f"{dtype}, expected one of {', '.join(self.dtypes())}")
        constexprs, options = launch_options(self.sm, self.channels, self.padded, self.norm, self.pooled, self.eps)
        pointers = dict.fromkeys(("p_tokens", "p_weight", "p_bias", "p_out"), f"*{dtype}")
        integers = dict.fromkeys(("length", "stride", "leading"), "i32")
        types = {**pointers, **integers, "p_cu": "constexpr", **dict.fromkeys(constexprs, "constexpr")}
        return AotCase(
            op="pool_norm_pad",
            variant=f"plugin-{dtype}-C{self.channels}",
            sm=self.sm,
            kernel=pool_norm_pad_kernel,
            signature={name: types[name] for name in pool_norm_pad_kernel.arg_names},
            constexprs={**constexprs, "p_cu": None},
            divisible=(*pointers, *(("stride",) if self.channels % 16 == 0 else ())),
            matrix=False,
            **options,
        )

    def output_shape(self, *inputs: Shape) -> tuple[Dim, ...]:
        return (self.pooled, self.padded)

    def grid(self, *inputs: Shape) -> tuple[Dim, Dim]:
        """One program a bin."""
        return (self.pooled, 1)

    def scalars(self, *inputs: Shape) -> tuple[Dim, ...]:
        """length, stride, leading."""
        return (inputs[0][0], self.channels, self.leading)
