"""The fp32 references against the golden vectors of the published code (SPEC 10)."""

import json
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="the export extra is not installed")
load_file = pytest.importorskip("safetensors.torch").load_file

from wsi_rt.kernels.dilated_attention import dilated_attention  # noqa: E402
from wsi_rt.kernels.errors import KernelInputError  # noqa: E402
from wsi_rt.kernels.pool_norm_pad import pool_norm_pad  # noqa: E402
from wsi_rt.kernels.slide_embed import slide_embed  # noqa: E402

GOLDEN = Path(__file__).parents[1] / "golden" / "dilated_attention"
CASES = json.loads((GOLDEN / "cases.json").read_text())


@pytest.mark.parametrize("case", CASES, ids=lambda c: c["file"].removesuffix(".safetensors"))
def test_dilated_attention_equals_published(case):
    t = load_file(GOLDEN / case["file"])
    out = dilated_attention(t["q"], t["k"], t["v"], case["segment_length"], case["dilated_ratio"])
    assert out.shape == t["out"].shape
    assert (out - t["out"]).abs().max() <= 1e-5


def test_position_no_branch_keeps_is_zero():
    q, k, v = torch.randn(3, 9, 4, 8).unbind(0)
    out = dilated_attention(q, k, v, [9], [2])
    heads_of_group_0, heads_of_group_1 = out[:, :2], out[:, 2:]
    assert heads_of_group_0[1::2].abs().max() == 0
    assert heads_of_group_1[0::2].abs().max() == 0
    assert heads_of_group_0[0::2].abs().min() > 0


def test_position_rows_equal_the_published_table():
    """Rows of the 1000 x 1000 sin-cos table, built here the way the published code does (by mesh)."""
    width, grid = 16, 1000
    half = width // 2
    omega = 1.0 / 10000 ** (torch.arange(half // 2, dtype=torch.float64) / (half / 2))

    def axis(values):
        out = values.double().reshape(-1)[:, None] * omega
        return torch.cat([out.sin(), out.cos()], dim=1)

    h, w = torch.meshgrid(torch.arange(grid), torch.arange(grid), indexing="ij")  # row-major index i: i % 1000 is w
    table = torch.cat([torch.zeros(1, width), torch.cat([axis(w), axis(h)], dim=1).float()])
    positions = torch.tensor([[0, 0], [3, 7], [999, 0], [0, 999], [512, 998]])
    out = slide_embed(torch.zeros(5, width), positions, torch.zeros(width), torch.zeros(width))
    assert torch.equal(out[0], table[0])
    assert torch.equal(out[1:], table[positions[:, 0] * 1000 + positions[:, 1] + 1])


@pytest.mark.parametrize("n", [1, 5, 575, 576, 577, 1500])
@pytest.mark.parametrize("norm_width", [8, 12])
def test_pool_norm_pad_orders(n, norm_width):
    tokens, weight, bias = torch.randn(n, 8), torch.randn(norm_width), torch.randn(norm_width)
    out = pool_norm_pad(tokens, weight, bias, 1e-6, 576, 12)
    starts = [i * n // 576 for i in range(576)]
    ends = [-(-(i + 1) * n // 576) for i in range(576)]
    pooled = torch.stack([tokens[a:b].mean(0) for a, b in zip(starts, ends, strict=True)])
    if norm_width == 12:
        pooled = torch.nn.functional.pad(pooled, (0, 4))
    expected = (pooled - pooled.mean(1, keepdim=True)) / (pooled.var(1, correction=0, keepdim=True) + 1e-6).sqrt()
    expected = expected * weight + bias
    assert (out[:, :norm_width] - expected).abs().max() < 1e-4
    if norm_width == 8:
        assert out[:, 8:].abs().max() == 0


def test_bad_inputs_are_named():
    x = torch.zeros(4, 2, 8)
    with pytest.raises(KernelInputError, match="1 segment lengths for 2 ratios"):
        dilated_attention(x, x, x, [4], [1, 2])
    with pytest.raises(KernelInputError, match="expected three equal shapes"):
        dilated_attention(x, x, x[:3], [4], [1])
    with pytest.raises(KernelInputError, match="positive"):
        dilated_attention(x, x, x, [0], [1])
    with pytest.raises(KernelInputError, match="expected one device"):
        dilated_attention(x, x, x.to("meta"), [4], [1])
    with pytest.raises(KernelInputError, match=r"expected \[N, C\] and \[N, 2\]"):
        slide_embed(torch.zeros(1, 8), torch.tensor([[10, 0, 0]]), torch.zeros(8), torch.zeros(8))
    with pytest.raises(KernelInputError, match="norm weight"):
        pool_norm_pad(torch.zeros(4, 8), torch.zeros(9), torch.zeros(9), 1e-6, 576, 12)
