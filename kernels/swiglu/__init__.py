"""The gated activation of a language model's MLP: silu(gate) * up."""

from __future__ import annotations

from typing import TYPE_CHECKING

from wsi_rt.kernels.checks import check_floats
from wsi_rt.kernels.errors import KernelInputError

if TYPE_CHECKING:
    from torch import Tensor

OP = "swiglu"


def swiglu(gate_up: Tensor) -> Tensor:
    """gate_up [T >= 1, 2F] (gate first; rows may be strided) -> silu(gate) * up [T, F], dtype of gate_up.

    fp16, bf16 or fp32 in, computed in fp32, rounded once. CUDA tensors run the Triton kernel (sm_80 or newer), CPU
    tensors plain torch. Traces and exports as `torch.ops.wsi_rt.swiglu` (importing `library` registers it).
    Raises KernelInputError on shapes, strides, dtypes and devices that do not fit. Source: Shazeer, arXiv 2002.05202,
    as Llama has it (SPEC 5).
    """
    from wsi_rt.kernels.swiglu.library import swiglu_op

    if gate_up.ndim != 2 or gate_up.shape[0] < 1 or gate_up.shape[1] < 2 or gate_up.shape[1] % 2:
        raise KernelInputError(f"{OP}: gate_up is {list(gate_up.shape)}, expected [T >= 1, 2F], F >= 1")
    check_floats(OP, {"gate_up": gate_up})
    return swiglu_op(gate_up)
