"""The ONNX files that an engine is compiled from, in half precision, and those that onnxruntime can run of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import onnx

from wsi_rt.export.arch import LlamaConfig, LongNetConfig, ViTConfig
from wsi_rt.export.graphs import dilated_attention_rtx, llama_rtx, tile_encoder_rtx
from wsi_rt.export.graphs.builder import WeightFile
from wsi_rt.export.graphs.half import Half, write_half
from wsi_rt.export.graphs.layers import Style
from wsi_rt.export.graphs.write import DECODER, MODEL, Component, write_main
from wsi_rt.export.plugins.lowering import PluginCall, call_plugin
from wsi_rt.runtime.engines.tensorrt_api import Family


@dataclass(frozen=True)
class Sources:
    """role: of the one graph. compiled: what TensorRT parses. runnable: the same numbers for onnxruntime on the CPU,
    which has no bf16 kernels (computed in fp32, rounded to bf16 wherever the other graph rounds) and no plugins (their
    calls as fused attention). Both read `weights.data` beside them. plugin: the call that TensorRT gets a kernel for.
    """

    role: str
    compiled: Path
    runnable: Path
    plugin: PluginCall | None = None


def write_sources(component: Component, family: Family, half: Half, sm: int) -> Sources:
    """In a folder of the component, `<family>-onnx`; engines of other architectures find them there. sm: of the GPU,
    which a plugin depends on; `tensorrt`, which has plugins, builds for one alone."""
    c, shared = component.config, component.weights.path.parent
    folder = shared / f"{family.name}-onnx"
    role = DECODER if isinstance(c, LlamaConfig) else MODEL
    compiled, runnable = folder / f"{role}.onnx", folder / f"{role}-cpu.onnx"
    plugin = PluginCall.of(c, half.name, sm) if isinstance(c, LongNetConfig) and not family.ahead_of_time else None
    if folder.exists():
        return Sources(role, compiled, runnable if runnable.exists() else compiled, plugin)
    folder.mkdir()
    portable = folder / "fp32.onnx"
    _write_fp32(component, portable)
    weights = WeightFile(folder / "weights.data")
    borders = _half_borders(component)
    emulated = half.name == "bf16"
    for path, for_cpu in ((compiled, False), (runnable, True)):
        if for_cpu and not emulated and plugin is None:
            break  # onnxruntime runs what TensorRT parses
        model = onnx.load(str(portable), load_external_data=False)
        if isinstance(c, LongNetConfig):
            if plugin is not None and not for_cpu:
                call_plugin(model, plugin)
            else:
                dilated_attention_rtx.fuse_calls(model, c.heads, c.width // c.heads, half.name)
        write_half(model, shared, path, weights, half, borders, emulated=for_cpu and emulated)
    portable.unlink()
    return Sources(role, compiled, runnable if runnable.exists() else compiled, plugin)


def _write_fp32(component: Component, path: Path) -> None:
    """Its weights stand in the component's own file, where the portable graphs have them too."""
    c, source, weights = component.config, component.source, component.weights
    if isinstance(c, ViTConfig):
        tile_encoder_rtx.build(c, source, weights, path, Style())
    elif isinstance(c, LlamaConfig):
        llama_rtx.build(c, source, weights, path, Style(), c.context)
    else:
        write_main(component, path, Style())


def _half_borders(component: Component) -> tuple[str, ...]:
    c = component.config
    if not isinstance(c, LlamaConfig):
        return ()
    return (*llama_rtx.cache_names(c.layers), *llama_rtx.updated_names(c.layers))
