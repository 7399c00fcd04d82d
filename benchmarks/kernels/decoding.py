"""Inputs, exact answers and providers of the language model's operators, at the sizes of a 7 B model. Needs torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from wsi_rt.benchmarks.kernels.operator import Inputs, Operator, Run, random_tensors
from wsi_rt.kernels.block_linear import block_linear
from wsi_rt.kernels.block_linear.cost import BITS, BLOCK, SHAPES
from wsi_rt.kernels.block_linear.reference import block_linear_reference, dequantised
from wsi_rt.kernels.rms_norm import add_rms_norm
from wsi_rt.kernels.rms_norm.cost import CHANNELS
from wsi_rt.kernels.rms_norm.reference import add_rms_norm_reference
from wsi_rt.kernels.rope_kv_write import rope_kv_write
from wsi_rt.kernels.rope_kv_write.reference import rotated_reference, write_reference
from wsi_rt.kernels.shared_prefix_attention import shared_prefix_attention
from wsi_rt.kernels.shared_prefix_attention.cost import HEAD_WIDTH, HEADS, KV_HEADS, PREFIX, SUFFIX
from wsi_rt.kernels.swiglu import swiglu
from wsi_rt.kernels.swiglu.cost import WIDTH
from wsi_rt.kernels.swiglu.reference import swiglu_reference

EPS, THETA, CONTEXT, PAGE = 1e-5, 10_000.0, 4096, 16

# --- RMSNorm after the residual sum


def _norm_inputs(tokens: int, dtype: torch.dtype, device: torch.device) -> Inputs:
    return random_tensors(
        {"x": (tokens, CHANNELS), "residual": (tokens, CHANNELS), "weight": (CHANNELS,)}, dtype, device
    )


def _norm_exact(x: Inputs) -> Tensor:
    return add_rms_norm_reference(x["x"], x["residual"], x["weight"], EPS)[0]


def _norm_eager(x: Inputs) -> Tensor:
    return F.rms_norm(x["x"] + x["residual"], (CHANNELS,), x["weight"], EPS)


ADD_NORM = Operator(
    inputs=_norm_inputs,
    exact=_norm_exact,
    scale=lambda x: _norm_exact(x).abs().max().item(),
    providers={
        "wsi-rt": lambda x: lambda: add_rms_norm(x["x"], x["residual"], x["weight"], EPS)[0],
        "reference": lambda x: lambda: _norm_eager(x),
    },
    eager="reference",
)

# --- a Linear layer in int4 blocks: that of `block_linear.cost`


def _linear_inputs(tokens: int, dtype: torch.dtype, device: torch.device) -> Inputs:
    inputs, outputs = SHAPES[1]
    blocks = inputs // BLOCK
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(0, 256, (outputs, blocks, BLOCK * BITS // 8), dtype=torch.uint8, generator=generator)
    zeros = torch.randint(0, 1 << BITS, (outputs, blocks), dtype=torch.uint8, generator=generator)
    scales = torch.rand(outputs, blocks, generator=generator) / 100
    x = random_tensors({"x": (tokens, inputs)}, dtype, device)
    return {**x, **{n: t.to(device) for n, t in (("codes", codes), ("scales", scales), ("zeros", zeros))}}


def _weight(x: Inputs) -> Tensor:
    """fp32 [N, K]."""
    return dequantised(x["codes"], x["scales"], x["zeros"], BITS)


def _linear_dense(x: Inputs) -> Run:
    """torch's product with the same weight in the dtype of x, four times the bytes; made before the clock."""
    weight = _weight(x).to(x["x"].dtype)
    return lambda: F.linear(x["x"], weight)


LINEAR = Operator(
    inputs=_linear_inputs,
    exact=lambda x: block_linear_reference(**x, bits=BITS),
    scale=lambda x: block_linear_reference(**x, bits=BITS).abs().max().item(),
    providers={
        "wsi-rt": lambda x: lambda: block_linear(**x, bits=BITS),
        "torch-dense": _linear_dense,
        "reference": lambda x: lambda: F.linear(x["x"], _weight(x).to(x["x"].dtype)),
    },
    eager="reference",
)

# --- the gated activation

GATE = Operator(
    inputs=lambda tokens, dtype, device: random_tensors({"gate_up": (tokens, 2 * WIDTH)}, dtype, device),
    exact=lambda x: swiglu_reference(x["gate_up"]),
    scale=lambda x: swiglu_reference(x["gate_up"]).abs().max().item(),
    providers={
        "wsi-rt": lambda x: lambda: swiglu(x["gate_up"]),
        "reference": lambda x: lambda: F.silu(x["gate_up"][:, :WIDTH]) * x["gate_up"][:, WIDTH:],
    },
    eager="reference",
)

# --- positions and the write to the cache: q, k, v views of one projection, every token to a page of its own


def _rotate_inputs(tokens: int, dtype: torch.dtype, device: torch.device) -> Inputs:
    heads = [HEADS, KV_HEADS, KV_HEADS]
    q, k, v = random_tensors({"qkv": (tokens, sum(heads), HEAD_WIDTH)}, dtype, device)["qkv"].split(heads, dim=1)
    half = HEAD_WIDTH // 2
    angles = torch.arange(CONTEXT)[:, None] * THETA ** (-torch.arange(half) / half)
    index = torch.arange(tokens)
    caches = (torch.zeros(tokens, PAGE, KV_HEADS, HEAD_WIDTH, dtype=dtype, device=device) for _ in range(2))
    tables = {"cos": angles.cos(), "sin": angles.sin(), "positions": PREFIX + index, "slots": index * PAGE}
    moved = {name: x.to(device) for name, x in tables.items()}
    return {"q": q, "k": k, "v": v, **moved, **dict(zip(("k_cache", "v_cache"), caches, strict=True))}


def _rotate_eager(x: Inputs) -> Tensor:
    """As published: q and k turned at the precision of the model, then written."""
    cos, sin = (x[name][x["positions"], None].to(x["q"].dtype) for name in ("cos", "sin"))
    turned = []
    for y in (x["q"], x["k"]):
        a, b = y.chunk(2, dim=-1)
        turned.append(torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1))
    write_reference(turned[1], x["slots"], x["k_cache"])
    write_reference(x["v"], x["slots"], x["v_cache"])
    return turned[0]


ROTATE = Operator(
    inputs=_rotate_inputs,
    exact=lambda x: rotated_reference(x["q"], x["cos"], x["sin"], x["positions"]),
    scale=lambda x: x["q"].abs().max().item(),
    providers={
        "wsi-rt": lambda x: lambda: rope_kv_write(**x),
        "reference": lambda x: lambda: _rotate_eager(x),
    },
    eager="reference",
)

# --- attention of a decoding step: questions on one slide, as many own tokens each


def _shared_inputs(sequences: int, dtype: torch.dtype, device: torch.device) -> Inputs:
    prefix_pages, suffix_pages = -(-PREFIX // PAGE), -(-SUFFIX // PAGE)
    cache = (prefix_pages + sequences * suffix_pages, PAGE, KV_HEADS, HEAD_WIDTH)
    floats = random_tensors({"q": (sequences, HEADS, HEAD_WIDTH), "k_cache": cache, "v_cache": cache}, dtype, device)
    pages = torch.randperm(cache[0], generator=torch.Generator().manual_seed(0))
    integers = {
        "prefix_table": pages[:prefix_pages][None],
        "prefix_lengths": torch.tensor([PREFIX]),
        "group_starts": torch.tensor([0, sequences]),
        "suffix_table": pages[prefix_pages:].view(sequences, suffix_pages),
        "suffix_lengths": torch.full((sequences,), SUFFIX),
    }
    return {**floats, **{name: x.to(device, torch.int32) for name, x in integers.items()}}


def _gathered(x: Inputs, name: str) -> Tensor:
    """Keys or values of every sequence, the prefix once for each: [B, Hkv, PREFIX + SUFFIX, D]."""
    prefix = x[name][x["prefix_table"][0].long()].flatten(0, 1)[:PREFIX]
    own = x[name][x["suffix_table"].long()].flatten(1, 2)[:, :SUFFIX]
    return torch.cat([prefix.expand(len(own), *prefix.shape), own], dim=1).transpose(1, 2).contiguous()


def _unshared(x: Inputs) -> Run:
    """torch's own attention of every sequence by itself; its keys and values are laid out before the clock."""
    q, k, v = x["q"][:, :, None], _gathered(x, "k_cache"), _gathered(x, "v_cache")
    return lambda: F.scaled_dot_product_attention(q, k, v, enable_gqa=HEADS > KV_HEADS)[:, :, 0]


def _published(x: Inputs) -> Run:
    """The eager attention of the published model: scores, a softmax in fp32, a product."""
    q, k, v = x["q"][:, :, None], _gathered(x, "k_cache"), _gathered(x, "v_cache")

    def run() -> Tensor:
        weights = torch.softmax(q @ k.mT * HEAD_WIDTH**-0.5, dim=-1, dtype=torch.float32).to(q.dtype)
        return (weights @ v)[:, :, 0]

    return run


def _shared_exact(x: Inputs) -> Tensor:
    k, v = _gathered(x, "k_cache").float(), _gathered(x, "v_cache").float()
    weights = torch.softmax(x["q"].float()[:, :, None] @ k.mT * HEAD_WIDTH**-0.5, dim=-1)
    return (weights @ v)[:, :, 0]


SHARED_PREFIX = Operator(
    inputs=_shared_inputs,
    exact=_shared_exact,
    scale=lambda x: x["v_cache"].abs().max().item(),
    providers={
        "wsi-rt": lambda x: lambda: shared_prefix_attention(*x.values()),
        "torch-sdpa": _unshared,
        "reference": _published,
    },
    eager="reference",
)
