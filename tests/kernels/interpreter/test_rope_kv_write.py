"""The kernel of rope_kv_write against plain torch: what it writes, and what it leaves alone."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import pytest

torch = pytest.importorskip("torch", reason="the export extra is not installed")
pytest.importorskip("triton", reason="triton is not installed")
from torch import Tensor  # noqa: E402

from wsi_rt.kernels.errors import KernelInputError  # noqa: E402
from wsi_rt.kernels.rope_kv_write import rope_kv_write  # noqa: E402
from wsi_rt.kernels.rope_kv_write.triton import rope_kv_write_triton  # noqa: E402

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
HEADS = {"mha": (4, 4), "gqa": (9, 3), "mqa": (5, 1), "blocks": (32, 20)}
CONTEXT, PAGES = 50, 6


@dataclass(frozen=True)
class Given:
    """The operator's arguments; `slots` of distinct tokens, -1 for every third."""

    q: Tensor
    k: Tensor
    v: Tensor
    cos: Tensor
    sin: Tensor
    positions: Tensor
    slots: Tensor
    k_cache: Tensor
    v_cache: Tensor

    def run(self) -> Tensor:
        """The public operator on a GPU; its kernel alone in the interpreter, where tensors lie on the CPU."""
        return (rope_kv_write if self.q.is_cuda else rope_kv_write_triton)(*self.arguments)

    @property
    def arguments(self) -> list[Tensor]:
        return [getattr(self, field.name) for field in fields(self)]

    def written(self) -> tuple[Tensor, Tensor]:
        """The slots of the caches: [pages * page, Hkv, D] each."""
        return self.k_cache.flatten(0, 1), self.v_cache.flatten(0, 1)


def given(tokens: int, heads: int, kv_heads: int, width: int, page: int, dtype: torch.dtype, device) -> Given:
    """q, k, v: views of one projection [T, (H + 2 Hkv) * D]; caches of NaN, k beside v in every page."""
    generator = torch.Generator().manual_seed(tokens * 100 + heads)
    fused = torch.randn(tokens, heads + 2 * kv_heads, width, generator=generator).to(device, dtype)
    q, k, v = fused.split([heads, kv_heads, kv_heads], dim=1)
    angles = torch.rand(CONTEXT, width // 2, generator=generator) * 7
    positions = torch.randint(0, CONTEXT, (tokens,), generator=generator)
    positions[0], positions[-1] = 0, CONTEXT - 1
    slots = torch.randperm(PAGES * page, generator=generator)[:tokens]
    slots[2::3] = -1
    cache = torch.full((PAGES, 2, page, kv_heads, width), torch.nan, dtype=dtype, device=device)
    moved = [x.to(device) for x in (angles.cos(), angles.sin(), positions, slots)]
    return Given(q, k, v, *moved, cache[:, 0], cache[:, 1])


def eager(x: Tensor, g: Given) -> Tensor:
    """Rotate-half at the precision of x: as a matrix [[cos, -sin], [sin, cos]] of every pair (d, d + D / 2)."""
    cos, sin = (t.to(x.dtype)[g.positions][:, None] for t in (g.cos, g.sin))
    half = x.shape[-1] // 2
    return torch.cat([x[..., :half] * cos - x[..., half:] * sin, x[..., half:] * cos + x[..., :half] * sin], -1)


@pytest.mark.parametrize("page", [1, 16, 64], ids="page{}".format)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_plain_torch(kernel_device, poisoned, assert_as_exact, dtype, heads, page):
    g = given(5, *HEADS[heads], 64, page, DTYPES[dtype], kernel_device)
    ours = g.run()
    assert ours.dtype == DTYPES[dtype]
    assert_as_exact(ours, eager(g.q, g), eager(g.q.double(), g), floor=1e-6)
    kept = g.slots >= 0
    keys, values = g.written()
    assert_as_exact(keys[g.slots[kept]], eager(g.k, g)[kept], eager(g.k.double(), g)[kept], floor=1e-6)
    assert torch.equal(values[g.slots[kept]], g.v[kept])
    untouched = torch.ones(PAGES * page, dtype=torch.bool)
    untouched[g.slots[kept].cpu()] = False
    assert keys[untouched].isnan().all()
    assert values[untouched].isnan().all()


@pytest.mark.parametrize("width", [2, 32, 128], ids="D{}".format)
@pytest.mark.parametrize("tokens", [1, 2, 17, 63], ids="T{}".format)
def test_tokens_and_head_widths(kernel_device, poisoned, assert_as_exact, tokens, width):
    g = given(tokens, 3, 3, width, 16, torch.float16, kernel_device)
    assert_as_exact(g.run(), eager(g.q, g), eager(g.q.double(), g), floor=1e-6)


def test_position_0_is_the_identity_and_a_quarter_turn_swaps_the_halves(kernel_device):
    g = given(2, 2, 2, 8, 16, torch.float32, kernel_device)
    cos, sin = torch.zeros_like(g.cos), torch.ones_like(g.sin)
    cos[0], sin[0] = 1, 0
    turned = replace(g, cos=cos, sin=sin, positions=torch.tensor([0, 1], device=kernel_device)).run()
    assert torch.equal(turned[0], g.q[0])
    assert torch.equal(turned[1], torch.cat([-g.q[1, :, 4:], g.q[1, :, :4]], -1))


@pytest.mark.parametrize("value", [-1, CONTEXT], ids=["below", "beyond"])
def test_a_position_off_the_table_is_nan_and_writes_nothing(kernel_device, poisoned, value):
    """What the operator refuses where it may read values; on a GPU only the kernel sees them."""
    g = given(2, 3, 3, 8, 16, torch.float32, torch.device("cpu"))
    g.positions[1], g.slots[1] = value, 3
    moved = Given(*(x.to(kernel_device) for x in g.arguments))
    ours = moved.run() if kernel_device.type == "cpu" else rope_kv_write_triton(*moved.arguments)
    assert ours.isnan().flatten(1).all(1).tolist() == [False, True]
    assert not ours[0].isnan().any()
    for cache in moved.written():
        assert (~cache.isnan().all(-1).all(-1)).nonzero().flatten().tolist() == [g.slots[0].item()]


@pytest.mark.parametrize("slot", [-2, PAGES * 16], ids=["below", "beyond"])
def test_a_slot_off_the_cache_is_nan_and_writes_nothing(kernel_device, poisoned, slot):
    g = given(1, 3, 3, 8, 16, torch.float32, kernel_device)
    g.slots[0] = slot
    around = torch.full((PAGES + 2, 16, 3, 8), torch.nan, device=kernel_device)  # pages before and after the cache
    ours = rope_kv_write_triton(
        *(getattr(g, n) for n in g.__dataclass_fields__ if "cache" not in n), *[around[1:-1]] * 2
    )
    assert ours.isnan().all()
    assert around.isnan().all()


def test_a_cache_beyond_two_to_the_31(kernel_device):
    """1,100 pages 2^21 elements apart: 32-bit offsets would wrap from page 1,024 on."""
    storage = torch.empty(1100 * 2**21, dtype=torch.float16, device=kernel_device)  # 4.6 GB, of which few pages
    cache = storage.as_strided((1100, 16, 2, 8), (2**21, 16, 8, 1))
    g = given(1, 2, 2, 8, 16, torch.float16, kernel_device)
    far = replace(g, k_cache=cache, v_cache=cache, slots=torch.tensor([1099 * 16 + 5], device=kernel_device))
    far.run()
    assert torch.equal(cache[1099, 5], g.v[0])  # k and v share the cache here, and v is written last


def test_a_width_that_is_no_power_of_two_is_refused(kernel_device):
    g = given(1, 2, 2, 12, 16, torch.float16, kernel_device)
    with pytest.raises(KernelInputError, match="head width 12, expected a power of two on a GPU"):
        g.run()
