"""`wsi_rt::dilated_attention` for torch.library: plain torch on the CPU, Triton on CUDA, shapes for tracing."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from wsi_rt.kernels.dilated_attention.launch import dilated_attention_triton, slide_lengths
from wsi_rt.kernels.dilated_attention.reference import dilated_attention_reference

_SCHEMA = (
    "(Tensor q, Tensor k, Tensor v, int[] segment_lengths, int[] dilated_ratios, Tensor? cu_seqlens, str precision)"
    " -> Tensor"
)


@torch.library.custom_op("wsi_rt::dilated_attention", mutates_args=(), device_types="cpu", schema=_SCHEMA)
def dilated_attention_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segment_lengths: Sequence[int],
    dilated_ratios: Sequence[int],
    cu_seqlens: Tensor | None,
    precision: str,
) -> Tensor:
    """Arguments checked by the public function, but for the values of `cu_seqlens`."""
    lengths = slide_lengths(q.shape[0], cu_seqlens)
    slides = zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True)
    out = [dilated_attention_reference(*slide, segment_lengths, dilated_ratios) for slide in slides]
    return torch.cat(out).to(q.dtype)


@dilated_attention_op.register_kernel("cuda")
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segment_lengths: Sequence[int],
    dilated_ratios: Sequence[int],
    cu_seqlens: Tensor | None,
    precision: str,
) -> Tensor:
    return dilated_attention_triton(q, k, v, segment_lengths, dilated_ratios, cu_seqlens, precision)


@dilated_attention_op.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segment_lengths: Sequence[int],
    dilated_ratios: Sequence[int],
    cu_seqlens: Tensor | None,
    precision: str,
) -> Tensor:
    return q.new_empty(q.shape)
