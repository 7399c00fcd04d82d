"""One component of a bundle: portable graph, the target's graph, stored check, parity."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from onnx import TensorProto, helper
from onnx import load as load_onnx

from wsi_rt.export.arch import ComponentConfig, LlamaConfig, LongNetConfig, ProjectorConfig, ViTConfig, config_json
from wsi_rt.export.graphs import llama, projector, slide_encoder, tile_encoder
from wsi_rt.export.graphs.builder import WeightFile, check_model
from wsi_rt.export.parity import check_inputs, reference_outputs, run_portable, write_check
from wsi_rt.export.sources.weights import Part, WeightSource
from wsi_rt.export.targets import Lowered, Portable, lowering
from wsi_rt.kernels.slide_embed import GRID
from wsi_rt.runtime.hashing import sha256_json
from wsi_rt.runtime.manifest import Compiled, EngineManifest, TensorSpec
from wsi_rt.runtime.parity import GATES, check_component, compare, require

# Symbolic dimension -> (min, opt, max): what an engine accepts, and what a compiler may tune for.
PROFILES: dict[str, dict[str, tuple[int, int, int]]] = {
    "tile_encoder": {"batch": (1, 32, 256)},
    "slide_encoder": {"tiles": (1, 8192, GRID * GRID)},
    "projector": {"tokens": (1, 576, 4096)},
    "llm": {},
}


def build_component(
    name: str, part: Part, work: Path, target: str, precision: str, threads: int, on_step: Callable[[str], None]
) -> EngineManifest:
    """Writes `work/<name>/` and returns its manifest (digest left to the caller, who hashes the files).

    Raises ParityError when the portable or the lowered graph is off.
    """
    folder = work / name
    folder.mkdir()
    on_step("export")
    graphs = _write_portable(part.config, part.source, folder)
    lowered = _lower(graphs, folder, target, threads)
    for path in graphs.graphs.values():
        check_model(path)
    on_step("fp32 reference")
    inputs = check_inputs(part.config)
    expected = reference_outputs(part.config, part.source, inputs, threads)
    write_check(folder / "check.npz", inputs, expected)
    on_step("parity of the portable graph")
    portable = compare(run_portable(part.config, graphs.graphs, inputs, threads), expected)
    require(name, "portable graph", portable, GATES["fp32"])
    compiled = _compiled(lowered, work, precision)
    manifest = replace(_describe(name, graphs, work), portable_parity=portable.to_json(), targets={target: compiled})
    on_step(f"parity of the {target} engine")
    engine = check_component(work, target, manifest, threads)
    gate = GATES[precision]
    require(name, f"{target} engine", engine, gate)
    parity = {"engine": engine.to_json(), "gate": vars(gate)}
    return replace(manifest, targets={target: replace(compiled, parity=parity)})


def _write_portable(c: ComponentConfig, source: WeightSource, folder: Path) -> Portable:
    if isinstance(c, LlamaConfig):
        weights = WeightFile(folder / "weights.data")
        graphs = {role: folder / f"{role}.onnx" for role in ("embed", "decoder")}
        llama.build_embed(c, source, weights, graphs["embed"])
        llama.LlamaGraph(c, source, weights).build(graphs["decoder"])
        return Portable(c, source, graphs, weights)
    graphs = {"model": folder / "model.onnx"}
    if isinstance(c, ViTConfig):
        tile_encoder.build(c, source, graphs["model"])
    elif isinstance(c, LongNetConfig):
        slide_encoder.build(c, source, graphs["model"])
    elif isinstance(c, ProjectorConfig):
        projector.build(c, source, graphs["model"])
    return Portable(c, source, graphs)


def _lower(portable: Portable, folder: Path, target: str, threads: int = 0) -> Lowered:
    (folder / target).mkdir()
    return lowering(target)(portable, folder / target, threads)


def _compiled(lowered: Lowered, work: Path, precision: str) -> Compiled:
    """Its parity is not known yet."""
    return Compiled(
        graphs={role: str(p.relative_to(work)) for role, p in lowered.graphs.items()},
        weights_dir=str(lowered.weights_dir.relative_to(work)),
        precision=precision,
        parity={},
        requires=lowered.requires,
    )


def _describe(name: str, portable: Portable, work: Path) -> EngineManifest:
    """What does not depend on a target."""
    main = portable.graphs.get("model") or portable.graphs["decoder"]
    graph = load_onnx(str(main), load_external_data=False).graph
    return EngineManifest(
        name=name,
        config=config_json(portable.config),
        inputs=tuple(_spec(v) for v in graph.input),
        outputs=tuple(_spec(v) for v in graph.output),
        profile=PROFILES[name],
        portable={role: str(p.relative_to(work)) for role, p in portable.graphs.items()},
        portable_parity={},
        check=f"{name}/check.npz",
        targets={},
        weights=sha256_json({"source": portable.source.digest(), "config": config_json(portable.config)}),
        digest="",
    )


def _spec(value: Any) -> TensorSpec:
    tensor = value.type.tensor_type
    dims = tuple(d.dim_param or d.dim_value for d in tensor.shape.dim)
    dtype = (
        "float32" if tensor.elem_type == TensorProto.FLOAT else helper.tensor_dtype_to_np_dtype(tensor.elem_type).name
    )
    return TensorSpec(value.name, dtype, dims)
