"""The decoder seam: the LLM is not a function of its inputs (its KV lives on), so it has its own
small interface, implemented once per backend. No dictionary of KV tensors crosses it.

A slide's KV is a PrefixKV: computed once, never changed again, shared by every sequence that asks about the slide. A
sequence's KV holds its own tokens after that prefix.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from wsi_rt.runtime.manifest import Compiled, EngineManifest

F32 = NDArray[np.float32]


@dataclass(frozen=True)
class DecoderSpec:
    """What a caller must know of a language model before it feeds it.

    kv_bytes_per_token: keys and values of one token in all layers. row_exact: a token's logits and KV are the same bits
    whatever else is in the call and however its sequence is cut into calls; else the same to rounding. kv_bytes: of all
    keys and values at a time, where the decoder's own memory bounds them.
    """

    vocab_size: int
    hidden_size: int
    context_length: int
    kv_bytes_per_token: int
    row_exact: bool
    kv_bytes: int | None = None


class PrefixKV(ABC):
    """Keys and values of the first `length` tokens of many sequences; read only."""

    length: int

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes of its keys and values."""

    @abstractmethod
    def layers(self) -> Sequence[F32]:
        """Per layer f32 [2, length, kv_heads, head_width], keys then values: what `Decoder.load_prefix` takes."""


class KV(ABC):
    """Keys and values of one sequence: `prefix`, if it has one, then its own. `length` tokens of `capacity` are held,
    the prefix's included in both."""

    prefix: PrefixKV | None
    length: int
    capacity: int

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes of its own tokens' keys and values, the prefix's not included."""

    @property
    def shared(self) -> int:
        """Tokens of the prefix."""
        return 0 if self.prefix is None else self.prefix.length

    def rewind(self, length: int) -> None:
        """Forget every token from `length` on; raises ValueError when that is more than it holds, or in the prefix."""
        if not self.shared <= length <= self.length:
            raise ValueError(f"cannot rewind to {length}: {self.length} tokens are held, {self.shared} of them shared")
        self.length = length


@dataclass(frozen=True)
class Chunk:
    """New tokens of one sequence. embeds: [T >= 1, hidden] f32, appended to `kv`. logits: of how many of the last
    positions they are wanted, 0 to T."""

    kv: KV
    embeds: F32
    logits: int = 1


class Decoder(ABC):
    """Context manager. Not thread-safe. facts: as an engine's."""

    spec: DecoderSpec
    facts: Mapping[str, str] = MappingProxyType({})

    @classmethod
    @abstractmethod
    def open(cls, root: Path, manifest: EngineManifest, compiled: Compiled, threads: int, fast: bool = False) -> Self:
        """The language model of the bundle at `root`. fast: calls of many rows go through graphs of their own, so that
        what a sequence gets depends on its company (not row_exact). Raises InputError when the bundle has none."""

    @abstractmethod
    def new_kv(self, capacity: int, prefix: PrefixKV | None = None) -> KV:
        """For at most `capacity` tokens, those of `prefix` included, which it starts with. Memory is taken as tokens
        come. Raises ValueError beyond the context."""

    @abstractmethod
    def freeze(self, kv: KV) -> PrefixKV:
        """The tokens of a KV without prefix, to be shared. Nothing is copied: the KV must not be used any more."""

    @abstractmethod
    def load_prefix(self, layers: Sequence[F32]) -> PrefixKV:
        """What `PrefixKV.layers` gave, possibly memory-mapped from a file. Raises ValueError for other shapes."""

    @abstractmethod
    def embed(self, token_ids: NDArray[np.int64]) -> F32:
        """token_ids [T] int64 -> [T, hidden] f32."""

    @abstractmethod
    def extend(self, chunks: Sequence[Chunk]) -> list[F32]:
        """Append every chunk's tokens to its KV -> per chunk the wanted logits [k, vocab] f32.

        Sequences may differ in length, in the number of new tokens and in their prefix; a KV occurs once. Work that is
        shared: the linear layers by all, attention to a prefix by the sequences that have it. On an error no KV has
        grown. Raises ValueError for what does not fit a KV.
        """

    @abstractmethod
    def close(self) -> None:
        """Release what the backend holds; closing twice is fine."""

    def prefill(self, kv: KV, embeds: F32) -> F32:
        """Append embeds [T, hidden] f32 to `kv` -> the last position's logits [vocab] f32."""
        return self.extend([Chunk(kv, embeds)])[0][0]

    def step(self, kvs: Sequence[KV], token_ids: NDArray[np.int64]) -> F32:
        """Append one token per sequence: token_ids [B] -> logits [B, vocab] f32."""
        embeds = self.embed(token_ids)
        return np.concatenate(self.extend([Chunk(kv, embeds[i : i + 1]) for i, kv in enumerate(kvs)]))

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
        """Prefill a prompt [T, hidden], then one call for each of the given tokens [S] -> logits [S + 1, vocab]: what
        `verify` compares. all_wide: every call through the graphs for many rows. A backend may hold fewer weights at a
        time than an open decoder does."""
        if all_wide:
            raise NotImplementedError(f"{cls.__name__} has no graphs for calls of many rows")
        with cls.open(root, manifest, compiled, threads) as decoder:
            return decoder.taught(embeds, token_ids)

    def taught(self, embeds: F32, token_ids: NDArray[np.int64]) -> F32:
        """The same of an open decoder."""
        kv = self.new_kv(len(embeds) + len(token_ids))
        logits = [self.prefill(kv, embeds)]
        logits += [self.step([kv], token_ids[i : i + 1])[0] for i in range(len(token_ids))]
        return np.stack(logits)

    # What every backend checks, so that each refuses the same in the same words. All raise ValueError.

    def _require_capacity(self, capacity: int, prefix: PrefixKV | None) -> None:
        shared = 0 if prefix is None else prefix.length
        if not shared < capacity <= self.spec.context_length:
            raise ValueError(f"KV capacity is {capacity}, expected {shared + 1}..{self.spec.context_length} tokens")

    @staticmethod
    def _require_to_share(kv: KV) -> None:
        if kv.prefix is not None or kv.length == 0:
            raise ValueError("a KV to be shared holds tokens, all of them its own")

    def _require_layers(self, layers: Sequence[F32], count: int, kv_heads: int, head_width: int) -> None:
        length = layers[0].shape[1] if len(layers) and layers[0].ndim == 4 else 0
        shape = (2, length, kv_heads, head_width)
        if len(layers) != count or any(x.shape != shape or x.dtype != np.float32 for x in layers):
            found = ", ".join(sorted({f"{x.dtype} {list(x.shape)}" for x in layers}))
            raise ValueError(f"a prefix of {len(layers)} layers ({found}), expected {count} of float32 {list(shape)}")
        if not 1 <= length < self.spec.context_length:
            raise ValueError(f"a prefix of {length} tokens in a context of {self.spec.context_length}")

    def _require_fit(self, chunks: Sequence[Chunk]) -> None:
        if not chunks or len({id(c.kv) for c in chunks}) < len(chunks):
            raise ValueError("expected one chunk or more, each with a KV of its own")
        for c in chunks:
            new = len(c.embeds)
            if c.embeds.ndim != 2 or c.embeds.shape[1] != self.spec.hidden_size:
                raise ValueError(f"embeds are {list(c.embeds.shape)}, expected [tokens, {self.spec.hidden_size}]")
            if new < 1 or c.kv.length + new > c.kv.capacity:
                raise ValueError(f"{new} tokens after {c.kv.length} do not fit a KV of {c.kv.capacity}")
            if not 0 <= c.logits <= new:
                raise ValueError(f"logits of {c.logits} positions asked for, {new} are new")

    def __enter__(self) -> Decoder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
