"""One component of a bundle: portable graph, the target's graph, stored check, parity."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from onnx import TensorProto, helper
from onnx import load as load_onnx

from wsi_rt.export.arch import ComponentConfig, LlamaConfig, LongNetConfig, ProjectorConfig, ViTConfig, config_json
from wsi_rt.export.graphs import llama, projector, slide_encoder, tile_encoder
from wsi_rt.export.graphs.builder import WeightFile, check_model
from wsi_rt.export.lowering import lower_ort_cpu
from wsi_rt.export.parity import check_inputs, reference_outputs, run_portable, write_check
from wsi_rt.export.sources.weights import Part, WeightSource
from wsi_rt.kernels.slide_embed import GRID
from wsi_rt.runtime.manifest import EngineManifest, TensorSpec
from wsi_rt.runtime.parity import GATES, check_component, compare, require

# Symbolic dimension -> (min, opt, max): what an engine accepts, and what a compiler may tune for.
PROFILES: dict[str, dict[str, tuple[int, int, int]]] = {
    "tile_encoder": {"batch": (1, 32, 256)},
    "slide_encoder": {"tiles": (1, 8192, GRID * GRID)},
    "projector": {"tokens": (1, 576, 4096)},
    "llm": {},
}


@dataclass(frozen=True)
class Graphs:
    """Files of a component by graph role; `weights_dir` is what the engine files' weights are relative to."""

    portable: Mapping[str, Path]
    engine: Mapping[str, Path]
    weights_dir: Path


def build_component(
    name: str, part: Part, work: Path, target: str, precision: str, threads: int, on_step: Callable[[str], None]
) -> EngineManifest:
    """Writes `work/<name>/` and returns its manifest (digest left to the caller, who hashes the files).

    Raises ParityError when the portable or the lowered graph is off.
    """
    folder = work / name
    folder.mkdir()
    on_step("export")
    graphs = _write_graphs(part.config, part.source, folder, target, threads)
    for path in graphs.portable.values():
        check_model(path)
    on_step("fp32 reference")
    inputs = check_inputs(part.config)
    expected = reference_outputs(part.config, part.source, inputs, threads)
    write_check(folder / "check.npz", inputs, expected)
    on_step("parity of the portable graph")
    gate = GATES[precision]
    portable = compare(run_portable(part.config, graphs.portable, inputs, threads), expected)
    require(name, "portable graph", portable, GATES["fp32"])
    manifest = _describe(name, part.config, work, graphs, precision)
    on_step(f"parity of the {target} engine")
    engine = check_component(work, target, manifest, threads)
    require(name, f"{target} engine", engine, gate)
    report = {"portable": portable.to_json(), "engine": engine.to_json(), "gate": vars(gate)}
    return replace(manifest, parity=report)


def _write_graphs(c: ComponentConfig, source: WeightSource, folder: Path, target: str, threads: int = 0) -> Graphs:
    lowered = folder / target
    lowered.mkdir()
    if isinstance(c, LlamaConfig):
        weights = WeightFile(folder / "weights.data")
        portable = {role: folder / f"{role}.onnx" for role in ("embed", "decoder")}
        engine = {role: lowered / f"{role}.onnx" for role in ("embed", "decoder")}
        for path in (portable["embed"], engine["embed"]):
            llama.build_embed(c, source, weights, path)
        llama.LlamaGraph(c, source, weights).build(portable["decoder"])
        llama.OrtCpuLlamaGraph(c, source, weights).build(engine["decoder"])
        return Graphs(portable, engine, folder)
    portable = {"model": folder / "model.onnx"}
    if isinstance(c, ViTConfig):
        tile_encoder.build(c, source, portable["model"])
    elif isinstance(c, LongNetConfig):
        slide_encoder.build(c, source, portable["model"])
    elif isinstance(c, ProjectorConfig):
        projector.build(c, source, portable["model"])
    engine = {"model": lowered / "model.onnx"}
    lower_ort_cpu(portable["model"], engine["model"], threads)
    return Graphs(portable, engine, lowered)


def _describe(name: str, c: ComponentConfig, work: Path, graphs: Graphs, precision: str) -> EngineManifest:
    main = graphs.portable.get("model") or graphs.portable["decoder"]
    graph = load_onnx(str(main), load_external_data=False).graph
    return EngineManifest(
        name=name,
        precision=precision,
        config=config_json(c),
        inputs=tuple(_spec(v) for v in graph.input),
        outputs=tuple(_spec(v) for v in graph.output),
        profile=PROFILES[name],
        portable={role: str(p.relative_to(work)) for role, p in graphs.portable.items()},
        engine={role: str(p.relative_to(work)) for role, p in graphs.engine.items()},
        weights_dir=str(graphs.weights_dir.relative_to(work)),
        check=f"{name}/check.npz",
        parity={},
        digest="",
    )


def _spec(value: Any) -> TensorSpec:
    tensor = value.type.tensor_type
    dims = tuple(d.dim_param or d.dim_value for d in tensor.shape.dim)
    dtype = (
        "float32" if tensor.elem_type == TensorProto.FLOAT else helper.tensor_dtype_to_np_dtype(tensor.elem_type).name
    )
    return TensorSpec(value.name, dtype, dims)
