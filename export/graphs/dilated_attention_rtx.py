"""Dilated attention (SPEC 3) as TensorRT-RTX computes it: a branch is one fused Attention, which keeps no matrix of
scores and returns no sum of exponentials.

That sum comes from one key more. Heads of D are filled up to a width W that the kernel likes (48 to 64), and what fills
them works: a query has a number in column D that gives the appended key, zero elsewhere, the score t. Values have two
columns (b, a) behind their D: a branch's own keys, zero-padded ones included, carry (1, 0), the appended one (0, A).
With Z the sum of exp(score) over its own keys, the operator gives a = A e^t / (Z + e^t) and b = Z / (Z + e^t), and what
is over a is a sum of exponentials times e^-t / A; t is a query's, not a branch's, so those of all branches are added
where their tokens stand, in fp32, and the factor falls out.

fp16 ends early: an exponential below 2^-14 of the largest loses bits. So t has to lie near log Z, and is estimated from
the mean and the second moment of a head's keys over the whole slide: with scores as of a normal distribution of mean u
and deviation s, log Z of n keys is u + log n + s^2 / 2 up to s = sqrt(2 log n), and u + s sqrt(2 log n) beyond (the
random energy model); never more than what the longest key allows. Limits of a / A and b, below which a sum would be off
by more than 1 %, are checked: `headroom`, the smallest of them over its limit. Below 1, do not trust.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import onnx

from wsi_rt.export.graphs.attention_rtx import fused_attention
from wsi_rt.export.graphs.builder import OUR_DOMAIN, GraphBuilder
from wsi_rt.export.graphs.layers import FLOAT

NAME = "DilatedAttentionFused"
HEADROOM = "attention_headroom"  # f32 scalar, an output of the engine beside the portable graph's
_SUMS = 2  # columns b and a


@dataclass(frozen=True)
class Range:
    """scale_a: A. least_a, least_b: limits of a / A and b."""

    scale_a: float
    least_a: float
    least_b: float


# fp16: an exponential of 2^-18 of the largest is 64 steps of 2^-24, off by 0.8 % at most; b as stored has its bits from
# 2^-14. log Z may lie 12 above t or 9 below. bf16 has the range of fp32, whose limit is `dilated_attention_cpu`'s.
_WIDE = Range(scale_a=1.0, least_a=1e-30, least_b=1e-30)
RANGES = {"fp32": _WIDE, "bf16": _WIDE, "fp16": Range(scale_a=2.0**14, least_a=2.0**-18, least_b=2.0**-14)}
_KEYS = 2048.0  # n of the estimate, unless the slide has fewer tokens: between the fewest and the most of a branch
_FROZEN = 0.92  # of sqrt(2 log n): the largest of finitely many is smaller, by a sixth among 1,000
_LOWEST = -4.0  # t is no lower: a zero-padded key has score 0


@dataclass(frozen=True)
class Widths:
    """heads, width: as the model has them."""

    heads: int
    width: int
    range: Range

    @property
    def filled(self) -> int:
        """W: with room for both columns, a multiple of 16."""
        return -(-(self.width + _SUMS) // 16) * 16

    @property
    def scale(self) -> float:
        return float(self.width**-0.5)

    @property
    def appended(self) -> float:
        """The appended key's column D: the power of two nearest to 1 / scale, which no half type rounds."""
        return 2.0 ** round(-math.log2(self.scale))


def fuse_calls(model: onnx.ModelProto, heads: int, width: int, precision: str) -> None:
    """Every call of `wsi_rt::DilatedAttention` becomes one of the fused form; the graph has `attention_headroom`, the
    smallest of its layers, as an output more. precision: "fp32", "fp16" or "bf16"."""
    headrooms: list[str] = []
    for node in model.graph.node:
        if (node.domain, node.op_type) != (OUR_DOMAIN, "DilatedAttention"):
            continue
        lists = {a.name: tuple(a.ints) for a in node.attribute}
        function = fused_function(
            lists["segment_lengths"], lists["dilated_ratios"], Widths(heads, width, RANGES[precision])
        )
        if not headrooms:
            model.functions.append(function)
        node.op_type = NAME
        node.output.append(f"{node.output[0]}/headroom")
        headrooms.append(node.output[1])
    if not headrooms:
        raise ValueError("the graph calls no wsi_rt::DilatedAttention")
    least = onnx.helper.make_node("Min", headrooms, [HEADROOM], name=f"/{HEADROOM}/Min")
    model.graph.node.append(least)
    model.graph.output.append(onnx.helper.make_tensor_value_info(HEADROOM, FLOAT, []))


@lru_cache(maxsize=8)
def fused_function(segments: Sequence[int], ratios: Sequence[int], widths: Widths) -> onnx.FunctionProto:
    """`wsi_rt::DilatedAttentionFused`: q, k, v [L, H, D] -> [L, H, D], headroom []."""
    b = GraphBuilder(NAME)
    length = b.op("Shape", ["q"], start=0, end=1)
    with b.scope("estimate"):
        t = _estimate(b, length, widths)
        column = b.op("Mul", [t, b.constant(1 / (widths.appended * widths.scale), np.float32, "per_t")])
        query = b.op("Concat", ["q", column], axis=2)  # [L, H, D + 1]
    total, least = "", []
    for w, r in zip(segments, ratios, strict=True):
        with b.scope(f"branch_{w}_{r}"):
            sizes = _sizes(b, length, w, r)
            sums, smallest = _branch(b, query, r, sizes, widths)
            sums = _undilate(b, sums, r, sizes, widths)
            total = b.op("Add", [total, sums]) if total else sums
        least.append(smallest)
    values, z = b.op("Split", [total, b.constant([widths.width, 1])], axis=-1, outputs=2)
    floor = b.constant(np.finfo(np.float32).tiny, np.float32, "tiny")  # of what no branch keeps; nothing else is so low
    out = b.op("Div", [values, b.op("Max", [z, floor])])
    headroom = b.op("Min", least) if len(least) > 1 else least[0]
    return b.function(["q", "k", "v"], [out, headroom], ["segment_lengths", "dilated_ratios"])


def _estimate(b: GraphBuilder, length: str, w: Widths) -> str:
    """[L, H, 1]: t of every query, about the log of its sum of exponentials, from the keys of the whole slide. fp32."""
    f32 = np.float32

    def dot(x: str, y: str) -> str:
        return str(b.op("ReduceSum", [b.op("Mul", [x, y]), b.constant([-1])], keepdims=1))

    tokens = b.op("Cast", [length], to=FLOAT)  # [1]
    log_n = b.op("Log", [b.op("Min", [tokens, b.constant(_KEYS, f32, "keys")])])
    limit = b.op("Sqrt", [b.op("Mul", [log_n, b.constant(2 * _FROZEN**2, f32, "frozen")])])
    mean = b.op("ReduceMean", ["k", b.constant([0])], keepdims=1)
    second = b.op("Div", [b.op("Einsum", ["k", "k"], equation="lhd,lhe->hde"), tokens])
    scaled = b.op("Mul", ["q", b.constant(w.scale, f32, "scale")])
    u = dot(scaled, mean)
    moment = dot(b.op("Einsum", [scaled, second], equation="lhd,hde->lhe"), scaled)
    variance = b.op("Max", [b.op("Sub", [moment, b.op("Mul", [u, u])]), b.constant(0.0, f32, "zero")])
    beyond = b.op("Relu", [b.op("Sub", [b.op("Sqrt", [variance]), limit])])
    gain = b.op("Mul", [b.op("Sub", [variance, b.op("Mul", [beyond, beyond])]), b.constant(0.5, f32, "half")])
    longest = b.op("ReduceMax", [dot("k", "k"), b.constant([0])], keepdims=1)  # squared, [1, H, 1]
    most = b.op("Sqrt", [b.op("Mul", [dot(scaled, scaled), longest])])
    t = b.op("Add", [b.op("Min", [b.op("Add", [u, gain]), most]), log_n])
    return str(b.op("Max", [t, b.constant(_LOWEST, f32, "lowest")]))


def _sizes(b: GraphBuilder, length: str, w: int, r: int) -> dict[str, str]:
    """i64 [1] each: L, w' = min(w, L), segments, and m, the positions of a segment that a head keeps."""
    w_eff = b.op("Min", [length, b.constant([w])])
    segs = b.op("Div", [b.op("Sub", [b.op("Add", [length, w_eff]), b.constant([1])]), w_eff])
    m = b.op("Div", [b.op("Add", [w_eff, b.constant([r - 1])]), b.constant([r])])
    return {"length": length, "w": w_eff, "segs": segs, "m": m}


def _branch(b: GraphBuilder, query: str, r: int, sizes: dict[str, str], w: Widths) -> tuple[str, str]:
    """query: q with its column, [L, H, D + 1] -> sums [S, m, H', D + 1] of exp(score) v and of exp(score), over A e^t,
    in fp32; the smallest a or b over its limit."""
    heads, fill = w.heads + -w.heads % r, w.filled - w.width
    unit = np.eye(fill, dtype=np.float32)
    # What stands behind a head's own columns, in its own keys and in the appended one.
    own = {"q": 0 * unit[0, 1:], "k": 0 * unit[0], "v": unit[0]}
    last = {"k": w.appended * unit[0], "v": w.range.scale_a * unit[1]}
    one_row = b.op("Concat", [sizes["segs"], b.constant([1, heads, w.filled])], axis=0)
    filled = {}
    for name, source in (("q", query), ("k", "k"), ("v", "v")):
        with b.scope(name):
            width = w.filled - len(own[name])
            x = _dilate(b, source, r, sizes, w.heads, width)
            dims = b.op("Concat", [sizes["segs"], sizes["m"], b.constant([heads, len(own[name])])], axis=0)
            more = b.constant(own[name], np.float32, f"columns_{name}")
            x = b.op("Concat", [x, b.op("Expand", [more, dims])], axis=3)  # [S, m, H', W]
            if name in last:
                row = b.constant(np.concatenate([np.zeros(w.width), last[name]]), np.float32, f"appended_{name}")
                x = b.op("Concat", [x, b.op("Expand", [row, one_row])], axis=1)
            filled[name] = b.op("Transpose", [x], perm=[0, 2, 1, 3])  # [S, H', m or m + 1, W]
    x = b.op("Transpose", [fused_attention(b, filled["q"], filled["k"], filled["v"], w.scale)], perm=[0, 2, 1, 3])
    columns = [w.width + 1, 1, *([fill - _SUMS] if fill > _SUMS else [])]
    x, a, *_ = b.op("Split", [x, b.constant(columns)], axis=-1, outputs=len(columns))
    _, found = b.op("Split", [x, b.constant([w.width, 1])], axis=-1, outputs=2)
    limits = [(a, w.range.scale_a * w.range.least_a, "least_a"), (found, w.range.least_b, "least_b")]
    rooms = [
        b.op("Mul", [b.op("ReduceMin", [y], keepdims=0), b.constant(1 / least, np.float32, name)])
        for y, least, name in limits
    ]
    floor = b.constant(np.finfo(np.float32).tiny, np.float32, "tiny")
    return b.op("Div", [x, b.op("Max", [a, floor])]), b.op("Min", rooms)


def _dilate(b: GraphBuilder, x: str, r: int, sizes: dict[str, str], heads: int, width: int) -> str:
    """[L, H, width] -> [S, m, H', width]: head group g keeps positions g, g + r, ... of each zero-padded segment, the
    diagonal of [S, m, r positions x r groups, H' / r, width]."""
    padded, c = heads + -heads % r, b.constant
    missing = b.op("Sub", [b.op("Mul", [sizes["segs"], sizes["w"]]), sizes["length"]])
    x = b.op("Pad", [x, b.op("Concat", [c([0, 0, 0]), missing, c([padded - heads, 0])], axis=0)])
    x = _view(b, x, sizes["segs"], sizes["w"], c([padded, width]))
    if r == 1:
        return x
    missing = b.op("Sub", [b.op("Mul", [sizes["m"], c([r])]), sizes["w"]])
    x = b.op("Pad", [x, b.op("Concat", [c([0, 0, 0, 0, 0]), missing, c([0, 0])], axis=0)])
    x = _view(b, x, sizes["segs"], sizes["m"], c([r * r, padded // r, width]))
    x = b.op("Gather", [x, c(np.arange(r) * (r + 1), name=f"diagonal_{r}")], axis=2)
    return _view(b, x, sizes["segs"], sizes["m"], c([padded, width]))


def _undilate(b: GraphBuilder, x: str, r: int, sizes: dict[str, str], w: Widths) -> str:
    """[S, m, H', D + 1] -> [L, H, D + 1], zero where a head keeps nothing."""
    heads, c = w.heads + -w.heads % r, b.constant
    if r > 1:
        x = _view(b, x, sizes["segs"], sizes["m"], c([1, r, heads // r, w.width + 1]))
        kept = c(np.eye(r, dtype=np.float32).reshape(r, r, 1, 1), np.float32, name=f"kept_{r}")
        x = b.op("Mul", [x, kept])  # [S, m, r positions, r groups, H' / r, D + 1]
        x = _view(b, x, sizes["segs"], b.op("Mul", [sizes["m"], c([r])]), c([heads, w.width + 1]))
        x = b.op("Slice", [x, c([0]), sizes["w"], c([1])])
    x = _view(b, x, c([-1, heads, w.width + 1]))
    ends = b.op("Concat", [sizes["length"], c([w.heads])], axis=0)
    return str(b.op("Slice", [x, c([0, 0]), ends, c([0, 1])]))


def _view(b: GraphBuilder, x: str, *dims: str) -> str:
    """Reshape to the concatenation of `dims`; a zero, which no size is, would be one."""
    shape = b.op("Concat", dims, axis=0) if len(dims) > 1 else dims[0]
    return str(b.op("Reshape", [x, shape], allowzero=1 if len(dims) > 1 else 0))
