"""The kernel of tile_normalize against plain torch: both layouts, odd sizes, every value of a byte."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="the export extra is not installed")
pytest.importorskip("triton", reason="triton is not installed")
from torch import Tensor  # noqa: E402

from wsi_rt.kernels.tile_normalize import tile_normalize  # noqa: E402
from wsi_rt.kernels.tile_normalize.triton import tile_normalize_triton  # noqa: E402

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def normalized(tiles: Tensor, crop: int, dtype: torch.dtype, resize: int) -> Tensor:
    """The public operator on a GPU; its kernel alone in the interpreter, where tensors lie on the CPU."""
    if tiles.is_cuda:
        return tile_normalize(tiles, MEAN, STD, crop, resize=resize, dtype=dtype)
    return tile_normalize_triton(tiles, MEAN, STD, crop, dtype)


def eager(tiles: Tensor, crop: int, dtype: torch.dtype) -> Tensor:
    """The published transform in plain torch at a precision; tiles are [B, 3, S, S]."""
    at = (tiles.shape[2] - crop) // 2
    mean, std = (torch.tensor(v, dtype=torch.float64).reshape(1, 3, 1, 1).to(tiles.device, dtype) for v in (MEAN, STD))
    return (tiles[:, :, at : at + crop, at : at + crop].to(dtype) / 255 - mean) / std


def tiles_u8(batch: int, side: int, device: torch.device) -> Tensor:
    """[B, 3, S, S]."""
    generator = torch.Generator().manual_seed(side)
    return torch.randint(0, 256, (batch, 3, side, side), dtype=torch.uint8, generator=generator).to(device)


@pytest.mark.parametrize("layout", ["hwc", "chw"])
@pytest.mark.parametrize(
    ("batch", "side", "crop"),
    [(1, 256, 224), (3, 32, 28), (2, 37, 17), (2, 18, 15), (1, 7, 7), (5, 1, 1)],
    ids=["256-224", "B3-32-28", "37-17", "odd-border", "no-crop", "one-pixel"],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_plain_torch(kernel_device, poisoned, assert_as_exact, dtype, batch, side, crop, layout):
    tiles = tiles_u8(batch, side, kernel_device)
    given = tiles.permute(0, 2, 3, 1).contiguous() if layout == "hwc" else tiles
    ours = normalized(given, crop, DTYPES[dtype], side)
    assert ours.dtype == DTYPES[dtype]
    assert ours.is_contiguous()
    assert_as_exact(ours, eager(tiles, crop, DTYPES[dtype]), eager(tiles, crop, torch.float64), floor=5e-7)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_byte_in_every_channel(kernel_device, dtype):
    """Half an ulp of the output precision, plus two of fp32."""
    tiles = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).expand(1, 3, 16, 16).contiguous()
    exact = eager(tiles, 16, torch.float64)
    ours = normalized(tiles.to(kernel_device), 16, DTYPES[dtype], 16).double().cpu()
    ulp = torch.finfo(DTYPES[dtype]).eps / 2 + torch.finfo(torch.float32).eps
    assert ((ours - exact).abs() <= ulp * exact.abs() + 5e-7).all()
