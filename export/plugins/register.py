"""Registers the plugins with TensorRT >= 10.9. Not run on TensorRT yet: it needs a machine with a GPU.

API: https://docs.nvidia.com/deeplearning/tensorrt/latest/_static/python-api/pluginGuide.html and
https://docs.nvidia.com/deeplearning/tensorrt/latest/_static/python-api/infer/tensorrt.plugin/trt_plugin_aot_impl/index.html
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from functools import cache
from typing import Any, get_type_hints

from wsi_rt.export.plugins.dilated_attention import DilatedAttention
from wsi_rt.export.plugins.pool_norm_pad import PoolNormPad
from wsi_rt.export.plugins.ptx import compile_plugin_kernel
from wsi_rt.export.plugins.spec import Plugin, io_types
from wsi_rt.runtime.errors import MachineError

PLUGINS: dict[str, Callable[..., Plugin]] = {
    "wsi_rt::dilated_attention": DilatedAttention,
    "wsi_rt::pool_norm_pad": PoolNormPad,
}


@cache  # TensorRT refuses a name that it knows; a call that raised is not remembered
def register_plugins() -> None:
    """Make `tensorrt.plugin.op.wsi_rt.{dilated_attention, pool_norm_pad}` known; a second call does nothing.

    A plugin's attributes are the fields of its class, all of them, in their order. They are needed while an engine is
    built and not stored in it. Raises MachineError without TensorRT >= 10.9.
    """
    try:
        import tensorrt as trt
        import tensorrt.plugin as trtp
    except ImportError as e:
        raise MachineError(f"TensorRT plugins need TensorRT >= 10.9 ({e}): pip install tensorrt") from e
    if not hasattr(trtp, "aot_impl"):
        raise MachineError(f"TensorRT is {trt.__version__}, plugins need 10.9 or newer: pip install -U tensorrt")
    dtypes = {trt.float16: "fp16", trt.bfloat16: "bf16", trt.float32: "fp32"}
    for name, plugin in PLUGINS.items():
        _register(trtp, name, plugin, dtypes)


def _register(trtp: Any, name: str, plugin: Any, dtypes: Mapping[Any, str]) -> None:
    """Shapes, type combinations and the kernel of one plugin."""
    hints = get_type_hints(plugin)
    inputs = dict.fromkeys(plugin.inputs, trtp.TensorDesc)
    attributes = {f.name: hints[f.name] for f in fields(plugin)}
    outputs = {"outputs": tuple[trtp.TensorDesc]}
    n = len(inputs)

    def describe(*tensors: Any, **values: Any) -> Any:
        shapes = [list(x.shape_expr) for x in tensors]
        return trtp.from_shape_expr(plugin(**values).output_shape(*shapes), dtype=tensors[0].dtype)

    def combinations(*given: Any) -> list[Any]:
        return [trtp.AutoTuneCombination(io_types(plugin(*given[n:-1])), "LINEAR")]

    def kernel(*given: Any) -> tuple[str, str, Any, Any]:
        dtype = given[0].dtype
        return _launch(trtp, plugin(*given[n:-2]), given[:n], dtypes.get(dtype, str(dtype)))

    returned = tuple[str, str, trtp.KernelLaunchParams, trtp.SymIntExprs]  # type: ignore[name-defined]
    trtp.register(name)(_signed(describe, {**inputs, **attributes}, trtp.TensorDesc))
    trtp.autotune(name)(_signed(combinations, {**inputs, **attributes, **outputs}, list[trtp.AutoTuneCombination]))
    trtp.aot_impl(name)(_signed(kernel, {**inputs, **attributes, **outputs, "tactic": int}, returned))


def _signed(function: Callable[..., Any], parameters: Mapping[str, Any], returned: Any) -> Callable[..., Any]:
    """`function` with the signature that TensorRT reads: names and types of inputs, then of attributes."""
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    listed = [inspect.Parameter(name, kind, annotation=what) for name, what in parameters.items()]
    function.__signature__ = inspect.Signature(listed, return_annotation=returned)  # type: ignore[attr-defined]
    return function


def _launch(trtp: Any, plugin: Plugin, inputs: Sequence[Any], dtype: str) -> tuple[str, str, Any, Any]:
    """(kernel name, PTX, launch parameters, scalars)."""
    kernel = compile_plugin_kernel(plugin.case(dtype))
    shapes = [list(x.shape_expr) for x in inputs]
    launch = trtp.KernelLaunchParams()
    launch.grid_x, launch.grid_y = plugin.grid(*shapes)
    launch.block_x, launch.shared_mem = kernel.threads, kernel.shared_bytes
    scalars = plugin.scalars(*shapes)
    extra = trtp.SymIntExprs(len(scalars))
    for i, scalar in enumerate(scalars):
        extra[i] = trtp.SymInt32(scalar)
    return kernel.name, kernel.ptx, launch, extra
