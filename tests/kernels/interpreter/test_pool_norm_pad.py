"""The kernel of pool_norm_pad against plain torch: both norm orders, odd sizes, several slides."""

from __future__ import annotations

from itertools import pairwise

import pytest

torch = pytest.importorskip("torch", reason="the export extra is not installed")
pytest.importorskip("triton", reason="triton is not installed")
import torch.nn.functional as F  # noqa: E402
from torch import Tensor  # noqa: E402

from wsi_rt.kernels.errors import KernelInputError  # noqa: E402
from wsi_rt.kernels.pool_norm_pad import pool_norm_pad  # noqa: E402
from wsi_rt.kernels.pool_norm_pad.triton import pool_norm_pad_triton  # noqa: E402

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
EPS = 1e-6


def pooled(tokens: Tensor, weight: Tensor, bias: Tensor, bins: int, padded: int, **more) -> Tensor:
    """The public operator on a GPU; its kernel alone in the interpreter, where tensors lie on the CPU."""
    if tokens.is_cuda:
        return pool_norm_pad(tokens, weight, bias, EPS, bins, padded, **more)
    cu, leading, dtype = more.get("cu_seqlens"), more.get("leading", 0), more.get("dtype", tokens.dtype)
    return pool_norm_pad_triton(tokens, weight, bias, cu, EPS, bins, padded, leading, dtype)


def eager(tokens: Tensor, weight: Tensor, bias: Tensor, bins: int, padded: int) -> Tensor:
    """The published steps in plain torch at the precision of the tensors."""
    x = F.adaptive_avg_pool1d(tokens.T[None], bins)[0].T
    pad = (0, padded - x.shape[1])
    if weight.shape[0] == padded:
        return F.layer_norm(F.pad(x, pad), (padded,), weight, bias, EPS)
    return F.pad(F.layer_norm(x, (x.shape[1],), weight, bias, EPS), pad)


def inputs(n: int, channels: int, norm: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    """Tokens in rows of a wider matrix, a channel of which stands out; weight and bias of the norm."""
    generator = torch.Generator().manual_seed(n * 1000 + norm)
    tokens = torch.randn(n, channels + 3, generator=generator) + 0.5
    tokens[:, 1] *= 20
    weight, bias = torch.randn(2, norm, generator=generator)
    return tokens.to(device, dtype)[:, :channels], weight.to(device, dtype), bias.to(device, dtype)


@pytest.mark.parametrize("norm", [20, 28], ids=["norm-pad", "pad-norm"])
@pytest.mark.parametrize("n", [1, 2, 17, 63, 100, 257], ids="N{}".format)
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_plain_torch(kernel_device, poisoned, assert_as_exact, dtype, n, norm):
    given = inputs(n, 20, norm, DTYPES[dtype], kernel_device)
    assert given[0].stride(0) == 23
    ours = pooled(*given, 24, 28)
    assert ours.dtype == DTYPES[dtype]
    assert_as_exact(ours, eager(*given, 24, 28), eager(*(x.double() for x in given), 24, 28), floor=1e-6)
    if norm == 20:
        assert not ours[:, 20:].any()


@pytest.mark.parametrize("norm", [768, 1024], ids=["norm-pad", "pad-norm"])
@pytest.mark.parametrize("n", [100, 700], ids="N{}".format)
def test_published_sizes(kernel_device, poisoned, assert_as_exact, n, norm):
    given = inputs(n, 768, norm, torch.float16, kernel_device)
    ours = pooled(*given, 576, 1024, dtype=torch.float32)
    assert ours.dtype == torch.float32
    assert_as_exact(ours, eager(*given, 576, 1024), eager(*(x.double() for x in given), 576, 1024))


def test_a_bin_of_thousands_keeps_fp32_accuracy(kernel_device, assert_as_exact):
    """50,001 tokens in 5 bins: summed in fp16, 10,000 values of about 0.5 would stop growing at 2,048."""
    given = inputs(50_001, 4, 4, torch.float16, kernel_device)
    exact = eager(*(x.double() for x in given), 5, 4)
    ours = pooled(*given, 5, 4, dtype=torch.float32)
    assert_as_exact(ours, eager(*(x.float() for x in given), 5, 4), exact)


@pytest.mark.parametrize("cu_dtype", [torch.int32, torch.int64], ids=["int32", "int64"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_slide_is_the_same_alone_and_among_others(kernel_device, poisoned, dtype, cu_dtype):
    bounds = [0, 2, 40, 41, 90]
    tokens, weight, bias = inputs(90, 20, 20, DTYPES[dtype], kernel_device)
    cu = torch.tensor(bounds, dtype=cu_dtype, device=kernel_device)
    ours = pooled(tokens, weight, bias, 16, 28, cu_seqlens=cu)
    alone = [pooled(tokens[a:b], weight, bias, 16, 28) for a, b in pairwise(bounds)]
    assert torch.equal(ours, torch.stack(alone))


def test_the_cls_row_of_every_slide_is_left_out(kernel_device, poisoned):
    tokens, weight, bias = inputs(30, 20, 20, torch.float16, kernel_device)
    tokens[[0, 13]] = torch.nan
    cu = torch.tensor([0, 13, 30], device=kernel_device)
    ours = pooled(tokens, weight, bias, 16, 28, cu_seqlens=cu, leading=1)
    assert torch.equal(ours[0], pooled(tokens[1:13], weight, bias, 16, 28))
    assert torch.equal(ours[1], pooled(tokens[14:], weight, bias, 16, 28))


def test_rows_beyond_two_to_the_31(kernel_device):
    """1,100 rows 2^21 elements apart: 32-bit offsets would wrap from row 1,024 on."""
    storage = torch.empty(1100 * 2**21, dtype=torch.float16, device=kernel_device)  # 4.6 GB, of which 1,100 pages
    tokens = storage.view(1100, 2**21)[:, :8]
    small, weight, bias = inputs(1100, 8, 8, torch.float16, kernel_device)
    tokens.copy_(small)
    assert torch.equal(pooled(tokens, weight, bias, 4, 8), pooled(small, weight, bias, 4, 8))


def test_rows_too_wide_for_registers_are_refused(kernel_device):
    tokens, weight, bias = inputs(2, 20, 20, torch.float16, kernel_device)
    with pytest.raises(KernelInputError, match="padded width 8193, expected at most 8192 on a GPU"):
        pooled(tokens, weight, bias, 4, 8193)
    assert pooled(tokens, weight, bias, 1, 8192).shape == (1, 8192)


def test_more_slides_than_a_grid_has_rows_are_refused(kernel_device):
    tokens, weight, bias = inputs(65_536, 4, 4, torch.float16, kernel_device)
    cu = torch.arange(65_537, device=kernel_device)
    with pytest.raises(KernelInputError, match="65,536 slides in one launch, expected at most 65,535 on a GPU"):
        pooled(tokens, weight, bias, 1, 4, cu_seqlens=cu)
