"""What onnxruntime raises while it runs is one line with the right exit code."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from wsi_rt.runtime.engines.ort import plain_failure
from wsi_rt.runtime.errors import MachineError, WsiRtError
from wsi_rt.runtime.features import write_tile_features
from wsi_rt.runtime.types import Provenance, TileFeatures, TileGrid


def test_memory_is_the_machines_fault_and_the_rest_the_engines():
    with pytest.raises(MachineError, match="llm: memory ran out"), plain_failure("llm"):
        raise RuntimeError("Failed to allocate memory for requested buffer of size 1")
    with pytest.raises(WsiRtError, match=r"projector: onnxruntime failed.*bad node") as e, plain_failure("projector"):
        raise RuntimeError("bad node")
    assert e.value.exit_code == 1
    with pytest.raises(KeyError), plain_failure("llm"):
        raise KeyError("ours")


@pytest.mark.slow
def test_too_little_memory_for_a_large_slide(nano_bundle: Path, tmp_path: Path, wsi_rt_process):
    """12,000 tiles want about 3 GB in the slide encoder; 2.5 GB of address space are not enough."""
    import resource

    index = np.arange(12_000)
    xy0 = np.stack([index % 110, index // 110], axis=1).astype(np.int64) * 256
    features = TileFeatures(np.ones((12_000, 96), np.float32), TileGrid(xy0, 256), Provenance("test"))
    write_tile_features(tmp_path / "large.h5", features)
    limit = 2_500_000 * 1024
    done = wsi_rt_process(
        *("ask", tmp_path / "large.h5", "What?", "--engines", nano_bundle, "--max-new-tokens", 1),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
    )
    assert done.code == 3, done.err
    assert "memory ran out" in done.err.splitlines()[-1]
    assert "Traceback" not in done.err
