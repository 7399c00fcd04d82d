"""The decoder on ONNX Runtime."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from wsi_rt.runtime.engines.ort import plain_failure
from wsi_rt.runtime.errors import InputError, WsiRtError
from wsi_rt.runtime.llm.decoder import F32, KV, Chunk, Decoder, DecoderSpec, PrefixKV
from wsi_rt.runtime.llm.ort_layers import (
    HEAD,
    WIDE_ROWS,
    LayersRun,
    OrtKV,
    OrtLayers,
    OrtPrefix,
    own_kv,
    wide_role,
)
from wsi_rt.runtime.manifest import Compiled, EngineManifest


class OrtDecoder(Decoder):
    """Every row of a call goes through the linear layers together; rows do not see each other there, and attention's
    order of summation is a token's own, so its bits depend on its sequence alone (DecoderSpec.row_exact)."""

    def __init__(self, manifest: EngineManifest, layers: OrtLayers) -> None:
        c = manifest.config
        self._layers: OrtLayers | None = layers
        self.spec = DecoderSpec(
            vocab_size=c["vocab"],
            hidden_size=c["hidden"],
            context_length=c["context"],
            kv_bytes_per_token=2 * 4 * c["layers"] * c["kv_heads"] * c["head_width"],
            row_exact=not layers.wide,
        )

    @classmethod
    def open(
        cls, root: Path, manifest: EngineManifest, compiled: Compiled, threads: int, fast: bool = False
    ) -> OrtDecoder:
        if fast and wide_role(HEAD) not in compiled.graphs:
            raise InputError(
                f"{root}: --fast given, but this bundle has no graphs for it; build it again with "
                "wsi-rt build-engines --fast"
            )
        return cls(
            manifest, _layers(root, manifest, compiled, threads, hold=True, wide_from=WIDE_ROWS if fast else None)
        )

    @classmethod
    def teach(
        cls,
        root: Path,
        manifest: EngineManifest,
        compiled: Compiled,
        threads: int,
        embeds: F32,
        token_ids: NDArray[np.int64],
        all_wide: bool = False,
    ) -> F32:
        """Layer by layer: all calls go through one before the next is opened, which bounds the memory."""
        with plain_failure("llm"):
            layers = _layers(root, manifest, compiled, threads, hold=False, wide_from=1 if all_wide else None)
            kv, given = layers.new_kv(len(embeds) + len(token_ids)), layers.embed(token_ids)
            runs = [LayersRun([Chunk(kv, embeds)])]
            runs += [LayersRun([Chunk(kv, given[i : i + 1])], [len(embeds) + i]) for i in range(len(given))]
            for i in range(layers.count + 1):
                for run in runs:
                    run.through(layers, i)
            return np.concatenate([layers.head(run.last_rows()) for run in runs])

    def close(self) -> None:
        if self._layers is not None:
            self._layers.close()
        self._layers = None

    def new_kv(self, capacity: int, prefix: PrefixKV | None = None) -> OrtKV:
        self._require_capacity(capacity, prefix)
        if prefix is not None and not isinstance(prefix, OrtPrefix):
            raise TypeError(f"prefix is a {type(prefix).__name__}, expected this decoder's own OrtPrefix")
        return self._opened().new_kv(capacity, prefix)

    def freeze(self, kv: KV) -> OrtPrefix:
        kv = own_kv(kv)
        self._require_to_share(kv)
        return OrtPrefix([layer[:, : kv.length] for layer in kv.own])

    def load_prefix(self, layers: Sequence[F32]) -> OrtPrefix:
        own = self._opened()
        self._require_layers(layers, own.count, own.kv_heads, own.head_width)
        return OrtPrefix(layers)

    def embed(self, token_ids: NDArray[np.int64]) -> F32:
        with plain_failure("llm"):
            return self._opened().embed(token_ids)

    def extend(self, chunks: Sequence[Chunk]) -> list[F32]:
        self._require_fit(chunks)
        layers, run = self._opened(), LayersRun(chunks)
        with plain_failure("llm"):
            for i in range(layers.count + 1):
                run.through(layers, i)
            rows = run.last_rows()
            logits = layers.head(rows) if len(rows) else np.empty((0, self.spec.vocab_size), np.float32)
        run.commit()
        return np.split(logits, np.cumsum([c.logits for c in chunks])[:-1])

    def _opened(self) -> OrtLayers:
        if self._layers is None:
            raise WsiRtError("this decoder is closed")
        return self._layers


def _layers(
    root: Path, manifest: EngineManifest, compiled: Compiled, threads: int, hold: bool, wide_from: int | None
) -> OrtLayers:
    graphs = {role: root / path for role, path in compiled.graphs.items()}
    return OrtLayers(manifest.config, graphs, root / compiled.weights_dir, threads, hold, wide_from)
