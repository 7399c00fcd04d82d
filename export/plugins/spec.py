"""What a plugin is to TensorRT, in plain values: dtypes, shapes, launch geometry, scalars."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Protocol

from wsi_rt.kernels.aot_case import SHIPPED_SM, AotCase
from wsi_rt.kernels.errors import KernelInputError

# A number, or TensorRT's symbolic expression of one: both know + - * //.
Dim = Any
Shape = Sequence[Dim]
# GPUs that run the Triton operators by their elder's table, but load no PTX made for it: its target ends in "a".
PTX_OF = {103: "sm_100a", 121: "sm_120a"}
TENSORRT_TYPES = {"fp16": "FP16", "bf16": "BF16", "fp32": "FP32"}


class Plugin(Protocol):
    """Constants of one engine; a frozen dataclass whose fields are the plugin's attributes (int, float, str)."""

    inputs: ClassVar[tuple[str, ...]]  # names, in order
    other_inputs: ClassVar[tuple[str, ...]]  # TensorRT types of those behind the first, "*" for that of the first

    def dtypes(self) -> list[str]:
        """Of "fp16", "bf16", "fp32", those that the first input may have; the output has the same."""

    def case(self, dtype: str) -> AotCase:
        """The configuration to compile. Parameters: inputs, integer scalars, output."""

    def output_shape(self, *inputs: Shape) -> tuple[Dim, ...]:
        """Of the one output."""

    def grid(self, *inputs: Shape) -> tuple[Dim, Dim]:
        """Programs along x and y."""

    def scalars(self, *inputs: Shape) -> tuple[Dim, ...]:
        """The int32 arguments between inputs and output."""


def check_architecture(sm: int) -> None:
    """Raises KernelInputError on an architecture that no plugin's PTX loads on."""
    expected = f"expected one of {', '.join(map(str, SHIPPED_SM))}"
    if sm in PTX_OF:
        raise KernelInputError(
            f"architecture {sm}: PTX for {PTX_OF[sm]} does not load there, {expected}; "
            "use the Triton operator outside TensorRT"
        )
    if sm not in SHIPPED_SM:
        raise KernelInputError(f"architecture {sm}, {expected}")


def io_types(plugin: Plugin) -> str:
    """Supported types of inputs and output as `tensorrt.plugin.AutoTuneCombination` reads them ("|": chosen together).

    https://docs.nvidia.com/deeplearning/tensorrt/latest/_static/python-api/infer/tensorrt.plugin/trt_plugin_autotune/AutoTuneCombination.html
    """
    together = "|".join(TENSORRT_TYPES[dtype] for dtype in plugin.dtypes())
    others = (together if t == "*" else t for t in plugin.other_inputs)
    return ", ".join([together, *others, together])
