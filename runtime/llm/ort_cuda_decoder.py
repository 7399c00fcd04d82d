"""The decoder on ONNX Runtime with a GPU: the portable graph, its keys and values on the device from call to call.

The portable graph takes one length of past for all its rows and gives the last position's logits only, so that every
sequence is a call of its own, and logits of earlier positions cost a call each. A step writes a sequence's keys and
values anew (the graph concatenates), its prefix's included. Other targets share that work (`torch`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from wsi_rt.runtime.engines.ort import plain_failure
from wsi_rt.runtime.engines.ort_cuda import gpu_provider
from wsi_rt.runtime.engines.ort_provider import Provider
from wsi_rt.runtime.errors import InputError, WsiRtError
from wsi_rt.runtime.llm.decoder import F32, KV, Chunk, Decoder, DecoderSpec, PrefixKV
from wsi_rt.runtime.manifest import Compiled, EngineManifest

if TYPE_CHECKING:
    import onnxruntime

    Values = Sequence[onnxruntime.OrtValue]  # key, value of layer 0, of layer 1, ...: [1, kv_heads, tokens, head_width]

_DTYPES: dict[str, np.dtype[Any]] = {
    "tensor(float)": np.dtype(np.float32),
    "tensor(float16)": np.dtype(np.float16),
}


class OrtCudaPrefix(PrefixKV):
    def __init__(self, values: Values, length: int) -> None:
        self.values, self.length = values, length

    @property
    def nbytes(self) -> int:
        return sum(v.tensor_size_in_bytes() for v in self.values)

    def layers(self) -> Sequence[F32]:
        halves = [np.ascontiguousarray(v.numpy()[0].transpose(1, 0, 2), np.float32) for v in self.values]
        return [np.stack(pair) for pair in zip(halves[::2], halves[1::2], strict=True)]


class OrtCudaKV(KV):
    """values: of all its tokens, the prefix's too; until the first call they are the prefix's own. They may hold more
    tokens than `length` after a rewind."""

    def __init__(self, values: Values, capacity: int, prefix: OrtCudaPrefix | None) -> None:
        self.prefix, self.capacity, self.values = prefix, capacity, values
        self.length = self.shared

    @property
    def nbytes(self) -> int:
        """What it holds really: a copy of its prefix as well, from the first call on."""
        own = isinstance(self.prefix, OrtCudaPrefix) and self.values is self.prefix.values
        return 0 if own else sum(v.tensor_size_in_bytes() for v in self.values)


class OrtCudaDecoder(Decoder):
    """graphs: the portable "embed" and "decoder", in fp32 or fp16, their weights beside them. provider: where they
    run."""

    def __init__(self, manifest: EngineManifest, graphs: Mapping[str, Path], provider: Provider) -> None:
        c = manifest.config
        self._config, self._provider = c, provider
        self._embed: onnxruntime.InferenceSession | None = provider.open(graphs["embed"], graphs["embed"].parent)
        self._decoder = provider.open(graphs["decoder"], graphs["decoder"].parent)
        self._dtype = _DTYPES[self._decoder.get_inputs()[0].type]
        names = [f"{i}.{part}" for i in range(c["layers"]) for part in ("key", "value")]
        self._past, self._present = ([f"{when}.{name}" for name in names] for when in ("past", "present"))
        self.spec = DecoderSpec(
            vocab_size=c["vocab"],
            hidden_size=c["hidden"],
            context_length=c["context"],
            kv_bytes_per_token=2 * self._dtype.itemsize * c["layers"] * c["kv_heads"] * c["head_width"],
            row_exact=False,  # a GPU picks its kernels by the number of rows
        )

    @classmethod
    def open(
        cls, root: Path, manifest: EngineManifest, compiled: Compiled, threads: int, fast: bool = False
    ) -> OrtCudaDecoder:
        if fast:
            raise InputError("--fast is for engines of the ort-cpu target, expected to be asked without")
        graphs = {role: root / path for role, path in compiled.graphs.items()}
        return cls(manifest, graphs, gpu_provider(manifest, compiled, threads))

    def close(self) -> None:
        self._embed = self._decoder = None

    def new_kv(self, capacity: int, prefix: PrefixKV | None = None) -> OrtCudaKV:
        self._require_capacity(capacity, prefix)
        if prefix is None:
            c = self._config
            nothing = self._provider.put(np.zeros((1, c["kv_heads"], 0, c["head_width"]), self._dtype))
            return OrtCudaKV([nothing] * len(self._past), capacity, None)
        if not isinstance(prefix, OrtCudaPrefix):
            raise TypeError(f"prefix is a {type(prefix).__name__}, expected this decoder's own OrtCudaPrefix")
        return OrtCudaKV(prefix.values, capacity, prefix)

    def freeze(self, kv: KV) -> OrtCudaPrefix:
        kv = _own(kv)
        self._require_to_share(kv)
        return OrtCudaPrefix(self._cut(kv), kv.length)

    def load_prefix(self, layers: Sequence[F32]) -> OrtCudaPrefix:
        c = self._config
        self._require_layers(layers, c["layers"], c["kv_heads"], c["head_width"])
        halves = [half.transpose(1, 0, 2)[None].astype(self._dtype) for layer in layers for half in layer]
        return OrtCudaPrefix([self._provider.put(half) for half in halves], layers[0].shape[1])

    def embed(self, token_ids: NDArray[np.int64]) -> F32:
        session = self._opened()
        with plain_failure("llm"):
            ids = self._provider.put(np.asarray(token_ids, np.int64))
            return self._provider.run(session, {"input_ids": ids}, ["embeds"])["embeds"].numpy().astype(np.float32)

    def extend(self, chunks: Sequence[Chunk]) -> list[F32]:
        self._require_fit(chunks)
        self._opened()
        with plain_failure("llm"):
            found = [self._through(chunk) for chunk in chunks]
        for chunk, (_, values) in zip(chunks, found, strict=True):
            kv = _own(chunk.kv)
            kv.values, kv.length = values, kv.length + len(chunk.embeds)
        return [logits for logits, _ in found]

    def _through(self, chunk: Chunk) -> tuple[F32, Values]:
        """-> the wanted logits [k, vocab] and what the KV then holds."""
        values, logits = self._cut(_own(chunk.kv)), []
        first = len(chunk.embeds) - max(chunk.logits - 1, 0)  # at once; then one position at a time
        for rows in np.split(chunk.embeds, range(first, len(chunk.embeds))):
            feeds = dict(zip(self._past, values, strict=True))
            feeds["inputs_embeds"] = self._provider.put(rows[None].astype(self._dtype))
            out = self._provider.run(self._decoder, feeds, ["logits", *self._present])
            values = [out[name] for name in self._present]
            logits.append(out["logits"].numpy().astype(np.float32))
        wanted = logits[len(logits) - chunk.logits :]
        return np.concatenate(wanted) if wanted else np.empty((0, self.spec.vocab_size), np.float32), values

    def _cut(self, kv: OrtCudaKV) -> Values:
        """Its values as far as it goes; after a rewind by way of the host, since onnxruntime cuts no tensor itself."""
        if kv.values[0].shape()[2] == kv.length:
            return kv.values
        return [self._provider.put(v.numpy()[:, :, : kv.length]) for v in kv.values]

    def _opened(self) -> onnxruntime.InferenceSession:
        if self._embed is None:
            raise WsiRtError("this decoder is closed")
        return self._embed


def _own(kv: KV) -> OrtCudaKV:
    if not isinstance(kv, OrtCudaKV):
        raise TypeError(f"KV is a {type(kv).__name__}, expected this decoder's own OrtCudaKV")
    return kv
