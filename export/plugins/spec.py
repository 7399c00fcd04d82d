"""What a plugin is to TensorRT, in plain values: dtypes, shapes, launch geometry, scalars."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Protocol

from wsi_rt.kernels.aot_case import AotCase

# A number, or TensorRT's symbolic expression of one: both know + - * //.
Dim = Any
Shape = Sequence[Dim]
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


def io_types(plugin: Plugin) -> str:
    """Supported types of inputs and output as `tensorrt.plugin.AutoTuneCombination` reads them ("|": chosen together).

    https://docs.nvidia.com/deeplearning/tensorrt/latest/_static/python-api/infer/tensorrt.plugin/trt_plugin_autotune/AutoTuneCombination.html
    """
    together = "|".join(TENSORRT_TYPES[dtype] for dtype in plugin.dtypes())
    others = (together if t == "*" else t for t in plugin.other_inputs)
    return ", ".join([together, *others, together])
