"""Attention over spans of rows, and its parts joined, against a softmax in fp64 over all keys at once."""

from __future__ import annotations

import pytest

pytest.importorskip("torch", reason="the export extra is not installed")

import torch
from torch import Tensor

from wsi_rt.runtime.llm.torch_attention import (
    Parts,
    Spans,
    attend,
    choose_attention,
    flash_attention,
    join,
    plain_attention,
)

WIDTH = 64
SHAPES = [(4, 4), (4, 2), (4, 1)]
# (queries, keys) of a span: a prompt, one that goes on, a single token, all in one call
SPANS = [(9, 9), (5, 37), (1, 20), (1, 1), (16, 16)]
CPU = torch.device("cpu")


def exact(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Parts:
    """q [T, H, D], k and v [S, Hkv, D] -> fp64 [T, H, D], [T, H, 1], head by head."""
    repeats, (tokens, heads, width), keys = q.shape[1] // k.shape[1], q.shape, k.shape[0]
    out, lse = torch.zeros(q.shape, dtype=torch.float64), torch.zeros((tokens, heads, 1), dtype=torch.float64)
    for head in range(heads):
        own_k, own_v = (x[:, head // repeats].double().cpu() for x in (k, v))
        for t in range(tokens):
            seen = keys - tokens + t + 1 if causal else keys
            scores = own_k[:seen] @ q[t, head].double().cpu() / width**0.5
            out[t, head], lse[t, head] = scores.softmax(0) @ own_v[:seen], scores.logsumexp(0)
    return out, lse


def inputs(heads: int, kv_heads: int, dtype: torch.dtype = torch.float32, device: torch.device = CPU) -> list[Tensor]:
    queries, keys = (sum(n) for n in zip(*SPANS, strict=True))
    generator = torch.Generator().manual_seed(heads + kv_heads)
    shapes = ((queries, heads, WIDTH), (keys, kv_heads, WIDTH), (keys, kv_heads, WIDTH))
    return [torch.randn(s, generator=generator).to(device, dtype) for s in shapes]


def exact_spans(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Parts:
    queries, keys = zip(*SPANS, strict=True)
    parts = [exact(*x, causal) for x in zip(q.split(queries), k.split(keys), v.split(keys), strict=True)]
    return torch.cat([out for out, _ in parts]), torch.cat([lse for _, lse in parts])


def varlen_stand_in(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux, window_size, enable_gqa):
    """In the place of torch's FlashAttention, which needs a GPU: what its documentation says, in fp64."""
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert return_aux.lse
    assert enable_gqa  # else torch may choose cuDNN
    queries, keys = cu_seq_q.diff().tolist(), cu_seq_k.diff().tolist()
    assert (max_q, max_k) == (max(queries), max(keys))
    causal = {(-1, 0): True, (-1, -1): False}[window_size]
    parts = zip(query.split(queries), key.split(keys), value.split(keys), strict=True)
    out, lse = zip(*(exact(*part, causal) for part in parts), strict=True)
    return torch.cat(out).to(query.dtype), torch.cat(lse)[..., 0].T.float()  # lse is [heads, T]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("heads", "kv_heads"), SHAPES)
@pytest.mark.parametrize("path", ["plain", "flash stand-in", pytest.param("flash", marks=pytest.mark.gpu)])
def test_spans_attend_to_their_own_keys(
    heads: int, kv_heads: int, causal: bool, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if path == "flash" and not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU")
    device, dtype = (torch.device("cuda"), torch.float16) if path == "flash" else (CPU, torch.float32)
    if path == "flash stand-in":
        varlen = pytest.importorskip("torch.nn.attention.varlen", reason="this torch has none")
        monkeypatch.setattr(varlen, "varlen_attn", varlen_stand_in)
    q, k, v = inputs(heads, kv_heads, dtype, device)
    function = plain_attention if path == "plain" else flash_attention
    found = function(q, k, v, Spans(*zip(*SPANS, strict=True), device), causal)
    tolerance = 2e-3 if path == "flash" else 2e-6
    for a, b in zip(found, exact_spans(q, k, v, causal), strict=True):
        torch.testing.assert_close(a.double().cpu(), b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_half_precision_is_attended_to_in_fp32(dtype: torch.dtype) -> None:
    q, k, v = inputs(4, 2, dtype)
    out, lse = attend(q[:9], k[:9], v[:9], causal=True)
    assert (out.dtype, lse.dtype) == (torch.float32, torch.float32)
    for a, b in zip((out, lse), exact(q[:9], k[:9], v[:9], True), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=2e-6, atol=2e-6)


def test_parts_joined_are_one_softmax() -> None:
    """Also where one part has no keys: its denominator is 0, the logarithm of it minus infinity."""
    q, k, v = (x[:37] for x in inputs(4, 2))
    q = q[:8]
    whole, _ = exact(q, k, v, True)
    prefix, own = attend(q, k[:29], v[:29], causal=False), attend(q, k[29:], v[29:], causal=True)
    torch.testing.assert_close(join(prefix, own).double(), whole, rtol=2e-6, atol=2e-6)
    nothing = (torch.zeros_like(own[0]), torch.full_like(own[1], -torch.inf))
    torch.testing.assert_close(join(nothing, own), own[0])


def test_the_choice_of_attention_is_told() -> None:
    assert choose_attention(CPU, torch.float16) == (plain_attention, "plain torch (cpu, float16)")
    assert choose_attention(torch.device("cuda"), torch.float32) == (plain_attention, "plain torch (cuda, float32)")
    pytest.importorskip("torch.nn.attention.varlen", reason="this torch has none")
    chosen, told = choose_attention(torch.device("cuda"), torch.bfloat16)
    assert (chosen, told) == (flash_attention, "FlashAttention (torch.nn.attention.varlen)")
