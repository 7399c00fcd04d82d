"""`build-engines --target`: what is asked for which target, what a bundle of it holds, and what is checked of it."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("torch", reason="the export extra is not installed")
pytest.importorskip("onnx", reason="the export extra is not installed")
pytest.importorskip("transformers", reason="the export extra is not installed")

from wsi_rt.export import targets
from wsi_rt.export.build import BuildRequest, build_engines, is_up_to_date, plan_build
from wsi_rt.export.precision import parse_precision, supported
from wsi_rt.export.sources.checkpoint import Sources
from wsi_rt.runtime import devices
from wsi_rt.runtime.bundle import Bundle
from wsi_rt.runtime.devices import Gpu, Survey
from wsi_rt.runtime.engines import registry
from wsi_rt.runtime.errors import InputError, MachineError, ParityError
from wsi_rt.runtime.manifest import COMPONENTS
from wsi_rt.runtime.parity import GATES

has_gpu = bool(devices.gpus())


def plan(word, out, **request):
    return plan_build(BuildRequest(Sources(checkpoint=word), out, threads=1, **request))


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(devices, "found", lambda: Survey(problem="no NVIDIA driver here"))


@pytest.fixture
def gpu(monkeypatch):
    """A stand-in for a GPU that can be asked what it is."""
    monkeypatch.setattr(devices, "found", lambda: Survey((Gpu(0, "stand-in", 89, 1 << 30),), "580.65.06", (13, 1)))


@pytest.fixture
def abacus(monkeypatch):
    """A stand-in for a target that is compiled for architectures: the CPU's engines under several names."""

    def lower(order):
        made = {}
        for sm in order.sms:
            one = targets.LOWERINGS["ort-cpu"](replace(order, target=f"abacus-sm{sm}"))
            made |= {name: replace(x, requires={}, source=order.portable) for name, x in one.items()}
        return made

    monkeypatch.setitem(targets.LOWERINGS, "abacus", lower)
    cpu = registry.backend("ort-cpu")
    monkeypatch.setitem(registry.TARGETS, "abacus", replace(cpu, target="abacus", needs_gpu=True, per_sm=True))
    monkeypatch.setattr("wsi_rt.export.targets.architectures.tensorrt_api.family", lambda _: FAMILY)
    monkeypatch.setattr("wsi_rt.export.targets.architectures.tensorrt_api.load", lambda _: None)


class FAMILY:
    sms, ahead_of_time = (80, 89, 120), True


def test_torch_engines_are_the_portable_graphs_and_really_run(tmp_path, tiny_preset):
    out = tmp_path / "bundle"
    manifest = build_engines(plan(tiny_preset, out, target="torch"))
    assert manifest.targets == ("torch",)
    for name, c in manifest.components.items():
        compiled = c.compiled("torch")
        assert (compiled.graphs, compiled.weights_dir) == (c.portable, name)
        assert (dict(compiled.requires), dict(compiled.source), compiled.precision) == ({}, {}, "fp32")
        assert compiled.parity["engine"]["max_rel"] <= GATES["fp32"].max_rel
        assert not (out / name / "torch").exists()
        if name != "projector":
            assert compiled.parity["layers"]["error"] <= GATES["fp32"].max_layer
    bundle = Bundle.open(out, threads=1)
    with bundle.engine("projector") as engine:
        assert type(engine).__name__ == "TorchEngine"
        engine.run({"tokens": np.zeros((2, 96), np.float32)})


@pytest.mark.skipif(has_gpu, reason="this machine has a GPU: its engines run")
def test_ort_cuda_engines_are_recorded_as_not_run(tmp_path, tiny_preset):
    manifest = build_engines(plan(tiny_preset, tmp_path / "bundle", target="ort-cuda"))
    assert tuple(manifest.components) == COMPONENTS
    for c in manifest.components.values():
        compiled = c.compiled("ort-cuda")
        assert compiled.graphs == compiled.source == c.portable
        assert compiled.parity["engine"] == "not run: no GPU"
        assert compiled.measured() == c.portable_parity
        assert compiled.parity["gate"] == vars(GATES["fp32"])
        json.dumps(dict(compiled.parity))


def test_one_bundle_for_several_architectures(tmp_path, tiny_preset, no_gpu, abacus):
    out, parts = tmp_path / "bundle", {"components": ("projector",), "target": "abacus"}
    first = plan(tiny_preset, out, sms=(89, 80, 89), **parts)
    assert first.targets == ("abacus-sm80", "abacus-sm89")
    manifest = build_engines(first)
    assert manifest.targets == first.targets
    compiled = manifest.components["projector"].targets
    assert {t: c.graphs["model"] for t, c in compiled.items()} == {
        t: f"projector/{t}/model.onnx" for t in first.targets
    }
    assert {c.parity["engine"] for c in compiled.values()} == {"not run: no GPU"}
    assert manifest.build["sms"] == [80, 89]
    command = (
        "wsi-rt build-engines --checkpoint synthetic:tiny --target abacus --sm 80,89 --components projector "
        f"--out {out} --force"
    )
    assert manifest.rebuild_command(out) == command
    assert "--sm 80,89,120 " in manifest.rebuild_command(out, sms=(80, 89, 120))
    assert is_up_to_date(plan(tiny_preset, out, sms=(80, 89), **parts))
    with pytest.raises(InputError, match="holds another build"):
        is_up_to_date(plan(tiny_preset, out, sms=(80,), **parts))


def test_this_machines_gpu_is_the_default(tmp_path, tiny_preset, abacus, gpu):
    assert plan(tiny_preset, tmp_path / "bundle", target="abacus").sms == (89,)


def test_architectures_that_cannot_be_built_for(tmp_path, tiny_preset, no_gpu):
    out = tmp_path / "bundle"
    with pytest.raises(InputError, match=r"this machine has no GPU to take it from: give --sm, such as --sm 80,89$"):
        plan(tiny_preset, out, target="tensorrt-rtx")
    with pytest.raises(InputError, match=r"--sm has 90, tensorrt-rtx builds for: 75, 80, 86, 89, 120, 121$"):
        plan(tiny_preset, out, target="tensorrt-rtx", sms=(80, 90))
    with pytest.raises(MachineError, match="tensorrt needs an NVIDIA GPU"):
        plan(tiny_preset, out, target="tensorrt", sms=(80,))
    for target in ("ort-cpu", "ort-cuda", "torch"):
        with pytest.raises(InputError, match=f"--sm is given, but {target} engines are for no one architecture"):
            plan(tiny_preset, out, target=target, sms=(80,))


def test_a_target_whose_compiler_is_not_installed(tmp_path, tiny_preset, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    with pytest.raises(MachineError, match=r"tensorrt-rtx needs the module tensorrt_rtx .* pip install"):
        plan(tiny_preset, tmp_path / "bundle", target="tensorrt-rtx", sms=(80,))


def test_fast_is_for_the_cpu(tmp_path, tiny_preset):
    with pytest.raises(InputError, match="--fast is for the target ort-cpu, expected --target torch without it"):
        plan(tiny_preset, tmp_path / "bundle", target="torch", precision="llm=int4", fast=True)


def test_precisions_by_target():
    defaults = {t: parse_precision(None, COMPONENTS, t) for t in targets.LOWERINGS}
    for target, precision in {"ort-cpu": "fp32", "ort-cuda": "fp32", "torch": "fp32"}.items():
        assert defaults[target] == dict.fromkeys(COMPONENTS, precision)
    halves = {**dict.fromkeys(COMPONENTS, "fp16"), "slide_encoder": "bf16"}
    assert defaults["tensorrt"] == defaults["tensorrt-rtx"] == halves
    assert parse_precision("llm=int4,tile_encoder=bf16", COMPONENTS, "torch") == {
        **dict.fromkeys(COMPONENTS, "fp32"),
        "llm": "int4",
        "tile_encoder": "bf16",
    }
    assert parse_precision("bf16", COMPONENTS, "tensorrt-rtx") == dict.fromkeys(COMPONENTS, "bf16")
    with pytest.raises(InputError, match=r"--precision is 'fp32', expected bf16 or fp16, .* for tensorrt-rtx$"):
        parse_precision("fp32", COMPONENTS, "tensorrt-rtx")
    with pytest.raises(InputError, match="--precision is 'fp16', expected fp32 or int4 or int8"):
        parse_precision("fp16", COMPONENTS)
    assert all(set(supported(t)) == set(COMPONENTS) for t in targets.LOWERINGS)


def test_bytes_on_disk_are_near_what_was_said(tmp_path, tiny_preset, no_gpu):
    """A target that adds nothing to the portable graphs takes less than the CPU's."""
    said = {t: plan(tiny_preset, tmp_path / t, target=t).estimated_bytes for t in ("ort-cpu", "torch", "ort-cuda")}
    assert said["torch"] == said["ort-cuda"] < said["ort-cpu"]
    build_engines(plan(tiny_preset, tmp_path / "torch", target="torch"))
    weights = sum(p.stat().st_size for p in (tmp_path / "torch").rglob("weights.data"))
    assert 0.9 < weights / said["torch"] < 1.5


def test_settings_of_a_target_make_another_build(tmp_path, tiny_preset, no_gpu, abacus):
    plans = [
        plan(tiny_preset, tmp_path / "x", components=("projector",), **flags)
        for flags in ({}, {"target": "torch"}, {"target": "ort-cuda"}, {"target": "torch", "precision": "fp16"})
    ]
    plans += [plan(tiny_preset, tmp_path / "x", target="abacus", sms=sms) for sms in ((80,), (80, 89))]
    assert len({json.dumps(p.to_json(), sort_keys=True) for p in plans}) == len(plans)


def test_a_wrong_onnx_of_an_engine_that_cannot_run_is_refused(tmp_path, tiny_preset, no_gpu, abacus, monkeypatch):
    """What the engine is made from is held to the gate, so that nothing unchecked is installed."""
    honest = targets.LOWERINGS["abacus"]

    def lower(order):
        def wrong(_):
            return {"embeds": np.zeros((64, 64), np.float32)}

        return {t: replace(one, outputs=wrong) for t, one in honest(order).items()}

    monkeypatch.setitem(targets.LOWERINGS, "abacus", lower)
    out = tmp_path / "bundle"
    with pytest.raises(ParityError, match=r"projector \(ONNX of the abacus-sm80 engine\) differs") as e:
        build_engines(plan(tiny_preset, out, components=("projector",), target="abacus", sms=(80, 89)))
    assert e.value.exit_code == 5
    assert not out.exists()
