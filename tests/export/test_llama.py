"""The language model's graphs against transformers' LlamaForCausalLM on the same weights and embeddings."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the export extra is not installed")
transformers = pytest.importorskip("transformers", reason="the export extra is not installed")
pytest.importorskip("onnx", reason="the export extra is not installed")

from wsi_rt.export.arch import LlamaConfig  # noqa: E402
from wsi_rt.export.component import build_component  # noqa: E402
from wsi_rt.export.models import reference_model  # noqa: E402
from wsi_rt.export.portable import run_portable  # noqa: E402
from wsi_rt.export.sources.synthetic import SyntheticSource, uniform  # noqa: E402
from wsi_rt.export.sources.weights import Part, WeightSource  # noqa: E402
from wsi_rt.runtime.engines.registry import backend  # noqa: E402
from wsi_rt.runtime.errors import WsiRtError  # noqa: E402
from wsi_rt.runtime.llm.decoder import Decoder  # noqa: E402

PROMPT, NEW = 48, 64
MHA = LlamaConfig(hidden=64, layers=3, heads=4, kv_heads=4, head_width=16, ffn=96, vocab=512, context=256)
CONFIGS = {
    "mha": MHA,
    "gqa": replace(MHA, kv_heads=2),
    "mqa-wide-heads": replace(MHA, kv_heads=1, head_width=32),
    "tied": replace(MHA, tied_embeddings=True),
    "rope-theta-and-eps": replace(MHA, kv_heads=2, rope_theta=500000.0, rms_eps=1e-2),
}


@dataclass
class Case:
    config: LlamaConfig
    hf: transformers.LlamaForCausalLM
    decoder: Decoder
    graphs: dict
    embeds: np.ndarray  # [PROMPT, hidden]
    tokens: list[int]  # what transformers generates greedily
    logits: np.ndarray  # [NEW, vocab] that it chose them from


def weights(c: LlamaConfig, changed) -> WeightSource:
    """Synthetic ones; tied embeddings small, so that a token's own row does not always win."""
    source = SyntheticSource(c, "test", 3)
    name = "model.embed_tokens.weight"
    return changed(source, {name: 0.03 * source.get(name)}) if c.tied_embeddings else source


def huggingface(c: LlamaConfig, source: WeightSource) -> transformers.LlamaForCausalLM:
    """transformers' own model, put together here (not by the code under test)."""
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=c.vocab,
            hidden_size=c.hidden,
            intermediate_size=c.ffn,
            num_hidden_layers=c.layers,
            num_attention_heads=c.heads,
            num_key_value_heads=c.kv_heads,
            head_dim=c.head_width,
            max_position_embeddings=c.context,
            rms_norm_eps=c.rms_eps,
            rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta},
            tie_word_embeddings=c.tied_embeddings,
            attn_implementation="eager",
        )
    )
    result = model.load_state_dict({n: torch.from_numpy(source.get(n)) for n in c.tensors()}, strict=False)
    assert not result.unexpected_keys
    assert set(result.missing_keys) <= ({"lm_head.weight"} if c.tied_embeddings else set())
    model.tie_weights()
    return model.eval()


def generate(model: transformers.LlamaForCausalLM, embeds: np.ndarray, new: int) -> tuple[list[int], np.ndarray]:
    """transformers' greedy tokens after `embeds` [T, hidden], and their logits [new, vocab]; EOS does not stop it."""
    with torch.inference_mode():
        out = model.generate(
            inputs_embeds=torch.from_numpy(embeds)[None],
            attention_mask=torch.ones(1, len(embeds), dtype=torch.long),
            do_sample=False,
            max_new_tokens=new,
            eos_token_id=None,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_logits=True,
        )
    tokens, logits = out.sequences[0, -new:].tolist(), torch.cat(out.logits).numpy()
    assert len(tokens) == len(logits) == new
    return tokens, logits


@pytest.fixture(scope="module", params=CONFIGS)
def case(request, tmp_path_factory: pytest.TempPathFactory, changed):
    c = CONFIGS[request.param]
    source = weights(c, changed)
    hf = huggingface(c, source)
    embeds = uniform(9, "prompt", PROMPT * c.hidden, -1, 1).reshape(PROMPT, c.hidden)
    tokens, logits = generate(hf, embeds, NEW)
    work = tmp_path_factory.mktemp("llm")
    manifest = build_component("llm", Part(c, source), work, "ort-cpu", "fp32", 2, lambda _: None)
    graphs = {role: work / path for role, path in manifest.portable.items()}
    with backend("ort-cpu").open_decoder(work, manifest, 2) as decoder:
        yield Case(c, hf, decoder, graphs, embeds, tokens, logits)


def greedy(decoder: Decoder, kv, logits: np.ndarray, n: int = NEW) -> list[int]:
    tokens = [int(logits.argmax())]
    while len(tokens) < n:
        tokens.append(int(decoder.step([kv], np.array(tokens[-1:]))[0].argmax()))
    return tokens


def test_greedy_tokens_equal_transformers(case):
    assert len(set(case.tokens)) > 8, "a model that repeats itself shows little"
    kv = case.decoder.new_kv(PROMPT + NEW)
    logits = case.decoder.prefill(kv, case.embeds)
    assert logits.shape == (case.config.vocab,)
    assert np.abs(logits - case.logits[0]).max() <= 1e-4
    assert kv.length == PROMPT
    assert greedy(case.decoder, kv, logits) == case.tokens
    assert kv.length == PROMPT + NEW - 1


@pytest.mark.parametrize("sizes", [(20, 1, 27), (1, 47), (47, 1), (16, 16, 16)], ids=str)
def test_prefill_in_pieces_is_the_same(case, sizes):
    kv, start = case.decoder.new_kv(case.config.context), 0
    for size in sizes:
        logits = case.decoder.prefill(kv, case.embeds[start : start + size])
        start += size
    assert start == kv.length == PROMPT
    assert np.abs(logits - case.logits[0]).max() <= 1e-4
    assert greedy(case.decoder, kv, logits) == case.tokens


def test_rewind_and_generate_again(case):
    """To the end of the prompt, and into it: what was written after the point no longer counts."""
    kv = case.decoder.new_kv(PROMPT + NEW)
    case.decoder.prefill(kv, case.embeds)
    greedy(case.decoder, kv, case.decoder.step([kv], np.array([7]))[0], 20)
    kv.rewind(30)
    assert kv.length == 30
    logits = case.decoder.prefill(kv, case.embeds[30:])
    assert greedy(case.decoder, kv, logits) == case.tokens
    kv.rewind(PROMPT - 1)
    logits = case.decoder.prefill(kv, case.embeds[-1:])
    assert greedy(case.decoder, kv, logits) == case.tokens
    with pytest.raises(ValueError, match="cannot rewind"):
        kv.rewind(kv.length + 1)
    with pytest.raises(ValueError, match="cannot rewind"):
        kv.rewind(-1)


def test_two_sequences_side_by_side(case):
    """KV objects do not know of each other, whatever their capacities and lengths."""
    long, short = case.decoder.new_kv(case.config.context), case.decoder.new_kv(70)
    a = [int(case.decoder.prefill(long, case.embeds).argmax())]
    b = [int(case.decoder.prefill(short, case.embeds[:10]).argmax())]
    for _ in range(30):
        both = case.decoder.step([long, short], np.array([a[-1], b[-1]]))
        assert both.shape == (2, case.config.vocab)
        a.append(int(both[0].argmax()))
        b.append(int(both[1].argmax()))
    assert a == case.tokens[: len(a)]
    alone = case.decoder.new_kv(70)
    assert greedy(case.decoder, alone, case.decoder.prefill(alone, case.embeds[:10]), 31) == b


def test_capacity_is_kept(case):
    context = case.config.context
    for capacity in (0, -1, context + 1):
        with pytest.raises(ValueError, match=f"{capacity}, expected 1..{context}"):
            case.decoder.new_kv(capacity)
    kv = case.decoder.new_kv(12)
    with pytest.raises(ValueError, match="13 tokens after 0 do not fit a KV of 12"):
        case.decoder.prefill(kv, case.embeds[:13])
    with pytest.raises(ValueError, match="0 tokens after 0"):
        case.decoder.prefill(kv, case.embeds[:0])
    case.decoder.prefill(kv, case.embeds[:12])
    with pytest.raises(ValueError, match="1 tokens after 12"):
        case.decoder.step([kv], np.array([1]))
    assert kv.length == 12
    assert kv.nbytes == 12 * case.decoder.spec.kv_bytes_per_token


def test_the_whole_context_can_be_used(case):
    """The last position of the context still gives transformers' logits."""
    context = case.config.context
    embeds = uniform(4, "long", context * case.config.hidden, -1, 1).reshape(context, -1)
    with torch.inference_mode():
        expected = case.hf(inputs_embeds=torch.from_numpy(embeds)[None]).logits[0, -1].numpy()
    kv = case.decoder.new_kv(context)
    assert np.abs(case.decoder.prefill(kv, embeds) - expected).max() <= 1e-4


def test_portable_graph_equals_transformers(case):
    """Standard operators with past and present KV: prefill, then the tokens one by one."""
    inputs = {"embeds": case.embeds, "token_ids": np.array(case.tokens[:-1])}
    logits = run_portable(case.config, case.graphs, inputs)["logits"]
    assert logits.shape == case.logits.shape
    assert np.abs(logits - case.logits).max() <= 1e-4
    assert logits.argmax(axis=1).tolist() == case.tokens


def test_portable_graph_takes_a_batch(case, ort_run):
    """Two prompts at once give what each gives alone (dynamic batch)."""
    c = case.config
    empty = np.zeros((2, c.kv_heads, 0, c.head_width), np.float32)
    past = {f"past.{i}.{part}": empty for i in range(c.layers) for part in ("key", "value")}
    batch = np.stack([case.embeds, case.embeds[::-1]])
    out = ort_run(case.graphs["decoder"], {"inputs_embeds": batch, **past})
    assert out["logits"].shape == (2, c.vocab)
    assert np.abs(out["logits"][0] - case.logits[0]).max() <= 1e-4
    with torch.inference_mode():
        other = case.hf(inputs_embeds=torch.from_numpy(batch[1:].copy())).logits[0, -1].numpy()
    assert np.abs(out["logits"][1] - other).max() <= 1e-4


def test_the_reference_equals_transformers(case, changed):
    """The module that engines are held against is transformers' model with these weights."""
    module = reference_model(case.config, weights(case.config, changed))
    x = torch.from_numpy(case.embeds)[None]
    with torch.inference_mode():
        assert (module(inputs_embeds=x).logits - case.hf(inputs_embeds=x).logits).abs().max() <= 1e-4


def test_embedding_rows(case):
    ids = np.array([0, 511, 3, 3])
    expected = case.hf.get_input_embeddings().weight[torch.from_numpy(ids)].detach().numpy()
    assert np.array_equal(case.decoder.embed(ids), expected)


def test_spec_tells_the_sizes(case):
    c, spec = case.config, case.decoder.spec
    assert (spec.vocab_size, spec.hidden_size, spec.context_length) == (c.vocab, c.hidden, c.context)
    assert spec.kv_bytes_per_token == 8 * c.layers * c.kv_heads * c.head_width


def test_closed_decoder(tmp_path):
    c = replace(MHA, layers=1)
    manifest = build_component("llm", Part(c, SyntheticSource(c, "test", 3)), tmp_path, "ort-cpu", "fp32", 1, print)
    decoder = backend("ort-cpu").open_decoder(tmp_path, manifest, 1)
    kv = decoder.new_kv(4)
    decoder.close()
    decoder.close()
    with pytest.raises(WsiRtError, match="closed"):
        decoder.step([kv], np.array([1]))
    with pytest.raises(WsiRtError, match="closed"):
        decoder.prefill(kv, np.zeros((1, c.hidden), np.float32))


def test_a_prompt_as_long_as_a_slides(tmp_path):
    """Published head width 128, grouped heads, 640 tokens before the first answer (SPEC 5 has 611).

    The largest logit is 10.5 and the largest error seen 2.4e-5. Relative to fp64 we are off by 2.4e-6 and eager fp32 by
    1.9e-6, and no more at 4095 tokens. The bound also catches rotary frequencies that are one bit off (8.7e-5).
    """
    c = LlamaConfig(hidden=512, layers=2, heads=4, kv_heads=2, head_width=128, ffn=256, vocab=512, context=1024)
    source, prompt, new = SyntheticSource(c, "test", 3), 640, 16
    embeds = uniform(9, "prompt", prompt * c.hidden, -1, 1).reshape(prompt, c.hidden)
    tokens, expected = generate(huggingface(c, source), embeds, new)
    manifest = build_component("llm", Part(c, source), tmp_path, "ort-cpu", "fp32", 2, lambda _: None)
    with backend("ort-cpu").open_decoder(tmp_path, manifest, 2) as decoder:
        kv = decoder.new_kv(prompt + new)
        logits = [decoder.prefill(kv, embeds)]
        logits += [decoder.step([kv], np.array([token]))[0] for token in tokens[:-1]]
    assert len(set(tokens)) > 8, "a model that repeats itself shows little"
    assert np.abs(np.stack(logits) - expected).max() <= 5e-5
    assert np.stack(logits).argmax(axis=1).tolist() == tokens
