"""The kernels of shared_prefix_attention against one dense softmax per sequence in fp64.

Everything that may not be read is poisoned: slots beyond a length and pages of nobody hold NaN, table entries beyond a
length a page number that does not exist.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest

torch = pytest.importorskip("torch", reason="the export extra is not installed")
pytest.importorskip("triton", reason="triton is not installed")
from torch import Tensor  # noqa: E402

from wsi_rt.kernels.errors import KernelInputError  # noqa: E402
from wsi_rt.kernels.shared_prefix_attention import launch, shared_prefix_attention  # noqa: E402

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
NOWHERE = 2**30  # a page number that no cache has
pytestmark = pytest.mark.usefixtures("poisoned")


@dataclass(frozen=True)
class Step:
    """One decoding step: (sequences, prefix length) of every group, suffix length of every sequence."""

    groups: tuple[tuple[int, int], ...]
    suffixes: tuple[int, ...]
    heads: int = 2
    kv_heads: int = 2
    width: int = 64
    page: int = 16


STEPS = {
    "one": Step(((1, 37),), (5,)),
    "mha": Step(((3, 37),), (5, 1, 21)),
    "gqa": Step(((2, 70), (3, 9)), (3, 18, 40, 1, 16), heads=6),
    "mqa": Step(((3, 33),), (7, 2, 17), heads=5, kv_heads=1),
    "empty-suffix": Step(((3, 64),), (0, 9, 0)),
    "empty-prefix": Step(((2, 0), (1, 20)), (6, 33, 2)),
    "whole-pages": Step(((2, 64),), (64, 128), page=64),
    "page-64": Step(((3, 65), (1, 1)), (63, 1, 66, 0), page=64),
    "page-1": Step(((2, 19),), (3, 4), page=1),
    "empty-groups": Step(((0, 12), (1, 33), (0, 5), (4, 0), (2, 64), (0, 3)), (1, 9, 2, 30, 4, 5, 6)),
    "padded": Step(((2, 40), (3, 0)), (3, 8, 0, 0, 0)),
    "parts": Step(((3, 611),), (300, 129, 0), heads=1, kv_heads=1),
    "two-blocks": Step(((70, 17), (1, 18)), tuple(range(71)), heads=1, kv_heads=1),
    "three-suffix-blocks": Step(((2, 21),), (18, 3), heads=40, kv_heads=1),
    "many-groups": Step(tuple((1, n % 5) for n in range(70)), (1,) * 70, heads=1, kv_heads=1),
}
ALL_DTYPES = ("mha", "gqa", "parts", "padded")  # of the others fp16 is enough


@dataclass(frozen=True)
class Given:
    """The operator's arguments, and keys and values [tokens, Hkv, D] that each sequence must see."""

    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    prefix_table: Tensor
    prefix_lengths: Tensor
    group_starts: Tensor
    suffix_table: Tensor
    suffix_lengths: Tensor
    seen: tuple[tuple[Tensor, Tensor], ...]

    def run(self, scale: float | None = None) -> Tensor:
        """The public operator on a GPU; its kernels alone in the interpreter, where tensors lie on the CPU."""
        arguments = [getattr(self, name) for name in self.__dataclass_fields__ if name != "seen"]
        if self.q.is_cuda:
            return shared_prefix_attention(*arguments, scale=scale)
        return launch.shared_prefix_attention_triton(*arguments, self.q.shape[2] ** -0.5 if scale is None else scale)


class Cache:
    """Pages in no order, handed out once; k beside v in every page, as one allocation of both has them."""

    def __init__(self, step: Step, dtype: torch.dtype, generator: torch.Generator) -> None:
        lengths = [n for _, n in step.groups] + list(step.suffixes)
        pages = sum(-(-n // step.page) for n in lengths) + 3
        self.kv = torch.full((pages, 2, step.page, step.kv_heads, step.width), torch.nan, dtype=dtype)
        self.free = torch.randperm(pages, generator=generator).tolist()
        self.generator = generator

    def add(self, length: int) -> tuple[list[int], Tensor]:
        """Page numbers, and the keys and values [2, length, Hkv, D] that were written there."""
        page, kv_heads, width = self.kv.shape[2:]
        tokens = torch.randn(2, length, kv_heads, width, generator=self.generator).to(self.kv.dtype)
        numbers = [self.free.pop() for _ in range(-(-length // page))]
        for i, number in enumerate(numbers):
            part = tokens[:, i * page : (i + 1) * page]
            self.kv[number, :, : part.shape[1]] = part
        return numbers, tokens


def given(step: Step, dtype: torch.dtype, device: torch.device, spare: int = 2) -> Given:
    """spare: table entries beyond the longest."""
    generator = torch.Generator().manual_seed(len(step.suffixes))
    cache = Cache(step, dtype, generator)
    prefixes = [cache.add(n) for _, n in step.groups]
    suffixes = [cache.add(n) for n in step.suffixes]
    starts = torch.tensor([0, *(n for n, _ in step.groups)]).cumsum(0)
    group_of = [g for g, (n, _) in enumerate(step.groups) for _ in range(n)]
    seen = tuple(
        torch.cat([prefixes[g][1], own], dim=1).to(device).unbind(0)
        for g, (_, own) in zip(group_of, suffixes, strict=True)
    )

    def table(rows: list[list[int]]) -> Tensor:
        width = max(map(len, rows)) + spare
        return torch.tensor([[*row, *[NOWHERE] * (width - len(row))] for row in rows])

    wide = torch.randn(len(step.suffixes), step.heads + 1, step.width, generator=generator).to(device, dtype)
    integers = [
        table([numbers for numbers, _ in prefixes]),
        torch.tensor([n for _, n in step.groups]),
        starts,
        table([numbers for numbers, _ in suffixes]),
        torch.tensor(step.suffixes),
    ]
    k_cache, v_cache = cache.kv.to(device).unbind(1)
    return Given(wide[:, 1:], k_cache, v_cache, *(x.to(device, torch.int32) for x in integers), seen)


def dense(g: Given, exact: bool, scale: float | None = None) -> Tensor:
    """A softmax per sequence over all that it sees: in fp64 where `exact`, else in the dtype of q. [B, H, D]."""
    dtype = torch.float64 if exact else g.q.dtype
    out = torch.zeros(g.q.shape, dtype=dtype, device=g.q.device)
    scale = g.q.shape[2] ** -0.5 if scale is None else scale
    for b, (k, v) in enumerate(g.seen):
        if len(k):
            shared = g.q.shape[1] // k.shape[1]
            k, v = (x.to(dtype).repeat_interleave(shared, dim=1).transpose(0, 1) for x in (k, v))  # [H, tokens, D]
            scores = g.q[b].to(dtype)[:, None] @ k.mT * scale  # [H, 1, tokens]
            out[b] = (torch.softmax(scores, -1) @ v)[:, 0]
    return out


def cases():
    for name in STEPS:
        for dtype in DTYPES if name in ALL_DTYPES else ["fp16"]:
            yield pytest.param(STEPS[name], DTYPES[dtype], id=f"{name}-{dtype}")


@pytest.mark.parametrize(("step", "dtype"), list(cases()))
def test_equals_a_softmax_per_sequence(step, dtype, kernel_device, assert_as_exact):
    g = given(step, dtype, kernel_device)
    ours = g.run()
    assert ours.dtype == dtype
    assert_as_exact(ours, dense(g, exact=False), dense(g, exact=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_published_head_width(dtype, kernel_device, assert_as_exact):
    g = given(replace(STEPS["gqa"], width=128), DTYPES[dtype], kernel_device)
    assert_as_exact(g.run(), dense(g, exact=False), dense(g, exact=True))


@pytest.mark.parametrize("sequences", [16, 17, 33], ids="B{}".format)
def test_every_tile_of_rows(sequences, kernel_device, assert_as_exact):
    """16, 32 and 64 rows."""
    g = given(Step(((sequences, 70),), (3,) * sequences, heads=1, kv_heads=1), torch.float16, kernel_device)
    assert_as_exact(g.run(), dense(g, exact=False), dense(g, exact=True))


def test_keys_are_split_into_parts(kernel_device):
    """What `parts` above is about: 611 tokens in five parts, of which the last is partly filled; 300 in three."""
    g = given(STEPS["parts"], torch.float16, kernel_device)
    rooms = [16 * x.shape[1] for x in (g.prefix_table, g.suffix_table)]
    p = launch.plan(3, 1, 1, 1, *rooms, launch.multiprocessors(g.q), full=False)
    assert (p.prefix_parts, p.suffix_parts) == (6, 3)  # of 641 and 336 tokens that the tables hold


def test_rows_of_a_bucket_are_zero_whatever_they_hold(kernel_device):
    g = given(STEPS["padded"], torch.float16, kernel_device)
    before = g.run()
    g.q[2:] = torch.nan
    ours = g.run()
    assert not ours[2:].any()
    assert torch.equal(ours, before)
    assert ours[:2].abs().amin() > 0


def test_what_is_not_finite_stays_in_its_sequence(kernel_device):
    g = given(STEPS["gqa"], torch.float16, kernel_device)
    before = g.run()
    g.q[1, 2] = torch.nan
    ours = g.run()
    assert ours[1, 2].isnan().all()
    ours[1, 2] = before[1, 2]
    assert torch.equal(ours, before)


def test_lengths_are_read_on_the_device(kernel_device, assert_as_exact):
    """The same tensors, other lengths in them, as a graph that is replayed has them."""
    g = given(STEPS["gqa"], torch.float16, kernel_device)
    owns, shorter = STEPS["gqa"].suffixes, (1, 16, 38, 0, 14)
    for prefixes in ((69, 69, 7, 7, 7), (0,) * 5):
        g.suffix_lengths.copy_(torch.tensor(shorter))
        g.prefix_lengths.copy_(torch.tensor([prefixes[0], prefixes[-1]]))
        kept = tuple(
            tuple(torch.cat([x[:prefix], x[len(x) - own :][:n]]) for x in kv)
            for kv, prefix, own, n in zip(g.seen, prefixes, owns, shorter, strict=True)
        )
        now = replace(g, seen=kept)
        assert_as_exact(now.run(), dense(now, exact=False), dense(now, exact=True))


def test_group_starts_are_read_on_the_device(kernel_device, assert_as_exact):
    """Sequence 2 moves to the group before its own, whose prefix it then sees."""
    g = given(STEPS["gqa"], torch.float16, kernel_device)
    g.group_starts.copy_(torch.tensor([0, 3, 5]))
    moved = tuple(torch.cat([x[:70], y[9:]]) for x, y in zip(g.seen[0], g.seen[2], strict=True))
    now = replace(g, seen=(*g.seen[:2], moved, *g.seen[3:]))
    assert_as_exact(now.run(), dense(now, exact=False), dense(now, exact=True))


@pytest.mark.parametrize("scale", [0.0, 0.7, -0.3])
def test_scale(scale, kernel_device, assert_as_exact):
    g = given(STEPS["mha"], torch.float32, kernel_device)
    assert_as_exact(g.run(scale), dense(g, exact=False, scale=scale), dense(g, exact=True, scale=scale))


@pytest.mark.parametrize("level", [-60.0, 60.0], ids=["all-scores-low", "all-scores-high"])
def test_scores_far_from_zero(level, kernel_device, assert_as_exact):
    """exp() of them is 0 or infinite in fp32: only differences may be exponentiated, also between parts."""
    g = given(STEPS["parts"], torch.float32, kernel_device)
    for x in (g.k_cache, *(k for k, _ in g.seen)):
        x[..., 0] = level * 2
    g.q[..., 0] = 4.0
    assert_as_exact(g.run(), dense(g, exact=False), dense(g, exact=True))


@pytest.mark.parametrize("step", ["parts", "gqa"])
def test_the_same_call_gives_the_same_bits(step, kernel_device):
    g = given(STEPS[step], torch.float16, kernel_device)
    assert torch.equal(g.run(), g.run())


def test_a_cache_beyond_two_to_the_31(kernel_device):
    """1,100 pages 2^21 elements apart: 32-bit offsets would wrap from page 1,024 on."""
    g = given(Step(((1, 16),), (3,)), torch.float16, kernel_device, spare=0)
    storage = torch.zeros(1, dtype=torch.float16, device=kernel_device).untyped_storage()
    storage.resize_(1100 * 2**22)  # 4.6 GB, of which few pages
    far = torch.empty(0, dtype=torch.float16, device=kernel_device).set_(storage).as_strided(
        (1100, 2, 16, 2, 64), (2**21, 2048, 128, 64, 1)
    )  # fmt: skip
    moved = [int(g.prefix_table[0, 0]), int(g.suffix_table[0, 0])]
    for number, to in zip(moved, (1098, 1099), strict=True):
        far[to, 0], far[to, 1] = g.k_cache[number], g.v_cache[number]
    tables = [torch.tensor([[n]], dtype=torch.int32, device=kernel_device) for n in (1098, 1099)]
    there = replace(g, k_cache=far[:, 0], v_cache=far[:, 1], prefix_table=tables[0], suffix_table=tables[1])
    assert torch.equal(there.run(), g.run())


def test_refused_before_a_launch(kernel_device):
    g = given(replace(STEPS["mha"], width=32), torch.float16, kernel_device)
    with pytest.raises(KernelInputError, match="head width 32, expected 64 or 128 on a GPU"):
        g.run()
    g = given(STEPS["mha"], torch.float16, kernel_device)
    storage = torch.empty(g.k_cache.numel() + 1, dtype=torch.float16, device=kernel_device)
    odd = storage[1:].view(g.k_cache.shape)
    with pytest.raises(KernelInputError, match=r"v_cache begins at 0x[0-9a-f]*, expected a multiple of 16"):
        replace(g, k_cache=storage[:-1].view(odd.shape), v_cache=odd).run()
