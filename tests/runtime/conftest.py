"""A GPU's stand-in for tests of the TensorRT runtime."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


def _load(name: str) -> ModuleType:
    path = Path(__file__).with_name(f"{name}.py")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses and annotations look
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The stand-in TensorRT-RTX, in place of the module, with `.cuda` in place of the bindings, on one sm_89 GPU."""
    from wsi_rt.runtime import devices
    from wsi_rt.runtime.engines import tensorrt_api, tensorrt_session

    made = _load("tensorrt_stand_in")
    cuda = made.Cuda()
    module = made.TensorRt(cuda)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", module)
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", cuda)
    monkeypatch.setattr(tensorrt_session, "require_gpu", lambda target: devices.Gpu(0, "Stand-in", 89, 1 << 34))
    tensorrt_api.logger.cache_clear()
    yield module
    tensorrt_api.logger.cache_clear()


@pytest.fixture(scope="session")
def stand_in_engine() -> Callable[..., Any]:
    """(config, bundle folder, profiles=...) -> the component's manifest, with an engine of the stand-in in fp16 for
    `tensorrt-rtx-sm89`."""
    pytest.importorskip("torch", reason="the export extra is not installed")
    pytest.importorskip("onnx", reason="the export extra is not installed")
    return _build


def _build(config: Any, root: Path, profiles: Any = None, **changes: Any) -> Any:
    import onnx

    from wsi_rt.export.component import compiled_entry, describe
    from wsi_rt.export.graphs.builder import WeightFile
    from wsi_rt.export.graphs.dilated_attention_rtx import HEADROOM
    from wsi_rt.export.graphs.half import HALVES
    from wsi_rt.export.graphs.layers import Style
    from wsi_rt.export.graphs.write import EMBED, Component, write_graphs
    from wsi_rt.export.sources.synthetic import SyntheticSource
    from wsi_rt.export.targets.base import Lowered
    from wsi_rt.export.tensorrt import profiles as default
    from wsi_rt.export.tensorrt import specs, write_sources
    from wsi_rt.runtime.engines.tensorrt_api import family
    from wsi_rt.runtime.engines.tensorrt_sidecar import Sidecar
    from wsi_rt.runtime.manifest import TensorSpec

    folder = root / config.component
    (folder / "tensorrt-rtx-sm89").mkdir(parents=True)
    component = Component(
        config, SyntheticSource(config, "test", 1), WeightFile(folder / "weights.data"), lambda _: None
    )
    graphs = write_graphs(component, folder, Style())
    sources = write_sources(component, family("tensorrt-rtx"), HALVES["fp16"], 89)
    graph = onnx.load(str(sources.compiled), load_external_data=False).graph
    inputs, outputs = (tuple(TensorSpec(*s) for s in specs(v)) for v in (graph.input, graph.output))
    sidecar = Sidecar(
        target="tensorrt-rtx",
        version="1.7.1.stand-in",
        sms=(89,),
        precision="fp16",
        inputs=inputs,
        outputs=outputs,
        profiles=profiles or default(config),
        memory_bytes=0,
        weights_bytes=0,
        layers={},
        toolchain={},
        onnx={"model.onnx": "0" * 64},
        least={HEADROOM: 1.0} if any(s.name == HEADROOM for s in outputs) else {},
    )
    text = json.dumps(replace(sidecar, **changes).to_json())
    engine = folder / "tensorrt-rtx-sm89" / f"{sources.role}.engine"
    engine.write_bytes(str(sources.compiled).encode())
    for path in (engine, sources.compiled):
        path.with_suffix(".json").write_text(text)
    roles = {sources.role: engine} | ({EMBED: graphs[EMBED]} if EMBED in graphs else {})
    lowered = Lowered(roles, folder, {"sm": "89"})
    compiled = compiled_entry(lowered, root, config, "fp16")
    return replace(describe(component, graphs, root), targets={"tensorrt-rtx-sm89": compiled})
