"""The real TensorRT-RTX, without a GPU: every component becomes an engine, attention stays fused, errors say where."""

from __future__ import annotations

import json
import resource
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

onnx = pytest.importorskip("onnx", reason="the export extra is not installed")
pytest.importorskip("torch", reason="the export extra is not installed")
trt = pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx-cu12 is not installed")

from onnx import TensorProto, helper  # noqa: E402

from wsi_rt.export import tensorrt as lowering  # noqa: E402
from wsi_rt.export.graphs.builder import WeightFile  # noqa: E402
from wsi_rt.export.graphs.half import HALVES  # noqa: E402
from wsi_rt.export.graphs.write import Component  # noqa: E402
from wsi_rt.export.sources.presets import NANO, WSI_LLAVA_7B  # noqa: E402
from wsi_rt.export.sources.synthetic import SyntheticSource  # noqa: E402
from wsi_rt.export.tensorrt.build import FUSED_ATTENTION, Options, build_engine  # noqa: E402
from wsi_rt.export.tensorrt.profiles import profiles  # noqa: E402
from wsi_rt.export.tensorrt.sources import write_sources  # noqa: E402
from wsi_rt.runtime import devices  # noqa: E402
from wsi_rt.runtime.engines.tensorrt_api import FAMILIES  # noqa: E402
from wsi_rt.runtime.engines.tensorrt_sidecar import read_sidecar  # noqa: E402
from wsi_rt.runtime.errors import InputError, MachineError  # noqa: E402
from wsi_rt.runtime.manifest import TensorSpec  # noqa: E402

RTX = FAMILIES["tensorrt-rtx"]
# One layer of NANO's, whose slide encoder is as wide as the published one.
ONE_LAYER = {
    "tile_encoder": replace(NANO.tile_encoder, depth=1),
    "slide_encoder": replace(NANO.slide_encoder, depth=1),
    "projector": NANO.projector,
    "llm": replace(NANO.llm, layers=1, context=512),
}


def open_component(config, folder, source=None):
    folder.mkdir(parents=True)
    source = source or SyntheticSource(config, "test", 1)
    return Component(config, source, WeightFile(folder / "weights.data"), lambda _: None)


def lower(component, half, sms=(89,)):
    folder = component.weights.path.parent / "tensorrt-rtx-sm89"
    folder.mkdir()
    return lowering.lower(component, folder, 1, "tensorrt-rtx", sms, half)


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("name", ONE_LAYER)
def test_every_component_builds(name, half, tmp_path):
    component = open_component(ONE_LAYER[name], tmp_path / name)
    lowered = lower(component, half)
    role = "decoder" if name == "llm" else "model"
    engine = lowered.graphs[role]
    assert lowered.requires["sm"] == "89"
    sidecar = read_sidecar(engine)
    assert (sidecar.target, sidecar.version, sidecar.sms, sidecar.precision) == (RTX.name, trt.__version__, (89,), half)
    assert sidecar.profiles == profiles(ONE_LAYER[name])
    half_bytes = 2 * sum(int(np.prod(s)) for n, s in ONE_LAYER[name].tensors().items() if "embed_tokens" not in n)
    assert sidecar.weights_bytes > 0.9 * half_bytes
    assert engine.stat().st_size > sidecar.weights_bytes
    assert sidecar.memory_bytes > 0
    assert sidecar.layers.get(FUSED_ATTENTION, 0) == {"tile_encoder": 1, "slide_encoder": 5, "llm": 2}.get(name, 0)
    assert set(lowered.source.values()) <= set((tmp_path / name).rglob("*.onnx"))
    borders = {s.name: s.dtype for s in (*sidecar.inputs, *sidecar.outputs)}
    caches = {n for n in borders if n.startswith(("cache.", "updated."))}
    assert len(caches) == (4 if name == "llm" else 0)
    assert {borders[n] for n in caches} <= {"float16" if half == "fp16" else "bfloat16"}
    assert sidecar.least == ({"attention_headroom": 1.0} if name == "slide_encoder" else {})


def test_one_engine_for_several_gpus(tmp_path):
    """All that TensorRT-RTX builds for ahead of time; bf16 leaves the first one out."""
    component = open_component(ONE_LAYER["projector"], tmp_path / "projector")
    lowered = lower(component, "fp16", RTX.sms)
    assert lowered.requires["sm"] == "75,80,86,89,120,121"
    assert read_sidecar(lowered.graphs["model"]).sms == RTX.sms


def test_architectures_share_the_onnx_files(tmp_path):
    component = open_component(ONE_LAYER["projector"], tmp_path / "projector")
    found = []
    for sm in (86, 120):
        folder = tmp_path / "projector" / f"tensorrt-rtx-sm{sm}"
        folder.mkdir()
        found.append(lowering.lower(component, folder, 1, "tensorrt-rtx", (sm,), "bf16"))
    assert found[0].source == found[1].source
    digests = [read_sidecar(f.graphs["model"]).onnx for f in found]
    assert digests[0] == digests[1]
    assert set(digests[0]) == {"model.onnx", "weights.data"}


def test_no_matrix_of_scores_in_a_long_slide(tmp_path):
    """One published layer: a fused kernel for each branch, and at 65,535 tiles less memory than the scores of a single
    branch would take: (32768, ratio 4) has 2 segments x 16 heads x 8192^2 in fp16."""
    component = open_component(ONE_LAYER["slide_encoder"], tmp_path / "slide")
    sources = write_sources(component, RTX, HALVES["fp16"], 89)
    graph = onnx.load(str(sources.compiled), load_external_data=False).graph
    inputs = tuple(TensorSpec(*s) for s in lowering.specs(graph.input))
    options = Options((89,), ({"tiles": (1, 8192, 65_535)},))
    built = build_engine(trt, RTX, sources.compiled, inputs, options, tmp_path / "x.engine")
    assert built.layers[FUSED_ATTENTION] == len(component.config.dilated_ratios)
    assert built.memory_bytes < 2 * 16 * 8192**2 * 2


def test_a_refused_node_is_named(tmp_path):
    """An operator of another domain; the line says node, operator and version."""
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n"]) for n in "xy"]
    node = helper.make_node("NoSuchOperator", ["x"], ["y"], name="/layers.3/odd", domain="elsewhere")
    imports = [helper.make_opsetid("", 21), helper.make_opsetid("elsewhere", 1)]
    model = helper.make_model(helper.make_graph([node], "g", values[:1], values[1:]), opset_imports=imports)
    path = tmp_path / "odd.onnx"
    path.write_bytes(model.SerializeToString())
    inputs = (TensorSpec("x", "float32", ("n",)),)
    with pytest.raises(MachineError, match=r"odd\.onnx: tensorrt_rtx .* refuses node /layers\.3/odd \(NoSuchOp") as e:
        build_engine(trt, RTX, path, inputs, Options((89,), ({"n": (1, 2, 3)},)), tmp_path / "x.engine")
    assert "\n" not in str(e.value)
    assert e.value.exit_code == 3


def test_what_is_no_onnx_file(tmp_path):
    (tmp_path / "bad.onnx").write_bytes(b"no model")
    with pytest.raises(MachineError, match=r"bad\.onnx: tensorrt_rtx .* cannot parse it"):
        build_engine(trt, RTX, tmp_path / "bad.onnx", (), Options((89,), ()), tmp_path / "x.engine")


@pytest.mark.parametrize(
    ("target", "sms", "half", "said"),
    [
        ("tensorrt-rtx", (), "fp16", "--sm is not given, tensorrt-rtx builds for: 75, 80, 86, 89, 120, 121"),
        ("tensorrt-rtx", (89, 90), "fp16", "--sm is 89,90, tensorrt-rtx builds for: 75"),
        ("tensorrt-rtx", (75,), "bf16", "--sm 75 has no bf16"),
        ("tensorrt-rtx", (89,), "int8", "expected one of: fp16, bf16"),
        ("ort-cpu", (89,), "fp16", "expected one of: tensorrt, tensorrt-rtx"),
    ],
)
def test_what_is_not_built(target, sms, half, said, tmp_path):
    component = open_component(ONE_LAYER["projector"], tmp_path / "projector")
    with pytest.raises(InputError, match=said):
        lowering.lower(component, tmp_path, 1, target, sms, half)
    assert [p.name for p in (tmp_path / "projector").iterdir()] == ["weights.data"]


def test_a_missing_module_names_its_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    component = open_component(ONE_LAYER["projector"], tmp_path / "projector")
    with pytest.raises(MachineError, match="pip install tensorrt-rtx-cu12"):
        lowering.lower(component, tmp_path, 1, "tensorrt-rtx", (89,), "fp16")


def test_tensorrt_without_a_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(devices, "gpus", lambda: ())
    monkeypatch.setattr(devices, "found", lambda: devices.Survey(problem="no NVIDIA driver here"))
    component = open_component(ONE_LAYER["projector"], tmp_path / "projector")
    with pytest.raises(MachineError, match="tensorrt needs an NVIDIA GPU: no NVIDIA driver"):
        lowering.lower(component, tmp_path, 1, "tensorrt", (89,), "fp16")


def test_tensorrt_builds_for_its_own_gpu_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(lowering, "require_gpu", lambda target: SimpleNamespace(sm=90))
    component = open_component(ONE_LAYER["projector"], tmp_path / "projector")
    with pytest.raises(InputError, match="--sm is 89, this machine's GPU is 90: tensorrt builds for that alone"):
        lowering.lower(component, tmp_path, 1, "tensorrt", (89,), "fp16")


# --- the published sizes


class Repeated(SyntheticSource):
    """Big synthetic weights in seconds: each shape is made once, and scaled for each name, so that no two are equal."""

    def __init__(self, config):
        super().__init__(config, "full", 1)
        self._made = {}
        self._names = list(self.shapes())

    def get(self, name):
        shape = self.shapes()[name]
        if shape not in self._made:
            self._made[shape] = super().get(name)
        return self._made[shape] * np.float32(1 + self._names.index(name) / 4096)


FULL = {
    "tile_encoder": WSI_LLAVA_7B.tile_encoder,
    "slide_encoder": WSI_LLAVA_7B.slide_encoder,
    "projector": WSI_LLAVA_7B.projector,
    "llm-4-layers": replace(WSI_LLAVA_7B.llm, layers=4),
}


@pytest.mark.full
@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("name", FULL)
def test_the_published_sizes_build(name, half, tmp_path, capsys):
    """External weights of more than 2 GB among them (the tile encoder's 2.3)."""
    config = FULL[name]
    component = open_component(config, tmp_path / config.component, Repeated(config))
    began = time.monotonic()
    engine = next(p for role, p in lower(component, half).graphs.items() if role != "embed")
    took, sidecar = time.monotonic() - began, read_sidecar(engine)
    figures = {
        "case": f"{name} {half}",
        "seconds": round(took, 1),
        "engine_bytes": engine.stat().st_size,
        "memory_bytes": sidecar.memory_bytes,
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    with capsys.disabled():
        print("\n" + json.dumps(figures))
    assert engine.stat().st_size > sidecar.weights_bytes
