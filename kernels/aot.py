"""Compiles every shipped kernel configuration (the published sizes and dtypes) without a GPU, and reads what it needs.

Registers and stack come from `cuobjdump`, spills and tensor-core instructions from the SASS that `nvdisasm` gives (both
come with Triton), shared memory from Triton's metadata. The committed table (resources.json) is what it was when the
configurations were chosen; `check` names what moved away from it or breaks a rule.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from wsi_rt.kernels.aot_case import SHIPPED_SM, AotCase, Cost, Sizes
from wsi_rt.kernels.errors import KernelInputError
from wsi_rt.kernels.gpus import GPUS, REGISTERS_PER_THREAD, occupancy, predicted_seconds, resident_blocks

TILES = Sizes("tiles", (1_000, 10_000, 50_000))
TOKENS = Sizes("tokens", (1, 20, 640))  # a step of one question and of 20, a prefill
SEQUENCES = Sizes("sequences", (1, 20, 64))
OPS = {
    "block_linear": Sizes("tokens", (1, 8, 32)),  # a prefill multiplies by another way
    "dilated_attention": TILES,
    "pool_norm_pad": TILES,
    "rms_norm": TOKENS,
    "rope_kv_write": TOKENS,
    "shared_prefix_attention": SEQUENCES,
    "slide_embed": TILES,
    "swiglu": TOKENS,
    "tile_normalize": TILES,
}
TABLE = Path(__file__).with_name("resources.json")
CLEAN_SM = (80, 90, 100)  # where no shipped configuration may spill or use stack
_TENSOR_CORE = re.compile(r"\b(?:[HIDQO]MMA|[HIQ]GMMA|UTC[A-Z]*MMA)\b")
_LOCAL = re.compile(r"\b(?:LDL|STL)\b")


@dataclass(frozen=True)
class Resources:
    """What one configuration needs, per thread (registers, stack_bytes) and per block."""

    warps: int
    registers: int
    stack_bytes: int
    spills: int  # LDL and STL instructions
    shared_bytes: int
    tensor_memory_columns: int  # sm_100
    tensor_cores: tuple[str, ...]  # mnemonics: HMMA, HGMMA, UTCHMMA
    blocks_per_sm: int
    occupancy: float  # share of an SM's warp slots, predicted


def triton_version() -> str:
    """Version of the installed Triton. Raises ImportError where there is none."""
    import triton

    return triton.__version__


def all_cases(ops: Iterable[str] = OPS, sms: Iterable[int] = SHIPPED_SM) -> list[AotCase]:
    """The shipped configurations of some operators and architectures.

    Raises KernelInputError on an unknown operator or architecture, ImportError without Triton.
    """
    ops, sms = tuple(ops), tuple(sms)
    if unknown := [op for op in ops if op not in OPS]:
        raise KernelInputError(f"no operator {', '.join(unknown)}: expected {', '.join(OPS)}")
    if strange := [sm for sm in sms if sm not in SHIPPED_SM]:
        raise KernelInputError(f"no architecture {_listed(strange)}: expected {_listed(SHIPPED_SM)}")
    cases = [c for op in ops for c in import_module(f"wsi_rt.kernels.{op}.triton").aot_cases() if c.sm in sms]
    names = [c.name for c in cases]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise KernelInputError(f"aot_cases() names {', '.join(twice)} twice, expected every variant once")
    return cases


def measure(
    cases: Sequence[AotCase], workers: int = 2, on_done: Callable[[int], None] = lambda done: None
) -> tuple[dict[str, Resources], dict[str, str]]:
    """({case name: resources}, {case name: why it does not compile}), compiled in processes of their own.

    Triton's cache goes to a temporary folder unless TRITON_CACHE_DIR is set. `on_done(n)` after the n-th case.
    """
    found, failed = {}, {}
    places = {case.name: (case.op, case.variant, case.sm) for case in cases}
    with _compilers(workers) as pool:
        jobs = {pool.submit(_measure_named, *place): name for name, place in places.items()}
        try:
            for n, job in enumerate(as_completed(jobs), 1):
                try:
                    found[jobs[job]] = job.result()
                except Exception as e:  # compilers raise anything: it belongs to the case
                    failed[jobs[job]] = f"{type(e).__name__}: {' '.join(str(e).split())[:300]}"
                on_done(n)
        except BaseException:  # interrupted: do not first compile all the others
            pool.shutdown(cancel_futures=True)
            raise
    return {name: found[name] for name in places if name in found}, failed


@contextmanager
def _compilers(workers: int) -> Iterator[ProcessPoolExecutor]:
    spawn = multiprocessing.get_context("spawn")  # LLVM's threads do not survive a fork
    with tempfile.TemporaryDirectory(prefix="wsi-rt-triton-") as folder:
        cache_dir = os.environ.get("TRITON_CACHE_DIR") or folder
        with ProcessPoolExecutor(workers, spawn, initializer=_prepare, initargs=(cache_dir,)) as pool:
            yield pool


def _prepare(cache_dir: str) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group: the parent answers it
    os.environ["TRITON_CACHE_DIR"] = cache_dir
    os.environ.pop("TRITON_INTERPRET", None)  # read when Triton is imported, which is after this


def _measure_named(op: str, variant: str, sm: int) -> Resources:
    return measure_case(_cases_of(op)[f"{op}/{variant}/sm{sm}"])


@cache
def _cases_of(op: str) -> dict[str, AotCase]:
    return {case.name: case for case in all_cases([op])}


def compile_case(case: AotCase, ptx_version: int | None = None) -> Any:
    """Triton's compiled kernel (`asm["ptx"]`, `asm["cubin"]`, `metadata`) for the architecture of the case.

    ptx_version: 88 for PTX 8.8; the newest that Triton's assembler for the architecture knows where None.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = list(case.kernel.arg_names)
    if names != list(case.signature):
        raise KernelInputError(f"{case.name}: signature {list(case.signature)}, expected the parameters {names}")
    source = ASTSource(
        fn=case.kernel,
        signature=dict(case.signature),
        constexprs=dict(case.constexprs),
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in case.divisible},
    )
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    options |= {} if ptx_version is None else {"ptx_version": ptx_version}
    return triton.compile(source, target=GPUTarget("cuda", case.sm, 32), options=options)


def measure_case(case: AotCase) -> Resources:
    """Compile one case in this process, and read its resources."""
    compiled = compile_case(case)
    with tempfile.TemporaryDirectory(prefix="wsi-rt-cubin-") as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage = nvidia_tool("cuobjdump", "-res-usage", cubin)
        sass = nvidia_tool("nvdisasm", "-c", "-ndf", cubin)
    counts = {key: int(n) for key, n in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    if set(counts) != {"REG", "STACK", "LOCAL"} or "EXIT" not in sass:
        raise RuntimeError(f"cuobjdump and nvdisasm gave no resources for {case.name}: {usage[:200]}")
    warps, shared = compiled.metadata.num_warps, compiled.metadata.shared
    columns = getattr(compiled.metadata, "tmem_size", None) or 0
    blocks = resident_blocks(case.sm, warps, counts["REG"], shared, columns)
    return Resources(
        warps=warps,
        registers=counts["REG"],
        stack_bytes=counts["STACK"] + counts["LOCAL"],
        spills=len(_LOCAL.findall(sass)),
        shared_bytes=shared,
        tensor_memory_columns=columns,
        tensor_cores=tuple(sorted(set(_TENSOR_CORE.findall(sass)))),
        blocks_per_sm=blocks,
        occupancy=round(occupancy(case.sm, warps, blocks), 3),
    )


def nvidia_tool(name: str, *arguments: str | Path) -> str:
    """stdout of one of the programs that come with Triton: ptxas, cuobjdump, nvdisasm. RuntimeError where it fails."""
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    done = subprocess.run([path, *arguments], capture_output=True, text=True, timeout=120, check=False)
    if done.returncode:
        raise RuntimeError(f"{name} failed: {' '.join(done.stderr.split())[:300]}")
    return done.stdout


def broken_rules(case: AotCase, found: Resources) -> list[str]:
    """What a configuration must not do, whatever the table says; each line names the case."""
    gpu, wrong = GPUS[case.sm], []
    if case.sm in CLEAN_SM and found.spills:
        wrong.append(f"{found.spills} spill instructions, expected none on sm_{case.sm}")
    if case.sm in CLEAN_SM and found.stack_bytes:
        wrong.append(f"{found.stack_bytes} bytes of stack, expected none on sm_{case.sm}")
    if case.matrix and gpu.tensor_core not in found.tensor_cores:
        shown = ", ".join(found.tensor_cores) or "no tensor-core instruction"
        wrong.append(f"{shown}, expected {gpu.tensor_core} on sm_{case.sm}")
    if found.registers > REGISTERS_PER_THREAD:
        wrong.append(f"{found.registers} registers, the limit is {REGISTERS_PER_THREAD}")
    if found.shared_bytes > gpu.shared_per_block_bytes:
        wrong.append(f"{found.shared_bytes} bytes of shared memory, the limit is {gpu.shared_per_block_bytes}")
    if not found.blocks_per_sm:
        wrong.append("not one block fits on an SM")
    return [f"{case.name}: {what}" for what in wrong]


def drift(committed: Mapping[str, Resources], found: Mapping[str, Resources], chosen: Iterable[str]) -> list[str]:
    """How `found` differs from the committed table, one line a case; `chosen`: the names looked at."""
    lines = [f"{name}: not in the committed table" for name in found if name not in committed]
    lines += [f"{name}: in the committed table, but no longer shipped" for name in chosen if name not in found]
    for name in found.keys() & committed.keys():
        was, now = asdict(committed[name]), asdict(found[name])
        moved = ", ".join(f"{key} {was[key]} -> {now[key]}" for key in was if was[key] != now[key])
        lines += [f"{name}: {moved}"] if moved else []
    return sorted(lines)


def read_table(path: Path = TABLE) -> tuple[str, dict[str, Resources]]:
    """(Triton version, {case name: resources}) of a committed table. Raises OSError; KernelInputError on a bad one."""
    try:
        table = json.loads(path.read_text())
        cases = {name: {**r, "tensor_cores": tuple(r["tensor_cores"])} for name, r in table["cases"].items()}
        return table["triton"], {name: Resources(**r) for name, r in cases.items()}
    except (ValueError, KeyError, TypeError) as e:
        raise KernelInputError(f"{path} is no table of kernel resources ({e}): wsi-rt kernels --update") from e


def write_table(version: str, resources: Mapping[str, Resources], path: Path = TABLE) -> None:
    """One line a case, so that a change shows as one line."""
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(asdict(resources[name]))}" for name in sorted(resources))
    path.write_text(f'{{\n "triton": {json.dumps(version)},\n "cases": {{\n{lines}\n }}\n}}\n')


def roofline(cases: Sequence[AotCase]) -> list[dict[str, Any]]:
    """Work and predicted time of one fp16 call per operator, architecture and size."""
    rows = []
    for op, sm in dict.fromkeys((c.op, c.sm) for c in cases):
        matrix = any(c.matrix for c in cases if (c.op, c.sm) == (op, sm))
        for n in OPS[op].shown:
            work: Cost = import_module(f"wsi_rt.kernels.{op}.cost").cost(n, 2)
            seconds, bound = predicted_seconds(sm, work, matrix)
            size = {"size": n, "unit": OPS[op].unit}
            row = {"op": op, "sm": sm, "gpu": GPUS[sm].name, **size, "flops": work.flops, "bytes": work.bytes}
            rows.append({**row, "predicted_ms": seconds * 1e3, "bound": bound})
    return rows


def _listed(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, numbers))
