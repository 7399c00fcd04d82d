"""The kernel of slide_embed against plain torch, and its closed-form positions against the float64 table."""

from __future__ import annotations

from itertools import pairwise

import pytest

torch = pytest.importorskip("torch", reason="the export extra is not installed")
pytest.importorskip("triton", reason="triton is not installed")
from torch import Tensor  # noqa: E402

from wsi_rt.kernels.slide_embed import GRID, slide_embed  # noqa: E402
from wsi_rt.kernels.slide_embed.reference import position_embedding  # noqa: E402
from wsi_rt.kernels.slide_embed.triton import slide_embed_triton  # noqa: E402

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


def embedded(projected: Tensor, positions: Tensor, bias: Tensor, cls: Tensor, **more) -> Tensor:
    """The public operator on a GPU; its kernel alone in the interpreter, where tensors lie on the CPU."""
    if projected.is_cuda:
        return slide_embed(projected, positions, bias, cls, **more)
    cu, dtype = more.get("cu_seqlens"), more.get("dtype", projected.dtype)
    return slide_embed_triton(projected, positions, bias, cls, cu, dtype)


def eager(projected: Tensor, positions: Tensor, bias: Tensor, cls: Tensor) -> Tensor:
    """The published steps in plain torch at the precision of the tensors: a row of the table is cast to it."""
    table = position_embedding(positions.cpu(), projected.shape[1]).to(projected)
    return torch.cat([cls[None], projected + bias + table])


def inputs(n: int, channels: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    """The projection in rows of a wider matrix; positions anywhere on the grid, its corners among them."""
    generator = torch.Generator().manual_seed(n)
    projected = torch.randn(n, channels + 5, generator=generator).to(device, dtype)[:, :channels]
    positions = torch.randint(0, GRID, (n, 2), generator=generator)
    corners = torch.tensor([[0, 0], [0, GRID - 1], [GRID - 1, 0], [GRID - 1, GRID - 1]])[:n]
    positions[: len(corners)] = corners
    bias, cls = torch.randn(2, channels, generator=generator).to(device, dtype)
    return projected, positions.to(device), bias, cls


def test_positions_are_those_of_the_float64_table(kernel_device):
    """Every index of both axes at the published width. fp32 angles would be off by 3e-5; measured here: 1.0e-7."""
    index, channels = torch.arange(GRID), 768
    positions = torch.stack([GRID - 1 - index, index], 1)  # col, row
    zeros = torch.zeros(GRID, channels, device=kernel_device)
    ours = embedded(zeros, positions.to(kernel_device), zeros[0], zeros[0])[1:].double().cpu()
    omega = 10000.0 ** (-torch.arange(channels // 4, dtype=torch.float64) / (channels / 4))
    axes = [
        torch.cat([(i.double()[:, None] * omega).sin(), (i.double()[:, None] * omega).cos()], 1)
        for i in (index, index.flip(0))
    ]
    assert (ours - torch.cat(axes, 1)).abs().max() <= 1.5e-7


@pytest.mark.parametrize("n", [1, 2, 17, 63, 100, 257], ids="N{}".format)
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_plain_torch(kernel_device, poisoned, assert_as_exact, dtype, n):
    given = inputs(n, 20, DTYPES[dtype], kernel_device)
    assert given[0].stride(0) == 25
    ours = embedded(*given)
    assert ours.dtype == DTYPES[dtype]
    exact = torch.cat(
        [given[3][None].double(), eager(given[0].double(), given[1], given[2].double(), given[3].double())[1:]]
    )
    assert_as_exact(ours, eager(*given), exact, floor=5e-7)


def test_published_width_and_another_output_precision(kernel_device, poisoned, assert_as_exact):
    given = inputs(21, 768, torch.bfloat16, kernel_device)
    ours = embedded(*given, dtype=torch.float32)
    assert ours.dtype == torch.float32
    assert_as_exact(
        ours,
        eager(*(x.float() if x.is_floating_point() else x for x in given)),
        eager(*(x.double() if x.is_floating_point() else x for x in given)),
        floor=5e-7,
    )


@pytest.mark.parametrize("bounds", [[0, 1, 18, 40], list(range(41))], ids=["S3", "S40"])
@pytest.mark.parametrize("integer", [torch.int32, torch.int64], ids=["int32", "int64"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_slide_is_the_same_alone_and_among_others(kernel_device, poisoned, dtype, integer, bounds):
    """40 slides take three steps of boundaries."""
    projected, positions, bias, cls = inputs(40, 20, DTYPES[dtype], kernel_device)
    positions = positions.to(integer)
    cu = torch.tensor(bounds, dtype=integer, device=kernel_device)
    ours = embedded(projected, positions, bias, cls, cu_seqlens=cu)
    alone = torch.cat([embedded(projected[a:b], positions[a:b], bias, cls) for a, b in pairwise(bounds)])
    assert torch.equal(ours, alone)


def test_positions_in_columns_of_a_wider_table(kernel_device):
    projected, positions, bias, cls = inputs(9, 20, torch.float32, kernel_device)
    wide = torch.cat([positions, torch.full_like(positions, 10**9)], 1)[:, :2]
    assert wide.stride() == (4, 1)
    assert torch.equal(embedded(projected, wide, bias, cls), embedded(projected, positions, bias, cls))


def test_a_position_off_the_grid_is_nan_not_another_tiles_position(kernel_device):
    """What the operator refuses where it may read positions; under CUDA graph capture only the kernel sees them."""
    projected, positions, bias, cls = inputs(5, 20, torch.float32, torch.device("cpu"))
    positions[1, 0], positions[3, 1] = GRID, -1
    moved = [x.to(kernel_device) for x in (projected, positions, bias, cls)]
    ours = slide_embed_triton(*moved, None, torch.float32)
    assert ours.isnan().all(1).tolist() == [False, False, True, False, True, False]
    assert ours.isnan().any(1).sum() == 2


def test_rows_beyond_two_to_the_31(kernel_device):
    """1,100 rows 2^21 elements apart: 32-bit offsets would wrap from row 1,024 on."""
    storage = torch.empty(1100 * 2**21, dtype=torch.float16, device=kernel_device)  # 4.6 GB, of which 1,100 pages
    projected = storage.view(1100, 2**21)[:, :8]
    small, *rest = inputs(1100, 8, torch.float16, kernel_device)
    projected.copy_(small)
    assert torch.equal(embedded(projected, *rest), embedded(small, *rest))
