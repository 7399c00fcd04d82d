"""Who runs when, within which memory: composition of steps, fairness, preemption, prefixes under way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from wsi_rt.runtime.errors import InputError, MachineError
from wsi_rt.runtime.llm.decoder import DecoderSpec
from wsi_rt.runtime.llm.generation import Generation
from wsi_rt.runtime.llm.loop import Loop, drive
from wsi_rt.runtime.llm.prefix_store import PrefixStore
from wsi_rt.runtime.llm.request import Request
from wsi_rt.runtime.llm.scheduler import Limits
from wsi_rt.runtime.llm.sequence import Sequence
from wsi_rt.runtime.llm.tokenizer import Tokenizer

Asked = Callable[..., Request]


def run(loop: Loop) -> list[Sequence]:
    """To the end -> sequences in the order they ended."""
    ended = []
    while loop.scheduler.has_work:
        ended += [e.sequence for e in loop.step() if e.stop_reason or e.error]
    return ended


def tokens_of(requests: list[Request], llama, tokenizer: Tokenizer) -> list[tuple[int, ...]]:
    """Each alone in a loop of its own, without speculation."""
    alone = (drive(Loop(llama, tokenizer, speculate=False), [r])[0] for r in requests)
    return [tuple(s.token_ids) for s in alone]


@pytest.mark.parametrize(("running", "step", "lone"), [(0, 4, 8), (4, 4, 8), (2, 8, 4)])
def test_limits_that_cannot_work_are_refused(running: int, step: int, lone: int) -> None:
    with pytest.raises(ValueError, match="expected 1 <= max_running < step_tokens <= lone_tokens"):
        Limits(running, step, lone)


def test_a_long_prompt_is_cut_so_that_others_go_on(llama, tokenizer: Tokenizer, prompt, asked: Asked) -> None:
    loop = Loop(llama, tokenizer, Limits(max_running=4, step_tokens=10, lone_tokens=50), speculate=False)
    loop.submit(asked(0, max_new_tokens=20))
    loop.step()
    long = loop.submit(replace(asked(1), embeds=prompt(35)))
    llama.calls.clear()
    while long.prefill_ms == 0 or not long.token_ids:
        loop.step()
    assert llama.calls == [[1, 9], [1, 9], [1, 9], [1, 8]]  # 10 rows a step, every step has the decoding row
    alone = Loop(llama, tokenizer, Limits(max_running=4, step_tokens=10, lone_tokens=50), speculate=False)
    alone.submit(replace(asked(1), embeds=prompt(60)))
    llama.calls.clear()
    alone.step()
    alone.step()
    assert llama.calls == [[50], [10]]


def test_a_prefix_is_computed_once_and_the_questions_batched(llama, tokenizer: Tokenizer, slides, asked: Asked) -> None:
    requests = [asked(i, slides[0]) for i in range(5)]
    want = tokens_of(requests, llama, tokenizer)
    llama.calls.clear()
    sequences = drive(Loop(llama, tokenizer, speculate=False), requests)
    assert [tuple(s.token_ids) for s in sequences] == want
    assert llama.calls[0] == [slides[0].length]
    assert llama.calls[1] == [r.embeds.shape[0] for r in requests]
    assert llama.calls[2:] == [[1] * 5] * 11


def test_the_kv_of_twenty_questions_is_prefix_plus_suffixes(llama, tokenizer: Tokenizer, slides, asked: Asked) -> None:
    loop = Loop(llama, tokenizer)
    sequences = [loop.submit(asked(i, slides[0])) for i in range(20)]
    for _ in range(6):
        loop.step()
    suffixes = sum(s.kv.nbytes for s in sequences)
    assert suffixes == sum(s.fed for s in sequences) * llama.spec.kv_bytes_per_token
    assert loop.store.nbytes == slides[0].length * llama.spec.kv_bytes_per_token
    pending = sum(s.pending for s in sequences) * llama.spec.kv_bytes_per_token
    assert loop.scheduler.memory.held_bytes == loop.store.nbytes + suffixes + pending
    assert pending == 20 * llama.spec.kv_bytes_per_token
    run(loop)


def test_the_budget_is_never_exceeded_and_changes_nothing(llama, tokenizer: Tokenizer, slides, asked: Asked) -> None:
    """Ten questions about three slides in the room for about three of them."""
    requests = [asked(i, slides[i % 3], max_new_tokens=30, temperature=0.8 * (i % 2), seed=i) for i in range(10)]
    want = tokens_of(requests, llama, tokenizer)
    budget = 100 * llama.spec.kv_bytes_per_token
    loop = Loop(llama, tokenizer, Limits(kv_bytes=budget))
    sequences = [loop.submit(r) for r in requests]

    def check() -> None:
        held = loop.store.nbytes + sum(s.kv.nbytes for s in sequences if s.kv is not None)
        held += sum(f.kv.nbytes for f in loop.scheduler.memory.fills.values())
        assert held <= loop.scheduler.memory.held_bytes <= budget

    llama.on_call = check
    while loop.scheduler.has_work:
        loop.step()
        check_bytes = loop.store.nbytes + sum(s.kv.nbytes for s in sequences if s.kv is not None)
        assert check_bytes <= budget
    assert [tuple(s.token_ids) for s in sequences] == want
    assert sum(s.kv_lost for s in sequences) > 3
    assert loop.scheduler.memory.held_bytes == loop.store.nbytes == loop.store.idle_bytes


def test_the_first_to_arrive_keeps_its_memory(llama, tokenizer: Tokenizer, asked: Asked) -> None:
    loop = Loop(llama, tokenizer, Limits(kv_bytes=60 * llama.spec.kv_bytes_per_token), speculate=False)
    sequences = [loop.submit(asked(i, max_new_tokens=40)) for i in range(4)]
    run(loop)
    assert sequences[0].kv_lost == 0
    assert sum(s.kv_lost for s in sequences) > 0
    assert [len(s.token_ids) for s in sequences] == [40] * 4


def test_an_answer_is_cut_to_the_memory_there_can_be(llama, tokenizer: Tokenizer, slides, asked: Asked) -> None:
    """By the limit alone, so that the cut does not depend on the others."""
    request = asked(0, slides[0], max_new_tokens=100)
    prompt = request.prompt_length
    loop = Loop(llama, tokenizer, Limits(kv_bytes=(prompt + 9) * llama.spec.kv_bytes_per_token))
    sequences = [loop.submit(replace(request, settings=replace(request.settings, seed=s))) for s in range(3)]
    run(loop)
    assert [(len(s.token_ids), s.stop_reason) for s in sequences] == [(10, "length")] * 3
    assert "cut after 10 tokens instead of 100" in Generation.of(sequences[0]).notes[0]
    with pytest.raises(InputError, match="raise --kv-bytes"):
        Loop(llama, tokenizer, Limits(kv_bytes=prompt * llama.spec.kv_bytes_per_token - 1)).submit(request)


def test_pinned_prefixes_that_fill_the_memory_fail_a_question_and_name_the_way_out(
    llama, tokenizer: Tokenizer, slides, asked: Asked
) -> None:
    loop = Loop(llama, tokenizer, Limits(kv_bytes=60 * llama.spec.kv_bytes_per_token))
    drive(loop, [asked(0, slides[0])])
    loop.store.pin(slides[0].key)
    sequence = loop.submit(asked(1, slides[2], max_new_tokens=20))
    run(loop)
    assert isinstance(sequence.error, MachineError)
    assert "unpin" in str(sequence.error)
    loop.store.pin(slides[0].key, pinned=False)
    assert drive(loop, [asked(1, slides[2], max_new_tokens=20)])[0].stop_reason == "length"


def test_unused_prefixes_go_least_recently_used_first(llama, tokenizer: Tokenizer, slides, asked: Asked) -> None:
    loop = Loop(llama, tokenizer, Limits(kv_bytes=80 * llama.spec.kv_bytes_per_token))
    for i in (0, 1, 0, 2):  # 20 + 24 + 28 tokens and a question do not fit
        drive(loop, [asked(i, slides[i], max_new_tokens=4)])
    assert [x.key for x in loop.store.listed()] == [slides[2].key, slides[0].key]


def test_requests_on_a_slide_in_use_come_first_but_only_so_often(llama, tokenizer, slides, asked: Asked) -> None:
    """Slide 1's question arrives second; 30 on slide 0 arrive after it."""
    loop = Loop(llama, tokenizer, Limits(max_running=2, overtakes=5), speculate=False)
    first = loop.submit(asked(0, slides[0], max_new_tokens=8))
    second = loop.submit(asked(1, slides[1], max_new_tokens=3))
    later = [loop.submit(asked(i, slides[0], max_new_tokens=3)) for i in range(2, 32)]
    started: list[Sequence] = []
    while loop.scheduler.has_work:
        loop.step()
        started += [s for s in loop.scheduler.running if s not in started]
    place = started.index(second)
    assert started[0] is first
    assert place == 6  # five were admitted before it, and no more
    assert started[1:6] == later[:5]
    assert max(s.overtaken for s in later) <= 5


@pytest.mark.parametrize("seed", range(4))
def test_the_fairness_bound_holds_for_any_mixture(llama, tokenizer, slides, asked: Asked, seed: int) -> None:
    """No request sees more than `overtakes` later ones admitted for the first time before it."""
    rng = np.random.default_rng(seed)
    limits = Limits(max_running=3, overtakes=4, kv_bytes=120 * llama.spec.kv_bytes_per_token)
    loop = Loop(llama, tokenizer, limits)
    waiting = [
        loop.submit(asked(i, slides[rng.integers(3)], max_new_tokens=int(rng.integers(1, 20)))) for i in range(40)
    ]
    admitted: list[int] = []
    start = loop.scheduler.memory.start
    loop.scheduler.memory.start = lambda s: admitted.append(s.number) or start(s)
    run(loop)
    order = list(dict.fromkeys(admitted))  # those that lost their memory come twice
    assert sorted(order) == [s.number for s in waiting]
    before = {n: sum(other > n for other in order[:place]) for place, n in enumerate(order)}
    assert max(before.values()) <= 4
    assert max(before.values()) > 0  # sharing did change the order


def test_cancelled_while_its_prefix_is_computed(llama, tokenizer: Tokenizer, slides, asked: Asked) -> None:
    stop = []
    loop = Loop(llama, tokenizer, Limits(max_running=2, step_tokens=4, lone_tokens=8))
    first = loop.submit(asked(0, slides[0], cancel=lambda: bool(stop)))
    loop.step()
    assert loop.scheduler.memory.fills
    stop.append(1)
    loop.step()
    assert first.stop_reason == "cancelled"
    assert not loop.scheduler.memory.fills
    assert loop.scheduler.memory.held_bytes == 0


def test_a_second_question_keeps_a_prefix_under_way(llama, tokenizer: Tokenizer, slides, asked: Asked) -> None:
    stop = []
    want = tokens_of([asked(1, slides[0])], llama, tokenizer)
    loop = Loop(llama, tokenizer, Limits(max_running=2, step_tokens=4, lone_tokens=8))
    loop.submit(asked(0, slides[0], cancel=lambda: bool(stop)))
    second = loop.submit(asked(1, slides[0]))
    loop.step()
    llama.calls.clear()
    stop.append(1)
    run(loop)
    assert tuple(second.token_ids) == want[0]
    assert sum(sum(rows) for rows in llama.calls[:2]) == slides[0].length - 8  # it goes on where it was


def test_a_decoder_that_is_not_row_exact_replays_through_the_same_calls(
    llama, tokenizer: Tokenizer, asked: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = llama.spec
    monkeypatch.setattr(
        llama,
        "spec",
        DecoderSpec(spec.vocab_size, spec.hidden_size, spec.context_length, spec.kv_bytes_per_token, row_exact=False),
    )
    loop = Loop(llama, tokenizer, Limits(kv_bytes=44 * spec.kv_bytes_per_token))
    assert loop.speculation is None
    sequences = [loop.submit(asked(i, max_new_tokens=25)) for i in range(2)]
    while not sequences[1].kv_lost:
        loop.step()
    lost_at = len(sequences[1].token_ids)
    while not sequences[0].done:
        loop.step()
    llama.calls.clear()
    while len(sequences[1].token_ids) == lost_at:
        loop.step()
    assert llama.calls == [[sequences[1].prompt_tokens], *[[1]] * lost_at]


def test_the_store_may_come_from_outside(llama, tokenizer: Tokenizer, slides, asked: Asked) -> None:
    store = PrefixStore(llama)
    drive(Loop(llama, tokenizer, store=store), [asked(0, slides[0])])
    llama.calls.clear()
    drive(Loop(llama, tokenizer, store=store), [asked(1, slides[0])])
    assert [slides[0].length] not in llama.calls
