"""Encoder tokens -> 576 slide tokens: adaptive average pooling, LayerNorm, zero-padded channels."""

from __future__ import annotations

from typing import TYPE_CHECKING

from wsi_rt.kernels.errors import KernelInputError

if TYPE_CHECKING:
    from torch import Tensor


def pool_norm_pad(tokens: Tensor, weight: Tensor, bias: Tensor, eps: float, pooled: int, padded: int) -> Tensor:
    """tokens [N >= 1, C]; weight, bias [C] or [padded] -> [pooled, padded] fp32.

    The width of `weight` decides the order (C: norm then pad; `padded`: pad then norm).
    Raises KernelInputError on any other width. Source: SPEC 3.
    """
    from wsi_rt.kernels.pool_norm_pad.reference import pool_norm_pad_reference

    if tokens.ndim != 2 or tokens.shape[0] < 1:
        raise KernelInputError(f"tokens are {list(tokens.shape)}, expected [N >= 1, C]")
    channels = tokens.shape[1]
    if padded < channels:
        raise KernelInputError(f"padded width {padded} is below the {channels} channels of the tokens")
    if weight.shape != bias.shape or tuple(weight.shape) not in {(channels,), (padded,)}:
        raise KernelInputError(
            f"norm weight {list(weight.shape)} and bias {list(bias.shape)}, expected both [{channels}] or [{padded}]"
        )
    return pool_norm_pad_reference(tokens, weight, bias, eps, pooled, padded)
