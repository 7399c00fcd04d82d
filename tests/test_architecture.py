"""The frame: imports point down, nothing heavy at module level, no prints, facts written once."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

ROOT = Path(__file__).resolve().parents[1]
LAYERS = ("kernels", "runtime", "export", "benchmarks")  # each may import itself and what stands left of it
COMMANDS = ROOT / "runtime" / "commands"  # may reach up, lazily: the top of everything
HEAVY = {"torch", "onnx", "transformers", "timm", "safetensors", "onnxscript"}
MODULES = sorted(p for layer in LAYERS for p in (ROOT / layer).rglob("*.py"))
NAMES = [str(p.relative_to(ROOT)) for p in MODULES]


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """(absolute module, whether it is imported when the file is) of every import; TYPE_CHECKING blocks left out."""
    package = ("wsi_rt", *path.relative_to(ROOT).parent.parts)

    def walk(node: ast.AST, eager: bool) -> Iterator[tuple[str, bool]]:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for child in node.orelse:
                yield from walk(child, eager)
            return
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, eager
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield module, eager
            for alias in node.names:
                yield f"{module}.{alias.name}", eager
        inside = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for child in ast.iter_child_nodes(node):
            yield from walk(child, eager and not inside)

    yield from walk(ast.parse(path.read_text()), True)


def layer_of(module: str) -> str | None:
    parts = module.split(".")
    return parts[1] if parts[0] == "wsi_rt" and len(parts) > 1 else None


def test_the_walker_sees_every_kind_of_import(tmp_path: Path) -> None:
    file = ROOT / "runtime" / "llm" / "imaginary.py"
    source = "import torch\nfrom ..errors import X\nfrom wsi_rt import export\ndef f():\n    import timm\n"
    source += "if TYPE_CHECKING:\n    import onnx\n"

    class Imaginary:
        def relative_to(self, other: Path) -> Path:
            return file.relative_to(other)

        def read_text(self) -> str:
            return source

    found = dict(imports(Imaginary()))  # type: ignore[arg-type]
    assert found["torch"]
    assert "wsi_rt.runtime.errors" in found
    assert layer_of("wsi_rt.export") == "export"
    assert "wsi_rt.export" in found
    assert found["timm"] is False
    assert "onnx" not in found


@pytest.mark.parametrize("path", MODULES, ids=NAMES)
def test_imports_point_down(path: Path) -> None:
    name = str(path.relative_to(ROOT))
    layer = path.relative_to(ROOT).parts[0]
    allowed = set(LAYERS[: LAYERS.index(layer) + 1])
    for module, eager in imports(path):
        target = layer_of(module)
        lazily_up = path.parent == COMMANDS and not eager and target in LAYERS
        assert target is None or target in allowed or lazily_up, f"{name} imports {module}"


def of_the_runtime(path: Path) -> bool:
    """All of runtime/ but the torch backend, and the ring of tiles on a GPU behind its package's functions."""
    folders, ring = (ROOT / "runtime" / "llm", ROOT / "runtime" / "engines"), ROOT / "runtime" / "slides" / "device"
    of_torch = path.parent in folders and path.name.startswith("torch_")
    of_torch |= path.parent == ring and path.name != "__init__.py"
    return path.is_relative_to(ROOT / "runtime") and not of_torch


@pytest.mark.parametrize("path", [p for p in MODULES if of_the_runtime(p)], ids=lambda p: str(p.relative_to(ROOT)))
def test_the_runtime_never_imports_what_builds_engines(path: Path) -> None:
    """Not even inside functions: the whole of `ask` runs on a machine without torch."""
    heavy = {module for module, _ in imports(path) if module.split(".")[0] in HEAVY}
    assert not heavy


@pytest.mark.parametrize("path", MODULES, ids=NAMES)
def test_library_code_prints_nothing(path: Path) -> None:
    calls = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
    assert not [n.lineno for n in calls if isinstance(n.func, ast.Name) and n.func.id == "print"]


@pytest.mark.parametrize("path", MODULES, ids=NAMES)
def test_modules_say_what_they_are_for(path: Path) -> None:
    """A docstring; an `__init__.py` may also be empty."""
    text = path.read_text()
    if path.name == "__init__.py" and not text.strip():
        return
    assert ast.get_docstring(ast.parse(text))


def test_every_command_module_is_in_the_table_and_answers_to_its_name() -> None:
    from wsi_rt.runtime.cli import COMMANDS as TABLE
    from wsi_rt.runtime.cli import cli

    context = click.Context(cli)
    assert {name: cli.get_command(context, name).name for name in TABLE} == {name: name for name in TABLE}
    named = {place.partition(":")[0] for place in TABLE.values()}
    assert named == {p.stem for p in COMMANDS.glob("*.py")} - {"__init__", "options"}


def test_every_folder_is_a_package_and_the_root_is_none() -> None:
    folders = {p.parent for p in MODULES}
    assert not [f for f in folders if not (f / "__init__.py").is_file()]
    assert not (ROOT / "__init__.py").exists()
    assert not list((ROOT / "tests").rglob("__init__.py"))


def test_kernels_import_nothing_at_package_level() -> None:
    """transformers probes a top-level `kernels` when the repository root is on sys.path (test_imports.py)."""
    tree = ast.parse((ROOT / "kernels" / "__init__.py").read_text())
    assert not [n for n in ast.walk(tree) if isinstance(n, (ast.Import, ast.ImportFrom))]


def test_facts_are_written_once() -> None:
    from wsi_rt.kernels import slide_embed
    from wsi_rt.runtime import config, manifest, pipeline, positions, types
    from wsi_rt.runtime.llm.prompt import SYSTEM

    assert positions.GRID is slide_embed.GRID
    assert positions.GRID == 1000
    assert types.POOLED_TOKENS == 576
    assert types.TILE_PX == 256
    assert set(config.TEMPLATES) == set(SYSTEM)
    stages = "open tissue tiles tile_encoder slide_encoder projector prefill decode"
    assert tuple(stages.split()) == pipeline.STAGES
    assert manifest.COMPONENTS == ("tile_encoder", "slide_encoder", "projector", "llm")


def test_the_exporter_pools_to_as_many_tokens_as_the_runtime_expects() -> None:
    pytest.importorskip("torch", reason="the export extra is missing")
    from wsi_rt.export.arch import LongNetConfig
    from wsi_rt.export.precision import SUPPORTED
    from wsi_rt.runtime import manifest, pipeline, types

    published = LongNetConfig(in_width=1536)
    assert published.pooled == types.POOLED_TOKENS
    assert (published.width, published.padded) == (pipeline.PUBLISHED_WIDTH, pipeline.PUBLISHED_PADDED)
    assert tuple(SUPPORTED) == manifest.COMPONENTS


def test_exit_codes_are_the_contract() -> None:
    from wsi_rt.runtime import errors

    codes = {name: getattr(errors, name).exit_code for name in vars(errors) if name.endswith("Error")}
    assert codes == {
        "WsiRtError": 1,
        "InputError": 2,
        "SlideError": 2,
        "FeatureFileError": 2,
        "CheckpointError": 2,
        "MachineError": 3,
        "EngineMismatchError": 4,
        "ParityError": 5,
    }
