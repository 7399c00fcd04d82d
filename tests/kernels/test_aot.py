"""The ahead-of-time harness: kernels compiled for every architecture without a GPU, and what it finds wrong."""

# ruff: noqa: N803 - compile-time constants of a kernel are upper case
from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from importlib import import_module
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch", reason="the export extra is not installed")
triton = pytest.importorskip("triton", reason="triton is not installed")
import triton.language as tl  # noqa: E402

from wsi_rt.kernels import aot  # noqa: E402
from wsi_rt.kernels.aot_case import SHIPPED_SM, AotCase, Cost  # noqa: E402
from wsi_rt.kernels.checks import shipped_sm  # noqa: E402
from wsi_rt.kernels.errors import KernelInputError  # noqa: E402
from wsi_rt.kernels.gpus import occupancy, predicted_seconds, resident_blocks  # noqa: E402

VERSION, COMMITTED = aot.read_table()
SAME_TRITON = pytest.mark.skipif(triton.__version__ != VERSION, reason=f"the table is of Triton {VERSION}")


@triton.jit
def product_kernel(p_a, p_b, p_c, stride, SIDE: tl.constexpr):
    o = tl.arange(0, SIDE)
    at = o[:, None] * stride + o[None, :]
    acc = tl.zeros([SIDE, SIDE], tl.float32)
    for k in range(0, stride, SIDE):
        acc += tl.dot(tl.load(p_a + at + k), tl.load(p_b + at + k * stride))
    tl.store(p_c + at, acc)


def product_case(sm: int, side: int = 128, num_warps: int = 4) -> AotCase:
    return AotCase(
        op="product",
        variant=f"{side}",
        sm=sm,
        kernel=product_kernel,
        signature={"p_a": "*fp16", "p_b": "*fp16", "p_c": "*fp32", "stride": "i32", "SIDE": "constexpr"},
        constexprs={"SIDE": side},
        divisible=("p_a", "p_b", "p_c", "stride"),
        num_warps=num_warps,
        num_stages=1,
        matrix=True,
    )


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))


# --- the shipped kernels


@pytest.mark.parametrize("op", aot.OPS)
def test_every_operator_ships_every_architecture_once(op):
    cases = aot.all_cases([op])
    assert {c.sm for c in cases} == set(SHIPPED_SM)
    variants = {sm: {c.variant for c in cases if c.sm == sm} for sm in SHIPPED_SM}
    assert len({frozenset(v) for v in variants.values()}) == 1


@SAME_TRITON
def test_a_kernel_of_every_operator_and_architecture_is_as_committed():
    """The first variant per architecture; `test_every_kernel_is_as_committed` compiles all."""
    cases = list({(c.op, c.sm): c for c in reversed(aot.all_cases())}.values())
    assert len(cases) == len(aot.OPS) * len(SHIPPED_SM)
    found, failed = aot.measure(cases)
    assert not failed
    assert [line for case in cases for line in aot.broken_rules(case, found[case.name])] == []
    assert aot.drift(COMMITTED, found, found) == []


@SAME_TRITON
@pytest.mark.full
def test_every_kernel_is_as_committed(wsi_rt_process):
    done = wsi_rt_process("kernels", "--check", "--json", timeout=3000)
    assert done.code == 0, done.err
    report = json.loads(done.out)
    assert report["findings"] == []
    assert report["kernels"].keys() == COMMITTED.keys()


def test_the_committed_table_holds_every_shipped_kernel():
    assert {c.name for c in aot.all_cases()} == COMMITTED.keys()


def test_the_committed_table_has_no_spills_anywhere_it_must_not():
    clean = {name: r for name, r in COMMITTED.items() if int(name.rpartition("sm")[2]) in aot.CLEAN_SM}
    assert len(clean) * 2 == len(COMMITTED)
    assert not [name for name, r in clean.items() if r.spills or r.stack_bytes]


# --- what the harness reads


@pytest.mark.parametrize(
    ("sm", "mnemonic"), [(80, "HMMA"), (86, "HMMA"), (89, "HMMA"), (90, "HGMMA"), (100, "UTCHMMA"), (120, "HMMA")]
)
def test_sees_the_tensor_cores_of_every_architecture(sm, mnemonic):
    """mma, wgmma (sm_90) and tcgen05 (sm_100)."""
    case = product_case(sm, side=64 if sm in (86, 89, 120) else 128, num_warps=8)
    found = aot.measure_case(case)
    assert mnemonic in found.tensor_cores
    assert found.registers > 20
    assert aot.broken_rules(case, found) == []


def test_sees_spills_and_their_stack():
    """A 128 x 128 fp32 accumulator in one warp: 512 registers a thread, of which 255 exist."""
    case = product_case(80, num_warps=1)
    found = aot.measure_case(case)
    assert found.spills > 0
    assert found.stack_bytes > 0
    lines = aot.broken_rules(case, found)
    assert lines[0] == f"product/128/sm80: {found.spills} spill instructions, expected none on sm_80"
    assert "bytes of stack, expected none on sm_80" in lines[1]


def test_what_breaks_a_rule_is_named():
    clean = aot.Resources(4, 64, 0, 0, 0, 0, (), 8, 0.5)
    matrix, vector = product_case(90), replace(product_case(90), matrix=False)
    assert aot.broken_rules(vector, clean) == []
    assert aot.broken_rules(matrix, clean) == ["product/128/sm90: no tensor-core instruction, expected HGMMA on sm_90"]
    assert aot.broken_rules(matrix, replace(clean, tensor_cores=("HMMA",)))[0].endswith("HMMA, expected HGMMA on sm_90")
    assert "not one block" in aot.broken_rules(vector, replace(clean, blocks_per_sm=0))[0]
    assert "the limit is 232448" in aot.broken_rules(vector, replace(clean, shared_bytes=232449))[0]
    assert aot.broken_rules(replace(vector, sm=86), replace(clean, spills=2)) == []  # shown in the table, allowed


def test_a_kernel_that_does_not_compile_is_reported_and_the_others_measured():
    """Workers look cases up by name: one that is not shipped fails there."""
    good = aot.all_cases(["tile_normalize"], [80])[0]
    found, failed = aot.measure([replace(good, variant="absent"), good], workers=1)
    assert list(found) == [good.name]
    assert list(failed) == ["tile_normalize/absent/sm80"]
    assert "KeyError" in failed["tile_normalize/absent/sm80"]


def test_a_signature_that_is_not_the_kernels_is_refused():
    case = product_case(80)
    with pytest.raises(KernelInputError, match=r"expected the parameters \['p_a'"):
        aot.compile_case(replace(case, signature={"p_a": "*fp16"}))


# --- occupancy and roofline


@pytest.mark.parametrize(
    ("sm", "warps", "registers", "shared", "columns", "blocks"),
    [
        (80, 8, 32, 0, 0, 8),  # warp slots: 64 / 8
        (80, 8, 64, 0, 0, 4),  # 64 x 32 x 8 = 16,384 registers a block
        (80, 8, 65, 0, 0, 3),  # rounds up to 2,304 a warp: 28 warps
        (90, 4, 168, 0, 0, 3),  # 12 warps
        (86, 1, 16, 0, 0, 16),  # block slots
        (89, 1, 16, 0, 0, 24),
        (80, 4, 32, 163 * 1024, 0, 1),
        (80, 4, 32, 163 * 1024 + 1, 0, 0),
        (80, 4, 32, 40 * 1024, 0, 4),  # 41 KiB with what the system keeps, of 164
        (90, 4, 256, 0, 0, 0),
        (100, 4, 32, 0, 256, 2),  # tensor memory
    ],
)
def test_resident_blocks(sm, warps, registers, shared, columns, blocks):
    assert resident_blocks(sm, warps, registers, shared, columns) == blocks
    assert occupancy(sm, warps, blocks) == blocks * warps / (48 if sm in (86, 89, 120) else 64)


def test_predicted_time_is_the_slower_of_memory_and_compute():
    assert predicted_seconds(90, Cost(flops=0.0, bytes=3.35e12), matrix=True) == (1.0, "memory")
    assert predicted_seconds(90, Cost(flops=989e12, bytes=1.0), matrix=True) == (1.0, "compute")
    assert predicted_seconds(90, Cost(flops=67e12, bytes=1.0), matrix=False) == (1.0, "compute")


@pytest.mark.parametrize("tiles", [1000, 50_000])
def test_bytes_of_a_launch_are_those_of_its_tensors(tiles):
    def empty(*shape, dtype=torch.float16):
        return torch.empty(shape, dtype=dtype, device="meta").nbytes

    vectors = 2 * empty(768)
    expected = {
        "pool_norm_pad": empty(tiles, 768) + vectors + empty(576, 1024),
        "slide_embed": empty(tiles, 768)
        + empty(tiles, 2, dtype=torch.int64)
        + vectors
        + empty(tiles + 1, 768)
        + empty(192, dtype=torch.int64),
        "tile_normalize": empty(tiles, 3, 224, 224, dtype=torch.uint8) + empty(tiles, 3, 224, 224),
    }
    assert {op: import_module(f"wsi_rt.kernels.{op}.cost").cost(tiles, 2).bytes for op in expected} == expected


@pytest.mark.parametrize(
    ("capability", "sm"), [((8, 0), 80), ((8, 7), 86), ((8, 9), 89), ((9, 0), 90), ((10, 3), 100), ((12, 1), 120)]
)
def test_a_gpu_uses_the_table_of_its_own_generation(monkeypatch, capability, sm):
    stand_in_for_a_gpu_tensor = SimpleNamespace(is_cuda=True, device="cuda:0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert shipped_sm(stand_in_for_a_gpu_tensor) == sm


@pytest.mark.parametrize("capability", [(7, 5), (13, 0)])
def test_a_gpu_without_a_table_is_refused(monkeypatch, capability):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    with pytest.raises(KernelInputError, match=f"sm_{capability[0]}{capability[1]}, expected one of 80, 86"):
        shipped_sm(SimpleNamespace(is_cuda=True, device="cuda:0"))


# --- the table and the command


def test_table_round_trip_and_drift(tmp_path):
    was = {
        "a/x/sm80": aot.Resources(4, 64, 0, 0, 0, 0, ("HMMA",), 8, 0.5),
        "a/y/sm80": aot.Resources(4, 8, 0, 0, 0, 0, (), 8, 0.5),
    }
    aot.write_table("3.8.0", was, tmp_path / "table.json")
    assert aot.read_table(tmp_path / "table.json") == ("3.8.0", was)
    assert aot.drift(was, was, was) == []
    now = {"a/x/sm80": replace(was["a/x/sm80"], registers=72, tensor_cores=()), "a/z/sm80": was["a/y/sm80"]}
    assert aot.drift(was, now, was) == [
        "a/x/sm80: registers 64 -> 72, tensor_cores ('HMMA',) -> ()",
        "a/y/sm80: in the committed table, but no longer shipped",
        "a/z/sm80: not in the committed table",
    ]
    (tmp_path / "table.json").write_text('{"triton": "3.8.0"}')
    with pytest.raises(KernelInputError, match="no table of kernel resources"):
        aot.read_table(tmp_path / "table.json")


CASE = "tile_normalize/fp16-hwc256/sm80"
SUBSET = ("--op", "tile_normalize", "--sm", "80")


@SAME_TRITON
def test_check_fails_on_drift_by_name_and_update_mends_it(wsi_rt, monkeypatch, tmp_path):
    moved = {**COMMITTED, CASE: replace(COMMITTED[CASE], registers=COMMITTED[CASE].registers + 8)}
    monkeypatch.setattr(aot, "TABLE", tmp_path / "table.json")
    monkeypatch.setattr(aot.read_table, "__defaults__", (tmp_path / "table.json",))
    monkeypatch.setattr(aot.write_table, "__defaults__", (tmp_path / "table.json",))
    aot.write_table(VERSION, moved)
    done = wsi_rt("kernels", "--check", *SUBSET)
    assert done.code == 5
    was = COMMITTED[CASE].registers
    assert f"1 findings in 6 kernels: {CASE}: registers {was + 8} -> {was}" in done.err
    assert f"finding: {CASE}: registers {was + 8} -> {was}" in done.out

    assert wsi_rt("kernels", "--update", *SUBSET).code == 0  # only what was asked for is made anew
    assert aot.read_table() == (VERSION, COMMITTED)


@SAME_TRITON
def test_check_passes_and_json_is_one_object_with_the_roofline(wsi_rt):
    done = wsi_rt("kernels", "--check", "--json", *SUBSET)
    assert done.code == 0
    report = json.loads(done.out)
    assert report["note"] == "predicted, not run on a GPU yet"
    assert report["triton"] == triton.__version__
    assert report["kernels"][CASE].keys() == vars(COMMITTED[CASE]).keys()
    assert [(r["gpu"], r["size"], r["unit"], r["bound"]) for r in report["roofline"]] == [
        ("A100 80GB SXM", n, "tiles", "memory") for n in (1000, 10_000, 50_000)
    ]


def test_the_roofline_of_every_operator_is_of_its_own_sizes():
    """A decoding step is bound by memory; more questions on a slide cost less each."""
    cases = aot.all_cases(sms=[90])
    rows = aot.roofline(cases)
    assert {(r["op"], r["unit"]) for r in rows} == {(op, sizes.unit) for op, sizes in aot.OPS.items()}
    assert all(r["size"] in aot.OPS[r["op"]].shown and r["predicted_ms"] > 0 for r in rows)
    one, twenty, more = (r for r in rows if r["op"] == "shared_prefix_attention")
    assert {r["bound"] for r in (one, twenty, more)} == {"memory"}
    assert one["predicted_ms"] * 20 > twenty["predicted_ms"] * 5


@pytest.mark.parametrize(
    ("code", "message", "arguments"),
    [
        (2, "give one of them", ["--check", "--update"]),
        (2, "no operator softmax: expected block_linear, dilated_attention, pool_norm_pad", ["--op", "softmax"]),
        (2, "no architecture 75: expected 80, 86, 89, 90, 100, 120", ["--op", "slide_embed", "--sm", "75,80"]),
        (2, "'fast' is no list of architectures", ["--sm", "fast"]),
    ],
)
def test_bad_usage(wsi_rt, code, message, arguments):
    done = wsi_rt("kernels", *arguments)
    assert done.code == code
    assert message in done.err


def test_another_triton_is_told_from_drift(wsi_rt, monkeypatch):
    monkeypatch.setattr(aot, "triton_version", lambda: "9.9.0")
    done = wsi_rt("kernels", "--check", *SUBSET)
    assert done.code == 3
    assert f"made with Triton {VERSION}, this is 9.9.0: pip install triton=={VERSION}" in done.err


def test_without_triton_the_command_names_what_to_install(wsi_rt, monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    done = wsi_rt("kernels")
    assert done.code == 3
    assert "pip install torch triton" in done.err


def test_public_operators_do_not_import_triton():
    """Neither when imported, nor our kernels when called on the CPU (torch looks for triton by itself then)."""
    source = (
        "import sys, torch\n"
        "from wsi_rt.kernels.block_linear import block_linear, library\n"
        "from wsi_rt.kernels.pool_norm_pad import library, pool_norm_pad\n"
        "from wsi_rt.kernels.rms_norm import add_rms_norm, library\n"
        "from wsi_rt.kernels.rope_kv_write import library, rope_kv_write\n"
        "from wsi_rt.kernels.shared_prefix_attention import library, shared_prefix_attention\n"
        "from wsi_rt.kernels.slide_embed import library, slide_embed\n"
        "from wsi_rt.kernels.swiglu import library, swiglu\n"
        "from wsi_rt.kernels.tile_normalize import library, tile_normalize\n"
        "assert 'triton' not in sys.modules\n"
        "x, one = torch.zeros(2, 4), torch.ones(4)\n"
        "pool_norm_pad(slide_embed(x, torch.zeros(2, 2, dtype=torch.int64), one, one), one, one, 1e-6, 2, 4)\n"
        "tile_normalize(torch.zeros(1, 4, 4, 3, dtype=torch.uint8), (0, 0, 0), (1, 1, 1), 4)\n"
        "swiglu(add_rms_norm(x, x, one, 1e-5)[0])\n"
        "block_linear(x, torch.zeros(3, 1, 16, dtype=torch.uint8), torch.ones(3, 1), None, 4)\n"
        "q, cache, at = torch.zeros(1, 2, 4), torch.zeros(1, 4, 2, 4), torch.zeros(1, dtype=torch.int64)\n"
        "angles, page, end = torch.ones(1, 2), at.int()[None], torch.tensor([0, 1], dtype=torch.int32)\n"
        "rope_kv_write(q, q, q, angles, angles, at, at, cache, torch.zeros_like(cache))\n"
        "shared_prefix_attention(q, cache, cache, page, end[1:], end, page, end[1:])\n"
        "assert not [m for m in sys.modules if m.startswith('wsi_rt.') and m.endswith('.triton')]\n"
    )
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
