"""Blocks of integers made fp32 again, then one matrix product."""

from __future__ import annotations

import torch
from torch import Tensor


def unpacked(packed: Tensor, bits: int) -> Tensor:
    """uint8 [..., n] -> one code to a byte; of two 4-bit ones in a byte, that in the low half is the first."""
    if bits == 8:
        return packed
    return torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2)


def dequantised(codes: Tensor, scales: Tensor, zeros: Tensor | None, bits: int) -> Tensor:
    """codes uint8 [N, blocks, block * bits / 8], scales and zeros [N, blocks] -> fp32 [N, blocks * block]."""
    weight = unpacked(codes, bits).float()
    weight -= (1 << (bits - 1)) if zeros is None else zeros[..., None]
    weight *= scales[..., None]
    return weight.flatten(1)


def block_linear_reference(x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, bits: int) -> Tensor:
    """x [B, K] -> fp32 [B, N]; what the last block holds beyond K is not used."""
    return x.float() @ dequantised(codes, scales, zeros, bits)[:, : x.shape[1]].T
