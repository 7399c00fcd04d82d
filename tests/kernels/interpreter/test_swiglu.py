"""The kernel of swiglu against plain torch."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="the export extra is not installed")
pytest.importorskip("triton", reason="triton is not installed")
import torch.nn.functional as F  # noqa: E402
from torch import Tensor  # noqa: E402

from wsi_rt.kernels.errors import KernelInputError  # noqa: E402
from wsi_rt.kernels.swiglu import swiglu  # noqa: E402
from wsi_rt.kernels.swiglu.triton import swiglu_triton  # noqa: E402

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


def gated(gate_up: Tensor) -> Tensor:
    """The public operator on a GPU; its kernel alone in the interpreter, where tensors lie on the CPU."""
    return (swiglu if gate_up.is_cuda else swiglu_triton)(gate_up)


def eager(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def inputs(rows: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Rows of a wider matrix; every eighth gate far out, where exp() is nearly 0 or overflows."""
    generator = torch.Generator().manual_seed(rows * 10_000 + width)
    x = torch.randn(rows, 2 * width + 3, generator=generator) * 3
    x[:, :width:8] *= 40
    return x.to(device, dtype)[:, : 2 * width]


@pytest.mark.parametrize("width", [1, 20, 1024, 1025], ids="F{}".format)
@pytest.mark.parametrize("rows", [1, 2, 17], ids="T{}".format)
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_plain_torch(kernel_device, poisoned, assert_as_exact, dtype, rows, width):
    given = inputs(rows, width, DTYPES[dtype], kernel_device)
    assert given.stride(0) == 2 * width + 3
    ours = gated(given)
    assert ours.dtype == DTYPES[dtype]
    assert_as_exact(ours, eager(given), eager(given.double()))


@pytest.mark.parametrize("dtype", DTYPES)
def test_published_width(kernel_device, poisoned, assert_as_exact, dtype):
    given = inputs(2, 11_008, DTYPES[dtype], kernel_device)
    assert_as_exact(gated(given), eager(given), eager(given.double()))


def test_the_ends_of_the_gate(kernel_device):
    gates = torch.tensor([-1e38, -1e4, -88.8, 0.0, 88.8, 1e4, 1e30], device=kernel_device)
    ours = gated(torch.cat([gates, torch.ones_like(gates)])[None])[0]
    assert ours.tolist() == [0.0, 0.0, pytest.approx(0.0, abs=1e-35), 0.0, gates[4].item(), 1e4, gates[6].item()]


def test_rows_beyond_two_to_the_31(kernel_device):
    """1,100 rows 2^21 elements apart: 32-bit offsets would wrap from row 1,024 on."""
    storage = torch.empty(1100 * 2**21, dtype=torch.float16, device=kernel_device)  # 4.6 GB, of which 1,100 pages
    given = storage.view(1100, 2**21)[:, :8]
    small = inputs(1100, 4, torch.float16, kernel_device)
    given.copy_(small)
    assert torch.equal(gated(given), gated(small))


def test_more_blocks_than_a_grid_has_are_refused(kernel_device):
    wide = torch.zeros(1, device=kernel_device).expand(1, 2 * 65_536 * 1024)
    with pytest.raises(KernelInputError, match="67,108,864 channels, expected at most 67,107,840 on a GPU"):
        swiglu_triton(wide)
