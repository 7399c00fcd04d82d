"""Dilated attention as ONNX function bodies of standard operators (SPEC 3).

`wsi_rt::DilatedAttention` keeps its branch list as attributes, so that a target with a kernel of its own
can replace the call; every other runtime inlines the body.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import onnx

from wsi_rt.export.graphs.builder import GraphBuilder

NOT_KEPT = -1e30  # log-sum-exp of a (position, head) that a branch does not keep


def dilated_attention(
    b: GraphBuilder,
    q: str,
    k: str,
    v: str,
    segments: Sequence[int],
    ratios: Sequence[int],
    heads: int,
    width: int,
    bounded: bool = False,
) -> str:
    """q, k, v: [L, heads, width] values of `b` -> [L, heads, width].

    bounded: one segment and head after the other, so that the scores of one alone are in memory at a time: 268 MB for
    each of three copies at the published lengths below 185,363 tokens. Several times slower.
    """
    body, branches = _function(tuple(segments), tuple(ratios), heads, width, bounded)
    for branch in branches:
        b.declare(branch)
    return b.call(body, [q, k, v], segment_lengths=list(segments), dilated_ratios=list(ratios))


@lru_cache(maxsize=8)
def _function(
    segments: tuple[int, ...], ratios: tuple[int, ...], heads: int, width: int, bounded: bool
) -> tuple[onnx.FunctionProto, list[onnx.FunctionProto]]:
    branches = [_branch(w, r, heads, width, bounded) for w, r in zip(segments, ratios, strict=True)]
    b = GraphBuilder("DilatedAttention" + "Bounded" * bounded)
    outs, lses = zip(*(b.call(branch, ["q", "k", "v"]) for branch in branches), strict=True)
    top = b.op("Max", lses)  # [L, H, 1]
    weights = [b.op("Exp", [b.op("Sub", [lse, top])]) for lse in lses]
    total = b.op("Sum", [b.op("Mul", [w, o]) for w, o in zip(weights, outs, strict=True)])
    out = b.op("Div", [total, b.op("Sum", weights)])
    return b.function(["q", "k", "v"], [out], ["segment_lengths", "dilated_ratios"]), branches


def _branch(w: int, r: int, heads: int, width: int, bounded: bool) -> onnx.FunctionProto:
    """One branch: q, k, v [L, H, D] -> output [L, H, D], log-sum-exp [L, H, 1]."""
    b = GraphBuilder(f"DilatedBranch{'Bounded' * bounded}_{w}_{r}")
    length = b.op("Shape", ["q"], start=0, end=1)
    one = b.constant([1])
    w_eff = b.op("Min", [length, b.constant([w])])
    segs = b.op("Div", [b.op("Sub", [b.op("Add", [length, w_eff]), one]), w_eff])  # ceil(L / w')
    m = b.op("Div", [b.op("Add", [w_eff, b.constant([r - 1])]), b.constant([r])])  # ceil(w' / r)
    sizes = {"length": length, "w": w_eff, "segs": segs, "m": m}
    with b.scope("q"):
        q = b.op("Transpose", [_dilate(b, "q", r, heads, width, sizes)], perm=[0, 2, 1, 3])  # [S, H', m, D]
    with b.scope("k"):
        k = b.op("Transpose", [_dilate(b, "k", r, heads, width, sizes)], perm=[0, 2, 3, 1])  # [S, H', D, m]
    with b.scope("v"):
        v = b.op("Transpose", [_dilate(b, "v", r, heads, width, sizes)], perm=[0, 2, 1, 3])
    out, lse = _one_by_one(b, q, k, v, width, sizes) if bounded else _softmax(b, q, k, v, width)
    both = b.op("Transpose", [b.op("Concat", [out, lse], axis=-1)], perm=[0, 2, 1, 3])  # [S, m, H', D + 1]
    both = _undilate(b, both, r, heads, width, sizes)
    out, lse = b.op("Split", [both, b.constant([width, 1])], axis=-1, outputs=2)
    return b.function(["q", "k", "v"], [out, lse])


def _softmax(b: GraphBuilder, q: str, k: str, v: str, width: int) -> tuple[str, str]:
    """q, v [..., m, D], k [..., D, m] -> output [..., m, D], log-sum-exp [..., m, 1]."""
    scores = b.op("MatMul", [b.op("Mul", [q, b.constant(width**-0.5, np.float32)]), k])
    top = b.op("ReduceMax", [scores, b.constant([-1])], keepdims=1)
    exp = b.op("Exp", [b.op("Sub", [scores, top])])
    z = b.op("ReduceSum", [exp, b.constant([-1])], keepdims=1)
    out = b.op("Div", [b.op("MatMul", [exp, v]), z])
    return out, b.op("Add", [top, b.op("Log", [z])])


def _one_by_one(b: GraphBuilder, q: str, k: str, v: str, width: int, sizes: dict[str, str]) -> tuple[str, str]:
    """`_softmax` of [S, H', ...], one segment and head at a time."""
    rows, columns = b.constant([-1, width]), b.constant([width, -1])
    b.constant(width**-0.5, np.float32), b.constant([-1])  # here, where the function's other nodes see them, too
    with b.scope("one"), b.body({"q": ["values"], "k": ["values"], "v": ["values"]}) as one:
        q1, k1, v1 = (b.op("Reshape", [one.inputs[n], dims]) for n, dims in (("q", rows), ("k", columns), ("v", rows)))
        out, lse = _softmax(b, q1, k1, v1, width)
        one.results += [(out, ["m", width]), (lse, ["m", 1])]
    flat = [b.op("Flatten", [x], axis=2) for x in (q, k, v)]  # [S * H', m * D]
    out, lse = b.op("Scan", flat, outputs=2, body=one.graph, num_scan_inputs=3)
    shapes = [
        b.op("Concat", [sizes["segs"], b.constant([-1]), sizes["m"], b.constant([n])], axis=0) for n in (width, 1)
    ]
    return b.op("Reshape", [out, shapes[0]]), b.op("Reshape", [lse, shapes[1]])


def _dilate(b: GraphBuilder, x: str, r: int, heads: int, width: int, sizes: dict[str, str]) -> str:
    """[L, H, D] -> [S, m, H', D]: head group g keeps positions g, g + r, ... of each zero-padded segment.

    Viewed as [S, m, r positions x r groups, H' / r, D], a head's kept positions are the diagonal.
    """
    padded_heads = heads + -heads % r
    zero, c = b.constant([0]), b.constant
    missing = b.op("Sub", [b.op("Mul", [sizes["segs"], sizes["w"]]), sizes["length"]])
    pads = b.op("Concat", [c([0, 0, 0]), missing, c([padded_heads - heads, 0])], axis=0)
    x = b.op("Pad", [x, pads])
    x = b.op("Reshape", [x, b.op("Concat", [sizes["segs"], sizes["w"], c([padded_heads, width])], axis=0)])
    if r == 1:
        return x
    missing = b.op("Sub", [b.op("Mul", [sizes["m"], c([r])]), sizes["w"]])
    x = b.op("Pad", [x, b.op("Concat", [c([0, 0, 0, 0]), zero, missing, c([0, 0])], axis=0)])
    dims = [sizes["segs"], sizes["m"], c([r * r, padded_heads // r, width])]
    x = b.op("Reshape", [x, b.op("Concat", dims, axis=0)])
    x = b.op("Gather", [x, c(np.arange(r) * (r + 1), name="diagonal")], axis=2)
    return b.op("Reshape", [x, b.op("Concat", [sizes["segs"], sizes["m"], c([padded_heads, width])], axis=0)])


def _undilate(b: GraphBuilder, x: str, r: int, heads: int, width: int, sizes: dict[str, str]) -> str:
    """[S, m, H', D + 1] (output and log-sum-exp) -> [L, H, D + 1]; (0, NOT_KEPT) where a head keeps nothing."""
    padded_heads, c, zero = heads + -heads % r, b.constant, b.constant([0])
    if r > 1:
        dims = [sizes["segs"], sizes["m"], c([1, r, padded_heads // r, width + 1])]
        x = b.op("Reshape", [x, b.op("Concat", dims, axis=0)])
        kept = c(np.eye(r, dtype=bool).reshape(r, r, 1, 1), np.bool_, name="kept")
        fill = c([0.0] * width + [NOT_KEPT], np.float32, name="fill")
        x = b.op("Where", [kept, x, fill])  # [S, m, r positions, r groups, H' / r, D + 1]
        rows = b.op("Mul", [sizes["m"], c([r])])
        x = b.op("Reshape", [x, b.op("Concat", [sizes["segs"], rows, c([padded_heads, width + 1])], axis=0)])
        x = b.op("Slice", [x, zero, sizes["w"], c([1])])
    x = b.op("Reshape", [x, b.op("Concat", [c([-1]), c([padded_heads, width + 1])], axis=0)])
    ends = b.op("Concat", [sizes["length"], c([heads])], axis=0)
    return b.op("Slice", [x, c([0, 0]), ends, c([0, 1])])
