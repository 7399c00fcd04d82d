"""The public operator shared_prefix_attention: the reference by brute force, what is refused, how it traces."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="the export extra is not installed")
from torch.nn.functional import scaled_dot_product_attention  # noqa: E402

from wsi_rt.kernels.errors import KernelInputError  # noqa: E402
from wsi_rt.kernels.shared_prefix_attention import shared_prefix_attention  # noqa: E402
from wsi_rt.kernels.shared_prefix_attention.launch import check_launch  # noqa: E402
from wsi_rt.kernels.shared_prefix_attention.library import shared_prefix_attention_op  # noqa: E402

PAGE, PAGES = 4, 40
NAMES = (
    "q", "k_cache", "v_cache", "prefix_table", "prefix_lengths", "group_starts", "suffix_table", "suffix_lengths",
)  # fmt: skip
PREFIXES, STARTS, SUFFIXES = (11, 0, 8), (0, 2, 3, 6), (5, 0, 7, 1, 9, 0)  # groups of 2, 1 and 3 sequences


def integers(*values):
    return torch.tensor(values, dtype=torch.int32)


def given(heads=4, kv_heads=2, dtype=torch.float32, **changed):
    """The operator's arguments by name. Pages in no order; slots and pages that are nobody's hold NaN."""
    generator = torch.Generator().manual_seed(heads * 10 + kv_heads)
    q = torch.randn(6, heads, 8, generator=generator)
    caches = torch.full((2, PAGES, PAGE, kv_heads, 8), torch.nan)
    pages = torch.randperm(PAGES, generator=generator)[:27].int()
    tables = pages[:9].view(3, 3), pages[9:].view(6, 3)
    for table, lengths in zip(tables, (PREFIXES, SUFFIXES), strict=True):
        for row, length in zip(table.tolist(), lengths, strict=True):
            for token in range(length):
                tokens = torch.randn(2, kv_heads, 8, generator=generator)
                caches[:, row[token // PAGE], token % PAGE] = tokens
    k, v = caches.to(dtype).unbind(0)
    values = q.to(dtype), k, v, tables[0], integers(*PREFIXES), integers(*STARTS), tables[1], integers(*SUFFIXES)
    return {**dict(zip(NAMES, values, strict=True)), **changed}


def by_sequence(x, scale=None):
    """torch's own attention of one query over its sequence, token by token out of the cache."""
    out = []
    group_of = (0, 0, 1, 2, 2, 2)
    for b, group in enumerate(group_of):
        slots = [(x["prefix_table"][group][t // PAGE], t % PAGE) for t in range(PREFIXES[group])]
        slots += [(x["suffix_table"][b][t // PAGE], t % PAGE) for t in range(SUFFIXES[b])]
        k, v = (torch.stack([cache[page, at] for page, at in slots], 1) for cache in (x["k_cache"], x["v_cache"]))
        q = x["q"][b][:, None]  # [H, 1, D]
        out.append(scaled_dot_product_attention(q[None], k[None], v[None], scale=scale, enable_gqa=True)[0, :, 0])
    return torch.stack(out)


@pytest.mark.parametrize("scale", [None, 0.1, 1.7])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (5, 1)], ids=["mha", "gqa", "mqa"])
def test_is_torchs_attention_of_every_sequence(heads, kv_heads, scale):
    x = given(heads, kv_heads)
    ours = shared_prefix_attention(**x, scale=scale)
    assert ours.shape == x["q"].shape
    assert (ours - by_sequence(x, scale)).abs().max() <= 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_computes_in_fp32_and_rounds_once(dtype):
    x = given(dtype=dtype)
    full = {name: t.float() if t.is_floating_point() else t for name, t in x.items()}
    assert torch.equal(shared_prefix_attention(**x), shared_prefix_attention(**full).to(dtype))


def test_a_row_of_a_bucket_is_zero():
    """Sequence 3 on: an empty prefix, no token of their own, and pages that do not exist."""
    x = given(
        prefix_lengths=integers(11, 0, 0),
        suffix_lengths=integers(5, 0, 7, 0, 0, 0),
        suffix_table=torch.cat([given()["suffix_table"][:3], integers(-1, -1, -1).expand(3, 3)]),
    )
    ours = shared_prefix_attention(**x)
    assert not ours[3:].any()
    assert torch.equal(ours[:3], shared_prefix_attention(**given())[:3])


PLAIN = given()
CACHE = torch.zeros(PAGES, PAGE, 2, 8)
REFUSED = {
    "two axes": (r"q is \[4, 8\], expected \[B >= 1, H, D\]", {"q": PLAIN["q"][0]}),
    "no sequence": (r"q is \[0, 4, 8\], expected", {"q": PLAIN["q"][:0]}),
    "caches": (r"v_cache torch.float32 \[39, 4, 2, 8\], expected one dtype and", {"v_cache": CACHE[1:]}),
    "cache axes": (r"expected one dtype and two equal shapes \[pages", {"k_cache": CACHE[0], "v_cache": CACHE[0]}),
    "cache dtypes": (r"v_cache torch.float16 .* expected one dtype", {"v_cache": CACHE.half()}),
    "page of 3": (r"pages of 3 tokens, expected a power of two", {"k_cache": CACHE[:, :3], "v_cache": CACHE[:, :3]}),
    "cut pages": (r"k_cache has strides \(64, 16, 8, 1\)", dict.fromkeys(("k_cache", "v_cache"), CACHE[:, :, :1])),
    "unequal pages": (r"expected equal ones", {"k_cache": torch.zeros(PAGES, 2, PAGE, 2, 8)[:, 0]}),
    "heads": (r"3 heads of 8 with a cache of 2 heads of 8, expected a multiple", {"q": PLAIN["q"][:, :3]}),
    "width": (r"4 heads of 4 with a cache of 2 heads of 8, .* one width", {"q": PLAIN["q"][..., :4]}),
    "prefix table": (r"prefix_table \[3\], .* expected \[G >= 1", {"prefix_table": PLAIN["prefix_table"][:, 0]}),
    "no page": (r"suffix_table \[6, 0\], expected .* \[B, Q >= 1\]", {"suffix_table": PLAIN["suffix_table"][:, :0]}),
    "groups": (r"prefix_lengths is \[2\], expected \[3\]", {"prefix_lengths": integers(1, 2)}),
    "starts": (r"group_starts is \[3\], expected \[4\]", {"group_starts": integers(0, 3, 6)}),
    "sequences": (r"suffix_table is \[5, 3\], expected \[6, 3\]", {"suffix_table": PLAIN["suffix_table"][1:]}),
    "suffixes": (r"suffix_lengths is \[5\], expected \[6\]", {"suffix_lengths": integers(1, 2, 3, 4, 5)}),
    "int64": (r"suffix_lengths is torch.int64, expected torch.int32", {"suffix_lengths": torch.zeros(6).long()}),
    "strided": (r"prefix_table has strides \(1, 3\), expected", {"prefix_table": PLAIN["prefix_table"].T}),
    "two dtypes": (r"q is torch.float16, the cache torch.float32, expected one", {"q": PLAIN["q"].half()}),
    "fp64": (r"q is torch.float64, expected torch.float16", {"q": PLAIN["q"].double()}),
    "D apart": (r"q has strides .*, expected a contiguous last axis", {"q": PLAIN["q"].mT.contiguous().mT}),
    "devices": (r"group_starts on meta.*; expected one device", {"group_starts": PLAIN["group_starts"].to("meta")}),
    "scale": (r"scale holds inf, expected finite numbers", {"scale": float("inf")}),
    "starts from 1": (r"group_starts is \[1, 2, 3, 6\], expected to rise", {"group_starts": integers(1, 2, 3, 6)}),
    "starts to 5": (r"group_starts is \[0, 2, 3, 5\], .* 0 to 6", {"group_starts": integers(0, 2, 3, 5)}),
    "falling starts": (r"group_starts is \[0, 4, 3, 6\], expected", {"group_starts": integers(0, 4, 3, 6)}),
    "long prefix": (r"prefix_lengths run from 1 to 13, expected 0 to 12: 3", {"prefix_lengths": integers(1, 13, 2)}),
    "negative": (r"suffix_lengths run from -1 to 5, expected", {"suffix_lengths": integers(0, 1, -1, 2, 3, 5)}),
    "page 40": (r"suffix_table has pages 0 to 40 in use, expected 0 to 39", {
        "suffix_table": integers(40, 0, 0).expand(6, 3).contiguous()}),
    "page -1": (r"prefix_table has pages -1 to 1 in use", {
        "prefix_table": integers(1, -1, 1).expand(3, 3).contiguous()}),
}  # fmt: skip


@pytest.mark.parametrize(("message", "changed"), REFUSED.values(), ids=REFUSED)
def test_refuses(message, changed):
    with pytest.raises(KernelInputError, match=f"shared_prefix_attention: .*{message}"):
        shared_prefix_attention(**given(**changed))


def test_refused_before_a_launch():
    """What only the kernels ask for, beyond the operator."""
    q = torch.zeros(2, 4, 8)
    with pytest.raises(KernelInputError, match=r"head width 8, expected 64 or 128 on a GPU"):
        check_launch(q, CACHE, CACHE)
    q, many = torch.zeros(1, 1, 64), torch.zeros(1).expand(1, 1, 65_536, 64)
    with pytest.raises(KernelInputError, match=r"65,536 KV heads, expected at most 65,535 on a GPU"):
        check_launch(q, many, many)
    odd = torch.zeros(1 + 64)[1:].view(1, 1, 1, 64)
    with pytest.raises(KernelInputError, match=r"k_cache begins at 0x[0-9a-f]+, expected a multiple of 16"):
        check_launch(q, odd, odd)


@pytest.mark.parametrize("heads", [2, 4], ids=["mha", "gqa"])
def test_is_a_well_formed_operator(heads):
    torch.library.opcheck(shared_prefix_attention_op, (*given(heads, 2).values(), 0.3))


def test_exports_with_any_number_of_sequences():
    class Attend(torch.nn.Module):
        def forward(self, *x):
            return shared_prefix_attention(*x) * 2

    x = tuple(given().values())
    batch = torch.export.Dim("batch", min=2)
    shapes = ({0: batch}, *[None] * 5, {0: batch}, {0: batch})
    program = torch.export.export(Attend(), x, dynamic_shapes=(shapes,))
    assert "wsi_rt.shared_prefix_attention" in str(program.graph)
    fewer = (x[0][:3], *x[1:5], integers(0, 2, 3, 3), x[6][:3], x[7][:3])
    assert torch.equal(program.module()(*fewer), 2 * shared_prefix_attention(*fewer))
