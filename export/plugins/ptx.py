"""A Triton kernel as TensorRT launches it: its PTX entry checked against the arguments, hidden parameters dropped.

Triton 3.8 appends two pointers to every entry (global and profiler scratch memory). TensorRT would pass nothing for
them, so they have to be unused, which is proven here, and are then taken off the parameter list.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from wsi_rt.kernels.aot import compile_case, nvidia_tool, triton_version
from wsi_rt.kernels.aot_case import AotCase
from wsi_rt.kernels.errors import KernelInputError
from wsi_rt.kernels.gpus import THREADS_PER_WARP
from wsi_rt.runtime.errors import MachineError

SCRATCH_POINTERS = 2
# What a kernel may use without asking the driver for more (CUDA C++ Programming Guide, "Shared Memory"). TensorRT's
# documentation does not say whether it asks, so nothing here relies on it.
SHARED_BYTES = 48 * 1024
# 8.8 (CUDA 12.9) is the oldest that Triton writes for sm_90 and knows all of SHIPPED_SM. For Blackwell it would write
# 9.3 by itself, which drivers and TensorRT releases of CUDA 13.0 and older refuse to load.
PTX_VERSION = 88
_ENTRY = re.compile(r"\.visible\s+\.entry\s+(\w+)\s*\(([^)]*)\)")
_PARAMETER = re.compile(r"\.param\s+\.(\w+)\s+.*?(\w+)$")
_LINE_INFO = re.compile(
    r"^[ \t]*\.(?:loc|file)\b.*\n|^[ \t]*\.section[ \t]+\.debug_\w+\s*\{[^{}]*\}[ \t]*\n?", re.MULTILINE
)
_PTX_TYPES = {"i32": "u32", "i64": "u64"}


@dataclass(frozen=True)
class PluginKernel:
    """What TensorRT gets of one kernel: dynamic shared memory in bytes, threads of a block."""

    name: str
    ptx: str
    threads: int
    shared_bytes: int


def compile_plugin_kernel(case: AotCase) -> PluginKernel:
    """Compile for the architecture of the case, prove the entry, drop the scratch pointers, assemble what is left.

    Raises KernelInputError on a configuration that needs more than 48 KB of shared memory, MachineError where this
    Triton does not give the entry that TensorRT is going to launch.
    """
    compiled = compile_case(case, PTX_VERSION)
    found = compiled.metadata
    if found.shared > SHARED_BYTES:
        raise KernelInputError(
            f"{case.name} needs {found.shared} bytes of shared memory, a TensorRT plugin gets {SHARED_BYTES}: "
            "use another precision, or the Triton operator outside TensorRT"
        )
    if found.global_scratch_size or found.profile_scratch_size:
        raise _unexpected(case, f"{found.global_scratch_size} + {found.profile_scratch_size} bytes of scratch", "none")
    try:
        arguments = [t for t in case.signature.values() if t != "constexpr"]
        ptx = without_scratch(without_line_info(compiled.asm["ptx"]), arguments)
        assemble(ptx)
    except (ValueError, RuntimeError) as e:
        raise _unexpected(case, str(e), "an entry for TensorRT") from e
    return PluginKernel(found.name, ptx, found.num_warps * THREADS_PER_WARP, found.shared)


def _unexpected(case: AotCase, given: str, expected: str) -> MachineError:
    return MachineError(
        f"{case.name}: Triton {triton_version()} gives {given}, expected {expected}: pip install triton==3.8.0"
    )


def entry_parameters(ptx: str) -> tuple[str, list[tuple[str, str]]]:
    """(kernel name, [(PTX type, parameter name)]) of the one entry. Raises ValueError where there is not one."""
    entries = _ENTRY.findall(ptx)
    if len(entries) != 1:
        raise ValueError(f"{len(entries)} entries in the PTX, expected one")
    name, listed = entries[0]
    parameters = []
    for text in filter(None, (part.strip() for part in listed.split(","))):
        parameter = _PARAMETER.fullmatch(text)
        if not parameter:
            raise ValueError(f"parameter {text!r} of {name}, expected .param .type name")
        parameters.append((parameter[1], parameter[2]))
    return name, parameters


def without_scratch(ptx: str, signature: Sequence[str]) -> str:
    """The PTX with the parameters of `signature` alone ("*fp16", "i32" ...: Triton types, in order).

    Raises ValueError unless the entry has exactly those, then two pointers that nothing in the PTX refers to.
    """
    name, parameters = entry_parameters(ptx)
    expected = ["u64" if t.startswith("*") else _PTX_TYPES.get(t, t) for t in signature]
    found = [ptx_type for ptx_type, _ in parameters]
    if found != expected + ["u64"] * SCRATCH_POINTERS:
        raise ValueError(
            f"{name} takes ({', '.join(found)}), expected ({', '.join(expected)}) and two scratch pointers"
        )
    for _, scratch in parameters[len(expected) :]:
        uses = len(re.findall(rf"\b{re.escape(scratch)}\b", ptx))
        if uses != 1:  # the declaration itself
            raise ValueError(f"{name} uses the scratch pointer {scratch} ({uses - 1} times)")
    return _ENTRY.sub(lambda e: f".visible .entry {name}({','.join(e[2].split(',')[: len(expected)])}\n)", ptx)


def without_line_info(ptx: str) -> str:
    """The PTX without source lines: they hold paths of the machine that builds, and would be stored in the engine."""
    return _LINE_INFO.sub("", ptx)


def assemble(ptx: str) -> bytes:
    """The cubin that ptxas makes of a PTX, for the `.target` it names. Raises RuntimeError where it refuses."""
    target = re.search(r"^\.target\s+(sm_(\d+)\w*)", ptx, re.MULTILINE)
    if not target:
        raise RuntimeError("no .target in the PTX")
    with tempfile.TemporaryDirectory(prefix="wsi-rt-ptx-") as folder:
        source, cubin = Path(folder) / "kernel.ptx", Path(folder) / "kernel.cubin"
        source.write_text(ptx)
        program = "ptxas-blackwell" if int(target[2]) >= 100 else "ptxas"  # as Triton chooses
        nvidia_tool(program, f"--gpu-name={target[1]}", str(source), "-o", str(cubin))
        return cubin.read_bytes()
