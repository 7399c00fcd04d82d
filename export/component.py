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
from wsi_rt.export.targets import Lowered, Order, lowering
from wsi_rt.export.targets.base import Trajectory
from wsi_rt.kernels.slide_embed import GRID
from wsi_rt.runtime.engines.machine import lacking
from wsi_rt.runtime.hashing import sha256_json
from wsi_rt.runtime.manifest import NOT_RUN, Compiled, EngineManifest, TensorSpec
from wsi_rt.runtime.parity import (
    GATES,
    MAX_ROUNDING,
    WIDE_GATE,
    WIDE_LOGITS,
    Gate,
    Parity,
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
    sms: tuple[int, ...] = (),
) -> EngineManifest:
    """Writes `work/<name>/` and returns its manifest (digest left to the caller, who hashes the files). fast: with
    graphs for calls of many rows, where the component and the target have such. sms: GPU architectures to compile for,
    where the target is compiled for one.

    Raises ParityError when the portable or the lowered graph is off, naming the first layer that is.
    """
    on_step("export")
    component = open_component(part, work / name, precision, fast, threads)
    graphs = write_graphs(component, work / name, Style(DequantisedLinears(component.format_of)))
    lowered = lower(component, target, precision, threads, sms, graphs)
    for path in graphs.values():
        check_model(path)
    on_step("parity of the portable graph")
    inputs, first = check_inputs(part.config), next(iter(lowered.values()))
    computed: list[Any] | None = [] if first.trajectory is None else None
    actual = run_portable(part.config, graphs, inputs, threads, computed)
    on_step("fp32 reference, layer by layer")
    trajectory = first.trajectory or (lambda _: computed or [])
    reference = hold_against_reference(component, trajectory, precision, inputs, threads, first.wide_trajectory)
    expected, layers, rounding = reference
    write_check(component.weights.path.with_name(CHECK), inputs, expected)
    portable = compare(actual, {name: x for name, x in expected.items() if name != WIDE_LOGITS})
    require(name, "portable graph", portable, GATES["fp32"])
    compiled = {
        t: compiled_entry(one, work, part.config, precision, component.wide, component.format_of)
        for t, one in lowered.items()
    }
    manifest = replace(
        describe(component, graphs, work), portable_parity=portable.to_json(), rounding=rounding, targets=compiled
    )
    on_step(f"parity of the {target} engine")
    sources = _sources(name, lowered, inputs, expected, portable, GATES[precision])
    parity = _parity(work, manifest, precision, threads, sources)
    return replace(
        manifest, targets={t: replace(one, parity={**parity[t], "layers": layers}) for t, one in compiled.items()}
    )


def _sources(
    name: str, lowered: Mapping[str, Lowered], inputs: Arrays, expected: Arrays, portable: Parity, gate: Gate
) -> dict[str, Parity]:
    """-> by target, how far the ONNX files are that an engine which needs a GPU was made from: held to the gate in any
    case. Raises ParityError."""
    found: dict[str, Parity] = {}
    measured: dict[Callable[[Arrays], Arrays] | None, Parity] = {None: portable}
    for target, one in lowered.items():
        if one.outputs is not None and one.outputs not in measured:
            measured[one.outputs] = compare(one.outputs(inputs), expected)
            require(name, f"ONNX of the {target} engine", measured[one.outputs], gate)
        if one.outputs is not None or one.source:
            found[target] = measured[one.outputs]
    return found


def _parity(
    work: Path, manifest: EngineManifest, precision: str, threads: int, sources: Mapping[str, Parity]
) -> dict[str, dict[str, Any]]:
    """-> by target, what the manifest records of its engine: how far it is off, or that this machine cannot run it."""
    gate, found = GATES[precision], {}
    for target, compiled in manifest.targets.items():
        report: dict[str, Any] = {"source": sources[target].to_json()} if target in sources else {}
        flaw = lacking(target, compiled.requires)
        if flaw is None:
            engine = check_component(work, target, manifest, threads)
            require(manifest.name, f"{target} engine", engine, gate)
            report |= {"engine": engine.to_json(), "gate": vars(later_gate(gate, engine))}
        else:
            report |= {"engine": NOT_RUN + flaw, "gate": vars(gate)}
        found[target] = report
    return found


def hold_against_reference(
    component: Component,
    trajectory: Trajectory,
    precision: str,
    inputs: Arrays,
    threads: int,
    wide_trajectory: Trajectory | None = None,
) -> tuple[Arrays, dict[str, Any], dict[str, Any]]:
    """-> the outputs of the stored check, and what the manifest records of the layers and of the weights' rounding: the
    worst tensor, and how far the outputs move by it. trajectories: those of `Lowered`."""
    config, source = component.config, component.source
    stored = Stored(source, component.weights, component.format_of)
    reference = reference_outputs(config, stored, inputs, threads, trajectory(inputs))
    layers = require_layers(config.component, reference.layers, GATES[precision])
    outputs = reference.outputs
    if precision not in MAX_ROUNDING:
        return outputs, layers, {}
    checkpoint = Compared(source, stored)
    wide = wide_trajectory(inputs) if wide_trajectory else ()
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
    if not isinstance(c, ViTConfig) or precision not in MAX_ROUNDING:
        return component
    sensitive = sensitive_layers(c, source, choose, threads)
    return replace(component, format_of=sensitive.format_of(choose), sensitive=sensitive)


def lower(
    component: Component,
    target: str,
    precision: str = "fp32",
    threads: int = 0,
    sms: tuple[int, ...] = (),
    portable: Mapping[str, Path] | None = None,
) -> Mapping[str, Lowered]:
    """-> what the target made, by the bundle's name of it. portable: the graphs written already, by role."""
    return lowering(target)(Order(component, target, precision, sms, threads, portable or {}))


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
        source={role: str(p.relative_to(work)) for role, p in lowered.source.items()},
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
