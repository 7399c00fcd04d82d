"""Slide tokens from encoder tokens in plain fp32 torch (SPEC 3, "Pooling and padding")."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def pool_norm_pad_reference(
    tokens: Tensor, weight: Tensor, bias: Tensor, eps: float, pooled: int, padded: int
) -> Tensor:
    """tokens [N, C] (without CLS) -> [pooled, padded] fp32.

    Adaptive average pooling over the token axis (bin i averages floor(i N / pooled) ...
    ceil((i + 1) N / pooled) - 1), LayerNorm, channels zero-padded to `padded`. A norm as wide as
    `padded` means the checkpoint pads before it norms; one as wide as C norms first.
    """
    channels = tokens.shape[1]
    x = F.adaptive_avg_pool1d(tokens.float().T[None], pooled)[0].T  # [pooled, C]
    norm_first = weight.shape[0] == channels
    if not norm_first:
        x = F.pad(x, (0, padded - channels))
    x = F.layer_norm(x, (x.shape[1],), weight.float(), bias.float(), eps)
    return F.pad(x, (0, padded - channels)) if norm_first else x
