"""Positions of tiles on a slide, in closed form (SPEC 3, "Position"): no table of 1,000,001 rows."""

from __future__ import annotations

import torch
from torch import Tensor


def axis_embedding(index: Tensor, width: int) -> Tensor:
    """index [N] integers of one grid axis -> [N, width] fp32: a sin block, then a cos block.

    omega_k = 10000^(-k / (width / 2)), all in float64, then cast.
    """
    omega = 10000.0 ** (-torch.arange(width // 2, dtype=torch.float64) / (width / 2))
    angle = index.to(torch.float64)[:, None] * omega
    return torch.cat([angle.sin(), angle.cos()], dim=1).float()


def position_embedding(positions: Tensor, width: int) -> Tensor:
    """positions [N, 2] int (col, row) -> [N, width] fp32; the first half encodes row, the second col.

    Row `col * 1000 + row + 1` of the published table, whose first half encodes (index - 1) mod 1000.
    """
    col, row = positions[:, 0], positions[:, 1]
    return torch.cat([axis_embedding(row, width // 2), axis_embedding(col, width // 2)], dim=1)


def slide_embed_reference(projected: Tensor, positions: Tensor, bias: Tensor, cls_token: Tensor) -> Tensor:
    """projected [N, C] (patch projection without bias) -> [N + 1, C] fp32 with the CLS row first.

    CLS adds position row 0 of the published table, which is zero.
    """
    tiles = projected.float() + bias.float() + position_embedding(positions, projected.shape[1]).to(projected.device)
    return torch.cat([cls_token.float().reshape(1, -1), tiles])
