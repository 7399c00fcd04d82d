"""The generation loop: schedule -> run -> postprocess, and generate(), which drives it for one request."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from threading import Event as ThreadEvent
from time import perf_counter

import numpy as np
from numpy.typing import NDArray

from wsi_rt.runtime.errors import WsiRtError
from wsi_rt.runtime.llm.decoder import KV, Chunk, Decoder
from wsi_rt.runtime.llm.generation import Generation, LoopEvent
from wsi_rt.runtime.llm.memory import Fill
from wsi_rt.runtime.llm.prefix_store import PrefixStore
from wsi_rt.runtime.llm.request import Parked, Request, StopReason, answer_room
from wsi_rt.runtime.llm.scheduler import Batch, Limits, Scheduler, Work
from wsi_rt.runtime.llm.sequence import Sequence
from wsi_rt.runtime.llm.speculate import Speculation
from wsi_rt.runtime.llm.tokenizer import Tokenizer

CancelSignal = Callable[[], bool] | ThreadEvent
F32 = NDArray[np.float32]


class Loop:
    """Runs requests on one decoder. Not thread-safe: one thread drives it (cancel signals may come from any).

    What a request answers depends on its own prompt, settings and seed, not on what else runs, on speculation or on
    memory: exactly where the decoder is row-exact, else to rounding. Speculation is off where it is not.
    """

    def __init__(
        self,
        decoder: Decoder,
        tokenizer: Tokenizer,
        limits: Limits | None = None,
        store: PrefixStore | None = None,
        speculate: bool = True,
    ) -> None:
        self.decoder, self.tokenizer = decoder, tokenizer
        self.store = store if store is not None else PrefixStore(decoder)
        self.speculation = Speculation(tokenizer) if speculate and decoder.spec.row_exact else None
        self.scheduler = Scheduler(decoder.spec, self.store, decoder.new_kv, limits, self.speculation)
        self._submitted = 0

    def submit(self, request: Request) -> Sequence:
        """Queue a request. InputError: a prompt that does not fit (answer_room)."""
        limit = answer_room(request, self.decoder.spec, self.scheduler.limits.kv_bytes)
        sequence = Sequence.start(request, self._submitted, limit, self.tokenizer)
        self._submitted += 1
        self.scheduler.add(sequence)
        return sequence

    def forget(self, parked: Parked) -> None:
        """A conversation is over: its keys and values go."""
        self.scheduler.memory.forget(parked)

    def step(self) -> list[LoopEvent]:
        """One round of the three verbs; cancelled sequences end first. An empty list may mean nothing to tell yet."""
        events = self.reap_cancelled()
        batch = self.schedule()
        events += [LoopEvent(s, error=s.error) for s in batch.failed]
        if batch.work:
            events += self.postprocess(batch, self.run(batch))
        return events

    def schedule(self) -> Batch:
        """What to compute next; no work when every request has ended."""
        return self.scheduler.schedule()

    def run(self, batch: Batch) -> list[F32]:
        """Compute a batch -> per work the wanted logits [k, vocab] f32. When the decoder fails, its sequences are
        dropped."""
        started = perf_counter()
        try:
            logits = self.decoder.extend(self._chunks(batch))
        except BaseException as exc:  # KeyboardInterrupt too: the loop stays usable
            for fill in [w.target for w in batch.work if isinstance(w.target, Fill)]:
                self._abandon(fill, exc)
            for sequence in [w.target for w in batch.work if isinstance(w.target, Sequence)]:
                self._failed(sequence, _told(exc))
            raise
        elapsed_ms = (perf_counter() - started) * 1e3
        for sequence, kind in _sequences(batch):
            sequence.add_ms(kind, elapsed_ms)
        if self.speculation is not None and all(w.start and w.logits for w in batch.work):
            self.speculation.cost.observe(batch.rows, elapsed_ms)
        return logits

    def postprocess(self, batch: Batch, logits: list[F32]) -> list[LoopEvent]:
        """Choose tokens for each sequence of the batch; finished sequences leave the scheduler."""
        events = []
        for work, rows in zip(batch.work, logits, strict=True):
            if isinstance(work.target, Fill):
                events += self._filled(work.target)
            elif work.logits:
                sequence = work.target
                started, said_ms, kind = perf_counter(), sequence.said_ms, _kind(sequence)
                events.append(self._advance(sequence, work, rows))
                sequence.add_ms(kind, (perf_counter() - started) * 1e3 - (sequence.said_ms - said_ms))
        return events

    def reap_cancelled(self) -> list[LoopEvent]:
        """End the sequences whose caller asked to stop, waiting ones included."""
        return [self._finish(s, "cancelled") for s in self.scheduler.cancelled()]

    def _chunks(self, batch: Batch) -> list[Chunk]:
        """The batch's rows, its token ids embedded in one call."""
        ids: list[int] = []
        parts: list[tuple[KV, F32, int, int]] = []  # KV, prompt rows, how many ids follow, logits
        for work in batch.work:
            if isinstance(work.target, Fill):
                kv, new = work.target.kv, list(work.tail)
                rows = work.target.prefix.embeds[work.start : work.start + work.count]
            else:
                kv = work.target.kv = work.target.kv or self._new_kv(work.target)
                rows, generated = work.target.rows(work.start, work.count)
                new = [*generated, *work.tail]
            ids += new
            parts.append((kv, rows, len(new), work.logits))
        embedded = self.decoder.embed(np.array(ids, np.int64)) if ids else np.empty((0, 0), np.float32)
        chunks, at = [], 0
        for kv, rows, count, logits in parts:
            own = embedded[at : at + count]
            at += count
            joined = rows if not count else own if not len(rows) else np.concatenate([rows, own])
            chunks.append(Chunk(kv, joined, logits))
        return chunks

    def _new_kv(self, sequence: Sequence) -> KV:
        tail = sequence.scorer.longest_tail if sequence.scorer is not None else 0
        capacity = sequence.request.prompt_length + max(sequence.limit, tail)
        if sequence.request.keep_kv:  # for the turns to come; memory is taken as tokens come
            capacity = self.decoder.spec.context_length
        return self.decoder.new_kv(capacity, sequence.prefix_kv)

    def _filled(self, fill: Fill) -> list[LoopEvent]:
        """A prefix may be complete now."""
        if fill.pending:
            return []
        try:
            self.scheduler.filled(fill, lambda: self.store.add(fill.prefix, self.decoder.freeze(fill.kv)))
        except WsiRtError as exc:
            return [self._failed(s, exc) for s in self.scheduler.abandon(fill)]
        except BaseException as exc:
            self._abandon(fill, exc)
            raise
        return []

    def _advance(self, sequence: Sequence, work: Work, rows: F32) -> LoopEvent:
        """Take what the logits of this step say; guesses count as far as they are what is chosen anyway."""
        try:
            if sequence.scorer is not None:
                sequence.scorer.take(rows, prompt_ends=work.count > 0)
                sequence.rewind()
                if not sequence.scorer.done:
                    return LoopEvent(sequence)
                return self._finish(sequence, "choice", sequence.say(sequence.scorer.best().label))
            return self._choose(sequence, work.tail, rows)
        except WsiRtError as exc:
            return self._failed(sequence, exc)

    def _choose(self, sequence: Sequence, guesses: tuple[int, ...], rows: F32) -> LoopEvent:
        text, accepted = "", 0
        reason: StopReason | None = None
        for i, row in enumerate(rows):
            if i and sequence.cancel_requested:
                reason = "cancelled"
                break
            token = sequence.sampler.sample(row)
            sequence.took(token)
            accepted += i < len(guesses) and token == guesses[i]
            piece, reason = self._read(sequence, token)
            text += sequence.say(piece)
            if reason is not None or i == len(guesses) or token != guesses[i]:
                break
        if self.speculation is not None:
            self.speculation.learn(sequence, len(guesses), accepted)
        sequence.rewind()
        return self._finish(sequence, reason, text) if reason is not None else LoopEvent(sequence, text)

    def _read(self, sequence: Sequence, token: int) -> tuple[str, StopReason | None]:
        """The text a token brings, and whether it is the last."""
        if token in self.tokenizer.eos_ids:
            return "", "eos"
        text = sequence.text.push(token)
        if sequence.text.stopped:
            return text, "stop_string"
        return text, "length" if len(sequence.token_ids) >= sequence.limit else None

    def _finish(self, sequence: Sequence, reason: StopReason, text: str = "") -> LoopEvent:
        """End a sequence: what its stream held back is given out, and it leaves the scheduler."""
        sequence.stop_reason = reason
        self.scheduler.remove(sequence)
        if self.speculation is not None:
            self.speculation.remember(sequence)
        return LoopEvent(sequence, text + sequence.say(sequence.text.finish()), reason)

    def _failed(self, sequence: Sequence, error: Exception) -> LoopEvent:
        sequence.error = error
        self.scheduler.remove(sequence)
        return LoopEvent(sequence, error=error)

    def _abandon(self, fill: Fill, error: BaseException) -> None:
        for sequence in self.scheduler.abandon(fill):
            sequence.error = _told(error)


def _told(error: BaseException) -> Exception:
    """As a sequence keeps it."""
    return error if isinstance(error, Exception) else RuntimeError("interrupted")


def _kind(sequence: Sequence) -> str:
    return "decode" if sequence.token_ids else "prefill"


def _sequences(batch: Batch) -> list[tuple[Sequence, str]]:
    """Who takes part in a step, and whether it is prefill or decode to them."""
    found = []
    for work in batch.work:
        sequences = work.target.waiting if isinstance(work.target, Fill) else [work.target]
        found += [(s, _kind(s)) for s in sequences]
    return found


def _merge_cancel(own: Callable[[], bool] | None, signal: CancelSignal | None) -> Callable[[], bool] | None:
    """One callable that is true when either asks to stop."""
    given = signal.is_set if isinstance(signal, ThreadEvent) else signal
    asked = [c for c in (own, given) if c is not None]
    return (lambda: any(c() for c in asked)) if asked else None


def drive(
    loop: Loop,
    requests: Iterable[Request],
    on_text: Callable[[int, str], None] | None = None,
    cancel: CancelSignal | None = None,
) -> list[Sequence]:
    """Answer requests together -> their sequences, ended, in the same order. `on_text(i, piece)` gets each new
    non-empty piece of text of request i; joined they are Generation.text (a closed question's option comes as one).

    `cancel` is a callable or a threading.Event, asked before every token; it ends the answers with stop_reason
    "cancelled" and the text so far.

    InputError: a prompt that does not fit; then nothing is computed. WsiRtError: unusable logits. The decoder's own
    errors pass through. Whatever is raised, none of these requests stays in the loop.
    """
    sequences: list[Sequence] = []
    try:
        for i, request in enumerate(requests):
            heard = request.on_text if on_text is None else partial(on_text, i)
            merged = _merge_cancel(request.cancel, cancel)
            sequences.append(loop.submit(replace(request, cancel=merged, on_text=heard)))
        while not all(s.done for s in sequences):
            loop.step()
            for sequence in sequences:
                if sequence.error is not None:
                    raise sequence.error
    finally:
        for sequence in sequences:
            loop.scheduler.remove(sequence)
    return sequences


def generate(
    decoder: Decoder,
    tokenizer: Tokenizer,
    request: Request,
    on_text: Callable[[str], None] | None = None,
    cancel: CancelSignal | None = None,
) -> Generation:
    """`drive` for one request in a loop of its own."""
    heard = None if on_text is None else lambda _, piece: on_text(piece)
    return Generation.of(drive(Loop(decoder, tokenizer), [request], heard, cancel)[0])
