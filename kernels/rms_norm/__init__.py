"""RMSNorm of a language model's rows, alone or with the residual sum before it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from wsi_rt.kernels.checks import check_finite, check_floats, check_shapes
from wsi_rt.kernels.errors import KernelInputError

if TYPE_CHECKING:
    from torch import Tensor

OP = "rms_norm"
WIDEST = 16_384  # channels that the kernel takes; a row lives in registers


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [T >= 1, C] (rows may be strided), weight [C] -> x / sqrt(mean(x^2) + eps) * weight: [T, C], dtype of x.

    fp16, bf16 or fp32 in, computed in fp32, rounded once. CUDA tensors run the Triton kernel (sm_80 or newer,
    C <= WIDEST), CPU tensors plain torch. Traces and exports as `torch.ops.wsi_rt.rms_norm` (importing `library`
    registers it). Raises KernelInputError on shapes, strides, dtypes and devices that do not fit.
    Source: Zhang and Sennrich, arXiv 1910.07467, as Llama has it (SPEC 5).
    """
    from wsi_rt.kernels.rms_norm.library import rms_norm_op

    _check(OP, {"x": x}, weight, eps)
    return rms_norm_op(x, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x, residual [T >= 1, C] (rows may be strided), weight [C] -> (normed [T, C], dtype of x; x + residual [T, C],
    dtype of residual).

    The sum is rounded to the dtype it is returned in, and that is what is normed: rms_norm of the second answer where
    both dtypes are one. A residual in fp32 beside x in half precision keeps the stream exact. Else as `rms_norm`;
    `torch.ops.wsi_rt.add_rms_norm`.
    """
    from wsi_rt.kernels.rms_norm.library import add_rms_norm_op

    _check("add_rms_norm", {"x": x, "residual": residual}, weight, eps)
    return add_rms_norm_op(x, residual, weight, eps)


def _check(what: str, rows: dict[str, Tensor], weight: Tensor, eps: float) -> None:
    x = rows["x"]
    if x.ndim != 2 or x.shape[0] < 1 or x.shape[1] < 1:
        raise KernelInputError(f"{what}: x is {list(x.shape)}, expected [T >= 1, C >= 1]")
    shape = (x.shape[0], x.shape[1])
    check_shapes(what, {**{name: (y, shape) for name, y in rows.items()}, "weight": (weight, shape[1:])})
    check_floats(what, {**rows, "weight": weight})
    check_finite(what, {"eps": (eps,)})
    if eps < 0:
        raise KernelInputError(f"{what}: eps {eps}, expected eps >= 0")
