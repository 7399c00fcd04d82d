"""Pillow's bicubic resize, antialiased, as two products of matrices: for squares that were decoded on a device.

The same filter, support, borders and rounding between the passes as `Image.resize(..., BICUBIC, box=...)`, which the
CPU's path uses (ImagingResample in Pillow's src/libImaging/Resample.c), in fp32 where Pillow has 22-bit fixed point:
of noise, one value in some 2,000 is a grey level off.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from wsi_rt.runtime.types import TILE_PX

if TYPE_CHECKING:
    from torch import Tensor

SUPPORT = 2.0  # px of the output to either side


@dataclass(frozen=True)
class Resampling:
    """Where tiles lie in the squares that were read for them, px. offsets: (left, top) of each, 0 <= offset < 1.
    edges: of each square, up to which it counts; the memory may be wider. span: edge of a tile."""

    offsets: NDArray[np.float64]  # [b, 2]
    edges: NDArray[np.int64]  # [b]
    span: float


def take_tiles(batch: Tensor, out: Tensor, how: Resampling | None) -> None:
    """The first tiles of u8 [n, E, E, 3] (or [E, E, 3]) into out u8 [b, 256, 256, 3], resampled where told."""
    squares = batch.reshape(-1, *batch.shape[-3:])[: len(out)]
    if how is None:
        out.copy_(squares, non_blocking=True)
    else:
        resample(squares, how, out)


def resample(squares: Tensor, how: Resampling, out: Tensor) -> None:
    """squares u8 [b, E, E, 3] -> out u8 [b, 256, 256, 3], on their device. Takes some 15 bytes per px of the squares,
    and 50 per px of 256 x E."""
    place = np.concatenate([how.offsets, how.edges[:, None]], axis=1).astype(np.float64)  # [b, 3]
    left, top, edges = torch.from_numpy(place).to(squares.device)[..., None, None].unbind(1)  # [b, 1, 1] each
    across, down = (_weights(offset, edges, how.span, squares.shape[1]) for offset in (left, top))  # [b, 256, E]
    x = squares.permute(0, 3, 1, 2).float()  # [b, 3, E, E]
    x = _rounded(x @ across[:, None].mT)  # [b, 3, E, 256]
    x = _rounded(down[:, None] @ x)  # [b, 3, 256, 256]
    out.copy_(x.permute(0, 2, 3, 1))


def _rounded(x: Tensor) -> Tensor:
    """To whole grey levels, halves up, as between Pillow's passes and after them."""
    return x.add_(0.5).floor_().clamp_(0, 255)


def _weights(offset: Tensor, edge: Tensor, span: float, width: int) -> Tensor:
    """Of each px of a row of the square in each of the output: f32 [b, 256, width]. offset and edge: f64 [b, 1, 1]."""
    scale = span / TILE_PX
    wider = max(scale, 1.0)
    at = torch.arange(max(width, TILE_PX), dtype=torch.float64, device=offset.device)
    centre = offset + (at[:TILE_PX, None] + 0.5) * scale  # [b, 256, 1]
    x = at[:width]
    first = (centre - SUPPORT * wider + 0.5).clamp(min=0).floor()
    last = torch.minimum((centre + SUPPORT * wider + 0.5).floor(), edge)
    weights = torch.where((x >= first) & (x < last), _bicubic((x - centre + 0.5) / wider), 0.0)
    return (weights / weights.sum(dim=-1, keepdim=True)).float()


def _bicubic(x: Tensor) -> Tensor:
    """Keys' kernel with a = -0.5."""
    x = x.abs()
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return torch.where(x < 1, near, torch.where(x < 2, far, 0.0))
