"""Resampling as products of matrices against Pillow, which the CPU's path resizes with."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

torch = pytest.importorskip("torch", reason="the export extra is not installed")

from wsi_rt.runtime.slides.device.resample import Resampling, resample, take_tiles  # noqa: E402

CASES = {
    "halved": (512, 512.0, [(0.0, 0.0), (0.0, 0.0)], [512, 512]),
    "fraction": (508, 506.3, [(0.25, 0.6), (0.0, 0.55)], [507, 508]),
    "enlarged": (128, 128.0, [(0.0, 0.0)], [128]),
    "a quarter": (1025, 1024.0, [(0.5, 0.5)], [1025]),
}


@pytest.mark.parametrize("case", CASES)
def test_pillows_bicubic(case: str) -> None:
    """Noise, the hardest: no more than two grey levels, and one value in 1,000 at most, beside Pillow's."""
    width, span, offsets, edges = CASES[case]
    squares = np.random.default_rng(0).integers(0, 256, (len(edges), width, width, 3), np.uint8)
    out = torch.empty(len(edges), 256, 256, 3, dtype=torch.uint8)
    resample(torch.from_numpy(squares), Resampling(np.array(offsets), np.array(edges), span), out)
    for square, (left, top), edge, got in zip(squares, offsets, edges, out.numpy(), strict=True):
        own = Image.fromarray(square[:edge, :edge])
        box = (left, top, left + span, top + span)
        wanted = np.asarray(own.resize((256, 256), Image.Resampling.BICUBIC, box=box))
        difference = np.abs(got.astype(int) - wanted)
        assert difference.max() <= 2
        assert (difference > 0).mean() < 1e-3


def test_a_batch_of_one_and_the_rest_of_a_batch() -> None:
    """cuCIM gives [h, w, 3] for batches of one; of a larger batch than asked for, the first tiles count."""
    tiles = torch.randint(0, 256, (3, 256, 256, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    out = torch.zeros(2, 256, 256, 3, dtype=torch.uint8)
    take_tiles(tiles, out, None)
    assert torch.equal(out, tiles[:2])
    take_tiles(tiles[2], out[:1], None)
    assert torch.equal(out[0], tiles[2])
    assert torch.equal(out[1], tiles[1])
