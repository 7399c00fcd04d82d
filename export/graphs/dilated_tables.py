"""Where the branches of dilated attention find their keys and queries: tables of rows, computed in the graph from the
number of tokens alone, once for all layers (SPEC 3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from onnx import TensorProto

from wsi_rt.export.graphs.builder import GraphBuilder

SUMS = 2  # values a and b behind those of a head


@dataclass(frozen=True)
class Heads:
    count: int
    width: int

    @property
    def value_width(self) -> int:
        """A head's values with a and b, filled up to a width that onnxruntime 1.32 multiplies fast: 140 GFLOP/s at 56,
        81 at 49 (two cores)."""
        return -(-(self.width + SUMS) // 8) * 8

    @property
    def extra(self) -> int:
        return self.value_width - self.width

    @property
    def value_row(self) -> int:
        """All heads' values of a token."""
        return self.count * self.value_width


@dataclass(frozen=True)
class Part:
    """Names of i64 tables whose values are rows of [tokens * r, C / r] views: keys [B, n + 1], the appended one last,
    queries [B, n], and places [B * n, 1], where results go. B: segments times groups of heads."""

    keys: str
    queries: str
    places: str


@dataclass(frozen=True)
class Branch:
    """parts: the whole segments before the last one, perhaps none, and the last one."""

    segment: int
    ratio: int
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Tables:
    """Names of what depends on the number of tokens L alone. Behind them stand a zero-padded key, row L, then each
    part's appended one, then what fills up the chunks.

    end: i64 [1], L. filling: i64 [1], rows behind L. chunks: i64 [1]. real: f32 [chunks, rows, 1], 1 for a token, else
    0. sums: f32 [chunks, rows, 1, extra], a and b of each row, then zeros.
    """

    branches: tuple[Branch, ...]
    end: str
    filling: str
    chunks: str
    real: str
    sums: str


def make_tables(
    b: GraphBuilder, tokens: str, segments: Sequence[int], ratios: Sequence[int], heads: Heads, chunk_rows: int
) -> Tables:
    """For sequences as long as `tokens` [L, ...]; a chunk has at most so many rows. The ratios divide the heads."""
    end = b.op("Shape", [tokens], start=0, end=1)
    branches: list[Branch] = []
    missing: list[str] = []
    for w, r in zip(segments, ratios, strict=True):
        with b.scope(f"branch_{w}_{r}"):
            branch, left_out = _branch(b, end, w, r, 1 + len(missing))
        branches.append(branch)
        missing += left_out
    used = b.op("Add", [end, b.constant([1 + len(missing)])])
    chunks = _ceil_div(b, used, chunk_rows)
    rows = b.op("Div", [b.op("Add", [used, b.op("Sub", [chunks, b.constant([1])])]), chunks])
    total = b.op("Mul", [chunks, rows])
    filling = b.op("Sub", [total, end])
    real = b.op("Less", [_range(b, total), end])
    real = b.op("Cast", [real], to=TensorProto.FLOAT)
    sums = _sums(b, end, filling, missing, heads)
    shapes = [b.op("Concat", [chunks, rows, b.constant(dims)], axis=0) for dims in ([1], [1, heads.extra])]
    real, sums = (b.op("Reshape", [x, shape]) for x, shape in zip((real, sums), shapes, strict=True))
    return Tables(tuple(branches), end, filling, chunks, real, sums)


def _sums(b: GraphBuilder, end: str, filling: str, missing: Sequence[str], heads: Heads) -> str:
    """[L + filling, extra]. Keys carry (0, 1); so do zero-padded ones and, unused, the filling. The appended key of a
    part carries (1, n), n the zero-padded keys that its tables leave out."""
    unit = np.eye(heads.extra, dtype=np.float32)[:SUMS]
    a, one = (b.constant(u[None], np.float32, f"unit_{n}") for u, n in zip(unit, "ab", strict=True))  # [1, extra]
    counts = b.op("Reshape", [b.op("Concat", missing, axis=0), b.constant([-1, 1])])
    appended = b.op("Add", [b.op("Mul", [counts, one]), a])
    width = b.constant([heads.extra])
    before = b.op("Expand", [one, b.op("Concat", [b.op("Add", [end, b.constant([1])]), width], axis=0)])
    behind = b.op("Sub", [filling, b.constant([1 + len(missing)])])
    behind = b.op("Expand", [one, b.op("Concat", [behind, width], axis=0)])
    return str(b.op("Concat", [before, appended, behind], axis=0))


def _branch(b: GraphBuilder, end: str, w: int, r: int, first_key: int) -> tuple[Branch, list[str]]:
    """-> the branch, whose appended keys stand from row L + first_key on, and f32 [1] for each part: the zero-padded
    keys that its tables leave out."""
    length = b.op("Min", [end, b.constant([w])])  # w'
    before = b.op("Div", [b.op("Sub", [end, b.constant([1])]), length])
    start = b.op("Mul", [before, length])
    last = b.op("Sub", [end, start])
    kept, found = _ceil_div(b, length, r), _ceil_div(b, last, r)
    missing = b.op("Cast", [b.op("Sub", [kept, found])], to=TensorProto.FLOAT)
    with b.scope("whole"):
        whole = _part(b, (b.constant([0]), before, length, kept), end, r, first_key)
    with b.scope("last"):
        ragged = _part(b, (start, b.constant([1]), last, found), end, r, first_key + 1)
    return Branch(w, r, (whole, ragged)), [b.constant([0.0], np.float32), missing]


def _part(b: GraphBuilder, part: tuple[str, str, str, str], end: str, r: int, key: int) -> Part:
    """part: first token, segments, tokens of each, positions that each group keeps of them. Token t's heads of group g
    are row t r + g; a position beyond the segment is row L's, where there is a zero key and a place without a reader.
    """
    start, segments, length, kept = part
    group, step = b.constant(np.arange(r).reshape(r, 1), name=f"groups_{r}"), b.constant([r])  # [r, 1]
    position = b.op("Add", [group, b.op("Mul", [_range(b, kept), step])])  # [r, n]
    firsts = b.op("Add", [start, b.op("Mul", [_range(b, segments), length])])
    token = b.op("Add", [b.op("Reshape", [firsts, b.constant([-1, 1, 1])]), position])  # [segments, r, n]
    token = b.op("Where", [b.op("Less", [position, length]), token, end])
    row = b.op("Add", [b.op("Mul", [token, step]), group])
    appended = b.op("Add", [b.op("Mul", [b.op("Add", [end, b.constant([key])]), step]), group])
    appended = b.op("Expand", [appended, b.op("Concat", [segments, b.constant([r, 1])], axis=0)])
    queries, extra = (
        b.op("Reshape", [x, b.op("Concat", [b.op("Mul", [segments, step]), n], axis=0)])
        for x, n in ((row, kept), (appended, b.constant([1])))
    )  # [segments * r, n], [segments * r, 1]
    of_token = b.op("Min", [queries, b.op("Sub", [b.op("Mul", [end, step]), b.constant([1])])])
    keys = b.op("Concat", [queries, extra], axis=1)
    return Part(keys, of_token, b.op("Reshape", [row, b.constant([-1, 1])]))


def _ceil_div(b: GraphBuilder, x: str, divisor: int) -> str:
    return str(b.op("Div", [b.op("Add", [x, b.constant([divisor - 1])]), b.constant([divisor])]))


def _range(b: GraphBuilder, count: str) -> str:
    """[count]: 0, 1, ..."""
    return str(b.op("Range", [b.constant(0), b.op("Squeeze", [count, b.constant([0])]), b.constant(1)]))
