"""Portable graph -> the `ort-cpu` target's own graph.

Encoders and projector: onnxruntime's own offline optimisation up to its fused CPU operators (functions
inlined, constants folded), written once so that opening a bundle does not repeat it. The language model is
lowered where it is built (`graphs.llama.OrtCpuLlamaGraph`), since its KV handling differs.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import onnxruntime as ort

from wsi_rt.runtime.errors import MachineError, WsiRtError

# How onnxruntime words a write that failed; 28 is ENOSPC.
_NOT_WRITTEN = (
    "Failed to write external initializers",
    "Protobuf serialization failed",
    "SystemError : 28",
    "No space left",
)


def lower_ort_cpu(portable: Path, lowered: Path, threads: int = 0) -> None:
    """Writes `lowered` and `weights.data` beside it. threads 0: onnxruntime's default.

    Raises MachineError when the files cannot be written, WsiRtError when the graph cannot be optimised.
    """
    lowered.parent.mkdir(parents=True, exist_ok=True)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(lowered)
    options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "weights.data")
    options.add_session_config_entry("session.optimized_model_external_initializers_min_size_in_bytes", "1024")
    try:
        ort.InferenceSession(str(portable), options, providers=["CPUExecutionProvider"])
    except Exception as e:  # onnxruntime's own classes, which carry no errno
        reason = str(e).splitlines()[0]
        if not any(sign in reason for sign in _NOT_WRITTEN):
            raise WsiRtError(f"onnxruntime cannot optimise {portable}: {reason}") from e
        free = shutil.disk_usage(lowered.parent).free / 1e9
        raise MachineError(
            f"{lowered}: not written ({reason}), {free:.1f} GB free; make room or choose another --out"
        ) from e
