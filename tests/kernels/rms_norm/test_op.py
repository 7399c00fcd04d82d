"""The public operators rms_norm and add_rms_norm: what they refuse, how they trace, precisions on the CPU."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="the export extra is not installed")

from wsi_rt.kernels.errors import KernelInputError  # noqa: E402
from wsi_rt.kernels.rms_norm import add_rms_norm, rms_norm  # noqa: E402
from wsi_rt.kernels.rms_norm.cost import CHANNELS, cost  # noqa: E402
from wsi_rt.kernels.rms_norm.library import add_rms_norm_op, rms_norm_op  # noqa: E402

X, RESIDUAL = torch.randn(2, 9, 8, generator=torch.Generator().manual_seed(0))
WEIGHT, EPS = torch.linspace(-1, 2, 8), 1e-5
DTYPES = [torch.float16, torch.bfloat16, torch.float32]


def test_is_the_published_norm():
    expected = X / (X.square().sum(1, keepdim=True) / 8 + EPS).sqrt() * WEIGHT
    assert (rms_norm(X, WEIGHT, EPS) - expected).abs().max() <= 1e-6
    assert (rms_norm(X, WEIGHT, EPS) - torch.nn.functional.rms_norm(X, (8,), WEIGHT, EPS)).abs().max() <= 1e-6


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_computes_in_fp32_and_rounds_once(dtype):
    x, weight = X.to(dtype), WEIGHT.to(dtype)
    ours = rms_norm(x, weight, EPS)
    assert ours.dtype == dtype
    assert torch.equal(ours, rms_norm(x.float(), weight.float(), EPS).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_normed_is_the_sum_as_it_is_stored(dtype):
    x, residual = X.to(dtype), RESIDUAL.to(dtype)
    normed, total = add_rms_norm(x, residual, WEIGHT, EPS)
    assert torch.equal(total, x + residual)
    assert torch.equal(normed, rms_norm(total, WEIGHT, EPS))
    normed, total = add_rms_norm(x, RESIDUAL, WEIGHT, EPS)
    assert (normed.dtype, total.dtype) == (dtype, torch.float32)
    assert torch.equal(total, x.float() + RESIDUAL)


@pytest.mark.parametrize(
    ("message", "changed"),
    [
        (r"x is \[8\], expected \[T >= 1, C >= 1\]", {"x": X[0]}),
        (r"x is \[0, 8\], expected", {"x": X[:0]}),
        (r"weight is \[7\], expected \[8\]", {"weight": WEIGHT[:7]}),
        (r"x is torch.float64, expected torch.float16", {"x": X.double()}),
        (r"weight is torch.int64", {"weight": WEIGHT.long()}),
        (r"x has strides \(1, 9\), expected a contiguous last axis", {"x": X.T.contiguous().T}),
        (r"weight on meta; expected one device", {"weight": WEIGHT.to("meta")}),
        (r"eps holds nan, expected finite numbers", {"eps": float("nan")}),
        (r"eps -1.0, expected eps >= 0", {"eps": -1.0}),
    ],
)
def test_refuses(message, changed):
    with pytest.raises(KernelInputError, match=f"^rms_norm: .*{message}"):
        rms_norm(**{"x": X, "weight": WEIGHT, "eps": EPS, **changed})
    given = {"x": X, "residual": changed.get("x", RESIDUAL), "weight": WEIGHT, "eps": EPS, **changed}
    with pytest.raises(KernelInputError, match=f"^add_rms_norm: .*{message}"):
        add_rms_norm(**given)


def test_refuses_a_residual_of_another_shape():
    with pytest.raises(KernelInputError, match=r"add_rms_norm: residual is \[8, 8\], expected \[9, 8\]"):
        add_rms_norm(X, RESIDUAL[:8], WEIGHT, EPS)


def test_are_well_formed_operators():
    torch.library.opcheck(rms_norm_op, (X, WEIGHT, EPS))
    torch.library.opcheck(add_rms_norm_op, (X.half(), RESIDUAL, WEIGHT, EPS))


def test_exports_with_any_number_of_tokens():
    class Block(torch.nn.Module):
        def forward(self, x):
            return add_rms_norm(rms_norm(x, WEIGHT, EPS), x, WEIGHT, EPS)

    program = torch.export.export(Block(), (X,), dynamic_shapes=({0: torch.export.Dim("tokens", min=2)},))
    assert "wsi_rt.rms_norm" in str(program.graph)
    assert "wsi_rt.add_rms_norm" in str(program.graph)
    for ours, expected in zip(program.module()(X[:4]), Block()(X[:4]), strict=True):
        assert torch.equal(ours, expected)


def test_bytes_of_a_launch_are_those_of_its_tensors():
    x = torch.empty(20, CHANNELS, dtype=torch.float16, device="meta")
    assert cost(20, 2).bytes == 4 * x.nbytes + x[0].nbytes
