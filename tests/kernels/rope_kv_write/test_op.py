"""The public operator rope_kv_write: against a complex rotation; what it refuses and leaves alone, how it traces."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="the export extra is not installed")

from wsi_rt.kernels.errors import KernelInputError  # noqa: E402
from wsi_rt.kernels.rope_kv_write import rope_kv_write  # noqa: E402
from wsi_rt.kernels.rope_kv_write.cost import HEAD_WIDTH, HEADS, KV_HEADS, cost  # noqa: E402
from wsi_rt.kernels.rope_kv_write.library import rope_kv_write_op  # noqa: E402

CONTEXT, PAGES, PAGE = 20, 5, 4
NAMES = ("q", "k", "v", "cos", "sin", "positions", "slots", "k_cache", "v_cache")
ANGLES = torch.arange(CONTEXT)[:, None] * 10000.0 ** (-torch.arange(4) / 4)  # [CONTEXT, D / 2]


def given(dtype=torch.float32, **changed):
    """The operator's arguments by name: 3 tokens of 4 heads, 2 KV heads of 8, the second one padding."""
    generator = torch.Generator().manual_seed(0)
    fused = torch.randn(3, 8, 8, generator=generator).to(dtype)
    q, k, v = fused.split([4, 2, 2], dim=1)
    caches = torch.full((2, PAGES, PAGE, 2, 8), torch.nan, dtype=dtype).unbind(0)
    integers = torch.tensor([7, 0, CONTEXT - 1]), torch.tensor([13, -1, 4])
    return {**dict(zip(NAMES, (q, k, v, ANGLES.cos(), ANGLES.sin(), *integers, *caches), strict=True)), **changed}


def turned(x, positions):
    """Pairs (d, d + D / 2) as complex numbers, turned by their angle: RoFormer's rotation in rotate-half layout."""
    a, b = x.double().chunk(2, -1)
    turned = torch.complex(a, b) * torch.polar(torch.ones(()).double(), ANGLES.double())[positions, None]
    return torch.cat([turned.real, turned.imag], -1)


def test_is_the_published_rotation_and_writes_the_slots():
    x = given()
    out = rope_kv_write(**x)
    assert (out - turned(x["q"], x["positions"])).abs().max() <= 1e-5
    for cache, expected in ((x["k_cache"], turned(x["k"], x["positions"])), (x["v_cache"], x["v"])):
        assert (cache[3, 1] - expected[0]).abs().max() <= 1e-5  # slot 13: page 3, offset 1
        assert (cache[1, 0] - expected[2]).abs().max() <= 1e-5
        assert cache.isnan().sum() == cache.numel() - 2 * 2 * 8


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_computes_in_fp32_and_rounds_once(dtype):
    x = given(dtype)
    full = {name: t.float() if t.is_floating_point() else t for name, t in x.items()}
    assert torch.equal(rope_kv_write(**x), rope_kv_write(**full).to(dtype))
    assert torch.equal(x["k_cache"].nan_to_num(9), full["k_cache"].to(dtype).nan_to_num(9))
    assert torch.equal(x["v_cache"].nan_to_num(9), full["v_cache"].to(dtype).nan_to_num(9))


def moved(index, value):
    return given()["positions"].index_fill(0, torch.tensor(index), value)


PLAIN = given()
REFUSED = {
    "two axes": (r"q \[4, 8\], k \[3, 2, 8\], expected \[T >= 1, H, D\]", {"q": PLAIN["q"][0]}),
    "no token": (r"q \[0, 4, 8\], .* expected", {"q": PLAIN["q"][:0]}),
    "odd width": (r"q \[3, 4, 7\].*D even", {"q": PLAIN["q"][..., :7]}),
    "tokens": (r"k is \[2, 2, 8\], expected \[3, 2, 8\]", {"k": PLAIN["k"][:2]}),
    "v": (r"v is \[3, 1, 8\], expected \[3, 2, 8\]", {"v": PLAIN["v"][:, :1]}),
    "angles": (r"cos is \[20, 8\], expected \[20, 4\]", {"cos": torch.ones(20, 8)}),
    "two tables": (r"sin is \[19, 4\], expected \[20, 4\]", {"sin": PLAIN["sin"][1:]}),
    "fp16 angles": (r"cos is torch.float16, .* expected contiguous torch.float32", {"cos": PLAIN["cos"].half()}),
    "strided angles": (r"sin is torch.float32, strides \(1, 20\)", {"sin": PLAIN["sin"].T.contiguous().T}),
    "positions": (r"positions is \[2\], expected \[3\]", {"positions": PLAIN["positions"][:2]}),
    "int32": (r"slots is torch.int32, expected torch.int64: call .to\(torch.int64\)", {"slots": PLAIN["slots"].int()}),
    "strided slots": (r"slots has strides \(2,\), expected contiguous", {"slots": torch.arange(6)[::2]}),
    "cache heads": (r"k_cache is \[5, 4, 1, 8\], expected \[5, 4, 2, 8\]", dict.fromkeys(
        ("k_cache", "v_cache"), torch.zeros(5, 4, 1, 8))),
    "two dtypes": (r"float16, torch.float32, .* expected one dtype", {"q": PLAIN["q"].half()}),
    "fp64": (r"q is torch.float64, expected torch.float16", {"q": PLAIN["q"].double()}),
    "D apart": (r"v has strides .*, expected a contiguous last axis", {"v": PLAIN["v"].mT.contiguous().mT}),
    "devices": (r"cos on meta.*; expected one device", {"cos": PLAIN["cos"].to("meta")}),
    "position": (r"positions run from 0 to 20, expected 0 to 19", {"positions": moved([2], 20)}),
    "negative position": (r"positions run from -1 to 19, expected 0 to 19", {"positions": moved([1], -1)}),
    "slot": (r"slots run from -1 to 20, expected -1 to 19", {"slots": torch.tensor([20, -1, 3])}),
    "negative slot": (r"slots run from -2 to 3, expected -1 to 19", {"slots": torch.tensor([1, -2, 3])}),
}  # fmt: skip


@pytest.mark.parametrize(("message", "changed"), REFUSED.values(), ids=REFUSED)
def test_refuses_and_writes_nothing(message, changed):
    x = given(**changed)
    before = x["k_cache"].clone()
    with pytest.raises(KernelInputError, match=f"rope_kv_write: .*{message}"):
        rope_kv_write(**x)
    assert torch.equal(x["k_cache"].nan_to_num(9), before.nan_to_num(9))


def test_is_a_well_formed_operator():
    x = given(k_cache=torch.zeros(PAGES, PAGE, 2, 8), v_cache=torch.zeros(PAGES, PAGE, 2, 8))
    torch.library.opcheck(rope_kv_write_op, tuple(x.values()))


def test_exports_with_any_number_of_tokens():
    class Write(torch.nn.Module):
        def forward(self, q, k, v, positions, slots, k_cache, v_cache):
            return rope_kv_write(q, k, v, ANGLES.cos(), ANGLES.sin(), positions, slots, k_cache, v_cache)

    x = given()
    names = ("q", "k", "v", "positions", "slots")
    tokens = torch.export.Dim("tokens", min=2)
    arguments = [x[n].contiguous() for n in names]
    shapes = {**{n: {0: tokens} for n in names}, "k_cache": None, "v_cache": None}
    program = torch.export.export(Write(), (*arguments, x["k_cache"], x["v_cache"]), dynamic_shapes=shapes)
    assert "wsi_rt.rope_kv_write" in str(program.graph)
    caches = [torch.zeros(PAGES, PAGE, 2, 8) for _ in range(4)]
    ours = program.module()(*(a[:2] for a in arguments), *caches[:2])
    assert torch.equal(ours, Write()(*(a[:2] for a in arguments), *caches[2:]))
    assert torch.equal(torch.stack(caches[:2]), torch.stack(caches[2:]))
    assert caches[0].any()


def test_bytes_of_a_launch_are_those_of_its_tensors():
    def nbytes(*shape, dtype=torch.float16):
        return torch.empty(shape, dtype=dtype, device="meta").nbytes

    moved = nbytes(20, HEADS, HEAD_WIDTH) + 2 * nbytes(20, KV_HEADS, HEAD_WIDTH)
    angles = 2 * nbytes(20, HEAD_WIDTH // 2, dtype=torch.float32)
    assert cost(20, 2).bytes == 2 * moved + angles + 2 * nbytes(20, dtype=torch.int64)
