"""`build-engines` as a whole: reproducible, careful with what is already there, and safe to interrupt or kill."""

from __future__ import annotations

import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="the export extra is not installed")
pytest.importorskip("onnx", reason="the export extra is not installed")
pytest.importorskip("transformers", reason="the export extra is not installed")

from wsi_rt.export import build as build_module
from wsi_rt.export import component, targets
from wsi_rt.export.build import BuildRequest, build_engines, is_up_to_date, plan_build
from wsi_rt.export.sources.checkpoint import Sources
from wsi_rt.runtime.bundle import Bundle
from wsi_rt.runtime.commands.build import build_engines as build_command
from wsi_rt.runtime.engines import registry
from wsi_rt.runtime.errors import EngineMismatchError, InputError, MachineError
from wsi_rt.runtime.manifest import COMPONENTS, load_manifest
from wsi_rt.runtime.parity import Gate, check_component

COMMAND = [sys.executable, "-m", "wsi_rt.runtime.cli", "build-engines", "--components", "projector"]


def plan(word: str, out: Path, tokenizer_: str | None = None, **request):
    return plan_build(BuildRequest(Sources(checkpoint=word, tokenizer=tokenizer_), out, threads=1, **request))


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
    assert manifest.targets == ("ort-cpu",)
    assert {"onnx", "onnxruntime", "torch", "transformers", "numpy"} <= set(manifest.build["toolchain"])
    assert manifest.build["precision"] == dict.fromkeys(COMPONENTS, "fp32")
    assert set(manifest.files) == {
        str(p.relative_to(out))
        for p in out.rglob("*")
        if p.is_file() and p.name not in {"manifest.json", ".stamp.json"}
    }
    for name, c in manifest.components.items():
        assert c.config["width" if "encoder" in name else {"llm": "hidden", "projector": "widths"}[name]]
        parity = c.compiled("ort-cpu").parity
        assert parity["engine"]["max_rel"] <= parity["gate"]["max_rel"]
        assert check_component(out, "ort-cpu", c, 1).passes(Gate(**parity["gate"]))
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


def test_weights_name_the_checkpoint_whoever_built_it(tmp_path, tiny_preset, monkeypatch):
    """Features stay usable when the same checkpoint is built again by other code, and only then."""
    parts = {"components": ("projector",)}
    first = build_engines(plan(tiny_preset, tmp_path / "a", **parts)).components["projector"]
    monkeypatch.setattr(component, "check_inputs", lambda c: {"tokens": np.ones((3, c.widths[0]), np.float32)})
    again = build_engines(plan(tiny_preset, tmp_path / "b", **parts)).components["projector"]
    other = build_engines(plan(tiny_preset + "?seed=1", tmp_path / "c", **parts)).components["projector"]
    assert again.digest != first.digest
    assert again.weights == first.weights != other.weights


def test_other_code_is_another_build(tmp_path, tiny_preset, monkeypatch):
    out, parts = tmp_path / "bundle", {"components": ("projector",)}
    build_engines(plan(tiny_preset, out, **parts))
    monkeypatch.setattr(build_module, "code_digest", lambda: "other")
    with pytest.raises(InputError, match="another build"):
        is_up_to_date(plan(tiny_preset, out, **parts))


def follow(command: str) -> BuildRequest:
    """What `build-engines` would be asked by this line."""
    words = shlex.split(command)
    assert words[:2] == ["wsi-rt", "build-engines"]
    with build_command.make_context("build-engines", words[2:]) as context:
        flags = {k: v for k, v in context.params.items() if k not in {"dry_run", "components"}}
        components = tuple((context.params["components"] or "").split(",")) if context.params["components"] else ()
    sources = Sources(**{f.name: flags.pop(f.name) for f in fields(Sources)})
    return BuildRequest(sources, components=components, **flags)


@pytest.mark.parametrize(
    "request_",
    [
        {},
        {"components": ("projector",)},
        {"components": ("llm", "projector"), "precision": "llm=fp32,projector=fp32"},
        {"components": tuple(COMPONENTS), "precision": "fp32"},
    ],
    ids=["all", "one", "two-with-precision", "all-named"],
)
def test_the_rebuild_command_builds_the_same(tmp_path, tiny_preset, request_):
    out = tmp_path / "a bundle"
    first = build_engines(plan(tiny_preset + "?seed=2", out, **request_))
    command = first.rebuild_command(out)
    assert ("--components" in command) == (len(first.components) < len(COMPONENTS))
    again = plan_build(follow(command))
    assert again.request.force
    assert again.to_json() == {k: v for k, v in first.build.items() if k != "key"}
    whole = plan_build(follow(first.rebuild_command(out, everything=True)))
    assert tuple(whole.checkpoint.parts) == COMPONENTS


def test_the_rebuild_command_works_from_any_folder(tmp_path, checkpoint, monkeypatch):
    monkeypatch.chdir(checkpoint.root.parent)
    p = plan("checkpoint", tmp_path / "bundle", components=("projector",), tokenizer_="checkpoint/llava")
    manifest = build_engines(p)
    command = manifest.rebuild_command(tmp_path / "bundle")
    assert f"--checkpoint {checkpoint.root} --tokenizer {checkpoint.llava} --components projector" in command
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert plan_build(follow(command)).to_json() == p.to_json()


def test_the_target_is_named_unless_it_is_the_default(tmp_path):
    request = BuildRequest(Sources(checkpoint="synthetic:nano"), tmp_path, target="tensorrt-rtx-sm89", precision="fp16")
    assert request.arguments() == "--checkpoint synthetic:nano --target tensorrt-rtx-sm89 --precision fp16"
    assert replace(request, target="ort-cpu").arguments() == "--checkpoint synthetic:nano --precision fp16"


def test_a_target_that_cannot_be_built(tmp_path, tiny_preset, monkeypatch):
    """A name added to the runtime's targets alone must not get the CPU's graphs."""
    with pytest.raises(InputError, match=r"--target is 'abacus', expected one of: ort-cpu, ort-cuda, torch"):
        plan(tiny_preset, tmp_path / "bundle", target="abacus")
    monkeypatch.setitem(registry.TARGETS, "abacus", registry.backend("ort-cpu"))
    with pytest.raises(InputError, match=r"'abacus' \(this wsi-rt opens it, but .*\), expected one of: ort-cpu, "):
        plan(tiny_preset, tmp_path / "bundle", target="abacus")


def test_a_target_of_its_own_is_lowered_by_its_own_function(tmp_path, tiny_preset, monkeypatch):
    lowered: list[Path] = []

    def lower(order: targets.Order) -> dict[str, targets.Lowered]:
        (found,) = targets.LOWERINGS["ort-cpu"](order).values()
        lowered.append(found.weights_dir)
        return {"abacus": replace(found, requires={})}

    monkeypatch.setitem(targets.LOWERINGS, "abacus", lower)
    monkeypatch.setitem(registry.TARGETS, "abacus", replace(registry.backend("ort-cpu"), target="abacus"))
    manifest = build_engines(plan(tiny_preset, tmp_path / "bundle", target="abacus", components=("projector",)))
    assert [p.name for p in lowered] == ["abacus"]
    assert manifest.components["projector"].targets["abacus"].graphs == {"model": "projector/abacus/model.onnx"}
    assert Bundle.open(tmp_path / "bundle").target == "abacus"


@pytest.mark.parametrize("force", [False, True])
def test_what_appears_during_the_build_is_kept(tmp_path, tiny_preset, force):
    """A folder with a file, made by someone else while the build runs: refused at the swap, and the work removed."""
    out = tmp_path / "bundle"

    def meanwhile(step: str) -> None:
        if step == "tokenizer and manifest":
            out.mkdir()
            (out / "cat.jpg").write_text("cat")

    with pytest.raises(InputError, match="exists and is no engine bundle") as e:
        build_engines(plan(tiny_preset, out, components=("projector",), force=force), meanwhile)
    assert e.value.exit_code == 2
    assert [(p.name, p.read_text()) for p in out.iterdir()] == [("cat.jpg", "cat")]
    assert list(tmp_path.iterdir()) == [out]


def test_a_bundle_that_appears_during_the_build_is_kept(tmp_path, tiny_preset):
    out, parts = tmp_path / "bundle", {"components": ("projector",)}
    other = build_engines(plan(tiny_preset + "?seed=1", tmp_path / "other", **parts))

    def meanwhile(step: str) -> None:
        if step == "tokenizer and manifest":
            (tmp_path / "other").rename(out)

    with pytest.raises(InputError, match="an engine bundle stands there; replace it with --force"):
        build_engines(plan(tiny_preset, out, **parts), meanwhile)
    assert load_manifest(out) == other
    Bundle.open(out).verify_files()
    assert list(tmp_path.iterdir()) == [out]
    assert build_engines(plan(tiny_preset, out, force=True, **parts)) == load_manifest(out)


def test_another_programs_manifest_makes_no_bundle(tmp_path, tiny_preset):
    (tmp_path / "manifest.json").write_text('{"manifest_version": 3, "name": "a browser extension"}')
    for attempt in (is_up_to_date, build_engines):
        with pytest.raises(InputError, match="exists and is no engine bundle; choose another --out"):
            attempt(plan(tiny_preset, tmp_path, components=("projector",), force=True))
    assert [p.name for p in tmp_path.iterdir()] == ["manifest.json"]


def test_force_never_removes_a_file_put_into_a_bundle(tmp_path, tiny_preset):
    out, parts = tmp_path / "bundle", {"components": ("projector",), "force": True}
    build_engines(plan(tiny_preset, out, **parts))
    (out / "notes.txt").write_text("mine")
    for attempt in (is_up_to_date, build_engines):
        with pytest.raises(InputError, match=r"also holds 'notes\.txt', which is no part of an engine bundle; choose"):
            attempt(plan(tiny_preset, out, **parts))
    assert (out / "notes.txt").read_text() == "mine"
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize("flags", [(), ("--dry-run",)], ids=["real", "dry"])
def test_a_dry_run_refuses_what_the_build_would(tmp_path, tiny_preset, wsi_rt, monkeypatch, flags):
    build = ("build-engines", "--checkpoint", tiny_preset, "--components", "projector", *flags, "--out")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_text("cat")
    build_engines(plan(tiny_preset + "?seed=1", tmp_path / "bundle", components=("projector",)))

    def refused(code: int, words: str, out: Path, *more: str) -> None:
        result = wsi_rt(*build, out, *more)
        assert (result.code, result.out) == (code, "")
        assert words in result.err
        assert sorted(p.name for p in tmp_path.iterdir()) == ["bundle", "photos"]

    for more in ((), ("--force",)):
        refused(2, "exists and is no engine bundle", tmp_path / "photos", *more)
    refused(2, "exists and is no engine bundle", tmp_path / "photos" / "cat.jpg")
    refused(2, "something stands in the way", tmp_path / "photos" / "cat.jpg" / "bundle")
    refused(2, "holds another build", tmp_path / "bundle")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    refused(3, "0.0 GB free", tmp_path / "new")
    refused(3, "0.0 GB free", tmp_path / "bundle", "--force")


def test_a_dry_run_of_what_is_there_says_so(tmp_path, tiny_preset, wsi_rt):
    out = tmp_path / "bundle"
    build_engines(plan(tiny_preset, out, components=("projector",)))
    result = wsi_rt(
        "build-engines", "--checkpoint", tiny_preset, "--components", "projector", "--out", out, "--dry-run"
    )
    assert (result.code, result.out, result.err) == (0, "", f"{out}: up to date\n")


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
    with pytest.raises(MachineError, match=r"0\.0 GB free, the bundle needs about") as e:
        build_engines(plan(tiny_preset, tmp_path / "x" / "bundle"))
    assert e.value.exit_code == 3
    assert list(tmp_path.iterdir()) == []


def start_build(out: Path, seed: int) -> subprocess.Popen:
    command = [*COMMAND, "--checkpoint", f"synthetic:nano?seed={seed}", "--out", str(out), "--force"]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell's background jobs ignore Ctrl-C, and so would the build of tests that run in one.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


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
    """SIGKILL of the real command, thirty times, at every stage of its work and at random moments: what is there opens
    and is right each time. Then a build that is left alone."""
    out = tmp_path / "bundle"
    assert start_build(out, 0).wait() == 0
    rng = random.Random(0)
    stages = ["projector", "projector/weights.data", "projector/ort-cpu", "projector/probe.onnx", "projector/check.npz"]
    moments: list[str | None] = [*stages, "manifest.json", ".stamp.json", None, None, None]
    for seed, what in enumerate(3 * moments, start=1):
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
        assert check_component(out, "ort-cpu", part, 1).passes(Gate(**part.compiled("ort-cpu").parity["gate"]))
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
