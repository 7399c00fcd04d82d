"""The public operator slide_embed: what it refuses, how it traces, several slides and precisions on the CPU."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="the export extra is not installed")

from wsi_rt.kernels.errors import KernelInputError  # noqa: E402
from wsi_rt.kernels.slide_embed import slide_embed  # noqa: E402
from wsi_rt.kernels.slide_embed.library import slide_embed_op  # noqa: E402

PROJECTED = torch.randn(9, 8, generator=torch.Generator().manual_seed(0))
POSITIONS = torch.arange(18).reshape(9, 2)
BIAS, CLS = torch.ones(8), torch.full((8,), 2.0)


def embedded(projected=PROJECTED, positions=POSITIONS, bias=BIAS, cls=CLS, **more):
    return slide_embed(projected, positions, bias, cls, **more)


def at(value: int, row: int = 4, axis: int = 1) -> torch.Tensor:
    moved = POSITIONS.clone()
    moved[row, axis] = value
    return moved


@pytest.mark.parametrize(
    ("message", "changed"),
    [
        (r"projected \[0, 8\] .* N >= 1", {"projected": PROJECTED[:0], "positions": POSITIONS[:0]}),
        (r"projected \[9, 8\] with positions \[8, 2\], expected \[N, C\] and \[N, 2\]", {"positions": POSITIONS[:8]}),
        (r"projected \[8\] with", {"projected": PROJECTED[0]}),
        (r"6 channels, .* expected a multiple of 4", {"projected": PROJECTED[:, :6], "bias": BIAS[:6], "cls": CLS[:6]}),
        (r"8 channels, bias \[7\], CLS \[8\]", {"bias": BIAS[:7]}),
        (r"CLS \[1, 8\]", {"cls": CLS[None]}),
        (r"projected is torch.float64, expected torch.float16", {"projected": PROJECTED.double()}),
        (r"projected has strides \(1, 9\)", {"projected": PROJECTED.T.contiguous().T}),
        (r"bias on meta, .* expected one device", {"bias": BIAS.to("meta")}),
        (r"positions on meta; expected one device", {"positions": POSITIONS.to("meta")}),
        (r"positions are torch.float32, expected torch.int32 or int64", {"positions": POSITIONS.float()}),
        (
            r"positions have strides \(1, 9\), expected \(col, row\) side by side",
            {"positions": POSITIONS.T.contiguous().T},
        ),
        (r"positions run from 0 to 1000, expected 0 to 999", {"positions": at(1000)}),
        (r"positions run from -1 to 17, expected 0 to 999", {"positions": at(-1, axis=0)}),
        (r"dtype is torch.int8, expected", {"dtype": torch.int8}),
        (r"cu_seqlens is \[0, 3, 3, 9\], expected to rise from 0 to 9", {"cu_seqlens": torch.tensor([0, 3, 3, 9])}),
        (r"cu_seqlens is torch.int16", {"cu_seqlens": torch.tensor([0, 9], dtype=torch.int16)}),
    ],
)
def test_refuses(message, changed):
    with pytest.raises(KernelInputError, match=message):
        embedded(**changed)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_computes_in_fp32_and_returns_the_precision_asked_for(dtype):
    given = PROJECTED.to(dtype)
    as_fp32 = embedded(given, dtype=torch.float32)
    assert torch.equal(as_fp32, embedded(given.float()))
    assert torch.equal(embedded(given), as_fp32.to(dtype))


def test_several_slides_are_each_what_they_are_alone():
    ours = embedded(cu_seqlens=torch.tensor([0, 2, 9]))
    assert torch.equal(ours, torch.cat([embedded(PROJECTED[a:b], POSITIONS[a:b]) for a, b in ((0, 2), (2, 9))]))
    assert torch.equal(ours[[0, 3]], torch.stack([CLS, CLS]))


@pytest.mark.parametrize("cu", [None, torch.tensor([0, 3, 9])], ids=["slide", "slides"])
def test_is_a_well_formed_operator(cu):
    torch.library.opcheck(slide_embed_op, (PROJECTED, POSITIONS, BIAS, CLS, cu, torch.bfloat16))


def test_exports_with_any_number_of_tiles():
    class Embed(torch.nn.Module):
        def forward(self, x, positions):
            return slide_embed(x, positions, BIAS, CLS)

    n = torch.export.Dim("tiles", min=2)
    program = torch.export.export(Embed(), (PROJECTED, POSITIONS), dynamic_shapes=({0: n}, {0: n}))
    assert "wsi_rt.slide_embed" in str(program.graph)
    x, positions = torch.randn(30, 8), torch.randint(0, 1000, (30, 2))
    assert torch.equal(program.module()(x, positions), embedded(x, positions))
    with pytest.raises(KernelInputError, match="expected 0 to 999"):  # an exported program still checks values
        program.module()(x, positions + 1000)
