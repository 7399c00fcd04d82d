"""A Linear layer whose weight is stored in blocks of 4- or 8-bit integers: y = x W^T, W never written out."""

from __future__ import annotations

from typing import TYPE_CHECKING

from wsi_rt.kernels.checks import check_floats, check_one_device
from wsi_rt.kernels.errors import KernelInputError

if TYPE_CHECKING:
    from torch import Tensor

OP = "block_linear"
BITS = (4, 8)
BLOCKS = (32, 64, 128)  # weights that share a scale


def block_linear(x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, bits: int) -> Tensor:
    """x [B >= 1, K] (rows may be strided) -> [B, N] of the dtype of x: x @ W.T, without bias.

    W [N, K] is stored in `blocks` = ceil(K / block) blocks of 32, 64 or 128 weights a row, the last of which may reach
    beyond K: W[n, k] = scales[n, b] * (code - zeros[n, b]), b = k // block. codes uint8 [N, blocks, block * bits / 8]:
    of two 4-bit codes in a byte the low half is the first. scales fp32 or fp16 [N, blocks]; zeros uint8 [N, blocks], or
    None: all 2^(bits - 1). bits: 4 or 8. The three are contiguous.

    fp16, bf16 or fp32 in. CPU tensors run plain torch in fp32, some rows of W at a time: exact, and bounded in memory.
    CUDA tensors run Triton (sm_80 or newer). Up to 4 rows: products and sums in fp32. More: tensor cores; fp16 and
    bf16 rows meet weights rounded to their dtype, sums are fp32; fp32 rows are multiplied as fp32, without tensor
    cores. Sums are taken in a fixed order: the same call gives the same bits.

    Raises KernelInputError on shapes, dtypes, strides and devices that do not fit; reads no values. Traces and exports
    as `torch.ops.wsi_rt.block_linear` (importing `library` registers it). Source of the layout: ONNX Runtime's
    MatMulNBits.
    """
    check_inputs(x, codes, scales, zeros, bits)

    from wsi_rt.kernels.block_linear.library import block_linear_op

    return block_linear_op(x, codes, scales, zeros, bits)


def check_inputs(x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, bits: int) -> None:
    """Raises KernelInputError unless the arguments of `block_linear` fit each other."""
    if isinstance(bits, bool) or bits not in BITS:
        raise KernelInputError(f"{OP}: {bits!r} bits, expected {' or '.join(map(str, BITS))}")
    if x.ndim != 2 or 0 in tuple(x.shape):
        raise KernelInputError(f"{OP}: x is {list(x.shape)}, expected [B >= 1, K >= 1]")
    check_floats(OP, {"x": x})
    check_codes(codes, x.shape[1], bits)
    check_per_block(codes, scales, zeros)
    tensors = {"x": x, "codes": codes, "scales": scales}
    check_one_device(OP, tensors if zeros is None else {**tensors, "zeros": zeros})


def check_codes(codes: Tensor, inputs: int, bits: int) -> None:
    """codes: uint8 [N, blocks, block * bits / 8], contiguous, as many blocks as `inputs` columns take."""
    import torch

    if codes.dtype != torch.uint8:
        raise KernelInputError(f"{OP}: codes are {codes.dtype}, expected torch.uint8")
    if codes.ndim != 3 or codes.shape[0] < 1 or codes.shape[2] * 8 // bits not in BLOCKS:
        widths = " or ".join(str(block * bits // 8) for block in BLOCKS)
        raise KernelInputError(
            f"{OP}: codes are {list(codes.shape)}, expected [N >= 1, blocks, {widths}] at {bits} bits"
        )
    block = codes.shape[2] * 8 // bits
    if codes.shape[1] != -(-inputs // block):
        raise KernelInputError(
            f"{OP}: codes {list(codes.shape)} hold {codes.shape[1]} blocks of {block}, "
            f"expected {-(-inputs // block)} for x of {inputs} columns"
        )
    if not codes.is_contiguous():
        raise KernelInputError(f"{OP}: codes have strides {tuple(codes.stride())}, expected contiguous memory")


def check_per_block(codes: Tensor, scales: Tensor, zeros: Tensor | None) -> None:
    """scales (fp32, fp16) and zeros (uint8, or None) are [N, blocks], contiguous."""
    import torch

    if scales.dtype not in (torch.float32, torch.float16):
        raise KernelInputError(f"{OP}: scales are {scales.dtype}, expected torch.float32 or float16")
    if zeros is not None and zeros.dtype != torch.uint8:
        raise KernelInputError(f"{OP}: zeros are {zeros.dtype}, expected torch.uint8")
    for name, tensor in (("scales", scales), ("zeros", zeros)):
        if tensor is None:
            continue
        if tuple(tensor.shape) != tuple(codes.shape[:2]):
            raise KernelInputError(
                f"{OP}: {name} are {list(tensor.shape)}, expected {list(codes.shape[:2])}: one for each block of codes"
            )
        if not tensor.is_contiguous():
            raise KernelInputError(f"{OP}: {name} have strides {tuple(tensor.stride())}, expected contiguous memory")
