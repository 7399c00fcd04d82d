"""The `ort-cuda` decoder, the CPU provider in the GPU's stead: the tokens of ort-cpu's fp32, and a KV that behaves."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest

pytest.importorskip("torch", reason="the export extra is not installed")
pytest.importorskip("onnx", reason="the export extra is not installed")
pytest.importorskip("transformers", reason="the export extra is not installed")

from wsi_rt.export.arch import LlamaConfig
from wsi_rt.export.component import build_component
from wsi_rt.export.sources.synthetic import SyntheticSource, uniform
from wsi_rt.export.sources.weights import Part
from wsi_rt.runtime import devices
from wsi_rt.runtime.engines.ort_provider import on_cpu
from wsi_rt.runtime.engines.registry import backend
from wsi_rt.runtime.errors import InputError, WsiRtError
from wsi_rt.runtime.llm.decoder import Chunk, Decoder
from wsi_rt.runtime.llm.ort_cuda_decoder import OrtCudaDecoder, OrtCudaKV
from wsi_rt.runtime.llm.ort_decoder import OrtDecoder
from wsi_rt.runtime.manifest import EngineManifest
from wsi_rt.runtime.parity import compare, load_check, run_source

CONFIG = LlamaConfig(hidden=64, layers=2, heads=4, kv_heads=2, head_width=16, ffn=96, vocab=512, context=256)
PREFIX, NEW = 70, 16


@dataclass
class Pair:
    ours: OrtCudaDecoder
    plain: Decoder  # ort-cpu, fp32
    manifest: EngineManifest


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory):
    root = tmp_path_factory.mktemp("llm")
    part = Part(CONFIG, SyntheticSource(CONFIG, "test", 3))
    manifest = build_component("llm", part, root, "ort-cpu", "fp32", 1, lambda _: None)
    graphs = {role: root / path for role, path in manifest.portable.items()}
    with (
        OrtCudaDecoder(manifest, graphs, on_cpu(1)) as ours,
        backend("ort-cpu").open_decoder(root, manifest, 1) as plain,
    ):
        yield root, Pair(ours, plain, manifest)


@pytest.fixture
def decoders(pair):
    return pair[1]


def embeds(name: str, tokens: int):
    return uniform(0, name, tokens * CONFIG.hidden, -1, 1).reshape(tokens, CONFIG.hidden)


def greedy(decoder: Decoder, kvs, logits, count: int) -> list[list[int]]:
    """logits [B, vocab] -> the next tokens of every sequence."""
    found: list[list[int]] = [[] for _ in kvs]
    for _ in range(count):
        ids = np.argmax(logits, axis=-1)
        for one, token in zip(found, ids.tolist(), strict=True):
            one.append(token)
        logits = decoder.step(kvs, ids)
    return found


def answers(decoder: Decoder) -> list[list[int]]:
    """Two questions of different lengths about one prefix, decoded together."""
    whole = decoder.new_kv(PREFIX)
    decoder.extend([Chunk(whole, embeds("prefix", PREFIX), logits=0)])
    prefix = decoder.freeze(whole)
    kvs = [decoder.new_kv(CONFIG.context, prefix) for _ in range(2)]
    logits = decoder.extend([Chunk(kv, embeds(f"q{i}", 5 + i)) for i, kv in enumerate(kvs)])
    return greedy(decoder, kvs, np.concatenate(logits), NEW)


def test_the_tokens_of_ort_cpu(decoders):
    found = answers(decoders.ours)
    assert found == answers(decoders.plain)
    assert found[0] != found[1]
    assert len({token for one in found for token in one}) > 5


def test_the_stored_check(pair):
    root, p = pair
    inputs, expected = load_check(root / p.manifest.check)
    found = compare(run_source(root, p.manifest, p.manifest.portable, inputs, 1), expected)
    assert found.max_rel <= 5e-5


def test_logits_of_several_positions(decoders):
    x = embeds("x", 9)
    for count in (0, 1, 4, 9):
        ours, plain = (d.extend([Chunk(d.new_kv(20), x, logits=count)])[0] for d in (decoders.ours, decoders.plain))
        assert ours.shape == plain.shape == (count, CONFIG.vocab)
        assert np.allclose(ours, plain, atol=1e-4)


def test_a_prefix_can_be_kept_and_loaded(decoders):
    kv = decoders.ours.new_kv(PREFIX)
    decoders.ours.prefill(kv, embeds("prefix", PREFIX))
    prefix = decoders.ours.freeze(kv)
    layers = prefix.layers()
    assert [x.shape for x in layers] == [(2, PREFIX, CONFIG.kv_heads, CONFIG.head_width)] * CONFIG.layers
    assert prefix.nbytes == sum(x.nbytes for x in layers) == PREFIX * decoders.ours.spec.kv_bytes_per_token
    loaded = decoders.ours.load_prefix(layers)
    other = decoders.plain.load_prefix(layers)
    x = embeds("question", 3)
    first, second = (decoders.ours.prefill(decoders.ours.new_kv(100, p), x) for p in (prefix, loaded))
    assert np.array_equal(first, second)
    assert np.allclose(decoders.plain.prefill(decoders.plain.new_kv(100, other), x), first, atol=1e-4)


def test_a_kv_with_a_prefix_takes_no_memory_before_its_first_token(decoders):
    d = decoders.ours
    whole = d.new_kv(PREFIX)
    d.prefill(whole, embeds("prefix", PREFIX))
    kv = d.new_kv(100, d.freeze(whole))
    assert (kv.length, kv.shared, kv.nbytes) == (PREFIX, PREFIX, 0)
    d.prefill(kv, embeds("question", 3))
    assert kv.nbytes == (PREFIX + 3) * d.spec.kv_bytes_per_token, "a copy of the prefix is in it"


def test_a_rewind_forgets(decoders):
    d, x = decoders.ours, embeds("x", 12)
    kv = d.new_kv(30)
    d.prefill(kv, x[:6])
    d.prefill(kv, embeds("wrong", 4))
    kv.rewind(6)
    again = d.prefill(kv, x[6:])
    assert kv.length == 12
    assert np.allclose(again, d.prefill(d.new_kv(30), x), atol=1e-4)


def test_an_error_grows_no_kv(decoders, monkeypatch):
    d = decoders.ours
    kvs = [d.new_kv(30) for _ in range(2)]
    for kv in kvs:
        d.prefill(kv, embeds("x", 4))
    through, calls = d._through, []

    def fail_second(chunk):
        calls.append(chunk)
        if len(calls) == 2:
            raise RuntimeError("Failed to allocate memory")
        return through(chunk)

    monkeypatch.setattr(d, "_through", fail_second)
    with pytest.raises(WsiRtError, match="llm: memory ran out"):
        d.extend([Chunk(kv, embeds("y", 2)) for kv in kvs])
    monkeypatch.undo()
    assert [kv.length for kv in kvs] == [4, 4]
    assert np.allclose(*(d.prefill(kv, embeds("y", 2)) for kv in kvs))


def test_what_is_refused(decoders, pair):
    d = decoders.ours
    with pytest.raises(TypeError, match="expected this decoder's own OrtCudaKV"):
        d.extend([Chunk(decoders.plain.new_kv(8), embeds("x", 2))])
    decoders.plain.prefill(foreign := decoders.plain.new_kv(8), embeds("x", 2))
    prefix = decoders.plain.freeze(foreign)
    with pytest.raises(TypeError, match="expected this decoder's own OrtCudaPrefix"):
        d.new_kv(10, prefix)
    with pytest.raises(InputError, match="--fast is for engines of the ort-cpu target"):
        OrtCudaDecoder.open(pair[0], decoders.manifest, decoders.manifest.compiled("ort-cpu"), 1, fast=True)
    assert isinstance(d.new_kv(5), OrtCudaKV)
    assert isinstance(decoders.plain, OrtDecoder)


@pytest.mark.gpu
@pytest.mark.skipif(not devices.gpus(), reason="no NVIDIA GPU here")
def test_the_tokens_of_ort_cpu_on_a_gpu(pair):
    root, p = pair
    compiled = replace(p.manifest.compiled("ort-cpu"), graphs=p.manifest.portable, weights_dir="llm")
    with OrtCudaDecoder.open(root, p.manifest, compiled, 1) as ours:
        assert answers(ours) == answers(p.plain)


def test_a_closed_decoder(pair):
    root, p = pair
    d = OrtCudaDecoder(p.manifest, {role: root / path for role, path in p.manifest.portable.items()}, on_cpu(1))
    kv = d.new_kv(8)
    d.close()
    d.close()
    with pytest.raises(WsiRtError, match="this decoder is closed"):
        d.prefill(kv, embeds("x", 2))
