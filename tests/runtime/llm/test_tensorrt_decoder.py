"""The TensorRT decoder on a stand-in for the GPU: slots, batches and prefixes against the fp32 model."""

from __future__ import annotations

import gc

import numpy as np
import pytest

pytest.importorskip("torch", reason="the export extra is not installed")
pytest.importorskip("onnx", reason="the export extra is not installed")

from wsi_rt.export.arch import LlamaConfig
from wsi_rt.export.parity import reference_outputs
from wsi_rt.export.sources.synthetic import SyntheticSource, uniform
from wsi_rt.runtime.errors import InputError, WsiRtError
from wsi_rt.runtime.llm.decoder import Chunk
from wsi_rt.runtime.llm.tensorrt_decoder import TensorRtDecoder

TARGET = "tensorrt-rtx-sm89"
CONFIG = LlamaConfig(hidden=64, layers=2, heads=4, kv_heads=2, head_width=16, ffn=96, vocab=101, context=96)
SOURCE = SyntheticSource(CONFIG, "test", 1)
NEAR = 0.02  # of the largest logit: what fp16 costs here is 0.002


@pytest.fixture(scope="module")
def built(tmp_path_factory, stand_in_engine):
    root = tmp_path_factory.mktemp("llm")
    return root, stand_in_engine(CONFIG, root)


@pytest.fixture
def decoder(built, stand_in):
    root, manifest = built
    with TensorRtDecoder.open(root, manifest, manifest.compiled(TARGET), 1) as decoder:
        yield decoder
        gc.collect()


def embeds(name, tokens):
    return uniform(0, name, tokens * CONFIG.hidden, -1, 1).reshape(tokens, -1)


def expected(prompt, ids):
    """Logits behind the prompt and each token, by the fp32 module."""
    inputs = {"embeds": prompt, "token_ids": np.array(ids, np.int64)}
    return reference_outputs(CONFIG, SOURCE, inputs).outputs["logits"]


def near(actual, reference):
    assert actual.shape == reference.shape
    assert np.abs(actual - reference).max() <= NEAR * np.abs(reference).max()


def test_spec(decoder):
    spec = decoder.spec
    assert (spec.vocab_size, spec.hidden_size, spec.context_length) == (101, 64, 96)
    assert spec.kv_bytes_per_token == 2 * 2 * 2 * 2 * 16
    assert not spec.row_exact


def test_a_prompt_then_token_by_token(decoder, stand_in):
    prompt, ids = embeds("prompt", 33), [7, 8, 9]
    near(decoder.taught(prompt, np.array(ids, np.int64)), expected(prompt, ids))
    assert [x["profile"] for x in stand_in.launches] == [0, 1, 1, 1]
    shapes = stand_in.launches[0]["shapes"]
    assert shapes["inputs_embeds"] == (1, 33, 64)
    assert shapes["keys"] == (64,)
    assert shapes["cache.1.value"] == (1, 2, 96, 16)


def test_sequences_of_different_lengths_in_one_launch(decoder, stand_in):
    prompts = [embeds(f"p{i}", n) for i, n in enumerate((5, 17, 40))]
    kvs = [decoder.new_kv(60) for _ in prompts]
    firsts = decoder.extend([Chunk(kv, p) for kv, p in zip(kvs, prompts, strict=True)])
    ids = np.array([3, 50, 100])
    logits = decoder.step(kvs, ids)
    assert [x["shapes"]["inputs_embeds"] for x in stand_in.launches] == [
        (1, 5, 64),
        (1, 17, 64),
        (1, 40, 64),
        (3, 1, 64),
    ]
    for prompt, token, first, then in zip(prompts, ids, firsts, logits, strict=True):
        near(np.stack([first[0], then]), expected(prompt, [token]))
    assert [kv.length for kv in kvs] == [6, 18, 41]


def test_a_prefix_is_copied_to_the_beginning_of_each_slot(decoder, stand_in):
    slide, questions = embeds("slide", 20), [embeds(f"q{i}", n) for i, n in enumerate((4, 1))]
    kv = decoder.new_kv(20)
    decoder.prefill(kv, slide)
    prefix = decoder.freeze(kv)
    del kv
    assert prefix.length == 20
    assert prefix.nbytes == 20 * decoder.spec.kv_bytes_per_token
    kvs = [decoder.new_kv(50, prefix) for _ in questions]
    assert [kv.length for kv in kvs] == [20, 20]
    assert [kv.nbytes for kv in kvs] == [0, 0]
    found = decoder.extend([Chunk(kv, q) for kv, q in zip(kvs, questions, strict=True)])
    for q, logits in zip(questions, found, strict=True):
        near(logits, expected(np.concatenate([slide, q]), []))
    assert [kv.nbytes for kv in kvs] == [n * decoder.spec.kv_bytes_per_token for n in (4, 1)]


def test_a_prefix_of_another_process(decoder):
    slide, question = embeds("slide", 20), embeds("q", 3)
    kv = decoder.new_kv(20)
    decoder.prefill(kv, slide)
    layers = decoder.freeze(kv).layers()
    assert [x.shape for x in layers] == [(2, 20, 2, 16)] * 2
    loaded = decoder.load_prefix(layers)
    for mine, theirs in zip(loaded.layers(), layers, strict=True):
        assert np.array_equal(mine, theirs)
    near(decoder.prefill(decoder.new_kv(30, loaded), question)[None], expected(np.concatenate([slide, question]), []))
    with pytest.raises(ValueError, match="a prefix of 1 layers"):
        decoder.load_prefix(layers[:1])


def test_a_sequence_that_waits_keeps_its_numbers(decoder, stand_in):
    """It lies between two others and takes part in their launch; a full one ends the launch before it."""
    prompts = [embeds(f"p{i}", 6) for i in range(3)]
    kvs = [decoder.new_kv(96) for _ in prompts]
    for kv, prompt in zip(kvs, prompts, strict=True):
        decoder.prefill(kv, prompt)
    stand_in.launches.clear()
    decoder.step([kvs[0], kvs[2]], np.array([1, 2]))
    assert [x["shapes"]["inputs_embeds"][0] for x in stand_in.launches] == [3]
    assert kvs[1].length == 6
    near(decoder.step([kvs[1]], np.array([4])), expected(prompts[1], [4])[1:])

    decoder.prefill(kvs[1], embeds("more", 96 - kvs[1].length))
    stand_in.launches.clear()
    decoder.step([kvs[0], kvs[2]], np.array([1, 2]))
    assert [x["shapes"]["inputs_embeds"][0] for x in stand_in.launches] == [1, 1]


def test_a_prompt_between_single_tokens(decoder, stand_in):
    """Its slot takes part in the launch of its neighbours, idle, and then has one of its own."""
    prompts = [embeds(f"p{i}", 6) for i in range(3)]
    kvs = [decoder.new_kv(96) for _ in prompts]
    for kv, prompt in zip(kvs, prompts, strict=True):
        decoder.prefill(kv, prompt)
    stand_in.launches.clear()
    ids = [3, 50, 100, 7]
    new = decoder.embed(np.array(ids))
    chunks = [Chunk(kvs[0], new[:1]), Chunk(kvs[1], new[1:3], logits=2), Chunk(kvs[2], new[3:])]
    first, middle, last = decoder.extend(chunks)
    assert [x["shapes"]["inputs_embeds"][:2] for x in stand_in.launches] == [(3, 1), (1, 2)]
    near(first, expected(prompts[0], ids[:1])[1:])
    near(middle, expected(prompts[1], ids[1:3])[1:])
    near(last, expected(prompts[2], ids[3:])[1:])
    assert [kv.length for kv in kvs] == [7, 8, 7]


def test_more_sequences_than_a_launch_takes(built, stand_in):
    root, manifest = built
    with TensorRtDecoder.open(root, manifest, manifest.compiled(TARGET), 1) as decoder:
        decoder._most = 2
        prompt = embeds("p", 3)
        kvs = [decoder.new_kv(8) for _ in range(5)]
        for kv in kvs:
            decoder.prefill(kv, prompt)
        stand_in.launches.clear()
        logits = decoder.step(kvs, np.full(5, 9))
        assert [x["shapes"]["inputs_embeds"][0] for x in stand_in.launches] == [2, 2, 1]
        near(logits, np.repeat(expected(prompt, [9])[1:], 5, axis=0))


def test_slots_are_used_again_and_their_tensors_grow(decoder, stand_in):
    one = decoder.new_kv(10)
    before = stand_in.cuda.held
    two = decoder.new_kv(10)
    assert stand_in.cuda.held > before
    held, slot = stand_in.cuda.held, two.slot
    del two
    gc.collect()
    again = decoder.new_kv(10)
    assert (again.slot, stand_in.cuda.held) == (slot, held)
    prompt = embeds("p", 4)
    decoder.prefill(one, prompt)
    more = [decoder.new_kv(10) for _ in range(4)]  # the tensors move
    near(decoder.step([one], np.array([5])), expected(prompt, [5])[1:])
    assert len({kv.slot for kv in (one, again, *more)}) == 6


def test_logits_of_the_last_positions_or_of_none(decoder):
    prompt = embeds("p", 12)
    ids = np.array([5, 6, 7])
    both = np.concatenate([prompt, decoder.embed(ids)])
    kv, other = decoder.new_kv(20), decoder.new_kv(20)
    found = decoder.extend([Chunk(kv, both, logits=4), Chunk(other, prompt, logits=0)])
    near(found[0], expected(prompt, ids.tolist()))
    assert found[1].shape == (0, 101)


def test_rewinding_forgets(decoder):
    prompt = embeds("p", 12)
    kv = decoder.new_kv(20)
    decoder.prefill(kv, prompt)
    decoder.step([kv], np.array([1]))
    kv.rewind(12)
    near(decoder.step([kv], np.array([2])), expected(prompt, [2])[1:])


def test_on_an_error_no_sequence_has_grown(decoder, stand_in):
    kv = decoder.new_kv(20)
    decoder.prefill(kv, embeds("p", 12))
    stand_in.refuse = "execute"
    with pytest.raises(WsiRtError, match="llm: tensorrt_rtx refuses the run"):
        decoder.step([kv], np.array([1]))
    assert kv.length == 12


@pytest.mark.parametrize("capacity", [0, 97])
def test_what_does_not_fit_the_context(decoder, capacity):
    with pytest.raises(ValueError, match=r"expected 1\.\.96 tokens"):
        decoder.new_kv(capacity)


def test_no_fast_and_no_foreign_parts(built, stand_in, decoder):
    root, manifest = built
    with pytest.raises(InputError, match="no --fast"):
        TensorRtDecoder.open(root, manifest, manifest.compiled(TARGET), 1, fast=True)
    with pytest.raises(TypeError, match="own TensorRtPrefix"):
        decoder.new_kv(20, object.__new__(type("Other", (), {"length": 3})))


def test_closed_is_closed_and_all_memory_free(built, stand_in):
    root, manifest = built
    decoder = TensorRtDecoder.open(root, manifest, manifest.compiled(TARGET), 1)
    kv = decoder.new_kv(20)
    decoder.prefill(kv, embeds("p", 3))
    decoder.close()
    decoder.close()
    assert stand_in.cuda.held == 0
    with pytest.raises(WsiRtError, match="closed"):
        decoder.prefill(kv, embeds("p", 3))
