"""`build-engines --target tensorrt-rtx` as a whole: real engines for GPUs that are not here, and what is told."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed (pip install '.[tensorrt-rtx]')")
pytest.importorskip("torch", reason="the export extra is not installed")
pytest.importorskip("transformers", reason="the export extra is not installed")

from wsi_rt.export.build import BuildRequest, build_engines, plan_build
from wsi_rt.export.sources.checkpoint import Sources
from wsi_rt.runtime import devices
from wsi_rt.runtime.bundle import Bundle
from wsi_rt.runtime.errors import MachineError
from wsi_rt.runtime.manifest import COMPONENTS
from wsi_rt.runtime.parity import GATES

without_gpu = pytest.mark.skipif(bool(devices.gpus()), reason="this machine has a GPU: engines of its own run")


def build(tiny_preset, out, **flags):
    request = BuildRequest(Sources(checkpoint=tiny_preset), out, "tensorrt-rtx", threads=1, **flags)
    return build_engines(plan_build(request))


@without_gpu
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_the_projector_for_two_architectures(tmp_path, tiny_preset, wsi_rt, precision):
    out = tmp_path / "bundle"
    manifest = build(tiny_preset, out, components=("projector",), precision=precision, sms=(80, 89))
    assert manifest.targets == ("tensorrt-rtx-sm80", "tensorrt-rtx-sm89")
    assert manifest.build["toolchain"]["tensorrt-rtx-cu12"]
    for target, compiled in manifest.components["projector"].targets.items():
        assert (out / compiled.graphs["model"]).parent == out / "projector" / target
        assert compiled.requires["sm"] == target[-2:]
        assert compiled.precision == precision
        assert compiled.parity["engine"] == "not run: no GPU"
        assert 0 < compiled.measured()["max_rel"] <= GATES[precision].max_rel
    with pytest.raises(MachineError, match="needs an NVIDIA GPU"):
        Bundle.open(out)
    report = json.loads(wsi_rt("verify", out, "--json").out)["components"]["projector"]
    assert report["ok"]
    assert {r["checked"] for r in report["targets"].values()} == {"onnx"}


def test_a_dry_run_names_every_architecture(tmp_path, wsi_rt):
    flags = ("--target", "tensorrt-rtx", "--sm", "89,80", "--precision", "llm=bf16", "--out", tmp_path / "bundle")
    result = wsi_rt("build-engines", "--checkpoint", "synthetic:nano", *flags, "--dry-run")
    assert result.code == 0, result.err
    lines = result.out.splitlines()
    assert "for tensorrt-rtx-sm80, tensorrt-rtx-sm89 from synthetic:nano" in lines[0]
    assert [line.split()[:2] for line in lines[1:5]] == [
        *(["tile_encoder", "fp16"], ["slide_encoder", "bf16"], ["projector", "fp16"], ["llm", "bf16"]),
    ]
    assert not list(tmp_path.iterdir())


@without_gpu
@pytest.mark.slow
def test_all_components(tmp_path, tiny_preset, wsi_rt):
    manifest = build(tiny_preset, tmp_path / "bundle", sms=(89,))
    assert tuple(manifest.components) == COMPONENTS
    for name, c in manifest.components.items():
        parity = c.compiled("tensorrt-rtx-sm89").parity
        assert parity["engine"] == "not run: no GPU"
        gate = GATES["bf16" if name == "slide_encoder" else "fp16"]
        assert parity["gate"] == vars(gate)
        assert 0 < parity["source"]["max_rel"] <= gate.max_rel
        if name != "projector":
            assert 0 < parity["layers"]["error"] <= gate.max_layer
    told = wsi_rt("verify", tmp_path / "bundle")
    assert told.code == 0
    assert told.out.count("of the ONNX on the CPU; engine not run: no GPU") == 3
    assert "llm            not checked  tensorrt-rtx-sm89: engine not run: no GPU" in told.out
