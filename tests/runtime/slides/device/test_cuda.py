"""The real device: its kernel in Triton's interpreter, and the whole of it where there is a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the export extra is not installed")

from wsi_rt.kernels.tile_normalize.reference import tile_normalize_reference  # noqa: E402
from wsi_rt.runtime.config import SlideSettings  # noqa: E402
from wsi_rt.runtime.errors import MachineError  # noqa: E402
from wsi_rt.runtime.slides import open_slide, plan_reads, read_tile  # noqa: E402
from wsi_rt.runtime.slides.device import open_tiles  # noqa: E402
from wsi_rt.runtime.slides.device.cuda import CudaTileDevice  # noqa: E402
from wsi_rt.runtime.slides.device.features import iter_features, ring_shape  # noqa: E402
from wsi_rt.runtime.slides.tiles import TileSource  # noqa: E402
from wsi_rt.runtime.types import TileGrid  # noqa: E402

INTO_MEMORY_THAT_IS_THERE = """
import torch
from wsi_rt.kernels.tile_normalize.reference import tile_normalize_reference
from wsi_rt.runtime.slides.device.cuda import normalise_into

mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
ring = torch.randint(0, 256, (2, 256, 256, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
for dtype, px in ((torch.float32, 224), (torch.float16, 56)):
    slot = torch.full((2, 3, px, px), float("nan"), dtype=dtype)
    normalise_into(ring[:1], mean, std, slot[:1])
    expected = tile_normalize_reference(ring[:1], mean, std, px)
    torch.testing.assert_close(slot[:1].float(), expected, atol=2e-6 if dtype == torch.float32 else 2e-3, rtol=0)
    assert slot[1].isnan().all()  # rows that are not of the batch
print("same")
"""


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
def test_the_kernel_writes_into_the_ring(tmp_path: Path) -> None:
    """In Triton's interpreter, a process of its own."""
    environ = {**os.environ, "TRITON_INTERPRET": "1", "TRITON_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", INTO_MEMORY_THAT_IS_THERE],
        env=environ, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "same\n"), done.stderr


def test_without_a_gpu_it_says_so() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(MachineError, match="torch finds no NVIDIA GPU"):
        CudaTileDevice(torch.device("cuda", 0))


@pytest.mark.gpu
@pytest.mark.parametrize("reader_name", [None, "cucim-cuda"])
def test_on_a_gpu(synth: Path, bands_engine: Callable[..., Any], reader_name: str | None) -> None:
    """Both sources: the CPU's pixels exactly, nvJPEG's within a few grey levels; three slots, 20 batches."""
    if not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU; test_features.py drives the ring with a stand-in")
    if reader_name is not None:
        pytest.importorskip("cucim", reason="cucim-cu12 is not installed")
        pytest.importorskip("cupy", reason="cupy is not installed")
    engine = bands_engine(dtype=torch.float16)
    engine.device, engine._own = torch.device("cuda", 0), engine._own.cuda()
    settings = SlideSettings(reader=reader_name)
    with open_slide(synth, settings) as reader, CudaTileDevice(engine.device) as device:
        plan = plan_reads(reader, settings)
        xy0 = [(col * 256, row * 256) for row in range(plan.rows) for col in range(plan.cols)] * 2
        source = TileSource(reader, TileGrid(np.array(xy0, np.int64), 256), plan)
        tiles = open_tiles(source, reader_name, device, threads=2)
        batches = list(iter_features(tiles, engine, device, ring_shape(tiles, engine, 5, 3)))
    with open_slide(synth) as reader:
        pixels = torch.from_numpy(np.stack([read_tile(reader, plan, place) for place in xy0]))
    config = engine.manifest.config
    expected = engine._encode(tile_normalize_reference(pixels, config["mean"], config["std"], 224).half()).numpy()
    features = np.concatenate([batch.features for batch in batches])
    assert [f for batch in batches for f in batch.failures] == []
    np.testing.assert_allclose(features, expected, atol=2e-3 if reader_name is None else 3e-2)
