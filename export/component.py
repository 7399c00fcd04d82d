"""One component of a bundle: portable graph, the target's graph, stored check, parity."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from onnx import TensorProto, helper
from onnx import load as load_onnx

from wsi_rt.export.arch import ComponentConfig, LlamaConfig, ViTConfig, config_json
from wsi_rt.export.graphs.builder import WeightFile, check_model
from wsi_rt.export.graphs.layers import Style
from wsi_rt.export.graphs.linears import DequantisedLinears
from wsi_rt.export.graphs.write import DECODER, MODEL, Component, write_graphs
from wsi_rt.export.parity import Arrays, check_inputs, reference_outputs, write_check
from wsi_rt.export.portable import run_portable
from wsi_rt.export.precision import format_of, formats, wide_format_of, wide_formats
from wsi_rt.export.quantise import FormatOf
from wsi_rt.export.sensitive import sensitive_layers
from wsi_rt.export.sources.stored import Compared, Stored, with_head
from wsi_rt.export.sources.weights import Part
from wsi_rt.export.targets import Lowered, lowering
from wsi_rt.kernels.slide_embed import GRID
from wsi_rt.runtime.hashing import sha256_json
from wsi_rt.runtime.manifest import Compiled, EngineManifest, TensorSpec
from wsi_rt.runtime.parity import (
    GATES,
    WIDE_GATE,
    WIDE_LOGITS,
    check_component,
    compare,
    later_gate,
    require,
    require_layers,
    require_rounding,
)

CHECK = "check.npz"  # stored inputs and reference outputs, in the component's folder

# Symbolic dimension -> (min, opt, max): what an engine accepts, and what a compiler may tune for.
PROFILES: dict[str, dict[str, tuple[int, int, int]]] = {
    "tile_encoder": {"batch": (1, 32, 256)},
    "slide_encoder": {"tiles": (1, 8192, GRID * GRID)},
    "projector": {"tokens": (1, 576, 4096)},
    "llm": {},
}


def build_component(
    name: str,
    part: Part,
    work: Path,
    target: str,
    precision: str,
    threads: int,
    on_step: Callable[[str], None],
    fast: bool = False,
) -> EngineManifest:
    """Writes `work/<name>/` and returns its manifest (digest left to the caller, who hashes the files). fast: with
    graphs for calls of many rows, where the component and the target have such.

    Raises ParityError when the portable or the lowered graph is off, naming the first layer that is.
    """
    on_step("export")
    component = open_component(part, work / name, precision, fast, threads)
    graphs = write_graphs(component, work / name, Style(DequantisedLinears(component.format_of)))
    lowered = lower(component, target, threads)
    for path in graphs.values():
        check_model(path)
    on_step("fp32 reference, layer by layer")
    inputs = check_inputs(part.config)
    expected, layers, rounding = hold_against_reference(component, lowered, precision, inputs, threads)
    write_check(component.weights.path.with_name(CHECK), inputs, expected)
    on_step("parity of the portable graph")
    actual = run_portable(part.config, graphs, inputs, threads)
    portable = compare(actual, {name: x for name, x in expected.items() if name != WIDE_LOGITS})
    require(name, "portable graph", portable, GATES["fp32"])
    compiled = compiled_entry(lowered, work, part.config, precision, component.wide, component.format_of)
    manifest = replace(
        describe(component, graphs, work),
        portable_parity=portable.to_json(),
        rounding=rounding,
        targets={target: compiled},
    )
    on_step(f"parity of the {target} engine")
    engine = check_component(work, target, manifest, threads)
    require(name, f"{target} engine", engine, GATES[precision])
    parity = {"engine": engine.to_json(), "gate": vars(later_gate(GATES[precision], engine)), "layers": layers}
    return replace(manifest, targets={target: replace(compiled, parity=parity)})


def hold_against_reference(
    component: Component, lowered: Lowered, precision: str, inputs: Arrays, threads: int
) -> tuple[Arrays, dict[str, Any], dict[str, Any]]:
    """-> the outputs of the stored check, and what the manifest records of the layers and of the weights' rounding: the
    worst tensor, and how far the outputs move by it."""
    config, source = component.config, component.source
    stored = Stored(source, component.weights, component.format_of)
    reference = reference_outputs(config, stored, inputs, threads, lowered.trajectory(inputs))
    layers = require_layers(config.component, reference.layers, GATES[precision])
    outputs = reference.outputs
    if precision == "fp32":
        return outputs, layers, {}
    checkpoint = Compared(source, stored)
    wide = lowered.wide_trajectory(inputs) if lowered.wide_trajectory else ()
    whole = reference_outputs(config, checkpoint, inputs, threads, wide)
    rounding = require_rounding(config.component, checkpoint.errors, precision)
    rounding |= {"outputs": compare(outputs, whole.outputs).to_json()}
    rounding |= {"sensitive": component.sensitive.to_json()} if component.sensitive is not None else {}
    if wide:  # 8 bits in any case, so held against the checkpoint itself
        layers |= {"wide": require_layers(config.component, whole.layers, WIDE_GATE)}
        outputs = {**outputs, WIDE_LOGITS: whole.outputs["logits"]}
    return outputs, layers, rounding


def open_component(part: Part, folder: Path, precision: str, fast: bool = False, threads: int = 0) -> Component:
    """Its folder, made here, and the empty weight file that its graphs will share; which layers are too sensitive for
    the precision's format is measured. threads 0: torch's default."""
    folder.mkdir()
    c, source = part.config, with_head(part.config, part.source)
    wide = wide_format_of(precision) if fast and isinstance(c, LlamaConfig) else None
    choose = format_of(precision, c.component)
    component = Component(c, source, WeightFile(folder / "weights.data"), choose, wide)
    if not isinstance(c, ViTConfig) or precision == "fp32":
        return component
    sensitive = sensitive_layers(c, source, choose, threads)
    return replace(component, format_of=sensitive.format_of(choose), sensitive=sensitive)


def lower(component: Component, target: str, threads: int = 0) -> Lowered:
    folder = component.weights.path.parent / target
    folder.mkdir()
    return lowering(target)(component, folder, threads)


def compiled_entry(
    lowered: Lowered,
    work: Path,
    config: ComponentConfig,
    precision: str,
    wide: FormatOf | None = None,
    choose: FormatOf | None = None,
) -> Compiled:
    """Its parity is not known yet. choose: each layer's format, where it is not the precision alone that says it."""
    return Compiled(
        graphs={role: str(p.relative_to(work)) for role, p in lowered.graphs.items()},
        weights_dir=str(lowered.weights_dir.relative_to(work)),
        precision=precision,
        formats=formats(config, precision, choose) | (wide_formats(config, precision) if wide else {}),
        parity={},
        requires=lowered.requires,
    )


def describe(component: Component, graphs: Mapping[str, Path], work: Path) -> EngineManifest:
    """What does not depend on a target. graphs: the portable ones by role."""
    name, config = component.config.component, config_json(component.config)
    main = graphs.get(MODEL) or graphs[DECODER]
    graph = load_onnx(str(main), load_external_data=False).graph
    return EngineManifest(
        name=name,
        config=config,
        inputs=tuple(_spec(v) for v in graph.input),
        outputs=tuple(_spec(v) for v in graph.output),
        profile=PROFILES[name],
        portable={role: str(p.relative_to(work)) for role, p in graphs.items()},
        portable_parity={},
        rounding={},
        check=f"{name}/{CHECK}",
        targets={},
        weights=sha256_json({"source": component.source.digest(), "config": config}),
        digest="",
    )


def _spec(value: Any) -> TensorSpec:
    tensor = value.type.tensor_type
    dims = tuple(d.dim_param or d.dim_value for d in tensor.shape.dim)
    dtype = (
        "float32" if tensor.elem_type == TensorProto.FLOAT else helper.tensor_dtype_to_np_dtype(tensor.elem_type).name
    )
    return TensorSpec(value.name, dtype, dims)
