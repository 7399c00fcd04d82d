"""ONNX Runtime on the CPU."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from wsi_rt.runtime.engines.base import Array, Engine
from wsi_rt.runtime.errors import EngineMismatchError, InputError, MissingDependencyError, WsiRtError
from wsi_rt.runtime.manifest import EngineManifest

if TYPE_CHECKING:
    import onnxruntime

PROVIDER = "CPUExecutionProvider"
# Weights of a graph loaded from memory are looked up in this folder (onnxruntime memory-maps them).
_WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"


def open_session(graph: Path, weights_dir: Path, threads: int) -> onnxruntime.InferenceSession:
    """A CPU session on `threads` threads, whose external weights stand in `weights_dir`.

    Raises MissingDependencyError without onnxruntime, EngineMismatchError when it cannot open the graph
    or would run it on another provider.
    """
    try:
        import onnxruntime as ort
    except ImportError as e:
        raise MissingDependencyError(f"onnxruntime does not import ({e}); pip install onnxruntime") from e
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3  # errors only: the rest is raised
    options.add_session_config_entry(_WEIGHTS_FOLDER, str(weights_dir))
    try:
        session = ort.InferenceSession(graph.read_bytes(), options, providers=[PROVIDER])
    except Exception as e:  # onnxruntime raises its own classes, which share no base
        reason = str(e).splitlines()[0]
        raise EngineMismatchError(
            f"{graph}: onnxruntime {ort.__version__} cannot open it ({reason}); rebuild it"
        ) from e
    if session.get_providers() != [PROVIDER]:
        raise EngineMismatchError(f"{graph}: would run on {session.get_providers()}, expected {PROVIDER}")
    return session


class OrtEngine(Engine):
    """One ONNX graph in one session."""

    def __init__(self, manifest: EngineManifest, session: onnxruntime.InferenceSession) -> None:
        super().__init__(manifest)
        self._session: onnxruntime.InferenceSession | None = session

    @classmethod
    def open(cls, root: Path, manifest: EngineManifest, threads: int) -> OrtEngine:
        return cls(manifest, open_session(root / manifest.engine["model"], root / manifest.weights_dir, threads))

    def _run(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> dict[str, Array]:
        if self._session is None:
            raise WsiRtError(f"{self.manifest.name}: this engine is closed")
        contiguous = {name: np.ascontiguousarray(x) for name, x in inputs.items()}
        if not outputs:
            names = [s.name for s in self.manifest.outputs]
            return dict(zip(names, self._session.run(names, contiguous), strict=True))
        binding = self._session.io_binding()
        for name, x in contiguous.items():
            binding.bind_input(name, "cpu", 0, x.dtype, x.shape, x.ctypes.data)
        for name, x in outputs.items():
            if not (x.flags.c_contiguous and x.flags.writeable):
                what = "read-only" if x.flags.c_contiguous else "not contiguous"
                raise InputError(f"{self.manifest.name}: `{name}` is {what}, expected memory to fill in place")
            binding.bind_output(name, "cpu", 0, x.dtype, x.shape, x.ctypes.data)
        self._session.run_with_iobinding(binding)
        return dict(outputs)

    def close(self) -> None:
        self._session = None
