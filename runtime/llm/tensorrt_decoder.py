"""The decoder of `tensorrt` and `tensorrt-rtx`: one engine, whose caches grow in place (`export.graphs.llama_rtx`).

Has not run on a GPU: slots, batches, sizes and the order of copies and launches are tested with a stand-in for the
modules, which computes the engine's own ONNX file with onnxruntime.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wsi_rt.runtime.engines.ort import open_session
from wsi_rt.runtime.engines.tensorrt_session import Session
from wsi_rt.runtime.errors import InputError, WsiRtError
from wsi_rt.runtime.llm.decoder import F32, KV, Chunk, Decoder, DecoderSpec, PrefixKV
from wsi_rt.runtime.llm.tensorrt_kv import CacheShape, Slots, TensorRtKV, TensorRtPrefix
from wsi_rt.runtime.manifest import Compiled, EngineManifest

KEYS = 64  # attention reads a multiple of so many keys: kernels are compiled for few different shapes
_PARTS = ("key", "value")


class TensorRtDecoder(Decoder):
    """One token of each of many sequences is one launch, over the slots from the first to the last of them; several
    tokens of a sequence are a launch of their own. Rows share the kernels of a batch, so logits are the same to
    rounding only."""

    def __init__(self, manifest: EngineManifest, session: Session, embed: Any) -> None:
        c = manifest.config
        cache = next(s for s in session.sidecar.inputs if s.name == "cache.0.key")
        capacity = cache.dims[2]
        if not isinstance(capacity, int):
            raise TypeError(f"cache.0.key is {cache.dims}, expected a fixed capacity")
        self._layers, self._config = c["layers"], c
        self._session: Session | None = session
        self._embed = embed
        shape = CacheShape(c["layers"], c["kv_heads"], capacity, c["head_width"], cache.dtype)
        self._slots = Slots(session.device, shape)
        self._most = max(p["batch"][2] for p in session.sidecar.profiles)
        self._keys = session.device.alloc(8 * capacity)
        session.device.write(self._keys.pointer, np.arange(capacity, dtype=np.int64))
        self.spec = DecoderSpec(c["vocab"], c["hidden"], capacity, shape.tokens_bytes(1), row_exact=False)

    @classmethod
    def open(
        cls, root: Path, manifest: EngineManifest, compiled: Compiled, threads: int, fast: bool = False
    ) -> TensorRtDecoder:
        """threads: of the token embeddings, which are looked up on the CPU. Raises InputError for `fast`, and what
        `Session` raises."""
        if fast:
            raise InputError("the TensorRT decoder has no --fast, expected to be opened without")
        embed = open_session(root / compiled.graphs["embed"], root / compiled.weights_dir, threads)
        return cls(manifest, Session(root / compiled.graphs["decoder"], manifest.name), embed)

    def close(self) -> None:
        if self._session is not None:
            self._slots.close()
            self._keys.free()
            self._session.close()
            self._session = None

    def new_kv(self, capacity: int, prefix: PrefixKV | None = None) -> TensorRtKV:
        self._require_capacity(capacity, prefix)
        if prefix is not None and not isinstance(prefix, TensorRtPrefix):
            raise TypeError(f"prefix is a {type(prefix).__name__}, expected this decoder's own TensorRtPrefix")
        self._opened()
        return TensorRtKV(self._slots, capacity, prefix)

    def freeze(self, kv: KV) -> TensorRtPrefix:
        """Copied out of its slot, which is free when the KV is gone."""
        kv = _own(kv)
        self._require_to_share(kv)
        self._opened()
        return self._slots.save(kv.slot, kv.length)

    def load_prefix(self, layers: Sequence[F32]) -> TensorRtPrefix:
        c = self._config
        self._require_layers(layers, c["layers"], c["kv_heads"], c["head_width"])
        return TensorRtPrefix.of(self._opened().device, self._slots.shape, layers)

    def embed(self, token_ids: NDArray[np.int64]) -> F32:
        return self._embed.run(["embeds"], {"input_ids": np.asarray(token_ids, np.int64)})[0]

    def extend(self, chunks: Sequence[Chunk]) -> list[F32]:
        self._require_fit(chunks)
        self._opened()
        by_slot = {_own(c.kv).slot: i for i, c in enumerate(chunks)}
        found: list[F32] = [np.empty((0, self.spec.vocab_size), np.float32)] * len(chunks)
        single = sorted(slot for slot, i in by_slot.items() if len(chunks[i].embeds) == 1)
        several = [range(slot, slot + 1) for slot, i in by_slot.items() if len(chunks[i].embeds) > 1]
        # Single tokens first: a slot between them takes part as an idle one, and its own run overwrites what that left.
        for run, mine in [*((r, single) for r in self._runs(single)), *((r, [r.start]) for r in several)]:
            members = [chunks[by_slot[slot]] if slot in mine else None for slot in run]
            for slot, logits in zip(run, self._launch(run.start, members), strict=True):
                if slot in mine:
                    found[by_slot[slot]] = logits
        for c in chunks:
            c.kv.length += len(c.embeds)
        return found

    def _runs(self, slots: Sequence[int]) -> list[range]:
        """Consecutive slots that cover these. Those between them take part with a token that nobody reads: it is
        written behind what such a slot holds, where its next token will be; a full one has no such place."""
        runs: list[range] = []
        for slot in slots:
            last = runs[-1] if runs else range(0)
            idle = [self._slots.holder(i) for i in range(last.stop, slot)]
            room = all(kv is None or kv.length < self._slots.shape.capacity for kv in idle)
            if runs and room and slot - last.start < self._most:
                runs[-1] = range(last.start, slot + 1)
            else:
                runs.append(range(slot, slot + 1))
        return runs

    def _launch(self, first: int, members: Sequence[Chunk | None]) -> list[F32]:
        """One run of the engine over the slots from `first` on; None: an idle one -> wanted logits of each."""
        session = self._opened()
        tokens = max(len(c.embeds) for c in members if c is not None)
        embeds = np.zeros((len(members), tokens, self.spec.hidden_size), np.float32)
        start = np.zeros(len(members), np.int64)
        rows: list[int] = []
        for i, c in enumerate(members):
            holder = c.kv if c is not None else self._slots.holder(first + i)
            start[i] = 0 if holder is None else holder.length
            if c is not None:
                embeds[i] = c.embeds
                rows += range((i + 1) * tokens - c.logits, (i + 1) * tokens)
        asked = np.array(rows or [0], np.int64)  # no row at all is no shape of the engine
        ends = [int(start[i]) + tokens for i, c in enumerate(members) if c is not None]
        keys = min(-(-max(ends) // KEYS) * KEYS, self.spec.context_length)
        logits = self._run(session, first, {"inputs_embeds": embeds, "start": start, "rows": asked}, keys)
        counts = [0 if c is None else c.logits for c in members]
        return np.split(logits[: len(rows)], np.cumsum(counts)[:-1])

    def _run(self, session: Session, first: int, inputs: dict[str, NDArray[Any]], keys: int) -> F32:
        device, buffers, shape = session.device, session.buffers, self._slots.shape
        batch, tokens, _ = inputs["inputs_embeds"].shape
        dims = {"batch": batch, "tokens": tokens, "keys": keys, "rows": len(inputs["rows"])}
        addresses = {"keys": self._keys.pointer}
        for name, x in inputs.items():
            addresses[name] = buffers.take(name, x.nbytes)
            device.write(addresses[name], x)
        shapes: dict[str, Sequence[int]] = {"keys": (keys,), **{name: x.shape for name, x in inputs.items()}}
        for i in range(shape.layers):
            for j, part in enumerate(_PARTS):
                pointer = self._slots.pointer(2 * i + j, first)
                addresses |= {f"cache.{i}.{part}": pointer, f"updated.{i}.{part}": pointer}
                shapes[f"cache.{i}.{part}"] = (batch, shape.kv_heads, shape.capacity, shape.head_width)
        logits = np.empty((len(inputs["rows"]), self.spec.vocab_size), np.float32)
        addresses["logits"] = buffers.take("logits", logits.nbytes)
        session.launch(session.sidecar.profile_for(dims, session.name), shapes, addresses)
        device.read(logits, addresses["logits"])
        device.wait()
        return logits

    def _opened(self) -> Session:
        if self._session is None:
            raise WsiRtError("this decoder is closed")
        return self._session


def _own(kv: KV) -> TensorRtKV:
    if not isinstance(kv, TensorRtKV):
        raise TypeError(f"KV is a {type(kv).__name__}, expected this decoder's own TensorRtKV")
    return kv
