"""The kernel of rms_norm and add_rms_norm against plain torch."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="the export extra is not installed")
pytest.importorskip("triton", reason="triton is not installed")
from torch import Tensor  # noqa: E402

from wsi_rt.kernels.errors import KernelInputError  # noqa: E402
from wsi_rt.kernels.rms_norm import WIDEST, add_rms_norm, rms_norm  # noqa: E402
from wsi_rt.kernels.rms_norm.triton import add_rms_norm_triton, rms_norm_triton  # noqa: E402

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
EPS = 1e-5


def normed(x: Tensor, weight: Tensor) -> Tensor:
    """The public operator on a GPU; its kernel alone in the interpreter, where tensors lie on the CPU."""
    return (rms_norm if x.is_cuda else rms_norm_triton)(x, weight, EPS)


def summed(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return (add_rms_norm if x.is_cuda else add_rms_norm_triton)(x, residual, weight, EPS)


def eager(x: Tensor, weight: Tensor) -> Tensor:
    """The published steps in plain torch at the precision of the tensors."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * weight


def inputs(rows: int, channels: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """x in rows of a wider matrix, a channel of which stands out; a residual in rows of another; weight."""
    generator = torch.Generator().manual_seed(rows * 1000 + channels)
    x, residual = torch.randn(2, rows, channels + 5, generator=generator)
    x[:, 1] *= 20
    weight = torch.randn(channels, generator=generator)
    return (
        x.to(device, dtype)[:, :channels],
        residual[:, 2:].to(device, dtype)[:, :channels],
        weight.to(device, dtype),
    )


@pytest.mark.parametrize("channels", [1, 20, 128, 1000], ids="C{}".format)
@pytest.mark.parametrize("rows", [1, 2, 17, 63], ids="T{}".format)
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_plain_torch(kernel_device, poisoned, assert_as_exact, dtype, rows, channels):
    x, _, weight = inputs(rows, channels, DTYPES[dtype], kernel_device)
    assert x.stride(0) == channels + 5
    ours = normed(x, weight)
    assert ours.dtype == DTYPES[dtype]
    # the floor: a unit in the last place of the largest values, 33 in fp32
    assert_as_exact(ours, eager(x, weight), eager(x.double(), weight.double()), floor=4e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_published_width(kernel_device, poisoned, assert_as_exact, dtype):
    x, residual, weight = inputs(3, 4096, DTYPES[dtype], kernel_device)
    ours, total = summed(x, residual, weight)
    assert torch.equal(total, x + residual)
    assert_as_exact(ours, eager(total, weight), eager(total.double(), weight.double()))


@pytest.mark.parametrize("rows", [1, 17], ids="T{}".format)
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_normed_is_the_sum_as_it_is_stored(kernel_device, poisoned, dtype, rows):
    x, residual, weight = inputs(rows, 100, DTYPES[dtype], kernel_device)
    ours, total = summed(x, residual, weight)
    assert torch.equal(total, x + residual)
    assert torch.equal(ours, normed(total, weight))


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_a_residual_in_fp32_stays_exact(kernel_device, poisoned, assert_as_exact, dtype):
    x, residual, weight = inputs(9, 100, DTYPES[dtype], kernel_device)
    exact = residual.float() + 1e-4  # what half precision would lose
    ours, total = summed(x, exact, weight)
    assert (ours.dtype, total.dtype) == (DTYPES[dtype], torch.float32)
    assert torch.equal(total, x.float() + exact)
    assert_as_exact(ours, eager(total.to(x.dtype), weight), eager(total.double(), weight.double()))


def test_a_large_fp16_row_does_not_overflow(kernel_device):
    """Squares of 1,000 are beyond fp16, and 4,096 of them beyond 2^31."""
    x = torch.full((1, 4096), 1000.0, dtype=torch.float16, device=kernel_device)
    assert torch.equal(normed(x, torch.ones_like(x[0])), torch.ones_like(x))


def test_rows_beyond_two_to_the_31(kernel_device):
    """1,100 rows 2^21 elements apart: 32-bit offsets would wrap from row 1,024 on."""
    storage = torch.empty(1100 * 2**21, dtype=torch.float16, device=kernel_device)  # 4.6 GB, of which 1,100 pages
    x = storage.view(1100, 2**21)[:, :8]
    small, residual, weight = inputs(1100, 8, torch.float16, kernel_device)
    x.copy_(small)
    assert torch.equal(normed(x, weight), normed(small, weight))
    assert torch.equal(summed(residual, x, weight)[1], residual + small)


def test_rows_too_wide_for_registers_are_refused(kernel_device):
    wide = torch.zeros(1, WIDEST + 1, dtype=torch.float16, device=kernel_device)
    with pytest.raises(KernelInputError, match="16385 channels, expected at most 16384 on a GPU"):
        normed(wide, wide[0])
    assert not normed(wide[:, :WIDEST], wide[0, :WIDEST]).any()
