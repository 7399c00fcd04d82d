"""The slide encoder in eager torch as the published module computes it: each branch gathers, attends, scatters, and
the branches are weighted by their log-sum-exp (SPEC 3). Needs torch."""

from __future__ import annotations

from collections.abc import Sequence
from unittest.mock import patch

import torch
from torch import Tensor

from wsi_rt.export.arch import LongNetConfig
from wsi_rt.export.models import longnet
from wsi_rt.export.sources.weights import WeightSource
from wsi_rt.kernels.dilated_attention.reference import NOT_KEPT, _dilate, _segments, _undilate


class PublishedSlideEncoder:
    """fp32, all weights in memory. On the CPU torch's flash attention stands for the one that the published module
    calls on a GPU: it returns the log-sum-exp, too, and makes no matrix of scores."""

    def __init__(self, c: LongNetConfig, source: WeightSource) -> None:
        self._module = longnet.SlideEncoder(c).eval().requires_grad_(False)
        self._module.load_state_dict({n: torch.from_numpy(source.get(n)) for n in source.shapes()})

    def tokens(self, features: Tensor, positions: Tensor) -> Tensor:
        """f32 [N, in_width], i64 [N, 2] -> [576, padded]."""
        with torch.inference_mode(), patch.object(longnet, "dilated_attention", dilated_attention):
            out: dict[str, Tensor] = self._module(features, positions)
        return out["tokens"]


def dilated_attention(q: Tensor, k: Tensor, v: Tensor, segments: Sequence[int], ratios: Sequence[int]) -> Tensor:
    """q, k, v [L, H, D] -> [L, H, D]."""
    outs, lses = zip(*(_branch(q, k, v, w, r) for w, r in zip(segments, ratios, strict=True)), strict=True)
    lse = torch.stack(lses)  # [branch, L, H, 1]
    weight = torch.exp(lse - lse.amax(dim=0))
    return (torch.stack(outs) * (weight / weight.sum(dim=0))).sum(dim=0)


def _branch(q: Tensor, k: Tensor, v: Tensor, w: int, r: int) -> tuple[Tensor, Tensor]:
    length, heads, _ = q.shape
    w = min(w, length)
    q, k, v = (_dilate(_segments(x, w, r), r).contiguous() for x in (q, k, v))  # [S, H, m, D]
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
    out = _undilate(out, r, 0.0)[:, :w, :heads].flatten(0, 1)[:length]
    return out, _undilate(lse[..., None], r, NOT_KEPT)[:, :w, :heads].flatten(0, 1)[:length]
