"""Sequences that share a prefix and a batch: a token's bits depend on its sequence alone (DecoderSpec.row_exact)."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("torch", reason="the export extra is not installed")
pytest.importorskip("transformers", reason="the export extra is not installed")
pytest.importorskip("onnx", reason="the export extra is not installed")

from wsi_rt.export.arch import LlamaConfig
from wsi_rt.export.component import build_component
from wsi_rt.export.sources.synthetic import SyntheticSource
from wsi_rt.export.sources.weights import Part
from wsi_rt.runtime.engines.registry import backend
from wsi_rt.runtime.llm.decoder import KV, Chunk, Decoder, PrefixKV

MHA = LlamaConfig(hidden=128, layers=2, heads=4, kv_heads=4, head_width=32, ffn=352, vocab=512, context=1024)
SHAPES = {"mha": MHA, "gqa": replace(MHA, kv_heads=2), "mqa": replace(MHA, kv_heads=1)}
CASES = [(s, p) for s in SHAPES for p in ("fp32", "int8", "int4")]
PREFIX = 300  # tokens: more than one piece of 256 rows, no multiple of 16
CUTS = (1, 2, 3, 5, 8, 13, 31, 64, 65)


@pytest.fixture(scope="module", params=CASES, ids=["-".join(c) for c in CASES])
def opened(request, tmp_path_factory):
    shape, precision = request.param
    work, c = tmp_path_factory.mktemp("llm"), SHAPES[shape]
    part = Part(c, SyntheticSource(c, "test", 3))
    return work, build_component("llm", part, work, "ort-cpu", precision, 2, lambda _: None)


@pytest.fixture(scope="module")
def decoder(opened):
    with backend("ort-cpu").open_decoder(*opened, 2) as decoder:
        yield decoder


@pytest.fixture(scope="module")
def prefix(decoder) -> PrefixKV:
    kv = decoder.new_kv(PREFIX + 1)
    decoder.prefill(kv, some_embeds(0, PREFIX, decoder))
    return decoder.freeze(kv)


def some_embeds(seed: int, length: int, decoder: Decoder) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1, 1, (length, decoder.spec.hidden_size)).astype(np.float32)


def one_by_one(decoder: Decoder, kv: KV, embeds: np.ndarray) -> np.ndarray:
    """Logits [T, vocab] of tokens that came alone."""
    return np.stack([decoder.prefill(kv, embeds[i : i + 1]) for i in range(len(embeds))])


def test_how_a_sequence_is_cut_changes_no_bit(decoder, prefix):
    embeds = some_embeds(1, sum(CUTS), decoder)
    alone = one_by_one(decoder, decoder.new_kv(900, prefix), embeds)
    for cuts in (CUTS, CUTS[::-1], (len(embeds),)):
        kv, start, found = decoder.new_kv(900, prefix), 0, []
        for size in cuts:
            found += decoder.extend([Chunk(kv, embeds[start : start + size], size)])
            start += size
        assert np.array_equal(np.concatenate(found), alone), cuts
        assert kv.length == PREFIX + len(embeds)


def test_company_changes_no_bit(decoder, prefix):
    """Alone, and among sequences of other lengths, with this prefix, another one and none, new and long started."""
    other = decoder.load_prefix([x[:, :77] * np.float32(0.5) for x in prefix.layers()])
    prompts = [some_embeds(10 + i, n, decoder) for i, n in enumerate((1, 40, 64, 7, 129, 2, 33))]
    prefixes = [prefix, None, prefix, other, prefix, other, None]
    later = some_embeds(30, 3 * len(prompts), decoder).reshape(3, len(prompts), 1, -1)

    def run(members: list[int]) -> dict[int, np.ndarray]:
        kvs = {i: decoder.new_kv(900, prefixes[i]) for i in members}
        rounds = [decoder.extend([Chunk(kvs[i], prompts[i]) for i in members])]
        rounds += [decoder.extend([Chunk(kvs[i], x[i]) for i in members]) for x in later]
        return {i: np.concatenate([r[at] for r in rounds]) for at, i in enumerate(members)}

    together = run(list(range(len(prompts))))
    for i in range(len(prompts)):
        assert np.array_equal(run([i])[i], together[i]), i


def test_one_thread_or_two_changes_no_bit(opened, decoder, prefix):
    embeds = some_embeds(2, 70, decoder)
    with backend("ort-cpu").open_decoder(*opened, 1) as single:
        kv = single.new_kv(900, single.load_prefix(prefix.layers()))
        assert np.array_equal(
            single.extend([Chunk(kv, embeds, 70)])[0], one_by_one(decoder, decoder.new_kv(900, prefix), embeds)
        )


def test_a_prefix_is_what_its_tokens_would_be(opened, decoder, prefix):
    """Split softmax or one: the same to rounding; weights in blocks round activations, which widens it."""
    kv, embeds = decoder.new_kv(900), some_embeds(3, 40, decoder)
    decoder.prefill(kv, some_embeds(0, PREFIX, decoder))
    own = decoder.extend([Chunk(kv, embeds, 40)])[0]
    shared = decoder.extend([Chunk(decoder.new_kv(900, prefix), embeds, 40)])[0]
    precision = opened[1].compiled("ort-cpu").precision
    assert np.abs(own - shared).max() <= (1e-5 if precision == "fp32" else 5e-2) * np.abs(own).max()


def test_a_prefix_comes_back_from_a_file(tmp_path, decoder, prefix):
    np.savez(tmp_path / "prefix.npz", *prefix.layers())
    with np.load(tmp_path / "prefix.npz") as data:
        loaded = decoder.load_prefix([data[name] for name in data.files])
    embeds = some_embeds(4, 9, decoder)
    a, b = (decoder.prefill(decoder.new_kv(900, p), embeds) for p in (prefix, loaded))
    assert np.array_equal(a, b)
    assert loaded.nbytes == prefix.nbytes == PREFIX * decoder.spec.kv_bytes_per_token


def test_a_foreign_prefix_is_refused(decoder, prefix):
    layers = list(prefix.layers())
    wrong = [
        layers[1:],
        [x[:, :, :, :8] for x in layers],
        [x.astype(np.float64) for x in layers],
        [],
        [x[0] for x in layers],
    ]
    for other in (*wrong, [layers[0], layers[1][:, :5]], [x[:, :0] for x in layers]):
        with pytest.raises(ValueError, match="a prefix of"):
            decoder.load_prefix(other)


def test_only_own_tokens_count(decoder, prefix):
    kv = decoder.new_kv(900, prefix)
    assert (kv.length, kv.nbytes) == (PREFIX, 0)
    before = [x.copy() for x in prefix.layers()]
    decoder.prefill(kv, some_embeds(5, 11, decoder))
    assert kv.nbytes == 11 * decoder.spec.kv_bytes_per_token
    kv.rewind(PREFIX)
    assert kv.nbytes == 0
    with pytest.raises(ValueError, match="cannot rewind"):
        kv.rewind(PREFIX - 1)
    assert all(np.array_equal(a, b) for a, b in zip(before, prefix.layers(), strict=True))


def test_what_was_rewound_leaves_no_trace(decoder, prefix):
    embeds, kv = some_embeds(6, 20, decoder), decoder.new_kv(900, prefix)
    decoder.prefill(kv, some_embeds(7, 90, decoder) * 1e3)
    kv.rewind(PREFIX)
    assert np.array_equal(decoder.prefill(kv, embeds), decoder.prefill(decoder.new_kv(900, prefix), embeds))


def test_a_call_that_cannot_be_leaves_every_kv_as_it_was(decoder, prefix):
    good, full = decoder.new_kv(900, prefix), decoder.new_kv(PREFIX + 3, prefix)
    x = some_embeds(8, 4, decoder)
    for chunks, message in (
        ([Chunk(good, x), Chunk(full, x)], f"4 tokens after {PREFIX} do not fit a KV of {PREFIX + 3}"),
        ([Chunk(good, x), Chunk(good, x)], "a KV of its own"),
        ([Chunk(good, x, 5)], "logits of 5 positions"),
        ([], "one chunk or more"),
    ):
        with pytest.raises(ValueError, match=message):
            decoder.extend(chunks)
    assert (good.length, full.length) == (PREFIX, PREFIX)
    for capacity in (PREFIX, decoder.spec.context_length + 1):
        with pytest.raises(ValueError, match=f"expected {PREFIX + 1}.."):
            decoder.new_kv(capacity, prefix)
    with pytest.raises(ValueError, match="to be shared holds tokens"):
        decoder.freeze(good)


def test_logits_of_as_many_positions_as_are_wanted(decoder, prefix):
    x, counts = some_embeds(9, 12, decoder), (0, 1, 5, 12)
    found = decoder.extend([Chunk(decoder.new_kv(900, prefix), x, n) for n in counts])
    assert [len(f) for f in found] == list(counts)
    for f, n in zip(found, counts, strict=True):
        assert np.array_equal(f, found[-1][12 - n :])


def test_layer_by_layer_is_the_same_as_an_open_decoder(opened, decoder):
    work, manifest = opened
    embeds, ids = some_embeds(20, 70, decoder), np.array([3, 500, 3, 41])
    taught = type(decoder).teach(work, manifest, manifest.compiled("ort-cpu"), 2, embeds, ids)
    kv = decoder.new_kv(80)
    expected = [decoder.prefill(kv, embeds), *(decoder.step([kv], ids[i : i + 1])[0] for i in range(len(ids)))]
    assert np.array_equal(taught, np.stack(expected))
