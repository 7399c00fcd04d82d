"""`tensorrt` and `tensorrt-rtx`: engines compiled from half-precision ONNX files, and JSON beside them.

TensorRT-RTX builds here without a GPU; TensorRT only where the GPU is. docs/tensorrt.md says what is proven where.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
from pathlib import Path
from typing import Any

import onnx

from wsi_rt.export.arch import LlamaConfig
from wsi_rt.export.graphs.dilated_attention_rtx import HEADROOM
from wsi_rt.export.graphs.half import Half, half_of
from wsi_rt.export.graphs.write import EMBED, Component
from wsi_rt.export.plugins.lowering import PROGRAMS
from wsi_rt.export.plugins.register import register_plugins
from wsi_rt.export.targets.architectures import check_types
from wsi_rt.export.targets.base import Lowered
from wsi_rt.export.tensorrt.build import Options, build_engine
from wsi_rt.export.tensorrt.check import specs, trajectory
from wsi_rt.export.tensorrt.profiles import profiles
from wsi_rt.export.tensorrt.sources import Sources, write_sources
from wsi_rt.runtime.atomic import atomic_write
from wsi_rt.runtime.devices import require_gpu
from wsi_rt.runtime.engines.tensorrt_api import Family, family, load
from wsi_rt.runtime.engines.tensorrt_sidecar import Profile, Sidecar, sidecar_path
from wsi_rt.runtime.errors import InputError
from wsi_rt.runtime.features.store_place import default_root
from wsi_rt.runtime.hashing import sha256_file
from wsi_rt.runtime.manifest import TensorSpec


def lower(component: Component, folder: Path, threads: int, target: str, sms: tuple[int, ...], dtype: str) -> Lowered:
    """Writes the component's engine for all of `sms` to `folder`, and JSON beside it. The ONNX files, of which engines
    for other architectures are made too, stand in the component's folder; a language model's token embeddings are the
    portable `embed.onnx` there.

    target: `tensorrt` or `tensorrt-rtx`. dtype: "fp16" or "bf16". threads: of the check on the CPU; 0 is onnxruntime's
    default.

    Raises InputError for an architecture that is not built for, MachineError without the module, for `tensorrt` without
    a GPU, and when it refuses a node.
    """
    of, half = family(target), half_of(dtype)
    sms = _checked(of, sms, component.config.component, half)
    module = load(of)
    if not of.ahead_of_time:
        register_plugins()
    c, shared = component.config, component.weights.path.parent
    sources = write_sources(component, of, half, sms[0])
    engine = folder / f"{sources.role}.engine"
    _build(module, of, half, sources, profiles(c), sms, engine)
    graphs = {sources.role: engine} | ({EMBED: shared / f"{EMBED}.onnx"} if isinstance(c, LlamaConfig) else {})
    return Lowered(
        graphs=graphs,
        weights_dir=shared,
        requires={"isa": platform.machine(), "sm": ",".join(map(str, sms))},
        trajectory=lambda inputs: trajectory(c, sources, inputs, threads),
        source={} if isinstance(c, LlamaConfig) else {sources.role: sources.runnable},
    )


def _checked(of: Family, sms: tuple[int, ...], component: str, half: Half) -> tuple[int, ...]:
    """The architectures, for `tensorrt` this machine's own if none is told."""
    if not of.ahead_of_time:
        here = require_gpu(of.name).sm
        if sms not in ((), (here,)):
            told = ",".join(map(str, sms))
            raise InputError(f"--sm is {told}, this machine's GPU is {here}: {of.name} builds for that alone")
        sms = (here,)
    unknown = [sm for sm in sms if of.ahead_of_time and sm not in of.sms]
    if unknown or not sms:
        told = ",".join(map(str, sms)) or "not given"
        raise InputError(f"--sm is {told}, {of.name} builds for: {', '.join(map(str, of.sms))}")
    check_types(sms, {component: half.name})
    return sms


def _build(
    module: Any,
    of: Family,
    half: Half,
    sources: Sources,
    bounds: tuple[Profile, ...],
    sms: tuple[int, ...],
    engine: Path,
) -> None:
    """The engine and its JSON, which is whole or not there."""
    graph = onnx.load(str(sources.compiled), load_external_data=False).graph
    inputs, outputs = (tuple(TensorSpec(*s) for s in specs(v)) for v in (graph.input, graph.output))
    call = sources.plugin
    if call is not None:
        low, opt, high = call.programs([bounds[0]["tiles"][k] for k in range(3)])
        bounds = tuple({**p, PROGRAMS: (low, opt, high)} for p in bounds)
    options = Options(sms, bounds, timing_cache=_timing_cache(of, module, sms))
    built = build_engine(module, of, sources.compiled, inputs, options, engine)
    packages = ("onnx",) if call is None else ("onnx", "triton")
    sidecar = Sidecar(
        target=of.name,
        version=module.__version__,
        sms=sms,
        precision=half.name,
        inputs=inputs,
        outputs=outputs,
        profiles=bounds,
        memory_bytes=built.memory_bytes,
        weights_bytes=built.weights_bytes,
        layers=built.layers,
        toolchain={of.module: module.__version__} | {n: importlib.metadata.version(n) for n in packages},
        onnx={p.name: sha256_file(p) for p in (sources.compiled, sources.compiled.with_name("weights.data"))},
        least={HEADROOM: 1.0} if any(s.name == HEADROOM for s in outputs) else {},
        tables={PROGRAMS: call.table()} if call is not None else {},
    )
    with atomic_write(sidecar_path(engine)) as path:
        path.write_text(json.dumps(sidecar.to_json(), indent=1, sort_keys=True) + "\n")


def _timing_cache(of: Family, module: Any, sms: tuple[int, ...]) -> Path | None:
    """Of TensorRT, below the user's cache folder; TensorRT-RTX times nothing when it builds."""
    if of.ahead_of_time:
        return None
    path = default_root() / of.name / f"timing-sm{sms[0]}-{module.__version__}.cache"
    path.parent.mkdir(parents=True, exist_ok=True)
    return path
