"""The kernels of block_linear against the fp32 reference: rows of either kernel, odd sizes, strides, split sums."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="the export extra is not installed")
pytest.importorskip("triton", reason="triton is not installed")
from torch import Tensor  # noqa: E402

from wsi_rt.kernels.block_linear import block_linear, configs  # noqa: E402
from wsi_rt.kernels.block_linear.configs import VECTOR_ROWS  # noqa: E402
from wsi_rt.kernels.block_linear.launch import block_linear_triton  # noqa: E402
from wsi_rt.kernels.block_linear.reference import block_linear_reference, dequantised  # noqa: E402

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
ROWS = (1, 2, 3, 4, 5, 8, 17, 32, 33)
FORMATS = [(bits, block, own) for bits in (4, 8) for block in (32, 64, 128) for own in (True, False)]
INT4 = (4, 32, True)  # as bundles hold it
pytestmark = pytest.mark.usefixtures("poisoned")


def product(x: Tensor, *weight) -> Tensor:
    """The public operator on a GPU; its kernels alone in the interpreter, where tensors lie on the CPU."""
    return block_linear(x, *weight) if x.is_cuda else block_linear_triton(x, *weight)


def weight(outputs: int, inputs: int, bits: int, block: int, own_zeros: bool, device, scales=torch.float32) -> list:
    """codes, scales, zeros, bits; columns beyond `inputs` hold codes like any."""
    generator = torch.Generator().manual_seed(inputs + bits + block)
    blocks = -(-inputs // block)
    codes = torch.randint(0, 256, (outputs, blocks, block * bits // 8), dtype=torch.uint8, generator=generator)
    scale = (torch.rand(outputs, blocks, generator=generator) + 0.5) / (1 << bits)
    zeros = torch.randint(0, 1 << bits, (outputs, blocks), dtype=torch.uint8, generator=generator)
    return [codes.to(device), scale.to(device, scales), zeros.to(device) if own_zeros else None, bits]


def rows_of(batch: int, inputs: int, dtype: torch.dtype, device, around: int = 3) -> Tensor:
    """[batch, inputs], rows of a wider matrix that is NaN elsewhere."""
    generator = torch.Generator().manual_seed(batch)
    wide = torch.full((batch, inputs + around), torch.nan)
    wide[:, :inputs] = torch.randn(batch, inputs, generator=generator)
    return wide.to(device, dtype)[:, :inputs]


def eager(x: Tensor, codes, scales, zeros, bits) -> Tensor:
    """Plain torch at the precision of x: weights rounded to it."""
    return x @ dequantised(codes, scales, zeros, bits)[:, : x.shape[1]].T.to(x.dtype)


def exact(x: Tensor, codes, scales, zeros, bits) -> Tensor:
    return x.double() @ dequantised(codes, scales, zeros, bits)[:, : x.shape[1]].double().T


def cases():
    """All formats with all rows and dtypes; the default run has int4 as bundles hold it with all of them, and all
    formats in fp16 for 3 rows and 17."""
    for dtype in DTYPES:
        for batch in ROWS:
            for form in FORMATS:
                quick = form == INT4 or (dtype == "fp16" and batch in (3, 17))
                name = f"{dtype}-M{batch}-int{form[0]}x{form[1]}{'-zeros' if form[2] else ''}"
                yield pytest.param(dtype, batch, *form, id=name, marks=[] if quick else [pytest.mark.slow])


@pytest.mark.parametrize(("dtype", "batch", "bits", "block", "own_zeros"), list(cases()))
def test_equals_plain_torch(kernel_device, assert_as_exact, dtype, batch, bits, block, own_zeros):
    """N a multiple of no tile, K of no block and no 16 bytes; rows of x 3 elements apart."""
    x = rows_of(batch, 203, DTYPES[dtype], kernel_device)
    given = weight(13 if batch <= VECTOR_ROWS[-1] else 67, 203, bits, block, own_zeros, kernel_device)
    ours = product(x, *given)
    assert ours.dtype == x.dtype
    assert_as_exact(ours, eager(x, *given), exact(x, *given))


@pytest.mark.parametrize("batch", [1, 4, 8], ids="M{}".format)
@pytest.mark.parametrize("bits", [4, 8])
def test_several_steps_of_columns(kernel_device, assert_as_exact, bits, batch):
    """4,200 columns are two steps of the vector kernel in 4 bits and three in 8; K is split by the matrix kernel."""
    x = rows_of(batch, 4200, torch.float16, kernel_device, around=0)
    given = weight(5, 4200, bits, 32, True, kernel_device)
    assert_as_exact(product(x, *given), eager(x, *given), exact(x, *given))


@pytest.mark.parametrize("batch", [2, 40], ids="M{}".format)
def test_scales_in_fp16(kernel_device, assert_as_exact, batch):
    x = rows_of(batch, 96, torch.bfloat16, kernel_device)
    given = weight(33, 96, 4, 32, True, kernel_device, scales=torch.float16)
    assert_as_exact(product(x, *given), eager(x, *given), exact(x, *given))


@pytest.mark.parametrize("batch", [3, 6], ids="M{}".format)
@pytest.mark.parametrize("size", [(1, 1), (1, 40), (9, 1), (300, 31)], ids="N{0[0]}-K{0[1]}".format)
def test_small_sizes(kernel_device, assert_as_exact, size, batch):
    x = rows_of(batch, size[1], torch.float32, kernel_device)
    given = weight(*size, 4, 32, True, kernel_device)
    assert_as_exact(product(x, *given), eager(x, *given), exact(x, *given))


def test_split_sums_have_the_bits_of_their_order(kernel_device, monkeypatch):
    """Splits write fp32 parts that are added in order: the same as the whole, up to the order of sums."""
    x = rows_of(7, 1024, torch.float32, kernel_device)
    given = weight(20, 1024, 8, 32, False, kernel_device)
    seen = []
    for programs in (1, 8):
        monkeypatch.setattr(configs, "PROGRAMS", dict.fromkeys(configs.PROGRAMS, programs))
        seen.append([product(x, *given) for _ in range(2)])
        assert torch.equal(*seen[-1])
    reference = block_linear_reference(x, *given)
    assert not torch.equal(seen[0][0], seen[1][0])  # 32 steps at once, and 8 times 4
    assert all((ours[0] - reference).abs().max() <= 1e-5 * reference.abs().max() for ours in seen)


@pytest.mark.parametrize("batch", [4, 12], ids="M{}".format)
def test_a_row_does_not_depend_on_the_others(kernel_device, batch):
    """Not on their values: a row among NaN is what it is among numbers."""
    x = rows_of(batch, 64, torch.float16, kernel_device)
    given = weight(10, 64, 4, 32, True, kernel_device)
    among = torch.full_like(x, torch.nan)
    among[1] = x[1]
    assert torch.equal(product(among, *given)[1], product(x, *given)[1])


def test_rows_beyond_two_to_the_31(kernel_device, tmp_path):
    """Three rows of x 2^30 elements apart: 32-bit offsets would wrap from the third on."""
    size = 2**31 + 64
    if kernel_device.type == "cuda":
        base = torch.empty(size, dtype=torch.float16, device=kernel_device)
    else:
        base = torch.from_file(str(tmp_path / "sparse"), shared=True, size=size, dtype=torch.float16)
    near = rows_of(3, 64, torch.float16, kernel_device)
    far = base.as_strided((3, 64), (2**30, 1))
    far.copy_(near)
    given = weight(6, 64, 4, 32, True, kernel_device)
    assert torch.equal(product(far, *given), product(near, *given))
