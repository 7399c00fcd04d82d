"""A Llama's layers on ONNX Runtime: one graph per layer's linear part, attention between them.

Every row of a call goes through the linear graphs together; attention treats each sequence on its own. The graphs are
those of `export.graphs.llama_layers`."""

from __future__ import annotations

import mmap
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from wsi_rt.runtime.engines.ort import open_session
from wsi_rt.runtime.llm.decoder import F32, KV, Chunk, PrefixKV

if TYPE_CHECKING:
    import onnxruntime

# Roles of the graphs in the manifest; a layer's is `layer_role(i)`.
EMBED, HEAD, PREFIX, OWN = "embed", "head", "attention.prefix", "attention.own"
KEYS = 64  # a sequence's keys are read in multiples of this (llama_layers.build_own_attention)
WIDE_ROWS = 8  # from so many rows on an integer product of whole rows is faster than blocks
ROWS = 256  # attended to at once: 32 heads x 256 rows x 4,096 keys of scores are 134 MB


def layer_role(i: int) -> str:
    """Of the graph between the attention of layer i - 1 and that of layer i."""
    return f"layers.{i}"


def wide_role(role: str) -> str:
    """Of the same graph for calls of many rows (`--fast`)."""
    return f"wide.{role}"


class OrtPrefix(PrefixKV):
    def __init__(self, layers: Sequence[F32]) -> None:
        self._layers, self.length = layers, layers[0].shape[1]

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in self._layers)

    def layers(self) -> Sequence[F32]:
        return self._layers


class OrtKV(KV):
    """f32 [layers, 2, room, kv_heads, head_width], token by token, so that any number of them is one piece of memory.
    The room is address space: a page takes memory when it is first written."""

    def __init__(self, shape: tuple[int, int, int], capacity: int, prefix: OrtPrefix | None) -> None:
        self.prefix, self.capacity = prefix, capacity
        self.length = self.shared
        layers, kv_heads, head_width = shape
        room = -(-(capacity - self.shared) // KEYS) * KEYS
        dims = (layers, 2, room, kv_heads, head_width)
        memory = mmap.mmap(-1, max(1, 4 * int(np.prod(dims))))
        self.own = np.frombuffer(memory, np.float32, count=int(np.prod(dims))).reshape(dims)

    @property
    def nbytes(self) -> int:
        return (self.length - self.shared) * self.own[:, :, :1].nbytes

    def write(self, layer: int, start: int, k: F32, v: F32) -> None:
        """k, v [T, kv_heads * D] of the tokens from position `start` on. `length` is the caller's to set."""
        rows = slice(start - self.shared, start - self.shared + len(k))
        for part, new in enumerate((k, v)):
            self.own[layer, part, rows] = new.reshape(-1, *self.own.shape[3:])

    def read(self, layer: int, end: int) -> tuple[F32, F32]:
        """Keys and values of its own tokens before position `end`, and what follows up to a multiple of KEYS."""
        rows = -(-(end - self.shared) // KEYS) * KEYS
        return self.own[layer, 0, :rows], self.own[layer, 1, :rows]


class OrtLayers:
    """The graphs of one language model.

    hold: every session stays open; else one layer's at a time, opened when it is used. wide_from: calls of so many rows
    or more go through the wide graphs.

    Sessions do not spin: there is one for each layer, and idle threads of 33 of them would take the cores from the one
    that works (3 x slower); nor keep freed memory, which each would hold for itself.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        graphs: Mapping[str, Path],
        weights_dir: Path,
        threads: int,
        hold: bool = False,
        wide_from: int | None = None,
    ) -> None:
        self.count, self.heads, self.hidden = config["layers"], config["heads"], config["hidden"]
        self.kv_heads, self.head_width = config["kv_heads"], config["head_width"]
        self._graphs, self._weights_dir, self._threads, self._hold = graphs, weights_dir, threads, hold
        self._wide_from = wide_from
        self._sessions: dict[str, onnxruntime.InferenceSession] = {}
        for role in graphs if hold else (PREFIX, OWN):
            if self.wide or not role.startswith(wide_role("")):
                self._session(role)

    @property
    def wide(self) -> bool:
        """Whether the wide graphs are in use."""
        return self._wide_from is not None

    def _role(self, role: str, rows: int) -> str:
        return wide_role(role) if self._wide_from is not None and rows >= self._wide_from else role

    def close(self) -> None:
        self._sessions.clear()

    def _session(self, role: str) -> onnxruntime.InferenceSession:
        if role not in self._sessions:
            if not self._hold:
                for other in [r for r in self._sessions if r not in (PREFIX, OWN)]:
                    del self._sessions[other]
            # A thread takes whole heads: what onnxruntime splits further it adds up in another order.
            threads = min(self._threads, self.kv_heads) if role in (PREFIX, OWN) else self._threads
            self._sessions[role] = open_session(self._graphs[role], self._weights_dir, threads, shared_cores=True)
        return self._sessions[role]

    def new_kv(self, capacity: int, prefix: OrtPrefix | None = None) -> OrtKV:
        return OrtKV((self.count, self.kv_heads, self.head_width), capacity, prefix)

    def embed(self, token_ids: NDArray[np.int64]) -> F32:
        """[T] -> [T, hidden]."""
        return self._session(EMBED).run(["embeds"], {"input_ids": token_ids})[0]

    def head(self, x: F32) -> F32:
        """x [rows, hidden], what came out of the last layer -> logits [rows, vocab]."""
        return self._session(self._role(HEAD, len(x))).run(["logits"], {"x": x})[0]

    def linear(self, i: int, feeds: Mapping[str, NDArray[Any]]) -> dict[str, F32]:
        """The graph between two attentions, see llama_layers.LayerGraph."""
        session = self._session(self._role(layer_role(i), len(feeds["x"])))
        names = [*(["y"] if i > 0 else []), *(["q", "k", "v"] if i < self.count else [])]
        wanted = ("x", *(["attended"] if i > 0 else []), *(["position"] if i < self.count else []))
        return dict(zip(names, session.run(names, {n: feeds[n] for n in wanted}), strict=True))

    def attend_prefix(self, q: F32, keys: F32) -> list[F32]:
        """q [rows, heads * D], keys and values [2, P, kv_heads, D] -> the three parts that `attend_own` joins."""
        if self._too_few(len(q)):
            return [x[:, :1] for x in self.attend_prefix(np.repeat(q, 2, axis=0), keys)]
        parts = [
            self._session(PREFIX).run(["weighted", "top", "total"], {"q": q[at], "k": keys[0], "v": keys[1]})
            for at in _pieces(len(q))
        ]
        return parts[0] if len(parts) == 1 else [np.concatenate(x, axis=1) for x in zip(*parts, strict=True)]

    def attend_own(self, q: F32, kv: OrtKV, layer: int, start: int, shared: Sequence[F32]) -> F32:
        """q [T, heads * D] of the tokens from `start` on, `shared` what they got from the prefix -> [T, heads * D]."""
        if self._too_few(len(q)):
            twice = [np.repeat(x, 2, axis=1) for x in shared]
            return self.attend_own(np.repeat(q, 2, axis=0), kv, layer, start, twice)[:1]
        groups, found = self.heads // self.kv_heads, []
        for at in _pieces(len(q)):
            k, v = kv.read(layer, start + at.stop)
            seen = np.array([start + at.start + 1 - kv.shared], np.int64)
            rows = slice(at.start * groups, at.stop * groups)
            weighted, top, total = (np.ascontiguousarray(x[:, rows]) for x in shared)
            feeds = {"q": q[at], "k": k, "v": v, "seen": seen, "weighted": weighted, "top": top, "total": total}
            found.append(self._session(OWN).run(["attended"], feeds)[0])
        return found[0] if len(found) == 1 else np.concatenate(found)

    def _too_few(self, rows: int) -> bool:
        """onnxruntime multiplies a single row in another order than two or more."""
        return rows * (self.heads // self.kv_heads) == 1

    def without_prefix(self, rows: int) -> list[F32]:
        """What `attend_prefix` would give for no keys."""
        dims = (self.kv_heads, rows * (self.heads // self.kv_heads))
        nothing = np.zeros((*dims, 1), np.float32)
        return [np.zeros((*dims, self.head_width), np.float32), nothing - np.float32(3e38), nothing]


class LayersRun:
    """New tokens on their way through the layers. starts: the position of each chunk's first token, default what its KV
    holds. The KVs are written to, but grow only with `commit`.

    x: f32 [rows, hidden], what comes out of the last layer it went through.
    """

    def __init__(self, chunks: Sequence[Chunk], starts: Sequence[int] | None = None) -> None:
        self.chunks = chunks
        self._starts = [c.kv.length for c in chunks] if starts is None else starts
        ends = np.cumsum([0, *(len(c.embeds) for c in chunks)])
        self._rows = [slice(a, b) for a, b in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True)]
        self.x: F32 = np.concatenate([c.embeds for c in chunks])
        self._position = np.concatenate(
            [np.arange(s, s + len(c.embeds)) for c, s in zip(chunks, self._starts, strict=True)]
        ).astype(np.int64)
        self._attended: F32 | None = None
        self._groups: dict[
            int, tuple[PrefixKV, list[int]]
        ] = {}  # by its identity, a prefix and the chunks that have it
        for i, chunk in enumerate(chunks):
            if chunk.kv.prefix is not None:
                self._groups.setdefault(id(chunk.kv.prefix), (chunk.kv.prefix, []))[1].append(i)

    def through(self, layers: OrtLayers, i: int) -> None:
        """From the attention of layer i - 1 through that of layer i."""
        feeds: dict[str, NDArray[Any]] = {"x": self.x, "position": self._position}
        if self._attended is not None:
            feeds["attended"] = self._attended
        out = layers.linear(i, feeds)
        self.x = out.get("y", self.x)
        if "q" in out:
            self._attended = self._attend(layers, i, out["q"], out["k"], out["v"])

    def last_rows(self) -> F32:
        """x of the positions whose logits are wanted, chunk by chunk."""
        wanted = (self.x[r.stop - c.logits : r.stop] for c, r in zip(self.chunks, self._rows, strict=True))
        return np.concatenate(list(wanted))

    def commit(self) -> None:
        for chunk, start in zip(self.chunks, self._starts, strict=True):
            chunk.kv.length = start + len(chunk.embeds)

    def _attend(self, layers: OrtLayers, layer: int, q: F32, k: F32, v: F32) -> F32:
        shared = self._attend_prefixes(layers, layer, q)
        attended = np.empty_like(q)
        for i, (chunk, rows, start) in enumerate(zip(self.chunks, self._rows, self._starts, strict=True)):
            kv = own_kv(chunk.kv)
            kv.write(layer, start, k[rows], v[rows])
            parts = shared.get(i) or layers.without_prefix(rows.stop - rows.start)
            attended[rows] = layers.attend_own(q[rows], kv, layer, start, parts)
        return attended

    def _attend_prefixes(self, layers: OrtLayers, layer: int, q: F32) -> dict[int, list[F32]]:
        """Each prefix once for all rows that have it -> by chunk."""
        found, groups = {}, layers.heads // layers.kv_heads
        for prefix, members in self._groups.values():
            rows = np.concatenate([q[self._rows[i]] for i in members]) if len(members) < len(self.chunks) else q
            parts, at = layers.attend_prefix(rows, prefix.layers()[layer]), 0
            for i in members:
                count = (self._rows[i].stop - self._rows[i].start) * groups
                found[i] = [x[:, at : at + count] for x in parts]
                at += count
        return found


def own_kv(kv: KV) -> OrtKV:
    if not isinstance(kv, OrtKV):
        raise TypeError(f"KV is a {type(kv).__name__}, expected this decoder's own OrtKV")
    return kv


def _pieces(rows: int) -> list[slice]:
    """At most ROWS each and as even as can be: none of a single row."""
    ends = np.linspace(0, rows, -(-rows // ROWS) + 1).astype(int).tolist()
    return [slice(a, b) for a, b in pairwise(ends)]
