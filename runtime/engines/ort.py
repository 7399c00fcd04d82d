"""ONNX Runtime on the CPU."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from wsi_rt.runtime.engines.base import Array, Engine
from wsi_rt.runtime.errors import EngineMismatchError, MachineError, WsiRtError
from wsi_rt.runtime.manifest import Compiled, EngineManifest

if TYPE_CHECKING:
    import onnxruntime

PROVIDER = "CPUExecutionProvider"
# Weights of a graph loaded from memory are looked up in this folder (onnxruntime memory-maps them).
_WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"
# DequantizeLinear and MatMul stay fp32: fused by default into a product of 8-bit activations, 8e-3 off.
_DEQUANTISED_LEVEL = "session.qdq_matmulnbits_accuracy_level"


def open_session(
    graph: Path | bytes, weights_dir: Path, threads: int, fold_constants: bool = True, shared_cores: bool = False
) -> onnxruntime.InferenceSession:
    """A CPU session of a graph (a file, or its bytes) on `threads` threads, whose external weights stand in
    `weights_dir`. fold_constants False: what a graph computes from its weights alone is not kept beside them.
    shared_cores: one of many that run in turn; it leaves cores and memory alone while it is idle.

    Raises MachineError without onnxruntime, EngineMismatchError when it cannot open the graph
    or would run it on another provider.
    """
    try:
        import onnxruntime as ort
    except ImportError as e:
        raise MachineError(f"onnxruntime does not import ({e}); pip install onnxruntime") from e
    options = session_options(weights_dir, threads)
    if shared_cores:
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.enable_cpu_mem_arena = False
    where = "a graph in memory" if isinstance(graph, bytes) else str(graph)
    if not has_vnni():  # AVX2 sums products of bytes in 16 bits, which overflow; what avoids it takes 2.5 times as long
        options.add_session_config_entry("session.x64quantprecision", "1")
    try:
        disabled = [] if fold_constants else ["ConstantFolding"]
        model = graph if isinstance(graph, bytes) else graph.read_bytes()
        session = ort.InferenceSession(model, options, providers=[PROVIDER], disabled_optimizers=disabled)
    except Exception as e:  # onnxruntime raises its own classes, which share no base
        reason = str(e).splitlines()[0]
        raise EngineMismatchError(
            f"{where}: onnxruntime {ort.__version__} cannot open it ({reason}); rebuild it"
        ) from e
    if session.get_providers() != [PROVIDER]:
        raise EngineMismatchError(f"{where}: would run on {session.get_providers()}, expected {PROVIDER}")
    return session


def session_options(weights_dir: Path, threads: int) -> onnxruntime.SessionOptions:
    """What sessions of every provider have in common."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3  # errors only: the rest is raised
    options.add_session_config_entry(_WEIGHTS_FOLDER, str(weights_dir))
    options.add_session_config_entry(_DEQUANTISED_LEVEL, "1")
    return options


@cache
def has_vnni() -> bool:
    """Whether the CPU sums products of bytes in 32 bits; False where the system does not tell."""
    try:
        flags = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags"))
    except (OSError, StopIteration):
        return False
    return not {"avx512_vnni", "avx_vnni"}.isdisjoint(flags.split())


@contextmanager
def plain_failure(component: str) -> Iterator[None]:
    """What onnxruntime raises while it runs as one line: memory that ran out is the machine's (exit 3), anything
    else the engine's."""
    try:
        yield
    except Exception as e:
        if not isinstance(e, RuntimeError) and not type(e).__module__.startswith("onnxruntime"):
            raise
        reason = str(e).splitlines()[0] if str(e) else type(e).__name__
        if "alloc" in reason.lower():
            raise MachineError(
                f"{component}: memory ran out ({reason}); use a machine with more, or a coarser --target-mpp"
            ) from e
        raise WsiRtError(f"{component}: onnxruntime failed ({reason}); check the bundle with wsi-rt verify") from e


class OrtEngine(Engine):
    """One ONNX graph in one session."""

    def __init__(self, manifest: EngineManifest, precision: str, session: onnxruntime.InferenceSession) -> None:
        super().__init__(manifest, precision)
        self._session: onnxruntime.InferenceSession | None = session

    @classmethod
    def open(cls, root: Path, manifest: EngineManifest, compiled: Compiled, threads: int) -> OrtEngine:
        session = open_session(root / compiled.graphs["model"], root / compiled.weights_dir, threads)
        return cls(manifest, compiled.precision, session)

    def _run(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> dict[str, Array]:
        if self._session is None:
            raise WsiRtError(f"{self.manifest.name}: this engine is closed")
        contiguous = {name: np.ascontiguousarray(x) for name, x in inputs.items()}
        if not outputs:
            names = [s.name for s in self.manifest.outputs]
            with plain_failure(self.manifest.name):
                return dict(zip(names, self._session.run(names, contiguous), strict=True))
        binding = self._session.io_binding()
        for name, x in contiguous.items():
            binding.bind_input(name, "cpu", 0, x.dtype, x.shape, x.ctypes.data)
        for name, x in outputs.items():
            binding.bind_output(name, "cpu", 0, x.dtype, x.shape, x.ctypes.data)
        with plain_failure(self.manifest.name):
            self._session.run_with_iobinding(binding)
        return dict(outputs)

    def close(self) -> None:
        self._session = None
