"""`build-engines` as a whole: reproducible, careful with what is already there, and safe to interrupt or kill."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="the export extra is not installed")
pytest.importorskip("onnx", reason="the export extra is not installed")
pytest.importorskip("transformers", reason="the export extra is not installed")

from wsi_rt.export import build as build_module
from wsi_rt.export.build import BuildRequest, build_engines, is_up_to_date, plan_build
from wsi_rt.export.sources.checkpoint import Sources
from wsi_rt.runtime.bundle import Bundle
from wsi_rt.runtime.errors import EngineMismatchError, InputError, MissingDependencyError
from wsi_rt.runtime.manifest import COMPONENTS, load_manifest
from wsi_rt.runtime.parity import Gate, check_component

COMMAND = [sys.executable, "-m", "wsi_rt.runtime.cli", "build-engines", "--components", "projector"]


def plan(word: str, out: Path, **request):
    return plan_build(BuildRequest(Sources(checkpoint=word), out, threads=1, **request))


def test_two_builds_are_equal(tmp_path, tiny_preset):
    """Every file byte for byte, so the manifests and the component digests too."""
    first, second = (build_engines(plan(tiny_preset, tmp_path / name)) for name in ("a", "b"))
    assert tuple(first.components) == COMPONENTS
    assert first.to_json() == second.to_json()
    for name in first.files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert load_manifest(tmp_path / "a") == first


def test_the_manifest_tells_what_was_built(tmp_path, tiny_preset, tiny):
    out = tmp_path / "bundle"
    manifest = build_engines(plan(tiny_preset + "?seed=7", out))
    assert manifest.source["synthetic"]
    assert manifest.source["label"] == "synthetic:tiny?seed=7"
    command = f"wsi-rt build-engines --checkpoint 'synthetic:tiny?seed=7' --out {out} --force"
    assert manifest.rebuild_command(out) == command
    assert {"onnx", "onnxruntime", "torch", "transformers", "numpy"} <= set(manifest.build["toolchain"])
    assert manifest.build["precision"] == dict.fromkeys(COMPONENTS, "fp32")
    assert set(manifest.files) == {
        str(p.relative_to(out))
        for p in out.rglob("*")
        if p.is_file() and p.name not in {"manifest.json", ".stamp.json"}
    }
    for name, c in manifest.components.items():
        assert c.config["width" if "encoder" in name else {"llm": "hidden", "projector": "widths"}[name]]
        assert c.parity["engine"]["max_rel"] <= c.parity["gate"]["max_rel"]
        assert check_component(out, "ort-cpu", c, 1).passes(Gate(**c.parity["gate"]))
        assert (out / c.check).stat().st_size < 3e6
    assert manifest.components["slide_encoder"].profile["tiles"] == (1, 8192, 1_000_000)
    assert not [p for p in tmp_path.iterdir() if p != out]


def test_steps_are_told(tmp_path, tiny_preset):
    steps: list[str] = []
    p = plan(tiny_preset, tmp_path / "bundle", components=("projector",))
    build_engines(p, steps.append)
    assert len(steps) == p.steps()
    assert steps[0] == "projector: export"


def test_a_subset_and_its_order(tmp_path, tiny_preset):
    manifest = build_engines(plan(tiny_preset, tmp_path / "bundle", components=("llm", "projector")))
    assert set(manifest.components) == {"llm", "projector"}
    assert manifest.tokenizer["vocab_size"] == 512
    manifest = build_engines(plan(tiny_preset, tmp_path / "other", components=("projector",)))
    assert manifest.tokenizer == {}
    assert not (tmp_path / "other" / "tokenizer").exists()


def test_up_to_date_and_force(tmp_path, tiny_preset):
    out, parts = tmp_path / "bundle", {"components": ("projector",)}
    assert not is_up_to_date(plan(tiny_preset, out, **parts))
    out.mkdir()
    assert not is_up_to_date(plan(tiny_preset, out, **parts)), "an empty folder may be filled"
    build_engines(plan(tiny_preset, out, **parts))
    assert is_up_to_date(plan(tiny_preset, out, **parts))
    assert is_up_to_date(plan(tiny_preset + "?seed=0", out, **parts))
    assert not is_up_to_date(plan(tiny_preset, out, force=True, **parts))
    for other in (plan(tiny_preset + "?seed=1", out, **parts), plan(tiny_preset, out, components=("tile_encoder",))):
        with pytest.raises(InputError, match=r"holds another build \(of synthetic:tiny\?seed=0\); .*--force"):
            is_up_to_date(other)
        assert not is_up_to_date(replace(other, request=replace(other.request, force=True)))


def test_other_code_is_another_build(tmp_path, tiny_preset, monkeypatch):
    out, parts = tmp_path / "bundle", {"components": ("projector",)}
    build_engines(plan(tiny_preset, out, **parts))
    monkeypatch.setattr(build_module, "code_digest", lambda: "other")
    with pytest.raises(InputError, match="another build"):
        is_up_to_date(plan(tiny_preset, out, **parts))


@pytest.mark.parametrize("force", [False, True])
def test_other_folders_and_files_are_never_replaced(tmp_path, tiny_preset, force):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_text("cat")
    for out in (tmp_path / "photos", tmp_path / "photos" / "cat.jpg"):
        with pytest.raises(InputError, match="exists and is no engine bundle"):
            is_up_to_date(plan(tiny_preset, out, components=("projector",), force=force))
    assert (tmp_path / "photos" / "cat.jpg").read_text() == "cat"


@pytest.mark.parametrize(("name", "told"), [("manifest.json", "damaged"), ("projector/weights.data", "bytes")])
def test_a_damaged_bundle_needs_force(tmp_path, tiny_preset, name, told):
    out, parts = tmp_path / "bundle", {"components": ("projector",)}
    build_engines(plan(tiny_preset, out, **parts))
    (out / name).write_text("{")
    with pytest.raises(EngineMismatchError, match=told):
        is_up_to_date(plan(tiny_preset, out, **parts))
    forced = plan(tiny_preset, out, force=True, **parts)
    assert not is_up_to_date(forced)
    build_engines(forced)
    Bundle.open(out).verify_files()


def test_a_full_disk_is_told_before_building(tmp_path, tiny_preset, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(MissingDependencyError, match=r"0\.0 GB free, the bundle needs about") as e:
        build_engines(plan(tiny_preset, tmp_path / "x" / "bundle"))
    assert e.value.exit_code == 3
    assert list(tmp_path.iterdir()) == []


def start_build(out: Path, seed: int) -> subprocess.Popen:
    command = [*COMMAND, "--checkpoint", f"synthetic:nano?seed={seed}", "--out", str(out), "--force"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(condition: Callable[[], bool], process: subprocess.Popen) -> None:
    while not condition() and process.poll() is None:
        time.sleep(0.002)


def working(out: Path, what: str = "projector") -> Callable[[], bool]:
    return lambda: (out.parent / f".{out.name}.building" / what).exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "terminated"])
def test_an_interrupted_build_leaves_nothing(tmp_path, number):
    out = tmp_path / "engines" / "bundle"
    process = start_build(out, 0)
    wait_for(working(out), process)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert stderr.rstrip().splitlines()[-1] == "wsi-rt: interrupted; nothing half-written is left behind"
    assert "Traceback" not in stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_killed_build_never_harms_the_old_bundle(tmp_path):
    """SIGKILL of the real command at stages of its work and at random moments; then a build that is left alone."""
    out = tmp_path / "bundle"
    assert start_build(out, 0).wait() == 0
    rng = random.Random(0)
    moments = ["projector", "projector/ort-cpu", "projector/check.npz", "manifest.json", None, None]
    for seed, what in enumerate(moments, start=1):
        process = start_build(out, seed)
        if what is None:
            time.sleep(rng.uniform(0.1, 4))
        else:
            wait_for(working(out, what), process)
        process.kill()
        process.communicate()
        bundle = Bundle.open(out)
        bundle.verify_files()
        part = bundle.component("projector")
        assert check_component(out, "ort-cpu", part, 1).passes(Gate(**part.parity["gate"]))
    assert start_build(out, 99).wait() == 0
    bundle = Bundle.open(out)
    bundle.verify_files()
    assert bundle.manifest.source["label"] == "synthetic:nano?seed=99"
    assert sorted(os.listdir(tmp_path)) == ["bundle"]


@pytest.mark.slow
def test_two_commands_at_once(tmp_path):
    """The second is refused (exit code 2) or, coming after the first, builds; the bundle is whole either way."""
    out = tmp_path / "bundle"
    both = [start_build(out, seed) for seed in (1, 2)]
    results = [(p.communicate()[1], p.returncode) for p in both]
    codes = sorted(code for _, code in results)
    assert codes in ([0, 0], [0, 2]), results
    if 2 in codes:
        assert any("another build is writing it" in stderr for stderr, _ in results)
    Bundle.open(out).verify_files()
    assert sorted(os.listdir(tmp_path)) == ["bundle"]
