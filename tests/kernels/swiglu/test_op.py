"""The public operator swiglu: what it refuses, how it traces, precisions on the CPU."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="the export extra is not installed")

from wsi_rt.kernels.errors import KernelInputError  # noqa: E402
from wsi_rt.kernels.swiglu import swiglu  # noqa: E402
from wsi_rt.kernels.swiglu.cost import WIDTH, cost  # noqa: E402
from wsi_rt.kernels.swiglu.library import swiglu_op  # noqa: E402

GATE_UP = torch.randn(9, 12, generator=torch.Generator().manual_seed(0))


def test_the_gate_is_first():
    gate, up = GATE_UP[:, :6], GATE_UP[:, 6:]
    assert (swiglu(GATE_UP) - gate * torch.sigmoid(gate) * up).abs().max() <= 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_computes_in_fp32_and_rounds_once(dtype):
    given = GATE_UP.to(dtype)
    assert swiglu(given).dtype == dtype
    assert torch.equal(swiglu(given), swiglu(given.float()).to(dtype))


@pytest.mark.parametrize(
    ("message", "given"),
    [
        (r"gate_up is \[12\], expected \[T >= 1, 2F\]", GATE_UP[0]),
        (r"gate_up is \[0, 12\], expected", GATE_UP[:0]),
        (r"gate_up is \[9, 0\], expected", GATE_UP[:, :0]),
        (r"gate_up is \[9, 11\], expected", GATE_UP[:, :11]),
        (r"gate_up is torch.int8, expected torch.float16", GATE_UP.to(torch.int8)),
        (r"gate_up has strides \(1, 9\), expected a contiguous last axis", GATE_UP.T.contiguous().T),
    ],
)
def test_refuses(message, given):
    with pytest.raises(KernelInputError, match=f"swiglu: {message}"):
        swiglu(given)


def test_is_a_well_formed_operator():
    torch.library.opcheck(swiglu_op, (GATE_UP,))


def test_exports_with_any_number_of_tokens():
    class Gate(torch.nn.Module):
        def forward(self, x):
            return swiglu(x) + 1

    program = torch.export.export(Gate(), (GATE_UP,), dynamic_shapes=({0: torch.export.Dim("tokens", min=2)},))
    assert "wsi_rt.swiglu" in str(program.graph)
    assert torch.equal(program.module()(GATE_UP[:4]), swiglu(GATE_UP[:4]) + 1)


def test_bytes_of_a_launch_are_those_of_its_tensors():
    gate_up = torch.empty(20, 2 * WIDTH, dtype=torch.float16, device="meta")
    assert cost(20, 2).bytes == gate_up.nbytes * 3 // 2
