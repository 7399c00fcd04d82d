"""Pages of the torch decoder's keys and values: who holds them, when they come back, and that reuse cannot be seen."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="the export extra is not installed")
pytest.importorskip("onnx", reason="the export extra is not installed")
pytest.importorskip("transformers", reason="the export extra is not installed")

import torch

from wsi_rt.export.arch import LlamaConfig
from wsi_rt.export.component import build_component
from wsi_rt.export.sources.synthetic import SyntheticSource
from wsi_rt.export.sources.weights import Part
from wsi_rt.runtime.errors import MachineError, WsiRtError
from wsi_rt.runtime.llm import torch_model
from wsi_rt.runtime.llm.decoder import Chunk
from wsi_rt.runtime.llm.torch_decoder import HOLDERS, TorchDecoder
from wsi_rt.runtime.llm.torch_pages import PAGE, FreePages, PagePool, Pages, TorchKV, TorchPrefix, pages_for
from wsi_rt.runtime.llm.torch_weights import StoredTensors

LLAMA = LlamaConfig(hidden=64, layers=3, heads=4, kv_heads=2, head_width=64, ffn=96, vocab=512, context=2048)
PREFIX, KV_BYTES = 70, 4 << 20
Open = Callable[..., TorchDecoder]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory):
    root = tmp_path_factory.mktemp("llm")
    part = Part(LLAMA, SyntheticSource(LLAMA, "test", 3))
    return root, build_component("llm", part, root, "ort-cpu", "fp32", 1, lambda _: None)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def opened(built, request: pytest.FixtureRequest) -> Open:
    """opened(precision="fp32", **options) -> a decoder whose pages hold NaN."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU")
    root, manifest = built
    made: list[TorchDecoder] = []

    def make(precision: str = "fp32", **options) -> TorchDecoder:
        tensors = StoredTensors(root / path for path in manifest.portable.values())
        options = {"kv_bytes": KV_BYTES, **options}
        made.append(TorchDecoder(manifest, tensors, precision, torch.device(request.param), **options))
        made[-1]._pool._pages.fill_(torch.nan)
        return made[-1]

    yield make
    for decoder in made:
        decoder.close()


def rows(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1, 1, (count, LLAMA.hidden)).astype(np.float32)


def frozen(decoder: TorchDecoder, length: int = PREFIX, seed: int = 0) -> TorchPrefix:
    kv = decoder.new_kv(length)
    decoder.prefill(kv, rows(length, seed))
    return decoder.freeze(kv)


def company(decoder: TorchDecoder) -> list[TorchKV]:
    """Five sequences, behind two prefixes and none, all of other lengths; one of them has filled its pages."""
    prefixes = [None, frozen(decoder), frozen(decoder, PAGE, 1)]
    kvs = [decoder.new_kv(300, prefixes[i % 3]) for i in range(5)]
    decoder.extend([Chunk(kv, rows(1 + 5 * i, 10 + i), 0) for i, kv in enumerate(kvs)])
    return kvs


def held(decoder: TorchDecoder) -> int:
    gc.collect()
    return decoder._pool.free.held


def story(decoder: TorchDecoder) -> list[np.ndarray]:
    """Sequences that come and go, rewind, share and outlive a prefix -> every logit."""
    kvs, told = company(decoder), []
    for step in range(40):
        told += decoder.extend([Chunk(kv, rows(1, 100 * step + i)) for i, kv in enumerate(kvs)])
        if step % 7 == 3:
            del kvs[step % len(kvs)]
            kvs.append(decoder.new_kv(400, frozen(decoder, 20 + step, step)))
            told += decoder.extend([Chunk(kvs[-1], rows(25, step)), Chunk(kvs[0], rows(2, step))])
        if step % 9 == 5:
            kvs[1].rewind(max(kvs[1].length - 19, kvs[1].shared))
            told += decoder.extend([Chunk(kvs[1], rows(PAGE, step))])
    return told


def test_pages_come_back_when_nobody_refers_to_them(opened: Open) -> None:
    """A prefix lives as long as anything that shares it, and is held once."""
    decoder = opened()
    kv = decoder.new_kv(PREFIX)
    decoder.prefill(kv, rows(PREFIX))
    numbers = list(kv.pages.numbers)
    prefix = decoder.freeze(kv)
    assert (prefix.pages.numbers, held(decoder)) == (numbers, pages_for(PREFIX))  # nothing was copied
    sharers = [decoder.new_kv(200, prefix) for _ in range(3)]
    decoder.extend([Chunk(s, rows(PAGE + 1, i)) for i, s in enumerate(sharers)])
    assert held(decoder) == pages_for(PREFIX) + 3 * 2
    sharers[0].rewind(PREFIX + PAGE)
    assert held(decoder) == pages_for(PREFIX) + 2 + 2 + 1
    del prefix, sharers[1:]
    assert held(decoder) == pages_for(PREFIX) + 1
    del sharers[:]
    assert held(decoder) == 0
    with pytest.raises(ValueError, match="do not fit a KV of 0"):  # a frozen KV takes nothing more
        decoder.prefill(kv, rows(1))


def test_bytes_are_those_of_the_tokens_held(opened: Open) -> None:
    for precision, width in (("fp32", 4), ("bf16", 2)):
        decoder = opened(precision)
        prefix = frozen(decoder)
        kv = decoder.new_kv(1000, prefix)
        assert kv.nbytes == 0
        decoder.prefill(kv, rows(100))
        per_token = decoder.spec.kv_bytes_per_token
        assert (prefix.nbytes, kv.nbytes) == (PREFIX * per_token, 100 * per_token)
        assert per_token == 2 * width * 3 * 2 * 64
        kv.rewind(PREFIX + 40)
        assert kv.nbytes == 40 * per_token
        assert decoder.spec.kv_bytes >= KV_BYTES > decoder.spec.kv_bytes - PAGE * per_token


def test_reuse_of_pages_cannot_be_seen(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages that come back are filled with NaN, or with another's keys: the answers are the same bits."""
    expected = story(opened())
    assert all(np.isfinite(x).all() for x in expected)
    poisoned = opened()
    given, give_back = [], FreePages.give_back

    def poisoning(self: FreePages, numbers: list[int]) -> None:
        if self is poisoned._pool.free and poisoned._pool._pages is not None:
            poisoned._pool._pages[:, :, list(numbers)] = torch.nan
            given.extend(numbers)
        give_back(self, numbers)

    monkeypatch.setattr(FreePages, "give_back", poisoning)
    for _ in range(2):
        found = story(poisoned)
        assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))
        assert len(given) > 30
        assert held(poisoned) == 0


def test_the_pool_never_moves(opened: Open) -> None:
    """CUDA graphs hold its addresses."""
    decoder = opened()
    where = decoder._pool._pages.data_ptr()
    story(decoder)
    decoder.load_prefix([np.zeros((2, 100, 2, 64), np.float32)] * 3)
    assert decoder._pool._pages.data_ptr() == where == decoder._pool.layer(0)[0].data_ptr()


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_a_prefix_read_back_from_a_file_answers_the_same(opened: Open, tmp_path: Path, precision: str) -> None:
    decoder, other = opened(precision), opened(precision)
    prefix = frozen(decoder)
    layers = prefix.layers()
    assert {(x.dtype, x.shape) for x in layers} == {(np.dtype("float32"), (2, PREFIX, 2, 64))}
    np.save(tmp_path / "prefix.npy", np.stack(layers))
    frozen(other, 40, 5)  # so that the pages are others
    for reader in (decoder, other):
        loaded = reader.load_prefix(list(np.load(tmp_path / "prefix.npy", mmap_mode="r")))
        assert (loaded.length, loaded.nbytes) == (PREFIX, PREFIX * decoder.spec.kv_bytes_per_token)
        assert all(np.array_equal(a, b) for a, b in zip(loaded.layers(), layers, strict=True))
        one, two = (d.prefill(d.new_kv(99, p), rows(7, 3)) for d, p in ((decoder, prefix), (reader, loaded)))
        assert np.array_equal(one, two)


def test_rewinding_forgets(opened: Open) -> None:
    decoder = opened()
    kv = decoder.new_kv(64)
    decoder.prefill(kv, rows(20))
    expected = decoder.prefill(kv, rows(5, 1))
    kv.rewind(20)
    decoder.prefill(kv, rows(30, 2))
    kv.rewind(20)
    assert np.array_equal(decoder.prefill(kv, rows(5, 1)), expected)
    with pytest.raises(ValueError, match="cannot rewind to 26"):
        kv.rewind(26)


def test_what_does_not_fit_is_refused_and_nothing_grows(opened: Open) -> None:
    decoder = opened()
    kv, other = decoder.new_kv(10), decoder.new_kv(10)
    good = Chunk(other, rows(3))
    bad = {
        "11 tokens after 0 do not fit a KV of 10": [good, Chunk(kv, rows(11))],
        "0 tokens after 0": [good, Chunk(kv, rows(0), 0)],
        "a KV of its own": [good, good],
        "one chunk or more": [],
        "logits of 4 positions": [good, Chunk(kv, rows(3), 4)],
        r"expected \[tokens, 64\]": [good, Chunk(kv, np.zeros((3, 63), np.float32))],
    }
    for message, chunks in bad.items():
        with pytest.raises(ValueError, match=message):
            decoder.extend(chunks)
    assert (kv.length, other.length, held(decoder)) == (0, 0, 0)


@pytest.mark.parametrize("tokens", [1, 40], ids=["step", "mixed"])
def test_a_call_that_fails_leaves_nothing_grown(opened: Open, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the second of three layers, after keys and values were written: what follows is as if it had not been. (The
    step on a GPU fails in the capture of its graph.)"""
    decoder = opened()
    kvs = company(decoder)
    before, swiglu, calls = [(kv.length, list(kv.pages.numbers)) for kv in kvs], torch_model.swiglu, []
    pages = held(decoder)

    def failing(x):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("out of luck")
        return swiglu(x)

    chunks = [Chunk(kv, rows(tokens, i)) for i, kv in enumerate(kvs)]
    with monkeypatch.context() as patch:
        patch.setattr(torch_model, "swiglu", failing)
        with pytest.raises(WsiRtError, match=r"llm: torch failed .out of luck"):
            decoder.extend(chunks)
    assert len(calls) == 2
    assert [(kv.length, kv.pages.numbers) for kv in kvs] == before
    assert held(decoder) == pages
    found, unharmed = decoder.extend(chunks), opened()
    expected = unharmed.extend([Chunk(kv, c.embeds) for kv, c in zip(company(unharmed), chunks, strict=True)])
    assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_full_pool_says_so_and_nothing_grows(opened: Open) -> None:
    page_bytes, pages = PAGE * opened().spec.kv_bytes_per_token, HOLDERS + 1
    decoder = opened(kv_bytes=page_bytes)
    assert (decoder.spec.kv_bytes, decoder._pool.free.count) == (page_bytes, pages)
    kv, other = decoder.new_kv(2000), decoder.new_kv(2000)
    decoder.prefill(kv, rows((pages - 2) * PAGE))
    with pytest.raises(MachineError, match=f"2 pages too few .*{pages - 2} of {pages} .*--kv-bytes"):
        decoder.extend([Chunk(kv, rows(2 * PAGE)), Chunk(other, rows(PAGE + 1))])
    assert (kv.length, other.length, held(decoder)) == ((pages - 2) * PAGE, 0, pages - 2)
    with pytest.raises(MachineError, match="1 pages too few"):
        decoder.load_prefix([np.zeros((2, 3 * PAGE, 2, 64), np.float32)] * 3)
    kv.rewind(PAGE)
    decoder.prefill(other, rows((pages - 1) * PAGE))
    assert held(decoder) == pages


def test_closing_frees_the_pool_whoever_holds_pages(opened: Open) -> None:
    decoder = opened()
    kvs = company(decoder)
    decoder.close()
    assert decoder._pool._pages is None
    with pytest.raises(WsiRtError, match="closed"):
        kvs[1].prefix.layers()
    with pytest.raises(WsiRtError, match="closed"):
        decoder.load_prefix([np.zeros((2, 5, 2, 64), np.float32)] * 3)
    with pytest.raises(WsiRtError, match="closed"):
        decoder.step(kvs, np.arange(5))
    del kvs
    assert held(decoder) == 0


def test_memory_that_is_not_there_is_the_machines_fault() -> None:
    with pytest.raises(MachineError, match=r"no memory for .* pages of keys and values"):
        PagePool(32, 32, 128, 1 << 40, torch.float16, torch.device("cpu"))


def test_random_holders_never_share_a_page() -> None:
    """Against a plain account of who holds how many tokens; each token's place holds what its owner wrote."""
    pool, rng = PagePool(2, 1, 2, 60, torch.float32, torch.device("cpu")), np.random.default_rng(0)
    held_by: dict[Pages, list[float]] = {}
    refused = 0
    for number in range(3000):
        pages = list(held_by)[rng.integers(len(held_by))] if held_by and rng.random() < 0.8 else Pages(pool)
        tokens = held_by.setdefault(pages, [])
        if rng.random() < 0.15:
            del held_by[pages], pages, tokens
        elif rng.random() < 0.3:
            del tokens[rng.integers(len(tokens) + 1) :]
            pages.cut(len(tokens))
        else:
            new = int(rng.integers(1, 50))
            try:
                pool.reserve([(pages, len(tokens) + new)])
            except MachineError:
                refused += 1
                assert sum(map(pages_for, map(len, held_by.values()))) + new // PAGE + 1 > 60 - 1
                continue
            slots = torch.from_numpy(pages.slots(len(tokens), len(tokens) + new))
            for layer in range(2):
                pool.write(layer, slots, torch.full((2, new, 1, 2), float(number + layer)))
            tokens += [float(number)] * new
        assert pool.free.held == sum(pages_for(len(t)) for t in held_by.values())
        every = [n for p in held_by for n in p.numbers]
        assert len(set(every)) == len(every)
    assert refused > 20
    for pages, tokens in held_by.items():
        for layer in range(2):
            k, v = pool.rows(layer, torch.from_numpy(pages.slots(0, len(tokens))))
            assert torch.equal(k, v)
            assert k[:, 0, 0].tolist() == [t + layer for t in tokens]


def test_rows_of_padding_write_nothing(opened: Open) -> None:
    """A step of 5 in a bucket of 8, on the CPU with a stand-in for CUDA graphs that calls the function again: of all
    pages only the slots of the new tokens change."""

    def stand_in(fn, static, _):
        output = fn(**static)
        return lambda: output.copy_(fn(**static)), output

    graphs = {} if torch.cuda.is_available() else {"capture": stand_in}
    decoder = opened(buckets=(8,), **graphs)
    kvs = company(decoder)
    before = decoder._pool._pages.clone()
    decoder.step(kvs, np.arange(5))
    changed = (decoder._pool._pages.view(torch.int32) != before.view(torch.int32)).flatten(4).any(-1)
    slots = {int(kv.pages.slots(kv.own_length - 1, kv.own_length)[0]) for kv in kvs}
    places = changed.nonzero().tolist()  # layer, keys or values, page, offset
    assert {page * PAGE + offset for _, _, page, offset in places} == slots
    assert len(places) == 3 * 2 * 5
