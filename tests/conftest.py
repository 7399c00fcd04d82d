"""What several test folders share: an engine bundle built through the command, slides, and the command itself."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import count
from pathlib import Path

import pytest

# Before torch is imported: its thread pool, fighting over few cores, makes tiny models twenty times slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
_CACHES = count()
COMMAND = (sys.executable, "-m", "wsi_rt.runtime.cli")


@dataclass(frozen=True)
class Result:
    """How a command ended."""

    code: int
    out: str
    err: str


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where commands keep encoded slides: a folder of the test's own, made when it is used."""
    folder = tmp_path_factory.getbasetemp() / f"cache-{next(_CACHES)}"
    monkeypatch.setenv("WSI_RT_CACHE", str(folder))
    return folder


@pytest.fixture(scope="session")
def shared_slides() -> Path:
    """The folder of real slides; tests that need it skip where it is absent."""
    folder = SHARED / "data" / "slides"
    if not folder.is_dir():
        pytest.skip(f"real slides are not there: {folder}")
    return folder


@pytest.fixture
def wsi_rt(capfd: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """wsi_rt(*arguments) -> Result: the command in this process."""
    from wsi_rt.runtime.cli import run

    def call(*arguments: object) -> Result:
        capfd.readouterr()
        code = run([str(a) for a in arguments])
        return Result(code, *capfd.readouterr())

    return call


@pytest.fixture
def wsi_rt_process() -> Callable[..., Result]:
    """wsi_rt_process(*arguments, **popen) -> Result: the command in a process of its own."""

    def call(*arguments: object, **popen: object) -> Result:
        options = {"capture_output": True, "text": True, "timeout": 120, "check": False, **popen}
        done = subprocess.run([*COMMAND, *(str(a) for a in arguments)], **options)
        return Result(done.returncode, done.stdout, done.stderr)

    return call


@pytest.fixture(scope="session")
def export_extra() -> None:
    """Skips where engines cannot be built."""
    missing = [name for name in ("torch", "onnx", "safetensors", "transformers") if find_spec(name) is None]
    if missing:
        pytest.skip(f"engines cannot be built without {', '.join(missing)} (the export extra)")


@pytest.fixture(scope="session")
def nano_bundle(export_extra: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of synthetic:nano?seed=0, built once. Tests that change it take `own_bundle`."""
    from wsi_rt.runtime.cli import run

    bundle = tmp_path_factory.mktemp("bundle") / "nano"
    assert run(["build-engines", "--checkpoint", "synthetic:nano?seed=0", "--out", str(bundle)]) == 0
    return bundle


@pytest.fixture
def own_bundle(nano_bundle: Path, tmp_path: Path) -> Path:
    """A copy of `nano_bundle` made of hard links: a test replaces files of it, and never writes into one."""
    import shutil

    return Path(shutil.copytree(nano_bundle, tmp_path / "own", copy_function=os.link))


@pytest.fixture(scope="session")
def synth_slide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1,500 x 1,100 px at 0.5 um/px, written by the project."""
    from wsi_rt.runtime.slides.synth import write_synth_slide

    return write_synth_slide(tmp_path_factory.mktemp("slide") / "synth.svs", width=1500, height=1100, seed=1)


@pytest.fixture(scope="session")
def slide(request: pytest.FixtureRequest) -> Path:
    """The real Aperio slide where the shared data is there, else a synthetic one."""
    real = SHARED / "data" / "slides" / "CMU-1-Small-Region.svs"
    return real if real.is_file() else request.getfixturevalue("synth_slide")
