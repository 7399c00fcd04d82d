"""The public operator on the CPU: what it refuses, what it gives, and that it traces."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest

torch = pytest.importorskip("torch", reason="the export extra is not installed")

from wsi_rt.kernels.dilated_attention import dilated_attention  # noqa: E402
from wsi_rt.kernels.dilated_attention.launch import (  # noqa: E402
    check_launch,
    device_tables,
    rows_aligned,
    slide_lengths,
)
from wsi_rt.kernels.dilated_attention.library import dilated_attention_op  # noqa: E402
from wsi_rt.kernels.errors import KernelInputError  # noqa: E402

BRANCHES = [16, 24], [1, 2]


def inputs(length=20, heads=3, width=16, dtype=torch.float32):
    generator = torch.Generator().manual_seed(length)
    return torch.randn(length, 3, heads, width, generator=generator).to(dtype).unbind(1)


def test_importing_the_operator_imports_neither_torch_nor_triton():
    code = "import sys, wsi_rt.kernels.dilated_attention; print(sorted({'torch', 'triton'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_cpu_needs_no_triton():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch; from wsi_rt.kernels.dilated_attention import dilated_attention\n"
        "print(dilated_attention(*torch.ones(3, 5, 2, 8), [4], [1]).sum().item())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    real = math.exp(math.sqrt(8))  # the fifth token's only real key, beside three zero-padded ones
    assert float(done.stdout) == pytest.approx(4 * 16 + 16 * real / (real + 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_output_has_the_dtype_of_the_input(dtype):
    q, k, v = inputs(dtype=dtype)
    out = dilated_attention(q, k, v, *BRANCHES)
    assert out.dtype == dtype
    assert torch.equal(out, dilated_attention(q.float(), k.float(), v.float(), *BRANCHES).to(dtype))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_slides_attend_within_themselves(dtype):
    slides = [inputs(n) for n in (20, 1, 33)]
    q, k, v = (torch.cat(x) for x in zip(*slides, strict=True))
    out = dilated_attention(q, k, v, *BRANCHES, cu_seqlens=torch.tensor([0, 20, 21, 54], dtype=dtype))
    for mine, slide in zip(out.split([20, 1, 33]), slides, strict=True):
        assert torch.equal(mine, dilated_attention(*slide, *BRANCHES))


@pytest.mark.parametrize("cu_seqlens", [None, torch.tensor([0, 7, 20])], ids=["one-slide", "two-slides"])
def test_opcheck(cu_seqlens):
    torch.library.opcheck(dilated_attention_op, (*inputs(), *BRANCHES, cu_seqlens, "ieee"))


def test_a_module_exports_at_any_length():
    class Attend(torch.nn.Module):
        def forward(self, qkv):
            return dilated_attention(*qkv.unbind(1), *BRANCHES) * 2

    qkv = torch.stack(inputs(), 1)
    length = torch.export.Dim("tokens", min=2)
    program = torch.export.export(Attend(), (qkv,), dynamic_shapes={"qkv": {0: length}})
    assert [n for n in program.graph.nodes if n.target == torch.ops.wsi_rt.dilated_attention.default]
    longer = torch.stack(inputs(57), 1)
    assert torch.equal(program.module()(longer), dilated_attention(*longer.unbind(1), *BRANCHES) * 2)


X = torch.zeros(4, 2, 16)
REFUSED = {
    "lists of unequal length": ((X, X, X, [4], [1, 2]), {}, r"1 segment lengths for 2 ratios, expected as many"),
    "no branch": ((X, X, X, [], []), {}, r"0 segment lengths for 0 ratios"),
    "ratio 0": ((X, X, X, [4], [0]), {}, r"ratios \[0\] hold 0, expected positive"),
    "ratio 2^70": ((X, X, X, [4], [2**70]), {}, r"hold 1180591620717411303424, expected positive integers below 2\^63"),
    "length 4.0": ((X, X, X, [4.0], [1]), {}, r"segment lengths \[4.0\] hold 4.0, expected positive integers"),
    "length True": ((X, X, X, [True], [1]), {}, r"hold True, expected positive integers"),
    "scalar": ((X, X, X, 4, [1]), {}, r"segment lengths 4, expected a list of integers"),
    "string": ((X, X, X, [4], "1"), {}, r"ratios '1', expected a list of integers"),
    "unequal shapes": ((X, X, X[:3], [4], [1]), {}, r"\(3, 2, 16\)\], expected three equal shapes"),
    "two axes": ((X[0], X[0], X[0], [4], [1]), {}, r"expected three equal shapes \[L >= 1, H, D\]"),
    "L = 0": ((X[:0], X[:0], X[:0], [4], [1]), {}, r"\(0, 2, 16\).*expected three equal shapes \[L >= 1"),
    "two devices": ((X, X, X.to("meta"), [4], [1]), {}, r"v on meta; expected one device"),
    "two dtypes": ((X, X, X.half(), [4], [1]), {}, r"torch.float16\], expected one dtype"),
    "fp64": ((X.double(),) * 3 + ([4], [1]), {}, r"q is torch.float64, expected torch.float16, bfloat16 or float32"),
    "int64": ((X.long(),) * 3 + ([4], [1]), {}, r"q is torch.int64"),
    "D not contiguous": ((X, X.mT.contiguous().mT, X, [4], [1]), {}, r"k has strides .*: call .contiguous\(\)"),
    "precision": ((X, X, X, [4], [1]), {"precision": "fast"}, r"precision 'fast', expected one of ieee, tf32"),
    "cu_seqlens fp32": (
        (X, X, X, [4], [1]),
        {"cu_seqlens": torch.tensor([0.0, 4.0])},
        r"float32 \[2\], expected int32",
    ),
    "cu_seqlens short": ((X, X, X, [4], [1]), {"cu_seqlens": torch.tensor([0, 3])}, r"\[0, 3\], expected to rise .* 4"),
    "empty slide": ((X, X, X, [4], [1]), {"cu_seqlens": torch.tensor([0, 0, 4])}, r"at least 1 a slide"),
}


@pytest.mark.parametrize(("args", "options", "message"), REFUSED.values(), ids=REFUSED)
def test_refused(args, options, message):
    with pytest.raises(KernelInputError, match=message):
        dilated_attention(*args, **options)


def test_refused_before_a_launch():
    """What only the kernel asks for, beyond the operator."""
    odd = torch.zeros(4, 2, 20)
    with pytest.raises(KernelInputError, match=r"head width 20, expected one of 8, 16, 24"):
        check_launch(odd, odd, odd)
    far = torch.empty(2**31 + 64, device="meta").as_strided((2, 1, 16), (2**31, 16, 1))
    with pytest.raises(KernelInputError, match=r"k has strides \(2147483648, 16, 1\), expected less than 2\^31"):
        check_launch(X, far, X)
    many = X[:1].expand(2**30 + 1, 2, 16)
    with pytest.raises(KernelInputError, match=r"1,073,741,825 tokens in one launch, expected at most 1,073,741,824"):
        check_launch(many, many, many)


def test_lengths_of_slides():
    assert slide_lengths(9, None) == (9,)
    assert slide_lengths(9, torch.tensor([0, 2, 9], dtype=torch.int32)) == (2, 7)


def test_rows_start_on_16_bytes_where_the_first_does_and_every_stride():
    x = torch.zeros(4, 3, 2, 16, dtype=torch.float16)
    assert rows_aligned(*x.unbind(1))
    late = torch.zeros(4 * 2 * 16 + 1, dtype=torch.float16)[1:].view(4, 2, 16)
    assert late.is_contiguous()
    assert not rows_aligned(late)
    assert not rows_aligned(x[:, 0], late, x[:, 2])
    assert not rows_aligned(torch.zeros(4, 2, 20, dtype=torch.float16)[..., :16])


@pytest.fixture
def captured(monkeypatch):
    """As while a CUDA graph is captured; a stand-in, for there is none without a GPU."""
    monkeypatch.setattr("wsi_rt.kernels.dilated_attention.launch.capturing", lambda device: True)
    monkeypatch.setattr("wsi_rt.kernels.checks.values_readable", lambda x: False)


def test_a_capture_makes_no_tables(captured, monkeypatch):
    device_tables.cache_clear()
    call = (7, 9), (4,), (1,), 2, 16, torch.device("cpu")
    with pytest.raises(KernelInputError, match=r"no tables yet for slides of 7, 9 tokens .* have run once before"):
        device_tables(*call)
    with monkeypatch.context() as before:
        before.setattr("wsi_rt.kernels.dilated_attention.launch.capturing", lambda device: False)
        made = device_tables(*call)
    assert device_tables(*call) is made


def test_a_capture_does_not_read_lengths(captured):
    with pytest.raises(KernelInputError, match=r"cu_seqlens is on the GPU while a CUDA graph is captured.*\.cpu\(\)"):
        slide_lengths(9, torch.tensor([0, 9]))
