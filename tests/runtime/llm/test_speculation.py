"""Guessed tokens: where guesses come from, that verifying them changes nothing, and what they may cost."""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from wsi_rt.runtime.config import GenerationSettings
from wsi_rt.runtime.llm.loop import Loop, drive
from wsi_rt.runtime.llm.ngrams import AnswerMemory, Guess, NgramText, OwnText
from wsi_rt.runtime.llm.phrases import PHRASES
from wsi_rt.runtime.llm.request import Request
from wsi_rt.runtime.llm.sampling import Sampler
from wsi_rt.runtime.llm.scheduler import Limits
from wsi_rt.runtime.llm.speculate import HOLDS, MOST, PRIOR, Holds, Speculation, StepCost
from wsi_rt.runtime.llm.tokenizer import Tokenizer

Asked = Callable[..., Request]
KEPT = ("token_ids", "stop_reason")


class Always(Speculation):
    """Guesses as much as there is room for, and whatever `guess` says: right or wrong must make no difference."""

    def __init__(self, tokenizer: Tokenizer, guess: Callable[..., list[int]]) -> None:
        super().__init__(tokenizer)
        self.guess = guess

    def plan(self, decoding, rows, room):
        found, left = {}, room
        for s in decoding:
            most = min(MOST, left, s.limit - len(s.token_ids) - 1)
            if most > 0 and (guess := self.guess(s, most)[:most]):
                found[s] = tuple(guess)
                left -= len(guess)
        return found


def speculating(llama, tokenizer: Tokenizer, guess: Callable[..., list[int]]) -> Loop:
    loop = Loop(llama, tokenizer)
    loop.speculation = loop.scheduler._speculation = Always(tokenizer, guess)
    return loop


# --- lookup
def test_the_longest_ngram_decides_and_the_latest_place_wins() -> None:
    text = NgramText()
    text.add([1, 2, 3, 4, 9, 2, 3, 4, 5, 6])
    text.add([7, 3, 4, 8])
    assert text.following((3, 4), 9) == [8]
    assert text.following((2, 3, 4), 9) == [5, 6]
    assert text.following((1, 2, 3, 4), 2) == [9, 2]
    assert text.following((4, 8), 9) == []  # nothing came after it
    own = OwnText((1, 2, 3, 4))
    assert own.guess({"phrase": text}, 3) == Guess((9, 2, 3), "phrase", 4)
    for token in (5, 2, 3):
        own.push(token)
    assert own.guess({"phrase": text}, 5) == Guess((4, 5, 2, 3), "own", 2)  # own first, with what was pushed since
    assert OwnText((7, 7, 4)).guess({"phrase": text}, 5) is None


def test_a_text_that_repeats_itself_is_guessed_from_itself() -> None:
    own = OwnText(())
    for token in (5, 6, 7, 8, 5, 6):
        own.push(token)
    assert own.guess({}, 4) == Guess((7, 8, 5, 6), "own", 2)


def test_earlier_answers_are_remembered_by_slide_and_bounded() -> None:
    memory = AnswerMemory()
    for slide, answer in itertools.product(range(70), range(2)):
        memory.add(slide, [1, 2, 10 * slide + answer])
    assert memory.of(0) is None
    latest = memory.of(69)
    assert latest is not None
    assert latest.following((1, 2), 5) == [691]
    for answer in range(200):
        memory.add("busy", [1, 2, answer])
    busy = memory.of("busy")
    assert busy is not None
    assert len(busy) <= 64
    assert busy.following((1, 2), 1) == [199]


def test_phrases_are_guessed_in_the_middle_of_a_sentence(llama, tokenizer: Tokenizer, asked: Asked) -> None:
    assert len(set(PHRASES)) == len(PHRASES)
    sequence = Loop(llama, tokenizer).submit(asked(0))
    phrase = tokenizer.encode("moderately differentiated adenocarcinoma")
    for token in phrase[:2]:
        sequence.took(token)
    assert Speculation(tokenizer)._guess(sequence, 20) == Guess(tuple(phrase[2:]), "phrase", 2)


# --- exactness
@pytest.mark.parametrize("temperature", [0.0, 0.8], ids=["greedy", "sampled"])
@pytest.mark.parametrize("kind", ["all right", "all wrong", "half right"])
def test_guesses_right_or_wrong_change_no_token(
    llama, tokenizer: Tokenizer, slides, asked: Asked, temperature: float, kind: str
) -> None:
    """With both penalties, whose state must not see a guess that was not taken."""
    settings = {"temperature": temperature, "repetition_penalty": 1.2, "no_repeat_ngram_size": 2, "max_new_tokens": 30}
    requests = [asked(i, slides[i % 2], seed=i, **settings) for i in range(4)]
    plain = [drive(Loop(llama, tokenizer, speculate=False), [r])[0] for r in requests]
    right = {tuple(s.request.prompt_ids): s.token_ids for s in plain}

    def guess(s, most: int) -> list[int]:
        done = len(s.token_ids)
        ids = right[s.request.prompt_ids][done : done + most]
        wrong_from = {"all right": most, "all wrong": 0, "half right": 2}[kind]
        return [t if i < wrong_from else (t + 1) % 2000 + 3 for i, t in enumerate(ids)]

    llama.calls.clear()
    sequences = drive(speculating(llama, tokenizer, guess), requests)
    for got, want in zip(sequences, plain, strict=True):
        assert [getattr(got, k) for k in KEPT] == [getattr(want, k) for k in KEPT]
        assert got.text.text == want.text.text
        assert got.drafted > 0
        assert (got.accepted == got.drafted) == (kind == "all right")
        assert (got.accepted == 0) == (kind == "all wrong")
    assert len(llama.calls) < 15 if kind == "all right" else len(llama.calls) >= 10


@pytest.mark.parametrize("end", ["eos", "stop_string", "length"])
def test_an_answer_that_ends_among_right_guesses_ends_there(tokenizer: Tokenizer, scripted, end: str) -> None:
    text = "The tumor is.\nUSER: more and more" if end == "stop_string" else "The tumor is poorly differentiated"
    decoder, request, ids = scripted(text, max_new_tokens=5 if end == "length" else 50)
    want = drive(Loop(decoder, tokenizer, speculate=False), [request])[0]
    got = drive(
        speculating(decoder, tokenizer, lambda s, most: (ids[len(s.token_ids) :] + [5] * 20)[:most]), [request]
    )[0]
    assert (got.token_ids, got.stop_reason, got.text.text) == (want.token_ids, want.stop_reason, want.text.text)
    assert got.stop_reason == end


def test_text_comes_by_the_token_and_cancelling_is_asked_between_guesses(tokenizer: Tokenizer, scripted) -> None:
    """All 30 tokens are guessed in one step; the caller stops at the fifth piece."""
    decoder, request, ids = scripted("The tumor is poorly differentiated and invades the muscle.", max_new_tokens=30)
    loop = speculating(decoder, tokenizer, lambda s, most: ids[len(s.token_ids) :][:most])
    pieces: list[str] = []
    sequence = drive(loop, [request], lambda _, piece: pieces.append(piece), cancel=lambda: len(pieces) == 5)[0]
    assert (sequence.stop_reason, "".join(pieces)) == ("cancelled", sequence.text.text)
    assert len(decoder.calls) == 2
    assert sequence.token_ids == ids[: len(sequence.token_ids)]
    assert 5 <= len(sequence.token_ids) <= 7
    assert len(pieces) in (5, 6)  # the last is what was held back


def test_time_in_on_text_is_not_counted(tokenizer: Tokenizer, scripted) -> None:
    decoder, request, _ = scripted("The tumor is benign.")
    sequence = drive(Loop(decoder, tokenizer), [request], lambda _, piece: time.sleep(0.05))[0]
    assert sequence.said_ms >= 150
    assert sequence.prefill_ms + sequence.decode_ms < 100


def test_sampling_with_guesses_keeps_the_distribution(llama, tokenizer: Tokenizer, asked: Asked) -> None:
    """The second token over 600 seeds, the likeliest one always guessed: chi-square against the exact distribution.

    The same test must reject taking every other guess unseen, as a rule that accepts too much would.
    """
    settings = {"temperature": 1.0, "top_k": 6, "max_new_tokens": 3}
    first = drive(Loop(llama, tokenizer, speculate=False), [asked(0, **settings)])[0]
    request = asked(0, **settings)
    prompt = np.concatenate([request.embeds, llama.embed(np.array(first.token_ids[:1]))])
    sampler = Sampler(request.settings)
    sampler.accept(first.token_ids[0])
    scores = sampler.process(llama.prefill(llama.new_kv(64), prompt)).astype(np.float64)
    p = np.exp(scores - scores.max())
    p /= p.sum()
    likeliest = int(p.argmax())
    verified = [_verified_second(llama, tokenizer, request, prompt, likeliest, seed) for seed in range(600)]
    biased = [likeliest if i % 2 and p[likeliest] > 0.2 else token for i, token in enumerate(verified)]
    assert _p_value(verified, p) > 1e-3
    assert _p_value(biased, p) < 1e-6


def _verified_second(llama, tokenizer: Tokenizer, request: Request, prompt, guess: int, seed: int) -> int:
    """The token sampled at a guess's place: two tokens in one step, the first of them forced by a top_k of 1."""
    loop = speculating(llama, tokenizer, lambda s, most: [guess])
    sequence = loop.submit(replace(request, embeds=prompt[:-1], settings=replace(request.settings, seed=seed)))
    forced = _Forced(sequence.sampler, llama, prompt)
    sequence.sampler = forced
    while len(sequence.token_ids) < 2:
        loop.step()
    return sequence.token_ids[1]


class _Forced:
    """A sampler whose first token is given."""

    def __init__(self, sampler: Sampler, llama, prompt) -> None:
        self._sampler = sampler
        self._first = int(np.flatnonzero((llama.table == prompt[-1]).all(-1))[0])
        self.complete = True

    def sample(self, logits) -> int:
        if not self._sampler.generated:
            self._sampler.accept(self._first)
            return self._first
        return self._sampler.sample(logits)


def _p_value(tokens: list[int], p: np.ndarray) -> float:
    counts = Counter(tokens)
    kept = np.flatnonzero(p > 0)
    assert set(counts) <= set(kept.tolist())
    seen = np.array([counts[int(i)] for i in kept])
    return float(stats.chisquare(seen, p[kept] * seen.sum()).pvalue)


# --- cost
def test_the_prior_goes_through_its_points_and_measurements_through_theirs() -> None:
    cost = StepCost()
    assert [cost(m) for m, _ in PRIOR] == [c for _, c in PRIOR]
    cost.observe(1, 10.0)
    assert cost(1) == 10.0
    assert cost(8) == pytest.approx(10.0 * dict(PRIOR)[8])
    cost.observe(8, 20.0)  # this machine is better at 8 rows
    assert cost(8) == 20.0
    assert cost(9) == pytest.approx(20.0 * ((2.3 + 2.5 / 12) / 2.3))
    cost.observe(1, 30.0)  # a disturbed step
    assert cost(1) == pytest.approx(10.2)


class Costly:
    """c(m) = 1 + slope x (m - 1)."""

    def __init__(self, slope: float) -> None:
        self.slope = slope

    def __call__(self, rows: int) -> float:
        return 1 + self.slope * (rows - 1)

    def observe(self, rows: int, elapsed_ms: float) -> None:
        pass


def plan_for(llama, tokenizer: Tokenizer, asked: Asked, holds: float, slope: float, batch: int = 1) -> list[int]:
    """How many guesses each sequence gets, where 30 are to be had and no try is due."""
    loop = Loop(llama, tokenizer)
    speculation = Speculation(tokenizer)
    speculation.cost = Costly(slope)  # type: ignore[assignment]
    speculation.holds = lambda source, matched: holds  # type: ignore[assignment]
    sequences = []
    for i in range(batch):
        s = loop.submit(asked(i, max_new_tokens=200))
        for token in [*range(50, 90), 50, 51, 52, 53]:
            s.took(token)
        sequences.append(s)
    plan = speculation.plan(sequences, batch, 60)
    assert all(plan[s] == tuple(range(54, 54 + len(plan[s]))) for s in plan)
    return [len(plan.get(s, ())) for s in sequences]


def test_guesses_follow_acceptance_and_cost(llama, tokenizer: Tokenizer, asked: Asked) -> None:
    assert plan_for(llama, tokenizer, asked, holds=0.95, slope=0.0) == [MOST]  # rows are free
    assert plan_for(llama, tokenizer, asked, holds=0.3, slope=0.5) == [0]
    some = plan_for(llama, tokenizer, asked, holds=0.8, slope=0.1)[0]
    assert 1 < some < MOST
    assert plan_for(llama, tokenizer, asked, holds=0.8, slope=0.4)[0] < some
    assert plan_for(llama, tokenizer, asked, holds=0.9, slope=1.0, batch=4) == [0] * 4  # a row costs what it gives


def test_what_holds_is_counted_and_forgotten() -> None:
    holds = Holds()
    assert holds("earlier", 8) == holds("earlier", 20) == HOLDS["earlier"][-1]
    for _ in range(20):
        holds.observe("earlier", 9, right=False)
    assert holds("earlier", 8) < 0.3
    assert holds("earlier", 7) == HOLDS["earlier"][-2]  # each on its own
    for _ in range(200):
        holds.observe("earlier", 8, right=True)
    assert holds("earlier", 8) > 0.95


@pytest.mark.parametrize("tokens", [230, 460])
def test_when_nothing_is_accepted_guessing_all_but_stops(
    llama, tokenizer: Tokenizer, asked: Asked, tokens: int
) -> None:
    """A guess at hand at every token, all of them wrong: rows spent in vain are a few tens, then one in 64."""
    loop = Loop(llama, tokenizer)
    speculation = loop.speculation
    assert speculation is not None
    speculation.cost = Costly(0.3)  # type: ignore[assignment]
    wrong = lambda s, most: Guess(tuple([(s.token_ids[-1] * 7 + 3) % 1000 + 3] * most), "earlier", 8)  # noqa: E731
    speculation._guess = wrong  # type: ignore[method-assign]
    sequences = drive(loop, [asked(i, max_new_tokens=230) for i in range(tokens // 230)])
    assert sum(s.accepted for s in sequences) <= 2
    assert 0 < sum(s.drafted for s in sequences) <= 60 + tokens // 64
    plain = drive(Loop(llama, tokenizer, speculate=False), [s.request for s in sequences])
    assert [s.token_ids for s in sequences] == [s.token_ids for s in plain]


def test_when_all_is_accepted_steps_become_few(tokenizer: Tokenizer, scripted) -> None:
    decoder, request, ids = scripted("no evidence of necrosis. " * 12, max_new_tokens=500)
    loop = Loop(decoder, tokenizer)
    assert loop.speculation is not None
    loop.speculation.cost = Costly(0.1)  # type: ignore[assignment]
    sequence = drive(loop, [request])[0]
    assert sequence.token_ids == ids
    assert sequence.accepted > len(ids) // 2
    assert len(decoder.calls) < len(ids) // 2


def test_an_earlier_answer_on_the_slide_is_guessed(llama, tokenizer: Tokenizer, slides, asked: Asked) -> None:
    """The same question again, memory empty of prefixes or not: its answer is guessed from the first one."""
    loop = Loop(llama, tokenizer, Limits())
    assert loop.speculation is not None
    loop.speculation.cost = Costly(0.0)  # type: ignore[assignment]
    request = replace(asked(0, slides[0], max_new_tokens=40), settings=GenerationSettings(max_new_tokens=40))
    first, second = (drive(loop, [request])[0] for _ in range(2))
    assert second.token_ids == first.token_ids
    assert second.accepted >= 30
    elsewhere = drive(loop, [replace(request, prefix=slides[1])])[0]
    assert elsewhere.accepted < 10


def test_guesses_stay_within_the_step(llama, tokenizer: Tokenizer, asked: Asked) -> None:
    loop = speculating(llama, tokenizer, lambda s, most: [9] * most)
    loop.scheduler.limits = Limits(max_running=4, step_tokens=12, lone_tokens=20)
    drive(loop, [asked(i, max_new_tokens=20) for i in range(4)])
    assert max(map(sum, llama.calls[1:])) <= 12
