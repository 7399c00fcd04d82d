"""What TensorRT launches, launched as it does it: the plugin's grid, its arguments in the order of the entry.

`test_plugins.py` runs this file in Triton's interpreter, in a process of its own; in the ordinary one it needs a GPU.
"""

from __future__ import annotations

import os

import pytest

torch = pytest.importorskip("torch", reason="the export extra is not installed")
pytest.importorskip("triton", reason="triton is not installed")

from wsi_rt.export.plugins.dilated_attention import DilatedAttention  # noqa: E402
from wsi_rt.export.plugins.pool_norm_pad import PoolNormPad  # noqa: E402
from wsi_rt.kernels.checks import shipped_sm  # noqa: E402
from wsi_rt.kernels.dilated_attention.launch import dilated_attention_triton  # noqa: E402
from wsi_rt.kernels.dilated_attention.programs import branch_table, program_table  # noqa: E402
from wsi_rt.kernels.pool_norm_pad.reference import pool_norm_pad_reference  # noqa: E402

TORCH = {"fp16": torch.float16, "fp32": torch.float32}
BRANCHES = {"powers": ([32, 64, 100], [1, 2, 4]), "unaligned": ([23, 50], [4, 3])}
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture(params=["interpreter"] if INTERPRETED else [pytest.param("gpu", marks=pytest.mark.gpu)])
def device(request):
    if request.param == "gpu" and not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU; test_plugins.py runs this file in Triton's interpreter")
    return torch.device("cuda" if request.param == "gpu" else "cpu")


def launch(plugin, dtype, *inputs):
    """Input pointers, scalars, output pointer: matched to the parameters by position alone."""
    case, shapes = plugin.case(dtype), [tuple(x.shape) for x in inputs]
    out = torch.full(plugin.output_shape(*shapes), float("nan"), dtype=TORCH[dtype], device=inputs[0].device)
    values = iter([*inputs, *plugin.scalars(*shapes), out])
    arguments = [case.constexprs[n] if t == "constexpr" else next(values) for n, t in case.signature.items()]
    case.kernel[plugin.grid(*shapes)](*arguments, num_warps=case.num_warps, num_stages=case.num_stages)
    assert next(values, None) is None
    return out


@pytest.mark.parametrize("branches", BRANCHES.values(), ids=BRANCHES)
@pytest.mark.parametrize(("length", "dtype"), [(1, "fp32"), (17, "fp16"), (40, "fp32"), (70, "fp16")], ids=str)
def test_attention_has_the_bits_of_the_operator(length, dtype, branches, device):
    heads, width = 3, 16
    generator = torch.Generator().manual_seed(length)
    qkv = torch.randn(length, 3, heads, width, generator=generator).to(device, TORCH[dtype])
    expected = dilated_attention_triton(*qkv.unbind(1), *branches)
    plugin = DilatedAttention.of(shipped_sm(qkv), dtype, heads, width, *branches)
    programs = torch.from_numpy(program_table((length,), *branches, heads, plugin.block_m)).to(device)
    out = launch(plugin, dtype, qkv, programs, torch.from_numpy(branch_table(*branches)).to(device))
    assert torch.equal(out, expected)


@pytest.mark.parametrize("order", ["norm-pad", "pad-norm"])
@pytest.mark.parametrize(("length", "dtype"), [(2, "fp32"), (40, "fp32"), (41, "fp16")], ids=str)
def test_pooling_is_the_reference(length, dtype, order, device):
    channels, padded, pooled = 24, 32, 7
    norm = channels if order == "norm-pad" else padded
    generator = torch.Generator().manual_seed(length)
    tokens, weight, bias = (
        torch.randn(shape, generator=generator).to(device, TORCH[dtype]) for shape in ((length, channels), norm, norm)
    )
    plugin = PoolNormPad(shipped_sm(tokens), channels, norm, padded, pooled, 1, 1e-6)
    out = launch(plugin, dtype, tokens, weight, bias)
    exact = pool_norm_pad_reference(tokens[1:], weight, bias, 1e-6, pooled, padded)
    assert (out.float() - exact).abs().max() <= (2e-5 if dtype == "fp32" else exact.abs().max() * 2**-10)
