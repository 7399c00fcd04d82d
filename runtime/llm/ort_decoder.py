"""The decoder on ONNX Runtime: KV in fixed buffers that GroupQueryAttention updates in place."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from wsi_rt.runtime.engines.ort import open_session, plain_failure
from wsi_rt.runtime.errors import WsiRtError
from wsi_rt.runtime.llm.decoder import KV, Decoder, DecoderSpec
from wsi_rt.runtime.manifest import Compiled, EngineManifest

if TYPE_CHECKING:
    import onnxruntime

F32 = NDArray[np.float32]


class OrtKV(KV):
    """Per layer a key and a value buffer, f32 [1, kv_heads, capacity, head_width]."""

    def __init__(self, layers: int, kv_heads: int, head_width: int, capacity: int) -> None:
        self.length, self.capacity = 0, capacity
        shape = (1, kv_heads, capacity, head_width)
        self.buffers = {f"{i}.{part}": np.zeros(shape, np.float32) for i in range(layers) for part in ("key", "value")}

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in self.buffers.values())

    def rewind(self, length: int) -> None:
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot rewind to {length}: {self.length} tokens are held")
        self.length = length


class OrtDecoder(Decoder):
    """Two sessions: token embedding, and the decoder graph. Batch 1: `step` runs its sequences in turn."""

    def __init__(
        self, manifest: EngineManifest, embed: onnxruntime.InferenceSession, decoder: onnxruntime.InferenceSession
    ) -> None:
        c = manifest.config
        self._layers, self._kv_heads, self._head_width = c["layers"], c["kv_heads"], c["head_width"]
        self._embed: onnxruntime.InferenceSession | None = embed
        self._decoder: onnxruntime.InferenceSession | None = decoder
        self.spec = DecoderSpec(
            vocab_size=c["vocab"],
            hidden_size=c["hidden"],
            context_length=c["context"],
            kv_bytes_per_token=2 * 4 * c["layers"] * c["kv_heads"] * c["head_width"],
        )

    @classmethod
    def open(cls, root: Path, manifest: EngineManifest, compiled: Compiled, threads: int) -> OrtDecoder:
        embed, decoder = (
            open_session(root / compiled.graphs[role], root / compiled.weights_dir, threads)
            for role in ("embed", "decoder")
        )
        return cls(manifest, embed, decoder)

    def close(self) -> None:
        self._embed = self._decoder = None

    def new_kv(self, capacity: int) -> OrtKV:
        if not 1 <= capacity <= self.spec.context_length:
            raise ValueError(f"KV capacity is {capacity}, expected 1..{self.spec.context_length} tokens")
        return OrtKV(self._layers, self._kv_heads, self._head_width, capacity)

    def embed(self, token_ids: NDArray[np.int64]) -> F32:
        with plain_failure("llm"):
            return _open(self._embed).run(["embeds"], {"input_ids": token_ids})[0]

    def prefill(self, kv: KV, embeds: F32) -> F32:
        return self._append(kv, embeds)[0]

    def step(self, kvs: Sequence[KV], token_ids: NDArray[np.int64]) -> F32:
        embeds = self.embed(token_ids)  # [B, hidden]
        return np.concatenate([self._append(kv, embeds[i : i + 1]) for i, kv in enumerate(kvs)])

    def _append(self, kv: KV, embeds: F32) -> F32:
        """Run `embeds` [T, hidden] after the tokens `kv` holds -> logits [1, vocab] of the last one."""
        if not isinstance(kv, OrtKV):
            raise TypeError(f"KV is a {type(kv).__name__}, expected this decoder's own OrtKV")
        total = kv.length + embeds.shape[0]
        if embeds.shape[0] < 1 or total > kv.capacity:
            raise ValueError(f"{embeds.shape[0]} tokens after {kv.length} do not fit a KV of {kv.capacity}")
        x = np.ascontiguousarray(embeds, np.float32)[None]
        logits = np.empty((1, self.spec.vocab_size), np.float32)
        seqlens, length = np.array([total - 1], np.int32), np.array(total, np.int32)
        session = _open(self._decoder)
        binding = session.io_binding()
        for name, array in (("inputs_embeds", x), ("seqlens_k", seqlens), ("total_sequence_length", length)):
            binding.bind_input(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        for name, buffer in kv.buffers.items():
            where = ("cpu", 0, buffer.dtype, buffer.shape, buffer.ctypes.data)
            binding.bind_input(f"past.{name}", *where)
            binding.bind_output(f"present.{name}", *where)
        binding.bind_output("logits", "cpu", 0, logits.dtype, logits.shape, logits.ctypes.data)
        with plain_failure("llm"):
            session.run_with_iobinding(binding)
        kv.length = total
        return logits


def _open(session: onnxruntime.InferenceSession | None) -> onnxruntime.InferenceSession:
    if session is None:
        raise WsiRtError("this decoder is closed")
    return session
