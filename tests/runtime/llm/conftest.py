"""What the tests of the loop share: a tokenizer, and a small Llama in numpy behind the decoder seam."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from wsi_rt.runtime.config import GenerationSettings
from wsi_rt.runtime.llm.decoder import F32, KV, Chunk, Decoder, DecoderSpec, PrefixKV
from wsi_rt.runtime.llm.prefix import SlidePrefix, slide_prefix
from wsi_rt.runtime.llm.request import Request
from wsi_rt.runtime.llm.tokenizer import Tokenizer

LAYERS, HEADS, KV_HEADS, WIDTH = 2, 4, 2, 8
HIDDEN = HEADS * WIDTH
CONTEXT = 256


class NumpyPrefix(PrefixKV):
    def __init__(self, layers: Sequence[F32]) -> None:
        self._layers, self.length = list(layers), layers[0].shape[1]

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in self._layers)

    def layers(self) -> Sequence[F32]:
        return self._layers


class NumpyKV(KV):
    """own: f32 [layers, 2, capacity, kv_heads, width]."""

    def __init__(self, capacity: int, prefix: NumpyPrefix | None) -> None:
        self.prefix, self.capacity = prefix, capacity
        self.length = self.shared
        self.own = np.full((LAYERS, 2, capacity - self.shared, KV_HEADS, WIDTH), np.nan, np.float32)

    @property
    def nbytes(self) -> int:
        return (self.length - self.shared) * self.own[:, :, :1].nbytes


class NumpyLlama(Decoder):
    """A Llama with random weights. Sums run along the last axis of contiguous rows, so that a row's bits depend on its
    own sequence alone. `calls` has per extend the rows of each chunk."""

    def __init__(self, vocab: int, seed: int = 0, context: int = CONTEXT) -> None:
        per_token = 4 * LAYERS * 2 * KV_HEADS * WIDTH
        self.spec = DecoderSpec(vocab, HIDDEN, context, per_token, row_exact=True)
        rng = np.random.default_rng(seed)

        def weight(rows: int, columns: int, scale: float = 1.0) -> F32:
            return (rng.standard_normal((rows, columns)) * scale / np.sqrt(columns)).astype(np.float32)

        self.table = rng.standard_normal((vocab, HIDDEN)).astype(np.float32)
        self.layers = [
            {"q": weight(HIDDEN, HIDDEN, 2.0), "k": weight(KV_HEADS * WIDTH, HIDDEN, 2.0),
             "v": weight(KV_HEADS * WIDTH, HIDDEN), "o": weight(HIDDEN, HIDDEN), "f": weight(HIDDEN, HIDDEN)}
            for _ in range(LAYERS)
        ]  # fmt: skip
        self.head = weight(vocab, HIDDEN, 4.0)
        self.head[:3] = 0  # special tokens come seldom
        self.calls: list[list[int]] = []
        self.on_call: Callable[[], None] = lambda: None

    @classmethod
    def open(cls, *_: object) -> NumpyLlama:
        raise NotImplementedError("made in memory, not read from a bundle")

    def new_kv(self, capacity: int, prefix: PrefixKV | None = None) -> NumpyKV:
        shared = prefix.length if prefix else 0
        if not shared < capacity <= self.spec.context_length:
            raise ValueError(capacity)
        assert prefix is None or isinstance(prefix, NumpyPrefix)
        return NumpyKV(capacity, prefix)

    def freeze(self, kv: KV) -> NumpyPrefix:
        assert isinstance(kv, NumpyKV)
        assert kv.prefix is None
        return NumpyPrefix([x[:, : kv.length] for x in kv.own])

    def load_prefix(self, layers: Sequence[F32]) -> NumpyPrefix:
        if len(layers) != LAYERS or any(x.shape[0] != 2 or x.shape[2:] != (KV_HEADS, WIDTH) for x in layers):
            raise ValueError("other shapes")
        return NumpyPrefix(layers)

    def embed(self, token_ids: NDArray[np.int64]) -> F32:
        assert token_ids.dtype == np.int64
        return self.table[token_ids]

    def extend(self, chunks: Sequence[Chunk]) -> list[F32]:
        self.calls.append([len(c.embeds) for c in chunks])
        self.on_call()
        assert len({id(c.kv) for c in chunks}) == len(chunks) >= 1
        for c in chunks:
            assert len(c.embeds) >= 1
            assert c.kv.length + len(c.embeds) <= c.kv.capacity, "the loop overran the KV"
            assert 0 <= c.logits <= len(c.embeds)
        out = [self._chunk(c) for c in chunks]
        for c in chunks:
            c.kv.length += len(c.embeds)
        return out

    def close(self) -> None:
        pass

    def _chunk(self, c: Chunk) -> F32:
        kv, x = c.kv, c.embeds.astype(np.float32)
        assert isinstance(kv, NumpyKV)
        places = np.arange(kv.length, kv.length + len(x))
        for i, w in enumerate(self.layers):
            normed = x / np.sqrt(np.square(x).mean(-1, keepdims=True) + 1e-5)
            q, k, v = (_linear(normed, w[name]).reshape(len(x), -1, WIDTH) for name in "qkv")
            kv.own[i, :, places - kv.shared] = np.stack([_rotate(k, places), v], axis=1)
            x = x + _linear(self._attend(kv, i, _rotate(q, places), places), w["o"])
            normed = x / np.sqrt(np.square(x).mean(-1, keepdims=True) + 1e-5)
            x = x + np.tanh(_linear(normed, w["f"]))
        last = x[len(x) - c.logits :]
        return _linear(last / np.sqrt(np.square(last).mean(-1, keepdims=True) + 1e-5), self.head)

    def _attend(self, kv: NumpyKV, layer: int, q: F32, places: NDArray[np.int64]) -> F32:
        own = kv.own[layer, :, : places[-1] + 1 - kv.shared]
        both = np.concatenate([kv.prefix.layers()[layer], own], axis=1) if isinstance(kv.prefix, NumpyPrefix) else own
        keys, values = np.repeat(both, HEADS // KV_HEADS, axis=2)  # [n, heads, width]
        out = np.empty((len(q), HIDDEN), np.float32)
        for row, place in enumerate(places):
            scores = (keys[: place + 1] * q[row]).sum(-1).T / np.float32(np.sqrt(WIDTH))  # [heads, n]
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            mixed = (np.ascontiguousarray(values[: place + 1].transpose(1, 2, 0)) * weights[:, None]).sum(-1)
            out[row] = (mixed / weights.sum(-1, keepdims=True)).reshape(-1)
        return out


class ScriptedLlama(NumpyLlama):
    """Says `script` after a prompt of `prompt` tokens, whatever it is, and computes nothing."""

    def __init__(self, vocab: int, script: Sequence[int], prompt: int) -> None:
        super().__init__(vocab)
        self.script, self.prompt = list(script), prompt

    def _chunk(self, c: Chunk) -> F32:
        logits = np.zeros((c.logits, self.spec.vocab_size), np.float32)
        for row in range(c.logits):
            place = c.kv.length + len(c.embeds) - c.logits + row + 1 - self.prompt
            logits[row, self.script[min(place, len(self.script) - 1)]] = 9
        return logits


def _linear(x: F32, w: F32) -> F32:
    """[T, in] x [out, in] -> [T, out], each number one sum along a contiguous row."""
    return (x[:, None] * w).sum(-1)


def _rotate(x: F32, places: NDArray[np.int64]) -> F32:
    half = WIDTH // 2
    angle = places[:, None] * (1e4 ** -(np.arange(half) / half))
    cos, sin = (f(angle)[:, None].astype(np.float32) for f in (np.cos, np.sin))
    a, b = x[..., :half], x[..., half:]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def embeds(length: int, seed: int = 1, hidden: int = HIDDEN) -> F32:
    """[length, hidden], random."""
    return np.random.default_rng(seed).standard_normal((length, hidden)).astype(np.float32)


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    synthetic = pytest.importorskip("wsi_rt.export.tokenizer", reason="the export extra is missing")
    folder: Path = tmp_path_factory.mktemp("synthetic")
    synthetic.synthetic_tokenizer(folder)
    return Tokenizer(folder)


@pytest.fixture
def numpy_llama(tokenizer: Tokenizer) -> NumpyLlama:
    """A fresh one; its weights are always the same."""
    return NumpyLlama(tokenizer.vocab_size)


@pytest.fixture
def llama(numpy_llama: NumpyLlama) -> NumpyLlama:
    return numpy_llama


@pytest.fixture
def new_llama(tokenizer: Tokenizer) -> Callable[..., NumpyLlama]:
    return lambda **kw: NumpyLlama(tokenizer.vocab_size, **kw)


@pytest.fixture
def prompt() -> Callable[..., F32]:
    """prompt(length, seed=1) -> [length, hidden]: a prompt that no tokens spell."""
    return embeds


@pytest.fixture
def scripted(tokenizer: Tokenizer) -> Callable[..., tuple[ScriptedLlama, Request, list[int]]]:
    """scripted(text, end=(2,), **settings) -> a model that says `text`, then `end`; a request for it; the tokens."""

    def make(text: str, end: Sequence[int] = (2,), **settings: Any) -> tuple[ScriptedLlama, Request, list[int]]:
        ids = [*tokenizer.encode(text), *end]
        request = Request(embeds(5), GenerationSettings(**settings))
        return ScriptedLlama(tokenizer.vocab_size, ids, prompt=5), request, ids

    return make


@pytest.fixture
def slides(llama: Decoder) -> list[SlidePrefix]:
    """Three slides of 20, 24 and 28 tokens."""
    hidden = llama.spec.hidden_size
    return [slide_prefix(llama, (1, 5, 6), embeds(17 + 4 * i, 100 + i, hidden)) for i in range(3)]


@pytest.fixture
def asked(llama: Decoder) -> Callable[..., Request]:
    """asked(number, prefix=None, options=(), ..., **settings): a question of 4 to 9 random tokens."""

    def make(number: int, prefix: SlidePrefix | None = None, **rest: Any) -> Request:
        own = {k: rest.pop(k) for k in ("stream", "options", "cancel", "keep_kv", "grammar") if k in rest}
        rng = np.random.default_rng(number)
        ids = rng.integers(3, llama.spec.vocab_size, rng.integers(4, 10))
        settings = GenerationSettings(**{"max_new_tokens": 12, **rest})
        return Request(llama.embed(ids), settings, prefix, prompt_ids=tuple(ids.tolist()), **own)

    return make
