"""Runs every file of `interpreter/` in Triton's interpreter: a process of its own each, as conftest.py explains."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "interpreter"
FILES = sorted(FOLDER.glob("test_*.py"))


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="this is the process with the interpreter")
@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_kernels_in_the_interpreter(file: Path, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    missing = [name for name in ("torch", "triton") if find_spec(name) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} not installed")
    environ = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    environ |= {"TRITON_INTERPRET": "1", "TRITON_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    marks = request.config.option.markexpr
    command = [sys.executable, "-m", "pytest", str(file), "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    command += ["-m", marks] if marks else []
    done = subprocess.run(
        command, env=environ, cwd=request.config.rootpath, capture_output=True, text=True, timeout=1200, check=False
    )
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    assert " passed" in done.stdout
    assert " skipped" not in done.stdout, done.stdout
