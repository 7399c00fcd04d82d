"""Each processor and the whole chain against transformers' own classes; the draw's distribution and seeds."""

from __future__ import annotations

import numpy as np
import pytest

from wsi_rt.runtime.config import GenerationSettings
from wsi_rt.runtime.errors import WsiRtError
from wsi_rt.runtime.llm import sampling
from wsi_rt.runtime.llm.sampling import NgramIndex, Sampler

torch = pytest.importorskip("torch", reason="the oracle is transformers, which needs torch")
lp = pytest.importorskip("transformers.generation.logits_process", reason="the oracle is transformers")

VOCABS = (5, 37, 1000, 32000)


def theirs(processor: object, ids: list[int], scores: np.ndarray) -> np.ndarray:
    """One transformers processor on float32 [vocab]."""
    input_ids = torch.tensor([ids], dtype=torch.long).reshape(1, len(ids))
    return processor(input_ids, torch.from_numpy(scores.copy())[None])[0].numpy()


def logits_of(rng: np.random.Generator, vocab: int, ties: bool = False) -> np.ndarray:
    x = (rng.standard_normal(vocab) * rng.choice([0.5, 3, 12])).astype(np.float32)
    return np.round(x) if ties else x


def cases(count: int = 60, ties: bool = True) -> list[tuple[np.random.Generator, np.ndarray]]:
    """Random logits of several vocabulary sizes; every third case is full of ties."""
    out = []
    for i in range(count):
        rng = np.random.default_rng(i)
        out.append((rng, logits_of(rng, VOCABS[i % len(VOCABS)], ties=ties and i % 3 == 0)))
    return out


def allowed_counts(x: np.ndarray, p: float) -> tuple[int, int]:
    """Least and most tokens top-p may keep when float32 sums are off by 5e-7 (torch's exp is not numpy's)."""
    exps = np.exp(np.sort(x).astype(np.float64) - float(x.max()))
    cumulative = np.cumsum(exps) / exps.sum()
    low, high = ((cumulative > 1 - p + slack).sum() for slack in (5e-7, -5e-7))
    return max(1, int(low)), max(1, int(high))


@pytest.mark.parametrize("penalty", [0.7, 1.1, 1.3, 2.0])
def test_repetition_penalty(penalty: float) -> None:
    for rng, x in cases():
        ids = rng.integers(0, x.shape[0], rng.integers(0, 40)).tolist()
        want = theirs(lp.RepetitionPenaltyLogitsProcessor(penalty), ids, x) if ids else x
        np.testing.assert_array_equal(sampling.repetition_penalty(x, ids, penalty), want)


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_no_repeat_ngram(size: int) -> None:
    banned_any = 0
    for rng, x in cases():
        length = int(rng.integers(0, 60))  # shorter than the n-gram included
        ids = rng.integers(0, min(3, x.shape[0]), length).tolist()
        index = NgramIndex(size)
        for token in ids:
            index.append(token)
        got = sampling.ban_tokens(x, index.banned())
        np.testing.assert_array_equal(got, theirs(lp.NoRepeatNGramLogitsProcessor(size), ids, x))
        banned_any += np.isneginf(got).any()
    assert banned_any > 10


@pytest.mark.parametrize("value", [0.2, 0.7, 1.7])
def test_temperature(value: float) -> None:
    for _, x in cases():
        np.testing.assert_array_equal(sampling.temperature(x, value), theirs(lp.TemperatureLogitsWarper(value), [0], x))


@pytest.mark.parametrize("k", [1, 2, 50, 40000])
def test_top_k(k: int) -> None:
    for _, x in cases():
        np.testing.assert_array_equal(sampling.top_k(x, k), theirs(lp.TopKLogitsWarper(k), [0], x))


@pytest.mark.parametrize("p", [1e-9, 1e-6, 0.1, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("k", [0, 3])
def test_top_p(p: float, k: int) -> None:
    exact = 0
    for _, x in cases():
        x = sampling.top_k(x, k) if k else x  # -inf entries, as after top-k
        got, want = sampling.top_p(x, p), theirs(lp.TopPLogitsWarper(p), [0], x)
        low, high = allowed_counts(x, p)
        assert low <= np.isfinite(want).sum() <= high  # the bound itself is right
        assert low <= np.isfinite(got).sum() <= high
        if low == high:  # no token stands on the edge: the same scores stay
            np.testing.assert_array_equal(np.sort(got), np.sort(want))
            if len(np.unique(x[x > -np.inf])) == np.isfinite(x).sum():  # torch.sort orders ties as it likes
                np.testing.assert_array_equal(got, want)
                exact += 1
    assert exact >= 15


def test_top_p_among_equals_drops_the_lowest_indices() -> None:
    x = np.zeros(4, np.float32)
    got = sampling.top_p(x, 0.5)
    assert np.isfinite(got).tolist() == [False, False, True, True]
    assert np.isfinite(theirs(lp.TopPLogitsWarper(0.5), [0], x)).sum() == 2


def test_the_whole_chain_in_transformers_order() -> None:
    cfg = GenerationSettings(
        temperature=0.7, top_k=20, top_p=0.8, repetition_penalty=1.3, no_repeat_ngram_size=2, max_new_tokens=64
    )
    chain = lp.LogitsProcessorList(
        [
            lp.RepetitionPenaltyLogitsProcessor(1.3),
            lp.NoRepeatNGramLogitsProcessor(2),
            lp.TemperatureLogitsWarper(0.7),
            lp.TopKLogitsWarper(20),
            lp.TopPLogitsWarper(0.8),
        ]
    )
    for rng, x in cases(ties=False):
        ids = rng.integers(0, min(6, x.shape[0]), 30).tolist()
        sampler = Sampler(cfg)
        for token in ids:
            sampler.accept(token)
        untouched = x.copy()
        np.testing.assert_array_equal(sampler.process(x), theirs(chain, ids, x))
        np.testing.assert_array_equal(x, untouched)


@pytest.mark.filterwarnings("ignore:Passing `(repetition_penalty|no_repeat_ngram_size)` with `inputs_embeds`")
def test_settings_build_the_chain_transformers_would_build() -> None:
    """Order and on/off switches from transformers' own _get_logits_processor, through a tiny real model."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    cfg = GenerationSettings(max_new_tokens=24, repetition_penalty=1.4, no_repeat_ngram_size=2)
    embeds = torch.randn(1, 5, 16)
    with torch.no_grad():
        out = model.generate(
            inputs_embeds=embeds,
            attention_mask=torch.ones(1, 5, dtype=torch.long),
            do_sample=False,
            max_new_tokens=24,
            repetition_penalty=1.4,
            no_repeat_ngram_size=2,
            eos_token_id=None,
            pad_token_id=0,
        )[0].tolist()
        sampler, ours = Sampler(cfg), []
        for _ in range(24):
            tail = model.model.embed_tokens(torch.tensor([ours], dtype=torch.long).reshape(1, len(ours)))
            logits = model(inputs_embeds=torch.cat([embeds, tail], 1)).logits[0, -1].numpy()
            ours.append(sampler.sample(logits))
    assert ours == out
    assert len(set(ours)) > 3


def test_greedy_takes_the_lowest_of_equals_and_no_filters() -> None:
    x = np.array([1, 5, 5, 2], np.float32)
    assert Sampler(GenerationSettings(temperature=0, top_k=1, top_p=0.1)).sample(x) == 1
    assert Sampler(GenerationSettings()).sample(x) == int(torch.from_numpy(x).argmax())


def test_draws_follow_the_distribution() -> None:
    x = np.log(np.array([0.5, 0.25, 0.125, 0.125], np.float32))
    sampler = Sampler(GenerationSettings(temperature=1.0, top_k=0, seed=3))
    counts = np.bincount([sampler.sample(x) for _ in range(20000)], minlength=4) / 20000
    np.testing.assert_allclose(counts, [0.5, 0.25, 0.125, 0.125], atol=0.015)


def test_filtered_tokens_are_never_drawn() -> None:
    x = np.linspace(-1, 1, 100).astype(np.float32)
    sampler = Sampler(GenerationSettings(temperature=1.0, top_k=5, seed=9))
    assert {sampler.sample(x) for _ in range(2000)} == set(range(95, 100))


def test_seed_and_stream_decide_and_nothing_else() -> None:
    x = np.zeros(1000, np.float32)

    def tokens(seed: int, stream: int = 0, others: int = 0) -> list[int]:
        cfg = GenerationSettings(temperature=1.0, top_k=0, seed=seed)
        mine, rest = Sampler(cfg, stream), [Sampler(cfg, 50 + i) for i in range(others)]
        out = []
        for _ in range(20):
            for other in rest:
                other.sample(x)
            out.append(mine.sample(x))
        return out

    assert tokens(1) == tokens(1) == tokens(1, others=3)
    assert len({tuple(tokens(1)), tuple(tokens(2)), tuple(tokens(1, stream=1)), tuple(tokens(2**64 - 1))}) == 4
    assert len(set(tokens(1))) > 15  # the steps differ


def test_replay_continues_as_if_never_stopped() -> None:
    x = np.zeros(500, np.float32)
    cfg = GenerationSettings(temperature=1.0, top_k=0, seed=4)
    whole = Sampler(cfg)
    want = [whole.sample(x) for _ in range(10)]
    again = Sampler(cfg)
    for token in want[:6]:
        again.accept(token)
    assert [again.sample(x) for _ in range(4)] == want[6:]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_unusable_logits_name_the_step(bad: float, temperature: float) -> None:
    sampler = Sampler(GenerationSettings(temperature=temperature))
    x = np.zeros(8, np.float32)
    sampler.sample(x)
    x[3] = bad
    with pytest.raises(WsiRtError, match="at step 1"):
        sampler.sample(x)
    assert len(sampler.generated) == 1


def test_nothing_left_and_overflow_are_errors() -> None:
    sampler = Sampler(GenerationSettings(no_repeat_ngram_size=1))
    x = np.zeros(2, np.float32)
    assert [sampler.sample(x), sampler.sample(x)] == [0, 1]
    with pytest.raises(WsiRtError, match="every token is excluded at step 2"):
        sampler.sample(x)
    with pytest.raises(WsiRtError, match="overflow"):
        Sampler(GenerationSettings(temperature=1e-40)).sample(np.ones(4, np.float32))
