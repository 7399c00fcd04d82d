"""Dilated attention for onnxruntime's CPU provider: its fused MultiHeadAttention, which keeps no matrix of scores, and
the sum of exponentials that it does not return, by one key more (SPEC 3).

A branch's queries, keys and values are rows of views with r groups of heads, gathered by `dilated_tables`. Each key has
two more values (a, b): (0, 1), and the appended one, which is zero, (1, n), n the zero-padded keys that the branch has,
too, so that these are never multiplied. The operator then gives a = 1 / (Z + 1) and b = (Z + n) / (Z + 1), and
everything over a is a sum of exponentials: those of all branches are added where their tokens stand.

Scores beyond about 65 either way leave fp32's range in that. The smallest a and b of a layer tell; it is then attended
to again by `dilated_attention`, from scores of any size, one segment and head at a time.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from wsi_rt.export.graphs.builder import ORT_DOMAIN, Dims, GraphBuilder
from wsi_rt.export.graphs.dilated_attention import dilated_attention
from wsi_rt.export.graphs.dilated_tables import SUMS, Branch, Heads, Part, Tables

# The smallest a or b that is trusted: what is a million times smaller still has all its bits (fp32 ends at 1.2e-38).
SMALLEST = 1e-30


def dilated_attention_cpu(b: GraphBuilder, q: str, k: str, v: str, tables: Tables, heads: Heads) -> str:
    """q, k [rows, H * width], v [rows, H * value_width] with a and b behind each head's values, all as `Tables` says
    -> [rows, H * width]; what is behind the tokens is finite."""
    total: str | None = None
    smallest: list[str] = []
    for branch in tables.branches:
        with b.scope(f"branch_{branch.segment}_{branch.ratio}"):
            attended = [_attend(b, (q, k, v), part, branch.ratio, heads) for part in branch.parts]
            sums = [b.op("Reshape", [x, b.constant([-1, heads.value_row // branch.ratio])]) for x, _ in attended]
            total = _added(b, total, sums, branch, tables, heads)
        smallest += [least for _, least in attended]
    if total is None:
        raise ValueError("no branches")
    trusted = b.op("Greater", [b.op("Min", smallest), b.constant(SMALLEST, np.float32, "smallest")])
    dims: Dims = ("rows", heads.count * heads.width)
    with b.scope("merge"), b.body({}) as merged:
        merged.results.append((_merged(b, total, heads), dims))
    with b.scope("again"), b.body({}) as again:
        again.results.append((_again(b, q, k, v, tables, heads), dims))
    return str(b.op("If", [trusted], then_branch=merged.graph, else_branch=again.graph))


def _attend(b: GraphBuilder, qkv: Sequence[str], part: Part, r: int, heads: Heads) -> tuple[str, str]:
    """-> sums [B, n, H / r, value_width], the smallest a or b."""
    group, tables = heads.count // r, (part.queries, part.keys, part.keys)
    views = [b.op("Reshape", [x, b.constant([-1, group * n])]) for x, n in zip(qkv, _widths(heads), strict=True)]
    gathered = [b.op("Gather", [x, table]) for x, table in zip(views, tables, strict=True)]
    x = b.op("MultiHeadAttention", gathered, domain=ORT_DOMAIN, num_heads=group, scale=heads.width**-0.5)
    x = b.op("Reshape", [x, b.constant([0, 0, group, heads.value_width])])
    a, both = (b.op("Slice", [x, *_columns(b, heads.width, n)]) for n in (1, SUMS))
    return b.op("Div", [x, a]), b.op("ReduceMin", [both], keepdims=0)


def _widths(heads: Heads) -> tuple[int, int, int]:
    return heads.width, heads.width, heads.value_width


def _columns(b: GraphBuilder, start: int, count: int) -> list[str]:
    """Inputs of a Slice along the last axis."""
    return [b.constant([start]), b.constant([start + count]), b.constant([-1])]


def _added(
    b: GraphBuilder, total: str | None, sums: Sequence[str], branch: Branch, tables: Tables, heads: Heads
) -> str:
    """The total [rows * ratio', value_row / ratio'] of the branches before, if any, with this one's added."""
    if total is None and branch.ratio == 1:  # every token, in order
        dims = b.op("Concat", [tables.filling, b.constant([heads.value_row])], axis=0)
        return str(b.op("Concat", [*sums, b.op("ConstantOfShape", [dims])], axis=0))
    if total is None:
        rows = b.op("Add", [tables.end, tables.filling])
        total = b.op("ConstantOfShape", [b.op("Concat", [rows, b.constant([heads.value_row])], axis=0)])
    total = b.op("Reshape", [total, b.constant([-1, heads.value_row // branch.ratio])])
    for x, part in zip(sums, branch.parts, strict=True):
        total = b.op("ScatterND", [total, part.places, x], reduction="add")
    return str(total)


def _merged(b: GraphBuilder, total: str, heads: Heads) -> str:
    """Sums of exponentials times values, over the sum of exponentials; 0 where no branch keeps a position."""
    total = b.op("Reshape", [total, b.constant([-1, heads.count, heads.value_width])])
    values, z = (
        b.op("Slice", [total, *_columns(b, 0, heads.width)]),
        b.op("Slice", [total, *_columns(b, heads.width + 1, 1)]),
    )
    z = b.op("Max", [z, b.constant(SMALLEST, np.float32, "smallest")])
    return str(b.op("Reshape", [b.op("Div", [values, z]), b.constant([-1, heads.count * heads.width])]))


def _again(b: GraphBuilder, q: str, k: str, v: str, tables: Tables, heads: Heads) -> str:
    """The same of the same, from scores of any size."""
    split = [
        b.op("Reshape", [x, b.constant([-1, heads.count, n])]) for x, n in zip((q, k, v), _widths(heads), strict=True)
    ]
    ends = b.op("Concat", [tables.end, b.constant([heads.width])], axis=0)
    q, k, v = (b.op("Slice", [x, b.constant([0, 0]), ends, b.constant([0, 2])]) for x in split)
    segments, ratios = ([getattr(branch, n) for branch in tables.branches] for n in ("segment", "ratio"))
    x = dilated_attention(b, q, k, v, segments, ratios, heads.count, heads.width, bounded=True)
    x = b.op("Reshape", [x, b.constant([-1, heads.count * heads.width])])
    return str(b.op("Pad", [x, b.op("Concat", [b.constant([0, 0]), tables.filling, b.constant([0])], axis=0)]))
