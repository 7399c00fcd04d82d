"""What gets imported, and how fast: each in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median

import pytest

ROOT = Path(__file__).resolve().parents[2]
BUILDERS = ("torch", "transformers", "onnx", "timm", "safetensors", "sentencepiece")

# Makes them unimportable, so that even a guarded `try: import torch` shows.
BLOCK = f"""
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in {BUILDERS!r}:
            asked.append(name)
            raise ImportError(f'{{name}} is blocked', name=name)
asked = []
sys.meta_path.insert(0, Block())
"""


def python(code: str, *arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120, cwd=cwd, check=False
    )
    assert done.returncode == 0, done.stderr
    return done


def seconds_and_modules(statement: str) -> tuple[float, set[str]]:
    code = f"""
from time import perf_counter
start = perf_counter()
{statement}
elapsed = perf_counter() - start
import json, sys
print(json.dumps([elapsed, sorted(sys.modules)]))
"""
    elapsed, modules = json.loads(python(code).stdout)
    return elapsed, set(modules)


@pytest.mark.parametrize(
    ("statement", "of_five"),
    # The second does all the work that the first puts off; the best run, since other tests share the CPUs.
    [("import wsi_rt.runtime", median), ("from wsi_rt.runtime import Pipeline", min)],
)
def test_the_runtime_imports_in_half_a_second(statement: str, of_five: Callable[[list[float]], float]) -> None:
    runs = [seconds_and_modules(statement) for _ in range(5)]
    assert of_five([elapsed for elapsed, _ in runs]) < 0.5
    assert not runs[0][1] & {*BUILDERS, "onnxruntime", "openslide", "h5py", "PIL", "tokenizers"}


def test_help_imports_no_numbers() -> None:
    _, modules = seconds_and_modules(
        "import contextlib, io\nfrom wsi_rt.runtime.cli import run\n"
        "with contextlib.redirect_stdout(io.StringIO()):\n    assert run(['--help']) == 0"
    )
    assert not modules & {*BUILDERS, "numpy", "onnxruntime", "h5py", "PIL", "openslide", "tokenizers", "tqdm"}


def test_a_command_imports_its_own_module_only() -> None:
    _, modules = seconds_and_modules(
        "import contextlib, io\nfrom wsi_rt.runtime.cli import run\n"
        "with contextlib.redirect_stdout(io.StringIO()):\n    assert run(['doctor', '--help']) == 0"
    )
    commands = {m.rpartition(".")[2] for m in modules if m.startswith("wsi_rt.runtime.commands.")}
    assert commands == {"doctor", "options"}


def test_unknown_names_of_the_package_are_refused() -> None:
    import wsi_rt.runtime

    assert all(hasattr(wsi_rt.runtime, name) for name in wsi_rt.runtime.__all__)
    with pytest.raises(AttributeError, match="Pipelin"):
        _ = wsi_rt.runtime.Pipelin


def test_a_whole_ask_works_without_the_packages_that_build_engines(nano_bundle: Path, slide: Path) -> None:
    code = f"""
{BLOCK}
from wsi_rt.runtime.cli import run
code = run(sys.argv[1:])
assert code == 0, code
print(asked, [n for n in {BUILDERS!r} if n in sys.modules])
"""
    done = python(code, "ask", str(slide), "What?", "--engines", str(nano_bundle), "--max-new-tokens", "4", "--json")
    answer, _, last = done.stdout.rstrip().rpartition("\n")
    assert len(json.loads(answer)["token_ids"]) == 4
    assert last == "[] []"


def test_building_without_them_says_what_to_install(tmp_path: Path) -> None:
    code = f"""
{BLOCK}
from wsi_rt.runtime.cli import run
print(run(sys.argv[1:]))
"""
    done = python(code, "build-engines", "--checkpoint", "synthetic:nano", "--out", str(tmp_path / "bundle"))
    assert done.stdout == "3\n"
    assert done.stderr.startswith("wsi-rt: ")
    assert "pip install '.[export]'" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_transformers_imports_with_the_repository_root_on_the_path() -> None:
    """It probes a top-level package called `kernels`, which is then ours; without a version it crashes."""
    pytest.importorskip("transformers", reason="the export extra is missing")
    done = python(
        "import kernels, transformers; from transformers import LlamaForCausalLM; print(kernels.__file__)", cwd=ROOT
    )
    assert done.stdout.strip() == str(ROOT / "kernels" / "__init__.py")
