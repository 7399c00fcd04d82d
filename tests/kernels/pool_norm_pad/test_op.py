"""The public operator pool_norm_pad: what it refuses, how it traces, several slides and precisions on the CPU."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="the export extra is not installed")

from wsi_rt.kernels.errors import KernelInputError  # noqa: E402
from wsi_rt.kernels.pool_norm_pad import pool_norm_pad  # noqa: E402
from wsi_rt.kernels.pool_norm_pad.library import pool_norm_pad_op  # noqa: E402

TOKENS, NORM = torch.randn(9, 8, generator=torch.Generator().manual_seed(0)), torch.ones(8)
META = torch.ones(8, device="meta")


def pooled(tokens=TOKENS, weight=NORM, bias=NORM, eps=1e-6, bins=4, padded=12, **more):
    return pool_norm_pad(tokens, weight, bias, eps, bins, padded, **more)


@pytest.mark.parametrize(
    ("message", "changed"),
    [
        (r"tokens are \[0, 8\], expected \[N >= 1, C\]", {"tokens": TOKENS[:0]}),
        (r"tokens are \[8\], expected \[N >= 1, C\]", {"tokens": TOKENS[0]}),
        (r"tokens are \[1, 8\], expected \[N >= 2, C\]", {"tokens": TOKENS[:1], "leading": 1}),
        (r"tokens is torch.float64, expected torch.float16", {"tokens": TOKENS.double()}),
        (r"weight is torch.int64, expected torch.float16", {"weight": NORM.long()}),
        (r"tokens has strides \(1, 9\), expected a contiguous last axis", {"tokens": TOKENS.T.contiguous().T}),
        (r"tokens on cpu, weight on meta, bias on meta; expected one device", {"weight": META, "bias": META}),
        (r"norm weight \[7\] and bias \[8\], expected both \[8\] or \[12\]", {"weight": NORM[:7]}),
        (r"norm weight \[9\] and bias \[9\], expected", {"weight": torch.ones(9), "bias": torch.ones(9)}),
        (r"padded width 7 is below the 8 channels", {"padded": 7}),
        (r"pooled 0, eps 1e-06: expected", {"bins": 0}),
        (r"eps -1.0: expected", {"eps": -1.0}),
        (r"eps holds inf, expected finite numbers", {"eps": float("inf")}),
        (r"eps holds '1e-6', expected finite numbers", {"eps": "1e-6"}),
        (r"dtype is torch.float64, expected", {"dtype": torch.float64}),
        (r"cu_seqlens is torch.float32 \[2\], expected int32 or int64", {"cu_seqlens": torch.tensor([0.0, 9.0])}),
        (
            r"cu_seqlens is torch.int64 \[1\], expected int32 or int64 \[slides \+ 1\]",
            {"cu_seqlens": torch.tensor([0])},
        ),
        (r"cu_seqlens has stride 2, expected 1", {"cu_seqlens": torch.tensor([0, 1, 9, 2])[::2]}),
        (r"cu_seqlens is \[0, 8\], expected to rise from 0 to 9", {"cu_seqlens": torch.tensor([0, 8])}),
        (r"cu_seqlens is \[0, 3, 3, 9\], expected", {"cu_seqlens": torch.tensor([0, 3, 3, 9])}),
        (r"cu_seqlens is \[0, 1, 9\], .* at least 2 a slide", {"cu_seqlens": torch.tensor([0, 1, 9]), "leading": 1}),
    ],
)
def test_refuses(message, changed):
    with pytest.raises(KernelInputError, match=message):
        pooled(**changed)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_computes_in_fp32_and_returns_the_precision_asked_for(dtype):
    given = TOKENS.to(dtype)
    assert pooled(given).dtype == dtype
    as_fp32 = pooled(given, dtype=torch.float32)
    assert torch.equal(as_fp32, pooled(given.float()))
    assert torch.equal(pooled(given), as_fp32.to(dtype))


def test_several_slides_are_each_what_they_are_alone():
    cu = torch.tensor([0, 2, 9], dtype=torch.int32)
    ours = pooled(cu_seqlens=cu, leading=1)
    assert torch.equal(ours, torch.stack([pooled(TOKENS[1:2]), pooled(TOKENS[3:])]))


@pytest.mark.parametrize("cu", [None, torch.tensor([0, 3, 9])], ids=["slide", "slides"])
@pytest.mark.parametrize("padded", [8, 12])
def test_is_a_well_formed_operator(cu, padded):
    torch.library.opcheck(pool_norm_pad_op, (TOKENS, NORM, NORM, cu, 1e-6, 4, padded, 1, torch.float16))


def test_exports_with_any_number_of_tokens():
    class Head(torch.nn.Module):
        def forward(self, x):
            return pool_norm_pad(x[1:], NORM, NORM, 1e-6, 4, 12)

    program = torch.export.export(Head(), (TOKENS,), dynamic_shapes=({0: torch.export.Dim("tokens", min=3)},))
    assert "wsi_rt.pool_norm_pad" in str(program.graph)
    other = torch.randn(30, 8)
    assert torch.equal(program.module()(other), pooled(other[1:]))
