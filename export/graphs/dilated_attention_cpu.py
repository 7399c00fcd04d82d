"""Dilated attention for onnxruntime's CPU provider: its fused MultiHeadAttention, which keeps no matrix of scores, and
the sum of exponentials that it does not return, by one key more (SPEC 3).

A branch's queries, keys and values are gathered from token rows cut into r groups of heads, [L, r, C / r], by tables
that are computed once for all layers. Each key carries two more values (a, b): real ones (0, 1), which the value
projection itself delivers as its bias; the appended key, which is zero, (1, n), n the zero-padded keys that the branch
would also have, so that they are never multiplied. The operator then gives a = 1 / (Z + 1) and b = (Z + n) / (Z + 1),
so that everything over a is a sum of exponentials, and the branches' sums are added where the tokens stand.

Exponentials of scores beyond about 65 either way leave fp32's range in that. The smallest a and b of a layer tell; it
is then computed again by `dilated_attention`, one segment and head at a time, from scores of any size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from onnx import TensorProto, helper

from wsi_rt.export.graphs.builder import ORT_DOMAIN, GraphBuilder
from wsi_rt.export.graphs.dilated_attention import dilated_attention

SUMS = 2  # columns a and b
# Of an a or b: numerators a million times smaller than it still have all their bits (fp32 ends at 1.2e-38).
SMALLEST = 1e-30


@dataclass(frozen=True)
class Branch:
    """segment: its length. parts: whole segments but the last, and the last."""

    segment: int
    ratio: int
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Part:
    """Names of tables i64, rows of [.., r, C / r] views: keys [B, n + 1], queries [B, n], and places [B * n, 1] where
    the results go. B: segments times groups of heads."""

    keys: str
    queries: str
    places: str


@dataclass(frozen=True)
class Tables:
    """tail: f32 [1 + 2 branches, H * value_width], what stands behind the values of L tokens: a zero-padded key, then
    the appended ones. key_tail: the same of keys. end: [1], L."""

    branches: tuple[Branch, ...]
    tail: str
    key_tail: str
    end: str


@dataclass(frozen=True)
class Heads:
    count: int
    width: int

    @property
    def value_width(self) -> int:
        """A head's values with (a, b), filled up to a width that the operator multiplies fast: 140 GFLOP/s at 56, 81 at
        49 (two cores, onnxruntime 1.32)."""
        return -(-(self.width + SUMS) // 8) * 8


def fits(heads: int, ratios: Sequence[int]) -> bool:
    """Whether each branch has equal groups of heads."""
    return all(heads % r == 0 for r in ratios)


def make_tables(b: GraphBuilder, tokens: str, segments: Sequence[int], ratios: Sequence[int], heads: Heads) -> Tables:
    """For sequences as long as `tokens` [L, ...]."""
    end = b.op("Shape", [tokens], start=0, end=1)
    branches, counts = [], [b.constant([0.0], np.float32)]
    for i, (w, r) in enumerate(zip(segments, ratios, strict=True)):
        with b.scope(f"branch_{w}_{r}"):
            branch, padding = _branch_tables(b, end, w, r, 1 + 2 * i)
        branches.append(branch)
        counts += padding
    rows = len(counts)
    one_key = np.zeros((rows, 1, heads.value_width), np.float32)
    one_key[0, 0, heads.width + 1] = 1  # a zero-padded key counts as a real one
    one_key[1:, 0, heads.width] = 1
    counted = np.zeros((1, 1, heads.value_width), np.float32)
    counted[..., heads.width + 1] = 1
    n = b.op("Reshape", [b.op("Concat", counts, axis=0), b.constant([-1, 1, 1])])
    head = b.op(
        "Add",
        [
            b.constant(one_key, np.float32, "one_key"),
            b.op("Mul", [n, b.constant(counted, np.float32, "counted")]),
        ],
    )
    tail = b.op("Reshape", [b.op("Tile", [head, b.constant([1, heads.count, 1])]), b.constant([rows, -1])])
    key_tail = b.op("ConstantOfShape", [b.constant([rows, heads.count * heads.width])])
    return Tables(tuple(branches), tail, key_tail, end)


def _branch_tables(b: GraphBuilder, end: str, w: int, r: int, tail: int) -> tuple[Branch, list[str]]:
    """-> the branch, and the zero-padded keys that its parts' tables leave out, f32 [1] each."""
    one, step = b.constant([1]), b.constant([r])
    length = b.op("Min", [end, b.constant([w])])  # w'
    before = b.op("Div", [b.op("Sub", [end, one]), length])  # whole segments before the last
    start = b.op("Mul", [before, length])
    last = b.op("Sub", [end, start])
    kept = b.op("Div", [b.op("Add", [length, b.constant([r - 1])]), step])  # ceil(w' / r)
    real = b.op("Div", [b.op("Add", [last, b.constant([r - 1])]), step])
    missing = b.op("Cast", [b.op("Sub", [kept, real])], to=TensorProto.FLOAT)
    with b.scope("whole"):
        whole = _part_tables(b, (b.constant([0]), before, length, kept), end, r, tail)
    with b.scope("last"):
        ragged = _part_tables(b, (start, one, last, real), end, r, tail + 1)
    return Branch(w, r, (whole, ragged)), [b.constant([0.0], np.float32), missing]


def _part_tables(b: GraphBuilder, part: tuple[str, str, str, str], end: str, r: int, tail: int) -> Part:
    """part: first token, segments, tokens and kept positions of each. tail: row of its appended key behind L."""
    start, segments, length, kept = part
    group = b.constant(np.arange(r).reshape(r, 1), name=f"groups_{r}")  # [r, 1]
    step = b.constant(r)
    inside = b.op("Add", [group, b.op("Mul", [_range(b, kept), step])])  # [r, n], position in the segment
    firsts = b.op("Add", [start, b.op("Mul", [_range(b, segments), length])])
    token = b.op("Add", [b.op("Reshape", [firsts, b.constant([-1, 1, 1])]), inside])  # [segments, r, n]
    token = b.op("Where", [b.op("Less", [inside, length]), token, end])
    row = b.op("Add", [b.op("Mul", [token, step]), group])
    places = b.op("Reshape", [row, b.constant([-1, 1])])
    appended = b.op("Add", [b.op("Mul", [b.op("Add", [end, b.constant([tail])]), step]), group])
    dims = b.op("Concat", [segments, b.constant([r, 1])], axis=0)
    keys = b.op("Concat", [row, b.op("Expand", [appended, dims])], axis=2)
    keys = b.op("Flatten", [b.op("Flatten", [keys], axis=2)], axis=1)  # [segments * r, n + 1]
    real = b.op("Sub", [b.op("Mul", [end, step]), b.constant([1])])
    queries = b.op("Flatten", [b.op("Min", [row, real])], axis=2)  # [segments * r, n]
    return Part(keys, queries, places)


def _range(b: GraphBuilder, count: str) -> str:
    """[count]: 0, 1, ..."""
    return b.op("Range", [b.constant(0), b.op("Squeeze", [count, b.constant([0])]), b.constant(1)])


def dilated_attention_cpu(b: GraphBuilder, q: str, k: str, v: str, tables: Tables, heads: Heads) -> str:
    """q, k: [L, H * width], v: [L, H * value_width] with (a, b) = (0, 1) behind each head's values -> [L, H * width]."""
    tailed = b.op("Concat", [k, tables.key_tail], axis=0), b.op("Concat", [v, tables.tail], axis=0)
    total, smallest = None, []
    for branch in tables.branches:
        with b.scope(f"branch_{branch.segment}_{branch.ratio}"):
            sums = []
            for part in branch.parts:
                x, least = _attend(b, (q, *tailed), part, branch.ratio, heads)
                sums.append(x)
                smallest.append(least)
            total = _added(b, total, sums, branch, tables, heads)
    least = b.op("Min", smallest)
    wide = [-1, heads.count, heads.value_width]
    total = b.op("Reshape", [total, b.constant(wide)])
    starts, ends = b.constant([0, 0]), b.op("Concat", [tables.end, b.constant([heads.width])], axis=0)
    out = b.op("Slice", [total, starts, ends, b.constant([0, 2])])
    z_at = heads.width + 1
    z_ends = b.op("Concat", [tables.end, b.constant([z_at + 1])], axis=0)
    z = b.op("Slice", [total, b.constant([0, z_at]), z_ends, b.constant([0, 2])])
    return b.op("Reshape", [b.op("Div", [out, z]), b.constant([0, -1])])


def _attend(b: GraphBuilder, qkv: Sequence[str], part: Part, r: int, heads: Heads) -> tuple[str, str]:
    """-> sums [B, n, H / r, value_width], the smallest a or b [1]."""
    inputs = []
    for x, width, table in zip(
        qkv,
        (heads.width, heads.width, heads.value_width),
        (part.queries, part.keys, part.keys),
        strict=True,
    ):
        rows = b.op("Reshape", [x, b.constant([-1, heads.count // r * width])])
        inputs.append(b.op("Gather", [rows, table]))
    scale = heads.width**-0.5
    x = b.op("MultiHeadAttention", inputs, domain=ORT_DOMAIN, num_heads=heads.count // r, scale=scale)
    x = b.op("Reshape", [x, b.constant([0, 0, heads.count // r, heads.value_width])])
    at = heads.width
    both = b.op("Slice", [x, b.constant([at]), b.constant([at + SUMS]), b.constant([3])])
    a = b.op("Slice", [x, b.constant([at]), b.constant([at + 1]), b.constant([3])])
    least = b.op("ReduceMin", [both], keepdims=0)
    return b.op("Div", [x, a]), least


def _added(
    b: GraphBuilder, total: str | None, sums: Sequence[str], branch: Branch, tables: Tables, heads: Heads
) -> str:
    """total [(L + 1), H * value_width] or none yet, plus the sums of a branch; row L takes what stands nowhere."""
    row = heads.count * heads.value_width
    if total is None and branch.ratio == 1:  # every token in its place
        flat = [b.op("Reshape", [x, b.constant([-1, row])]) for x in sums]
        return b.op("Concat", [*flat, b.op("ConstantOfShape", [b.constant([1, row])])], axis=0)
    if total is None:
        rows = b.op("Add", [tables.end, b.constant([1])])
        total = b.op("ConstantOfShape", [b.op("Concat", [rows, b.constant([row])], axis=0)])
    total = b.op("Reshape", [total, b.constant([-1, row // branch.ratio])])
    for x, part in zip(sums, branch.parts, strict=True):
        updates = b.op("Reshape", [x, b.constant([-1, row // branch.ratio])])
        total = b.op("ScatterND", [total, part.places, updates], reduction="add")
    return total
