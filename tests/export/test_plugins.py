"""The TensorRT plugins without TensorRT: entries, geometry, shapes, types; registration with a named stand-in."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
import typing
from dataclasses import asdict, replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

torch = pytest.importorskip("torch", reason="the export extra is not installed")
pytest.importorskip("triton", reason="triton is not installed")

from wsi_rt.export.plugins import ptx as plugin_ptx  # noqa: E402
from wsi_rt.export.plugins import register  # noqa: E402
from wsi_rt.export.plugins.dilated_attention import DilatedAttention  # noqa: E402
from wsi_rt.export.plugins.pool_norm_pad import PoolNormPad  # noqa: E402
from wsi_rt.export.plugins.ptx import compile_plugin_kernel, entry_parameters, without_scratch  # noqa: E402
from wsi_rt.export.plugins.spec import io_types  # noqa: E402
from wsi_rt.kernels import aot  # noqa: E402
from wsi_rt.kernels.aot_case import SHIPPED_SM  # noqa: E402
from wsi_rt.kernels.dilated_attention import cost as published  # noqa: E402
from wsi_rt.kernels.dilated_attention.configs import WIDTHS  # noqa: E402
from wsi_rt.kernels.dilated_attention.launch import device_tables, launch_options  # noqa: E402
from wsi_rt.kernels.dilated_attention.programs import program_table  # noqa: E402
from wsi_rt.kernels.errors import KernelInputError  # noqa: E402
from wsi_rt.runtime.errors import MachineError  # noqa: E402

BRANCHES = (published.SEGMENT_LENGTHS, published.DILATED_RATIOS)
INTERPRETED = Path(__file__).parent / "interpreter" / "test_plugin_kernels.py"


def attention(sm: int, dtype: str = "fp16", width: int = 48) -> DilatedAttention:
    return DilatedAttention.of(sm, dtype, 16, width, *BRANCHES)


def pooling(sm: int, **changes: object) -> PoolNormPad:
    sizes = {"channels": 768, "norm": 768, "padded": 1024, "pooled": 576, "leading": 1, "eps": 1e-6}
    return PoolNormPad(sm=sm, **{**sizes, **changes})


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))


# --- the entry

POINTER, SCALAR = "u64", "u32"
ENTRIES = {
    "attention": (attention, [POINTER] * 4),
    "pooling": (lambda sm, dtype: pooling(sm), [POINTER] * 3 + [SCALAR] * 3 + [POINTER]),
}


def each_entry():
    for name, (make, types) in ENTRIES.items():
        for sm in SHIPPED_SM:
            for dtype in ("fp16", "bf16", "fp32"):
                quick = (sm, dtype) in {(80, "bf16"), (100, "fp16")}
                marks = [] if quick else [pytest.mark.slow]
                yield pytest.param(make(sm, dtype), dtype, types, id=f"{name}-sm{sm}-{dtype}", marks=marks)


@pytest.mark.parametrize(("plugin", "dtype", "types"), list(each_entry()))
def test_the_entry_takes_what_tensorrt_passes(plugin, dtype, types, tmp_path):
    """Inputs, scalars, output; no scratch pointer left; the assembler reserves as many bytes of arguments."""
    case = plugin.case(dtype)
    kernel = compile_plugin_kernel(case)
    name, parameters = entry_parameters(kernel.ptx)
    assert (kernel.name, [t for t, _ in parameters]) == (name, types)
    assert [n for n, t in case.signature.items() if t != "constexpr"][-1] in {"out", "p_out"}
    assert kernel.threads == int(re.search(r"\.reqntid (\d+)", kernel.ptx)[1]) == case.num_warps * 32
    assert re.search(r"^\.version 8\.8$", kernel.ptx, re.MULTILINE)
    assert not re.search(r"\.py\b|\.file\b|\.loc\b|debug_", kernel.ptx)
    assert kernel.shared_bytes <= 48 * 1024

    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(plugin_ptx.assemble(kernel.ptx))
    elf = aot.nvidia_tool("cuobjdump", "-elf", cubin)
    size = re.search(r"EIATTR_CBANK_PARAM_SIZE\s+Format:\s+\S+\s+Value:\s+(0x[0-9a-f]+)", elf)
    assert int(size[1], 16) == argument_bytes(types)


def argument_bytes(types: list[str]) -> int:
    """Each argument at a multiple of its size."""
    at = 0
    for t in types:
        size = 8 if t == POINTER else 4
        at = -(-at // size) * size + size
    return at


@pytest.mark.parametrize("sm", [90, *(pytest.param(sm, marks=pytest.mark.slow) for sm in (80, 86, 89, 100, 120))])
def test_the_packed_kernel_keeps_the_rules_of_the_shipped_ones(sm):
    """No spills, no stack, tensor cores: what the committed table guards for `dilated_attention_kernel`."""
    case = attention(sm).case("fp16")
    assert aot.broken_rules(case, aot.measure_case(case)) == []


HEAD = ".version 8.8\n.target sm_80\n.address_size 64\n"


def entry(*types: str, body: str = "") -> str:
    listed = ",\n".join(f"\t.param .{t} .ptr .global .align 1 k_param_{i}" for i, t in enumerate(types))
    return f"{HEAD}.visible .entry k(\n{listed}\n)\n{{\n{body}\n\tret;\n}}\n"


def test_scratch_pointers_are_dropped():
    load = "\t.reg .b64 %r;\n\tld.param.b64 %r, [k_param_0];"
    kept = without_scratch(entry("u64", "u32", "u64", "u64", body=load), ["*fp16", "i32"])
    assert entry_parameters(kept) == ("k", [("u64", "k_param_0"), ("u32", "k_param_1")])
    assert load in kept
    assert plugin_ptx.assemble(kept)


@pytest.mark.parametrize(
    ("types", "signature", "said"),
    [
        (["u64", "u64"], ["*fp16"], "expected (u64) and two scratch pointers"),
        (["u64", "u64", "u64", "u64"], ["*fp16"], "expected (u64) and two scratch pointers"),
        (["u64", "u32", "u64", "u64"], ["i32", "*fp16"], "expected (u32, u64)"),
        (["u64", "u64", "u32"], ["*fp16"], "expected (u64)"),
    ],
    ids=["one-scratch", "one-argument-too-many", "other-order", "scratch-is-no-pointer"],
)
def test_an_entry_with_other_parameters_is_refused(types, signature, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        without_scratch(entry(*types), signature)


@pytest.mark.parametrize("scratch", [1, 2])
def test_scratch_that_is_used_is_refused(scratch):
    body = f"\tld.param.b64 %r, [k_param_{scratch}];"
    with pytest.raises(ValueError, match=f"uses the scratch pointer k_param_{scratch}"):
        without_scratch(entry("u64", "u64", "u64", body=body), ["*fp16"])


def test_scratch_is_not_mistaken_for_a_longer_name():
    body = "\t// k_param_20 and xk_param_2 are others"
    assert "k_param_2\n" not in without_scratch(entry("u64", "u64", "u64", body=body), ["*fp16"])


@pytest.mark.parametrize("text", ["", entry("u64") + entry("u64")], ids=["none", "two"])
def test_a_ptx_without_one_entry_is_refused(text):
    with pytest.raises(ValueError, match="entries in the PTX, expected one"):
        entry_parameters(text)


def test_ptx_that_does_not_assemble_is_refused():
    with pytest.raises(RuntimeError, match="ptxas failed"):
        plugin_ptx.assemble(entry("u64", body="\tld.param.b64 %nothing, [k_param_0];"))


@pytest.mark.parametrize("scratch", ["global_scratch_size", "profile_scratch_size"])
def test_a_kernel_that_needs_scratch_memory_is_refused(scratch, monkeypatch):
    sizes = {"global_scratch_size": 0, "profile_scratch_size": 0, scratch: 64}
    compiled = SimpleNamespace(metadata=SimpleNamespace(shared=0, **sizes), asm={})
    monkeypatch.setattr(plugin_ptx, "compile_case", lambda case, version: compiled)
    with pytest.raises(MachineError, match=r"64 .*bytes of scratch|0 \+ 64 bytes of scratch"):
        compile_plugin_kernel(attention(80).case("fp16"))


SHARED = "needs 81920 bytes of shared memory, a TensorRT plugin gets 49152"


def test_more_than_48_kb_of_shared_memory_is_refused():
    """By the committed table, before anything is compiled."""
    with pytest.raises(KernelInputError, match=f"no dtype for programs of 64 queries .* sm_90: fp16 {SHARED}; bf16 "):
        attention(90, width=128)
    with pytest.raises(KernelInputError, match=r"fp32 at head width 64 on sm_100 needs 57376 bytes .*; use another"):
        DilatedAttention.of(100, "fp32", 16, 64, *BRANCHES, precision="tf32")


def test_more_than_48_kb_is_refused_where_the_compiler_takes_them(monkeypatch):
    metadata = SimpleNamespace(shared=81920, global_scratch_size=0, profile_scratch_size=0)
    monkeypatch.setattr(plugin_ptx, "compile_case", lambda case, version: SimpleNamespace(metadata=metadata, asm={}))
    with pytest.raises(KernelInputError, match=SHARED):
        compile_plugin_kernel(attention(80).case("fp16"))


# --- geometry, shapes, types


@pytest.mark.parametrize("length", [1, 2, 1001, 5793, 50_001])
def test_attention_launches_what_the_operator_launches(length):
    plugin = attention(90)
    tile, options = launch_options(90, torch.float16, 48, "ieee")
    programs, branches = device_tables((length,), *BRANCHES, 16, tile["BLOCK_M"], torch.device("cpu"))
    shapes = (length, 3, 16, 48), tuple(programs.shape), tuple(branches.shape)
    assert plugin.grid(*shapes) == (len(programs), 1)
    assert plugin.output_shape(*shapes) == (length, 16, 48)
    case = plugin.case("fp16")
    assert {k: case.constexprs[k] for k in tile} == tile
    assert {k: getattr(case, k) for k in options} == options
    assert case.constexprs["BRANCHES"] == len(branches)


@pytest.mark.parametrize("length", [2, 577, 50_001])
def test_pooling_launches_what_the_operator_launches(length):
    shapes = (length, 768), (768,), (768,)
    assert pooling(90).grid(*shapes) == (576, 1)
    assert pooling(90).output_shape(*shapes) == (576, 1024)
    assert pooling(90).scalars(*shapes) == (length, 768, 1)


def test_a_longer_slide_never_has_fewer_programs():
    """So the optimization profile's largest slide bounds the table of every other."""
    branches = ([23, 50, 64], [4, 3, 1])
    rows = [len(program_table((n,), *branches, 3, 16)) for n in range(1, 300)]
    assert rows == sorted(rows)
    profile = DilatedAttention.of(80, "fp32", 3, 16, *branches).profile(*branches, (299, 1, 100))
    assert profile["qkv"] == [(n, 3, 3, 16) for n in (1, 100, 299)]
    assert [n for n, _ in profile["programs"]] == [len(program_table((n,), *branches, 3, 32)) for n in (1, 100, 299)]


@pytest.mark.parametrize("sm", SHIPPED_SM)
@pytest.mark.parametrize("width", WIDTHS)
def test_types_are_those_whose_programs_the_table_fits(sm, width):
    """A table of 64 queries a program, read by a kernel of 32, would leave half of the output unwritten."""
    exact = DilatedAttention.of(sm, "fp32", 16, width, *BRANCHES)
    assert exact.precision == "ieee"
    assert exact.block_m < 64
    assert io_types(exact) == "FP32, INT32, INT32, FP32"
    with pytest.raises(KernelInputError, match=r"no dtype for programs of 48 queries .* runs in programs of 64"):
        replace(exact, block_m=48)
    large = {name for name, r in aot.read_table()[1].items() if r.shared_bytes > 48 * 1024}
    fits = [t for t in ("fp16", "bf16", "fp32-tf32") if f"dilated_attention/{t}-D{width}/sm{sm}" not in large]
    if "fp16" not in fits:
        with pytest.raises(
            KernelInputError, match=f"head width {width} on sm_{sm}:? .*needs .* bytes of shared memory"
        ):
            attention(sm, width=width)
    else:
        half = DilatedAttention.of(sm, "fp16", 16, width, *BRANCHES, precision="tf32")
        types = "|".join({"fp16": "FP16", "bf16": "BF16", "fp32-tf32": "FP32"}[t] for t in fits)
        assert io_types(half) == f"{types}, INT32, INT32, {types}"
        assert io_types(attention(sm, width=width)) == "FP16|BF16, INT32, INT32, FP16|BF16"
    with pytest.raises(KernelInputError, match=f"fp16 in blocks of {exact.block_m} queries .*, expected fp32"):
        exact.case("fp16")


def test_pooling_types():
    three = "FP16|BF16|FP32"
    assert io_types(pooling(80)) == ", ".join([three] * 4)
    with pytest.raises(KernelInputError, match="int8, expected one of fp16, bf16, fp32"):
        pooling(80).case("int8")


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: attention(75), "architecture 75, expected one of 80"),
        (lambda: attention(103), "architecture 103: PTX for sm_100a does not load there"),
        (lambda: pooling(121), "architecture 121: PTX for sm_120a does not load there"),
        (lambda: DilatedAttention.of(80, "int8", 4, 16, [8], [1]), "dtype 'int8', expected one of fp16"),
        (lambda: attention(80, width=40), "head width 40, expected one of 8"),
        (lambda: DilatedAttention.of(80, "fp32", 4, 16, [8], [1], "fp8"), "precision 'fp8', expected one of ieee"),
        (lambda: DilatedAttention.of(80, "fp16", 0, 16, [8], [1]), "0 heads"),
        (lambda: DilatedAttention.of(80, "fp16", 4, 16, [8, 9], [1]), "2 segment lengths for 1 ratios"),
        (lambda: pooling(75), "architecture 75"),
        (lambda: pooling(80, norm=900), "norm one of the two"),
        (lambda: pooling(80, padded=9000), "padded <= 8192"),
        (lambda: pooling(80, eps=float("nan")), "eps >= 0"),
        (lambda: pooling(80, eps=float("inf")), "finite eps"),
    ],
)
def test_attributes_that_no_kernel_computes_are_refused(make, said):
    with pytest.raises(KernelInputError, match=re.escape(said)):
        make()


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="this is the process with the interpreter")
def test_launched_as_tensorrt_does_in_the_interpreter(request):
    environ = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    environ |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", str(INTERPRETED), "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    done = subprocess.run(
        command, env=environ, cwd=request.config.rootpath, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert " passed" in done.stdout
    assert " skipped" not in done.stdout, done.stdout


# --- registration


class Symbol:
    """A symbolic size of the stand-in: knows its value, and refuses what TensorRT's does not know."""

    def __init__(self, value: int):
        self.value = value


class StandIn(ModuleType):
    """In place of `tensorrt.plugin`, which cannot be installed without a GPU: checks what its documentation asks for.

    Every parameter annotated with a type; tensors, then attributes (int, float, str), then outputs, then tactic.
    """

    def __init__(self) -> None:
        super().__init__("tensorrt.plugin")
        self.defined: dict[str, dict[str, object]] = {}
        self.TensorDesc = type("TensorDesc", (SimpleNamespace,), {})
        self.KernelLaunchParams = type("KernelLaunchParams", (SimpleNamespace,), {})
        self.SymIntExprs = type("SymIntExprs", (dict,), {"__init__": lambda self, n: setattr(self, "length", n)})
        self.SymInt32 = type("SymInt32", (), {"__init__": lambda self, value: setattr(self, "value", value)})
        self.AutoTuneCombination = type(
            "AutoTuneCombination", (), {"__init__": lambda self, types, layouts: vars(self).update(locals())}
        )
        self.register = self.decorator("register", [])
        self.autotune = self.decorator("autotune", ["outputs"])
        self.aot_impl = self.decorator("aot_impl", ["outputs", "tactic"])

    def from_shape_expr(self, shape, dtype):
        assert isinstance(shape, tuple)
        return self.TensorDesc(shape_expr=shape, dtype=dtype)

    def decorator(self, kind, last):
        def named(plugin_id):
            def define(function):
                signature = inspect.signature(function)
                names = list(signature.parameters)
                types = [p.annotation for p in signature.parameters.values()]
                assert all(isinstance(t, type) or typing.get_origin(t) for t in types), types
                kinds = ["tensor" if t is self.TensorDesc else "attribute" for t in types[: len(types) - len(last)]]
                assert kinds == sorted(kinds, reverse=True)
                assert set(types[len(kinds) - kinds.count("attribute") : len(kinds)]) <= {int, float, str}
                assert names[len(kinds) :] == last
                assert signature.return_annotation is not inspect.Parameter.empty
                entry = self.defined.setdefault(plugin_id, {})
                assert kind not in entry
                assert entry.setdefault("schema", names[: len(kinds)]) == names[: len(kinds)]
                entry[kind] = function
                return function

            return define

        return named


@pytest.fixture
def stand_in(monkeypatch):
    trtp, trt = StandIn(), ModuleType("tensorrt")
    trt.float16, trt.bfloat16, trt.float32, trt.__version__ = "HALF", "BF16", "FLOAT", "10.8.0"
    trt.plugin = trtp
    monkeypatch.setitem(sys.modules, "tensorrt", trt)
    monkeypatch.setitem(sys.modules, "tensorrt.plugin", trtp)
    register.register_plugins.cache_clear()
    yield trtp
    register.register_plugins.cache_clear()


CASES = {
    "wsi_rt::dilated_attention": (attention(80), [("L", 3, 16, 48), ("P", 5), (5, 2)], ("P", 1), ("L", 16, 48), []),
    "wsi_rt::pool_norm_pad": (pooling(80), [("L", 768), (768,), (768,)], (576, 1), (576, 1024), ["L", 768, 1]),
}


@pytest.mark.parametrize("name", CASES)
def test_what_tensorrt_is_told(name, stand_in):
    """Called as TensorRT calls: attributes by name to describe, by position to choose types and to get the kernel."""
    register.register_plugins()
    register.register_plugins()
    assert set(stand_in.defined) == set(CASES)
    plugin, shapes, grid, out, scalars = CASES[name]
    functions = stand_in.defined[name]
    symbols = {s: Symbol(0) for s in "LP"}
    inputs = [
        stand_in.TensorDesc(shape_expr=[symbols.get(d, d) for d in s], dtype="HALF" if i == 0 else "INT32")
        for i, s in enumerate(shapes)
    ]
    described = functions["register"](*inputs, **asdict(plugin))
    assert described.dtype == "HALF"
    assert described.shape_expr == tuple(symbols.get(d, d) for d in out)

    (combination,) = functions["autotune"](*inputs, *asdict(plugin).values(), (described,))
    assert (combination.types, combination.layouts) == (io_types(plugin), "LINEAR")

    kernel_name, text, launch, extra = functions["aot_impl"](*inputs, *asdict(plugin).values(), (described,), 0)
    expected = compile_plugin_kernel(plugin.case("fp16"))
    assert (kernel_name, text) == (expected.name, expected.ptx)
    assert (launch.grid_x, launch.grid_y) == tuple(symbols.get(d, d) for d in grid)
    assert (launch.block_x, launch.shared_mem) == (expected.threads, expected.shared_bytes)
    assert extra.length == len(extra) == len(scalars)
    assert [extra[i].value for i in range(extra.length)] == [symbols.get(d, d) for d in scalars]


def test_without_tensorrt_one_line_says_so(monkeypatch):
    register.register_plugins.cache_clear()
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(MachineError, match=r"need TensorRT >= 10\.9 .*: pip install tensorrt"):
        register.register_plugins()


def test_a_tensorrt_without_ahead_of_time_plugins_is_refused(stand_in):
    del stand_in.aot_impl
    with pytest.raises(MachineError, match=r"TensorRT is 10\.8\.0, plugins need 10\.9 or newer"):
        register.register_plugins()
