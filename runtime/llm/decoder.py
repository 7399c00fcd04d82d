"""The decoder seam: the LLM is not a function of its inputs (its KV lives on), so it has its own
small interface, implemented once per backend. No dictionary of KV tensors crosses it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class DecoderSpec:
    """What a caller must know of a language model before it feeds it."""

    vocab_size: int
    hidden_size: int
    context_length: int
    kv_bytes_per_token: int


class KV(ABC):
    """Keys and values of one sequence. `length` tokens are valid out of `capacity`."""

    length: int
    capacity: int

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes held, whatever the length."""

    @abstractmethod
    def rewind(self, length: int) -> None:
        """Forget every token from `length` on; raises ValueError when length > self.length."""


class Decoder(ABC):
    """prefill and step over KV objects; context manager."""

    spec: DecoderSpec

    @abstractmethod
    def new_kv(self, capacity: int) -> KV:
        """An empty KV for at most `capacity` tokens."""

    @abstractmethod
    def embed(self, token_ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """token_ids [T] int64 -> [T, hidden] f32."""

    @abstractmethod
    def prefill(self, kv: KV, embeds: NDArray[np.float32]) -> NDArray[np.float32]:
        """Append embeds [T, hidden] f32 to `kv`; returns the last position's logits [vocab] f32."""

    @abstractmethod
    def step(self, kvs: Sequence[KV], token_ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Append one token per sequence: token_ids [B] -> logits [B, vocab] f32."""

    @abstractmethod
    def close(self) -> None:
        """Release what the backend holds; closing twice is fine."""

    def __enter__(self) -> Decoder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
