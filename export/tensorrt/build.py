"""ONNX file -> engine file: one builder for TensorRT and TensorRT-RTX, strongly typed."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wsi_rt.runtime.engines.tensorrt_api import Family, Messages, collected, logger
from wsi_rt.runtime.engines.tensorrt_sidecar import Profile
from wsi_rt.runtime.errors import InputError, MachineError
from wsi_rt.runtime.manifest import TensorSpec

_TOTALS = {"memory": "Total Activation Memory", "weights": "Total Weights Memory"}
_LAYER = re.compile(r"^Name: ([^\n]*?), LayerType: (\w+)", re.MULTILINE)
FUSED_ATTENTION = "fused attention"


@dataclass(frozen=True)
class Options:
    """sms: GPU architectures; TensorRT, which times kernels where it builds, takes this machine's alone. profiles: one
    or more. timing_cache: of TensorRT, a file read and written back; None: none. workspace_bytes: most of scratch
    memory; None: all there is. version_compatible: runs on later releases of TensorRT, too, with fewer kernels."""

    sms: tuple[int, ...]
    profiles: tuple[Profile, ...]
    timing_cache: Path | None = None
    workspace_bytes: int | None = None
    version_compatible: bool = False


@dataclass(frozen=True)
class Built:
    """What the builder reports. memory_bytes: of activations at the largest sizes of the profiles. layers: those that
    were compiled, by type; "fused attention" for a kernel that is named so (`_gemm_mha_v2...`)."""

    memory_bytes: int
    weights_bytes: int
    engine_bytes: int
    layers: Mapping[str, int]


def build_engine(
    module: Any, family: Family, onnx: Path, inputs: Sequence[TensorSpec], options: Options, out: Path
) -> Built:
    """Writes `out` as it is made: an engine of 13 GB is not in memory as a whole a second time. inputs: of the graph,
    with their symbolic dimensions. The file is complete when this returns; the caller stages the folder.

    Raises MachineError when the parser refuses a node, naming it, or the builder the network; InputError for an
    architecture that it does not build for.
    """
    with collected(module) as messages:
        builder = module.Builder(logger(module))
        network = builder.create_network(_network_flags(module))
        _parse(module, network, onnx, messages)
        _forbid_decomposition(network)
        config = builder.create_builder_config()
        _configure(module, family, config, options)
        for profile in options.profiles:
            config.add_optimization_profile(_profile(builder, inputs, profile))
        cache = _open_timing_cache(config, options.timing_cache)
        with out.open("wb") as file:
            written = builder.build_serialized_network_to_stream(network, config, _writer(module, file))
        if not written:
            raise MachineError(
                f"{onnx.name}: {module.__name__} {module.__version__} cannot build it for "
                f"{', '.join(f'sm_{sm}' for sm in options.sms)}: {messages.why()}"
            )
        if cache is not None and options.timing_cache is not None:
            options.timing_cache.write_bytes(cache.serialize())
    return _report(messages, out)


def _network_flags(module: Any) -> int:
    """Kernels of our plugins are compiled ahead of time; TensorRT-RTX knows no such flag."""
    flags = module.NetworkDefinitionCreationFlag
    wanted = [flags.STRONGLY_TYPED, *filter(None, [getattr(flags, "PREFER_AOT_PYTHON_PLUGINS", None)])]
    return sum(1 << int(flag) for flag in wanted)


def _parse(module: Any, network: Any, onnx: Path, messages: Messages) -> None:
    """From the file, not from memory: weights beside it are found, and are more than a protobuf's 2 GB."""
    parser = module.OnnxParser(network, logger(module))
    if parser.parse_from_file(str(onnx)):
        return
    refused = [parser.get_error(i) for i in range(parser.num_errors)]
    for error in refused:
        if error.node_operator():
            told = " ".join(error.desc().split())
            raise MachineError(
                f"{onnx.name}: {module.__name__} {module.__version__} refuses node {error.node_name()} "
                f"({error.node_operator()}): {told}; see docs/tensorrt.md"
            )
    raise MachineError(f"{onnx.name}: {module.__name__} {module.__version__} cannot parse it: {messages.why()}")


def _forbid_decomposition(network: Any) -> None:
    """Attention in one kernel or not at all: as separate operators it would hold a matrix of scores, N x N."""
    for i in range(network.num_layers):
        attention = getattr(network.get_layer(i), "attention", None)
        if attention is not None:
            attention.decomposable = False


def _configure(module: Any, family: Family, config: Any, options: Options) -> None:
    config.profiling_verbosity = module.ProfilingVerbosity.DETAILED  # names of what is compiled, in messages too
    config.clear_flag(module.BuilderFlag.TF32)  # what is fp32 here is so on purpose
    if options.version_compatible:
        config.set_flag(module.BuilderFlag.VERSION_COMPATIBLE)
    if options.workspace_bytes is not None:
        config.set_memory_pool_limit(module.MemoryPoolType.WORKSPACE, options.workspace_bytes)
    if not family.ahead_of_time:  # any GPU of the architecture, not only the model that it is built on
        config.hardware_compatibility_level = module.HardwareCompatibilityLevel.SAME_COMPUTE_CAPABILITY
        return
    unknown = [sm for sm in options.sms if sm not in family.sms]
    if unknown or not options.sms:
        raise InputError(
            f"--sm is {','.join(map(str, options.sms)) or 'empty'}, {family.name} builds for: "
            f"{', '.join(map(str, family.sms))}"
        )
    config.num_compute_capabilities = len(options.sms)
    for i, sm in enumerate(options.sms):
        config.set_compute_capability(getattr(module.ComputeCapability, f"SM{sm}"), i)


def _profile(builder: Any, inputs: Sequence[TensorSpec], profile: Profile) -> Any:
    made = builder.create_optimization_profile()
    for spec in inputs:
        shapes = [tuple(profile[d][k] if isinstance(d, str) else d for d in spec.dims) for k in range(3)]
        made.set_shape(spec.name, *shapes)
    return made


def _open_timing_cache(config: Any, path: Path | None) -> Any:
    """One of another machine is set aside by TensorRT itself (ignore_mismatch=False)."""
    if path is None:
        return None
    cache = config.create_timing_cache(path.read_bytes() if path.exists() else b"")
    if not config.set_timing_cache(cache, False):
        cache = config.create_timing_cache(b"")
        config.set_timing_cache(cache, False)
    return cache


def _writer(module: Any, file: Any) -> Any:
    class Writer(module.IStreamWriter):  # type: ignore[misc]
        def __init__(self) -> None:
            module.IStreamWriter.__init__(self)

        def write(self, data: bytes) -> int:
            return file.write(data)

    return Writer()


def _report(messages: Messages, out: Path) -> Built:
    totals = dict.fromkeys(_TOTALS, 0)
    layers: Counter[str] = Counter()
    for _, text in messages.lines:
        for key, words in _TOTALS.items():
            found = re.search(rf"{words}: (\d+) bytes", text)
            totals[key] = max(totals[key], int(found[1])) if found else totals[key]
        layers.update(FUSED_ATTENTION if "_mha_" in name else kind for name, kind in _LAYER.findall(text))
    return Built(totals["memory"], totals["weights"], out.stat().st_size, dict(sorted(layers.items())))
