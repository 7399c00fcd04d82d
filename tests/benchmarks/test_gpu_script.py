"""`benchmarks/gpu.sh`: what it would run, that it refuses a machine without a GPU, and what it writes.

`nvidia-smi` and the environment's commands are stand-ins: no GPU is here, and none of this says anything about one.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TARGETS, BENCHES = ("torch", "ort-cuda", "tensorrt-rtx", "tensorrt"), ("kernels", "tiles", "encoders", "llm")
STEPS = [
    "doctor",
    "torch-cuda",
    "tests",
    *(f"{verb}-{target}" for target in TARGETS for verb in ("build", "verify")),
    *(f"bench-{name}" for name in BENCHES),
]


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def run(tmp_path):
    """run(*arguments, gpu=...) -> the finished process; `nvidia-smi` lists that GPU, or none."""

    def call(*arguments: str, gpu: str = "") -> subprocess.CompletedProcess[str]:
        script(tmp_path / "bin" / "nvidia-smi", f"echo '{gpu}'" if gpu else "echo 'no devices were found'; exit 6")
        path = f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"
        command = [str(ROOT / "benchmarks" / "gpu.sh"), *arguments]
        return subprocess.run(
            command, capture_output=True, text=True, timeout=60, check=False, env={**os.environ, "PATH": path}
        )

    return call


@pytest.fixture
def venv(tmp_path):
    """An environment whose commands write down how they were called; `bench tiles` fails."""
    calls = tmp_path / "calls.txt"
    note = f'echo "$(basename "$0") $*" >> {calls}'
    script(tmp_path / "venv" / "bin" / "wsi-rt", f'{note}\n[ "$2" != tiles ] || exit 5\necho \'{{"ok": true}}\'')
    # Only `python -m pytest` and the question for CUDA are stand-ins: what puts the result together is run.
    script(tmp_path / "venv" / "bin" / "python", f'case $1 in -m | -c) {note}; exit 0 ;; esac\nexec python3 "$@"')
    return tmp_path / "venv", calls


def test_a_dry_run_prints_every_step_and_does_nothing(run, tmp_path):
    done = run("--dry-run", "--venv", str(tmp_path / "new"), "--out", str(tmp_path / "out"))
    assert (done.returncode, done.stderr) == (0, "")
    assert [line.partition(": ")[0] for line in done.stdout.splitlines()] == ["environment", *STEPS]
    assert f"{tmp_path}/new/bin/wsi-rt build-engines --checkpoint synthetic:nano?seed=0 --target torch" in done.stdout
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "new").exists()


def test_without_a_gpu_it_says_so_before_anything_else(run, tmp_path):
    done = run("--venv", str(tmp_path / "new"), "--out", str(tmp_path / "out"))
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr.startswith("gpu.sh: no NVIDIA GPU here (nvidia-smi -L lists none): nothing was run")
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("flags", [["--fast"], ["--venv"]])
def test_usage(run, flags):
    done = run(*flags)
    assert (done.returncode, done.stdout) == (2, "")
    assert flags[0] in done.stderr


def test_all_steps_run_and_a_failure_is_told(run, venv, tmp_path):
    """One step fails: the others still run, the result says which it was, and the exit code is 1."""
    folder, calls = venv
    flags = ("--quick", "--venv", str(folder), "--checkpoint", "synthetic:nano?seed=7", "--out", str(tmp_path / "out"))
    done = run(*flags, gpu="GPU 0: Stand-In (UUID: GPU-0)")
    assert done.returncode == 1, done.stderr
    assert "these steps failed: bench-tiles" in done.stderr
    (result_file,) = (tmp_path / "out").glob("*/result.json")
    result = json.loads(result_file.read_text())
    assert [s["name"] for s in result["steps"]] == STEPS
    assert {s["name"]: s["exit_code"] for s in result["steps"] if s["exit_code"]} == {"bench-tiles": 5}
    told = {s["name"]: s["result"] for s in result["steps"] if "result" in s}
    assert told["doctor"] == told["bench-llm"] == {"ok": True}
    assert told["bench-tiles"] is None
    assert (result["gpus"], result["checkpoint"]) == (["GPU 0: Stand-In (UUID: GPU-0)"], "synthetic:nano?seed=7")
    called = calls.read_text().splitlines()
    assert called[2] == "python -m pytest -n 0 -m gpu"
    assert sum("build-engines --checkpoint synthetic:nano?seed=7 --target" in line for line in called) == len(TARGETS)
    assert [line for line in called if " bench " in line] == [f"wsi-rt bench {b} --quick --json" for b in BENCHES]
    assert (result_file.parent / "log.txt").read_text().count("== ") == len(STEPS)
