"""The fused kernel against the published numbers, the fp32 reference, and one dense softmax over all keys in fp64."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="the export extra is not installed")
pytest.importorskip("triton", reason="triton is not installed")

from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from wsi_rt.kernels.dilated_attention.configs import WIDTHS  # noqa: E402
from wsi_rt.kernels.dilated_attention.launch import device_tables, dilated_attention_triton, rows_aligned  # noqa: E402
from wsi_rt.kernels.dilated_attention.reference import dilated_attention_reference  # noqa: E402

ROOT = Path(__file__).resolve().parents[3]
COMMITTED = ROOT / "tests" / "golden" / "dilated_attention"
GOLDEN = json.loads((COMMITTED / "cases.json").read_text())
LARGE = 400  # tokens x heads above which the interpreter needs over 5 s: every one may be a program of its own

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
BRANCHES = {
    "powers": ([32, 64, 100], [1, 2, 4]),  # the last one is not a multiple of its ratio's group at most lengths
    "unaligned": ([23, 50], [4, 3]),  # segments no multiple of their ratio, no r = 1, queries 12 apart
    "one": ([40], [1]),
}
pytestmark = pytest.mark.usefixtures("poisoned")


def inputs(length, heads, width, dtype, device, seed=0):
    """q, k, v [L, H, D]: views of one projection [L, 3, H, D]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(length, 3, heads, width, generator=generator).to(device, dtype).unbind(1)


def dense(q, k, v, segment_lengths, ratios, exact=True):
    """Eager: one softmax over all pairs, each as often as branches keep it, and the padded keys. [L, H, D].

    In fp64 where `exact`, else with scores, weights and values in the dtype of q.
    """
    length, heads, width = q.shape
    q, k, v = (x.transpose(0, 1).to(torch.float64 if exact else q.dtype) for x in (q, k, v))  # [H, L, D]
    times = torch.zeros(heads, length, length, device=q.device, dtype=torch.float64)
    padded = torch.zeros(heads, length, device=q.device, dtype=torch.float64)
    position = torch.arange(length, device=q.device)
    for w, r in zip(segment_lengths, ratios, strict=True):
        w = min(w, length)
        group = torch.arange(heads, device=q.device) // -(-heads // r)
        kept = position % w % r == group[:, None]  # [H, L]
        pairs = kept[:, :, None] & kept[:, None, :] & (position[:, None] // w == position // w)
        times += pairs
        padded += kept * (-(-w // r) - pairs.sum(-1))
    scores = (q @ k.transpose(1, 2) * width**-0.5).double()
    top = scores.amax(-1, keepdim=True).clamp(min=0)
    weights = times * (scores - top).exp()
    total = weights.sum(-1, keepdim=True) + padded[..., None] * (-top).exp()
    return ((weights / total.clamp(min=1e-300)).to(v.dtype) @ v).transpose(0, 1)


def slow(condition):
    return [pytest.mark.slow] if condition else []


def lengths():
    for length in (1, 2, 17, 63, 100, 257):
        for dtype in DTYPES:
            heavy = slow(length == 257 and dtype != torch.float32)
            yield pytest.param(length, dtype, id=f"L{length}-{dtype}", marks=heavy)


def widths():
    for width in WIDTHS:
        for dtype in DTYPES:
            heavy = slow(dtype != torch.float16 and width not in (48, 128))
            yield pytest.param(width, dtype, id=f"D{width}-{dtype}", marks=heavy)


def golden(case):
    marks = slow(case["L"] * case["H"] > LARGE)
    return pytest.param(case, id=case["file"].removesuffix(".safetensors"), marks=marks)


@pytest.mark.parametrize("case", [golden(case) for case in GOLDEN])
def test_golden(case, kernel_device):
    load_file = pytest.importorskip("safetensors.torch").load_file
    t = load_file(COMMITTED / case["file"])
    q, k, v = (t[name].to(kernel_device) for name in "qkv")
    out = dilated_attention_triton(q, k, v, case["segment_length"], case["dilated_ratio"])
    assert (out.cpu() - t["out"]).abs().max() <= 1e-5


@pytest.mark.parametrize("branches", BRANCHES.values(), ids=BRANCHES)
@pytest.mark.parametrize("length", [1, 17, 63])
def test_the_oracle_is_the_reference(length, branches):
    q, k, v = inputs(length, 5, 16, torch.float32, "cpu")
    assert (dense(q, k, v, *branches) - dilated_attention_reference(q, k, v, *branches)).abs().max() <= 1e-5


@pytest.mark.parametrize(("length", "dtype"), list(lengths()))
def test_lengths(length, dtype, kernel_device, assert_as_exact):
    """Partly filled segments at the end of a slide; three heads that neither 2 nor 4 divides."""
    q, k, v = inputs(length, 3, 48, dtype, kernel_device)
    branches = BRANCHES["powers"] if length < 257 else ([128, 200, 257], [1, 2, 4])
    out = dilated_attention_triton(q, k, v, *branches)
    assert out.dtype == dtype
    assert_as_exact(out, dense(q, k, v, *branches, exact=False), dense(q, k, v, *branches))


@pytest.mark.parametrize(("width", "dtype"), list(widths()))
def test_head_widths(width, dtype, kernel_device, assert_as_exact):
    branches = [64, 80], [1, 2]
    q, k, v = inputs(150, 2, width, dtype, kernel_device)
    out = dilated_attention_triton(q, k, v, *branches)
    assert_as_exact(out, dense(q, k, v, *branches, exact=False), dense(q, k, v, *branches))


@pytest.mark.parametrize("heads", [1, 5])
def test_segments_that_are_no_multiple_of_their_ratio(heads, kernel_device):
    """Every segment has its own residues; no r = 1 branch, so some (token, head) pairs are kept by none: 0."""
    q, k, v = inputs(60, heads, 16, torch.float32, kernel_device)
    out = dilated_attention_triton(q, k, v, *BRANCHES["unaligned"])
    exact = dense(q, k, v, *BRANCHES["unaligned"])
    assert (out - exact).abs().max() <= 1e-5
    nobody = (exact == 0).all(-1)
    assert nobody.any()
    assert (out[nobody] == 0).all()


def test_more_ratio_groups_than_heads(kernel_device):
    """r = 16 over 3 heads: H' = 16, and 13 of the 16 groups hold padded heads only."""
    q, k, v = inputs(40, 3, 8, torch.float32, kernel_device)
    out = dilated_attention_triton(q, k, v, [40], [16])
    assert (out - dense(q, k, v, [40], [16])).abs().max() <= 1e-5


@pytest.mark.parametrize("level", [-60.0, 60.0], ids=["all-scores-low", "all-scores-high"])
def test_scores_far_from_zero(level, kernel_device):
    """Padded keys have score 0: they drown keys of score -60, and must not overflow beside keys of +60."""
    q, k, v = inputs(70, 2, 16, torch.float32, kernel_device)
    q, k = q.clone(), k.clone()
    q[..., 0], k[..., 0] = level, 4.0
    branches = [64, 128], [1, 2]  # the second segment of 64 is padded with 58 keys; 128 is cut to 70
    exact = dense(q, k, v, *branches)
    out = dilated_attention_triton(q, k, v, *branches)
    assert (out - exact).abs().max() <= 1e-5
    assert (exact[64:].abs().max() < 1e-5) == (level < 0)


def off_16_bytes(x):
    """Rows of 3 + D elements, of which the first 3 are not x's."""
    return torch.nn.functional.pad(x, (3, 0))[..., 3:]


def begins_off_16_bytes(x):
    """Contiguous, from the second element of a larger buffer on."""
    return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)


LAYOUTS = {
    "heads-first": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "every-other-token": lambda x: x.repeat_interleave(2, 0)[::2],
    "rows-off-16-bytes": off_16_bytes,
    "begins-off-16-bytes": begins_off_16_bytes,
    "one-token-for-all": lambda x: x[:1].expand_as(x),
}


@pytest.mark.parametrize("change", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, marks=pytest.mark.slow), torch.float16], ids=str)
def test_strides(change, dtype, kernel_device, assert_as_exact):
    """Any strides, those of q and v unlike those of k; 140 keys: whole blocks of every tile, aligned or not."""
    q, k, v = (x.contiguous() for x in inputs(140, 1, 48, dtype, kernel_device))
    changed = [change(q), k, change(v)]
    off = change in (off_16_bytes, begins_off_16_bytes)
    assert rows_aligned(*changed) != off
    branches = [140, 90], [1, 2]
    out = dilated_attention_triton(*changed, *branches)
    assert_as_exact(out, dense(*changed, *branches, exact=False), dense(*changed, *branches))


@pytest.mark.parametrize(("lengths", "dtype"), [((33, 50), torch.int32), ((50, 1, 40), torch.int64)], ids=str)
def test_slides_in_one_launch_have_the_bits_of_each_alone(lengths, dtype, kernel_device):
    slides = [inputs(n, 3, 48, torch.float16, kernel_device, seed=n) for n in lengths]
    q, k, v = (torch.cat(x) for x in zip(*slides, strict=True))
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(dtype)
    out = dilated_attention_triton(q, k, v, *BRANCHES["powers"], cu_seqlens=cu_seqlens)
    for mine, slide in zip(out.split(lengths), slides, strict=True):
        assert torch.equal(mine, dilated_attention_triton(*slide, *BRANCHES["powers"]))


def test_offsets_of_64_bits(kernel_device, tmp_path):
    """33 tokens 2^26 elements apart: the last lie past element 2^31. A sparse file; on a GPU, 4.5 GB."""
    shape, strides = (33, 2, 16), (2**26, 16, 1)
    size = 33 * 2**26
    if kernel_device.type == "cuda":
        base = torch.empty(size, dtype=torch.float16, device=kernel_device)
    else:
        base = torch.from_file(str(tmp_path / "sparse"), shared=True, size=size, dtype=torch.float16)
    near = [x.contiguous() for x in inputs(33, 2, 16, torch.float16, kernel_device)]
    far = [base.as_strided(shape, strides, 32 * i) for i in range(3)]
    for x, y in zip(far, near, strict=True):
        x.copy_(y)
    out = dilated_attention_triton(*far, [32, 33], [1, 2])
    assert torch.equal(out, dilated_attention_triton(*near, [32, 33], [1, 2]))


@pytest.mark.parametrize("width", [48, 128])
def test_tf32_is_as_exact_as_its_ten_bits(width, kernel_device, assert_as_exact):
    """fp16 has the same ten bits: eager in fp16 is the measure. (The interpreter multiplies in fp32 all the same.)"""
    q, k, v = inputs(70, 2, width, torch.float32, kernel_device)
    out = dilated_attention_triton(q, k, v, [64], [1], precision="tf32")
    assert_as_exact(out, dense(q.half(), k.half(), v.half(), [64], [1], exact=False), dense(q, k, v, [64], [1]))


class Allocations(TorchDispatchMode):
    """Bytes of every storage that an operator returns and none of its inputs held."""

    def __init__(self):
        super().__init__()
        self.bytes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        held = {x.untyped_storage().data_ptr() for x in args if isinstance(x, torch.Tensor)}
        storages = [x.untyped_storage() for x in (out if isinstance(out, (tuple, list)) else [out])]
        self.bytes += [x.nbytes() for x in storages if x.nbytes() and x.data_ptr() not in held]
        return out


def test_nothing_is_allocated_but_the_output_and_the_tables(kernel_device):
    """No output, log-sum-exp or copy per branch: none of the 5 branches leaves a trace in memory."""
    branches = (64, 128, 128, 128, 128), (1, 2, 4, 4, 4)
    q, k, v = inputs(130, 2, 48, torch.float16, kernel_device)
    device_tables.cache_clear()
    seen = []
    for _ in range(2):
        with Allocations() as allocations:
            out = dilated_attention_triton(q, k, v, *branches)
        seen.append(sorted(allocations.bytes))
    tables = [x.nbytes for x in device_tables((130,), *branches, 2, 64, q.device)]
    assert device_tables.cache_info().misses == 1
    assert sum(tables) < 130 * 2 * 5 * 4 / 10  # a tenth of one fp32 number per token, head and branch
    assert seen[1] == [out.nbytes]
    assert seen[0] == sorted([out.nbytes, *(tables if q.is_cuda else [])])  # on the CPU they are numpy's memory
