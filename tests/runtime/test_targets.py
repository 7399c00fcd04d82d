"""Which target of a bundle runs: names, architectures, and machines without the GPU that it needs.

A stand-in for the driver says which GPUs there are; the machine of these tests has none.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="the export extra is not installed")
pytest.importorskip("onnx", reason="the export extra is not installed")

from wsi_rt.export.build import BuildRequest, build_engines, plan_build
from wsi_rt.export.sources.checkpoint import Sources
from wsi_rt.runtime import devices
from wsi_rt.runtime.bundle import Bundle
from wsi_rt.runtime.devices import Gpu, Survey
from wsi_rt.runtime.engines.registry import TARGETS, backend, family_of
from wsi_rt.runtime.errors import EngineMismatchError, InputError, MachineError
from wsi_rt.runtime.hashing import sha256_file, sha256_json
from wsi_rt.runtime.manifest import load_manifest

without_gpu = pytest.mark.skipif(bool(devices.gpus()), reason="this machine has a GPU")
SMS = (80, 89)


@pytest.fixture(scope="module")
def ort_cuda(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The projector for `ort-cuda`, built where there may be no GPU."""
    root = tmp_path_factory.mktemp("targets") / "ort-cuda"
    request = BuildRequest(Sources(checkpoint="synthetic:nano"), root, "ort-cuda", components=("projector",), threads=1)
    build_engines(plan_build(request))
    return root


@pytest.fixture
def two_sms(ort_cuda: Path, tmp_path: Path) -> Path:
    """A manifest of TensorRT-RTX engines for two architectures; the files are stand-ins that no test opens."""
    root = Path(shutil.copytree(ort_cuda, tmp_path / "two", copy_function=shutil.copy2))
    data = json.loads((root / "manifest.json").read_text())
    del data["digest"]
    compiled = data["components"]["projector"]["targets"].pop("ort-cuda")
    names = {f"tensorrt-rtx-sm{sm}": str(sm) for sm in SMS}
    data["components"]["projector"]["targets"] = {
        name: {**compiled, "precision": "fp16", "requires": {"sm": sm}} for name, sm in names.items()
    }
    arguments = data["source"]["arguments"].replace("ort-cuda", "tensorrt-rtx")
    data |= {"targets": list(names), "source": {**data["source"], "arguments": arguments}}
    data["build"] |= {"target": "tensorrt-rtx", "sms": list(SMS)}
    (root / "manifest.json").write_text(json.dumps({**data, "digest": sha256_json(data)}))
    return root


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """machine(90, ...): GPUs of these architectures, as far as the driver is asked."""

    def have(*sms: int) -> None:
        gpus = tuple(Gpu(i, "stand-in", sm, 1 << 30) for i, sm in enumerate(sms))
        problem = None if gpus else "no NVIDIA driver here"
        monkeypatch.setattr(devices, "found", lambda: Survey(gpus, "580.65.06", (13, 1), problem))

    return have


def test_names_of_targets():
    assert {name: b.needs_gpu for name, b in TARGETS.items()} == {
        "ort-cpu": False,
        "ort-cuda": True,
        "torch": False,  # plain torch on the CPU
        "tensorrt": True,
        "tensorrt-rtx": True,
    }
    assert family_of("tensorrt-rtx-sm89") == family_of("tensorrt-rtx") == "tensorrt-rtx"
    assert backend("tensorrt-rtx-sm89").target == "tensorrt-rtx-sm89"
    assert backend("tensorrt-rtx-sm89").engine == backend("tensorrt-rtx").engine
    for name in ("ort-cuda-sm89", "tensorrt-rtx-sm", "tensorrt-rtx-89"):
        with pytest.raises(InputError, match=f"target is '{name}', expected one of: ort-cpu, ort-cuda, torch"):
            backend(name)


@pytest.mark.parametrize("asked", [None, "tensorrt-rtx"])
def test_this_machines_architecture_is_picked(two_sms, machine, asked):
    machine(89)
    assert Bundle.open(two_sms, target=asked).target == "tensorrt-rtx-sm89"
    machine(80)
    assert Bundle.open(two_sms, target=asked).target == "tensorrt-rtx-sm80"
    machine(90, 80)
    assert Bundle.open(two_sms, target=asked).target == "tensorrt-rtx-sm80"


def test_an_architecture_that_is_not_in_the_bundle(two_sms, machine):
    """Exit code 4; the command adds this machine's to those that are there."""
    machine(120)
    for asked in (None, "tensorrt-rtx", "tensorrt-rtx-sm80"):
        with pytest.raises(EngineMismatchError, match=r"built for sm_80, this machine is sm_120; rebuild: wsi-rt") as e:
            Bundle.open(two_sms, target=asked)
        assert e.value.exit_code == 4
        assert f"--target tensorrt-rtx --sm 80,89,120 --components projector --out {two_sms} --force" in str(e.value)
    with pytest.raises(InputError, match=r"not built for 'tensorrt-rtx-sm120', expected one of: tensorrt-rtx-sm80, "):
        Bundle.open(two_sms, target="tensorrt-rtx-sm120")


def test_no_gpu(two_sms, ort_cuda, machine):
    machine()
    for root, asked in ((two_sms, None), (two_sms, "tensorrt-rtx"), (ort_cuda, None), (ort_cuda, "ort-cuda")):
        with pytest.raises(MachineError, match=r"needs an NVIDIA GPU: no NVIDIA driver here; .*--target ort-cpu") as e:
            Bundle.open(root, target=asked)
        assert e.value.exit_code == 3
    assert Bundle.open(two_sms, to_run=False).manifest.targets == ("tensorrt-rtx-sm80", "tensorrt-rtx-sm89")


def test_the_machine_is_looked_at_before_the_files(ort_cuda, machine, tmp_path):
    """Hashing a bundle that was copied takes as long as reading it."""
    root = Path(shutil.copytree(ort_cuda, tmp_path / "copy", copy_function=shutil.copyfile))
    (root / "projector" / "weights.data").unlink()
    machine()
    with pytest.raises(MachineError):
        Bundle.open(root)
    machine(89)
    with pytest.raises(EngineMismatchError, match="missing from the bundle"):
        Bundle.open(root)


# Runs the command, then tells which heavy modules it came to import.
CODE = """
import sys
from wsi_rt.runtime.cli import run
code = run(sys.argv[1:])
print(sorted({"openslide", "onnxruntime", "torch", "tensorrt_rtx", "h5py"} & set(sys.modules)))
sys.exit(code)
"""


@without_gpu
@pytest.mark.parametrize(
    "command",
    [
        ("ask", "nowhere.svs", "What?", "--engines"),
        ("encode", "nowhere.svs", "--out", "x.pt", "--engines"),
        ("plan", "nowhere.svs", "--engines"),
        ("verify",),
    ],
    ids=lambda c: c[0],
)
def test_commands_stop_before_the_slide_is_read(ort_cuda, tmp_path, command):
    """No slide is there, which is not what is told: nothing was opened, nothing that opens slides or engines was even
    imported."""
    arguments = [*command, str(ort_cuda), "--target", "ort-cuda"]
    done = subprocess.run(
        [sys.executable, "-c", CODE, *arguments], capture_output=True, text=True, timeout=60, cwd=tmp_path, check=False
    )
    assert done.returncode == 3
    assert done.stderr.startswith("wsi-rt: ort-cuda needs an NVIDIA GPU: ")
    assert len(done.stderr.splitlines()) == 1
    assert done.stdout.splitlines()[-1] == "[]"
    assert not list(tmp_path.iterdir())


@without_gpu
def test_verify_tells_what_it_could_not_check(wsi_rt, ort_cuda):
    result = wsi_rt("verify", ort_cuda)
    assert result.code == 0
    assert "files intact\nprojector      ok  ort-cuda  relative error " in result.out
    assert result.out.endswith(", of the ONNX on the CPU; engine not run: no GPU\n")
    report = json.loads(wsi_rt("verify", ort_cuda, "--json").out)
    row = report["components"]["projector"]["targets"]["ort-cuda"]
    assert (row["engine"], row["checked"], row["ok"]) == ("not run: no GPU", "onnx", True)
    assert row["max_rel"] <= 5e-5


@without_gpu
def test_verify_of_what_cannot_be_checked_at_all(wsi_rt, two_sms):
    """Neither engine nor ONNX: files are intact, and the exit code says that no number was looked at."""
    data = json.loads((two_sms / "manifest.json").read_text())
    del data["digest"]
    for compiled in data["components"]["projector"]["targets"].values():
        compiled["source"] = {}
    (two_sms / "manifest.json").write_text(json.dumps({**data, "digest": sha256_json(data)}))
    result = wsi_rt("verify", two_sms)
    assert result.code == 3
    assert result.out.count("projector      not checked  tensorrt-rtx-sm") == 2
    assert "needs an NVIDIA GPU" in result.err


@without_gpu
def test_wrong_numbers_fail_verify_without_a_gpu_too(wsi_rt, ort_cuda, tmp_path):
    root = Path(shutil.copytree(ort_cuda, tmp_path / "wrong", copy_function=shutil.copy2))
    manifest = load_manifest(root)
    check = root / manifest.components["projector"].check
    with np.load(check) as stored:
        arrays = dict(stored)
    arrays["output.embeds"] = arrays["output.embeds"] + 0.1 * np.abs(arrays["output.embeds"]).max()
    np.savez(check, **arrays)
    data = json.loads((root / "manifest.json").read_text())
    del data["digest"]
    entry = data["files"][manifest.components["projector"].check]
    entry |= {"size": check.stat().st_size, "sha256": sha256_file(check)}
    (root / "manifest.json").write_text(json.dumps({**data, "digest": sha256_json(data)}))
    result = wsi_rt("verify", root)
    assert result.code == 5
    assert "projector      FAILED  ort-cuda" in result.out


@without_gpu
def test_inspect_tells_that_the_engine_has_not_run(wsi_rt, ort_cuda):
    told = wsi_rt("inspect", ort_cuda).out
    assert "engine not run: no GPU; what follows is of the ONNX that it was made from, on the CPU" in told
    assert "  parity against fp32 torch: relative error " in told


@without_gpu
def test_doctor_on_a_bundle(wsi_rt, ort_cuda, two_sms, nano_bundle, machine):
    result = wsi_rt("doctor", "--engines", ort_cuda)
    assert result.code == 3
    assert "engines ort-cuda: ort-cuda needs an NVIDIA GPU: " in result.out
    assert f"PROBLEM {ort_cuda}: none of its engines runs here" in result.out
    assert "engines ort-cpu: ok" in wsi_rt("doctor", "--engines", nano_bundle).out
    machine(120)
    report = json.loads(wsi_rt("doctor", "--engines", two_sms, "--json").out)
    assert set(report["engines"]) == {"tensorrt-rtx-sm80", "tensorrt-rtx-sm89"}
    assert all("this machine is sm_120; rebuild: wsi-rt" in why for why in report["engines"].values())


def test_doctor_tells_what_gpu_work_lacks(wsi_rt, machine):
    """None of it is a problem of the CPU's job."""
    machine()
    report = json.loads(wsi_rt("doctor", "--json").out)
    assert report["ok"]
    assert report["gpu"]["missing"][0] == {
        "what": "GPU",
        "for": "every GPU target",
        "fix": "no NVIDIA driver here",
    }
    assert all(m["fix"] and m["for"] for m in report["gpu"]["missing"])
    machine(89)
    report = json.loads(wsi_rt("doctor", "--json").out)
    assert report["gpu"]["gpus"] == [{"index": 0, "name": "stand-in", "sm": 89, "memory_bytes": 1 << 30}]
    assert (report["gpu"]["driver"], report["gpu"]["cuda"]) == ("580.65.06", "13.1")
    assert "GPU" not in [m["what"] for m in report["gpu"]["missing"]]
    assert "GPU     stand-in (sm_89, 1 GiB); driver 580.65.06, CUDA up to 13.1" in wsi_rt("doctor").out


def test_doctor_knows_libraries_newer_than_the_driver(monkeypatch):
    from wsi_rt.runtime import doctor_gpu

    monkeypatch.setattr(doctor_gpu, "installed_version", {"nvidia-cuda-runtime": "13.0.96"}.get)
    old = Survey((Gpu(0, "stand-in", 89, 1 << 30),), "535.1", (12, 2))
    monkeypatch.setattr(devices, "found", lambda: old)
    lacks = {m["what"]: m["fix"] for m in doctor_gpu.examine_gpu()["missing"]}
    assert lacks["CUDA"].startswith("the installed CUDA libraries are of 13.0.96, the driver supports 12.2: install")
    assert {"onnxruntime-gpu", "tensorrt", "tensorrt-rtx", "triton", "flash-attn", "cucim"} <= set(lacks)
