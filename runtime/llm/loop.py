"""The generation loop: schedule -> run -> postprocess, and generate(), which drives it for one request."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from threading import Event as ThreadEvent
from time import perf_counter

import numpy as np
from numpy.typing import NDArray

from wsi_rt.runtime.errors import WsiRtError
from wsi_rt.runtime.llm.decoder import Decoder
from wsi_rt.runtime.llm.scheduler import Batch, Request, Scheduler, Sequence, StopReason, answer_room
from wsi_rt.runtime.llm.tokenizer import Tokenizer

CancelSignal = Callable[[], bool] | ThreadEvent


@dataclass(frozen=True)
class LoopEvent:
    """News of one sequence: new text (may be empty), and how it ended, if it did.

    `error` is set instead of `stop_reason` when the sequence failed; the other sequences go on.
    """

    sequence: Sequence
    text: str = ""
    stop_reason: StopReason | None = None
    error: Exception | None = None


@dataclass(frozen=True)
class Generation:
    """One finished answer.

    text: without the EOS token and trimmed at a stop string.
    token_ids: every generated token, EOS and a stop string's tokens included.
    prefill_ms, decode_ms: wall time; choosing the first token counts as prefill. Time in `on_text` is not counted.
    prompt_tokens: all of the prompt, a shared prefix included.
    """

    text: str
    token_ids: tuple[int, ...]
    stop_reason: StopReason
    prefill_ms: float
    decode_ms: float
    prompt_tokens: int
    notes: tuple[str, ...] = ()

    @classmethod
    def of(cls, sequence: Sequence) -> Generation:
        """The result of a sequence that ended with a stop reason."""
        if sequence.stop_reason is None:
            raise ValueError("the sequence has not finished")
        return cls(
            text=sequence.text.text,
            token_ids=tuple(sequence.token_ids),
            stop_reason=sequence.stop_reason,
            prefill_ms=sequence.prefill_ms,
            decode_ms=sequence.decode_ms,
            prompt_tokens=sequence.prompt_length,
            notes=sequence.notes(),
        )


class Loop:
    """Runs requests on one decoder. Not thread-safe: one thread drives it (cancel signals may come from any)."""

    def __init__(self, decoder: Decoder, tokenizer: Tokenizer, max_running: int = 1) -> None:
        self.decoder = decoder
        self.tokenizer = tokenizer
        self.scheduler = Scheduler(max_running)

    def submit(self, request: Request) -> Sequence:
        """Queue a request. InputError: a prompt that does not fit (answer_room). ValueError: a KV still in use."""
        if request.kv is not None and any(s.kv is request.kv for s in self.scheduler.sequences):
            raise ValueError("this KV belongs to a request that has not ended: both would append to it")
        limit = answer_room(request, self.decoder.spec)
        sequence = Sequence.start(request, limit, self.tokenizer)
        self.scheduler.add(sequence)
        return sequence

    def step(self) -> list[LoopEvent]:
        """One round of the three verbs; cancelled sequences end first. An empty list may mean nothing to tell yet."""
        events = self.reap_cancelled()
        batch = self.schedule()
        if batch is not None:
            events += self.postprocess(batch, self.run(batch))
        return events

    def schedule(self) -> Batch | None:
        """What to compute next; None when every request has ended."""
        return self.scheduler.schedule()

    def run(self, batch: Batch) -> NDArray[np.float32]:
        """Compute a batch: logits [B, vocab] f32. When the decoder fails, its sequences are dropped."""
        started = perf_counter()
        try:
            if batch.kind == "prefill":
                (sequence,) = batch.sequences
                if sequence.kv is None:  # made on admission: a waiting request holds no memory
                    sequence.kv = self.decoder.new_kv(sequence.prompt_length + sequence.limit)
                logits = self.decoder.prefill(sequence.admitted_kv, sequence.request.embeds)[None]
                sequence.prefilled = True
            else:
                last = np.array([s.token_ids[-1] for s in batch.sequences], dtype=np.int64)
                logits = self.decoder.step([s.admitted_kv for s in batch.sequences], last)
        except BaseException as exc:  # KeyboardInterrupt too: the loop stays usable
            for sequence in batch.sequences:
                sequence.error = exc if isinstance(exc, Exception) else RuntimeError("interrupted")
                self.scheduler.remove(sequence)
            raise
        self._count_ms(batch, started)
        return logits

    def postprocess(self, batch: Batch, logits: NDArray[np.float32]) -> list[LoopEvent]:
        """Choose a token for each sequence of the batch; finished sequences leave the scheduler."""
        events = []
        for sequence, row in zip(batch.sequences, logits, strict=True):
            started = perf_counter()
            events.append(self._advance(sequence, row))
            sequence.add_ms(batch.kind, (perf_counter() - started) * 1e3)
        return events

    def reap_cancelled(self) -> list[LoopEvent]:
        """End the sequences whose caller asked to stop, waiting ones included."""
        return [self._finish(s, "cancelled") for s in self.scheduler.cancelled()]

    def _advance(self, sequence: Sequence, logits: NDArray[np.float32]) -> LoopEvent:
        try:
            token = sequence.sampler.sample(logits)
        except WsiRtError as exc:
            sequence.error = exc
            self.scheduler.remove(sequence)
            return LoopEvent(sequence, error=exc)
        sequence.token_ids.append(token)
        if token in self.tokenizer.eos_ids:
            return self._finish(sequence, "eos")
        text = sequence.text.push(token)
        if sequence.text.stopped:
            return self._finish(sequence, "stop_string", text)
        if len(sequence.token_ids) >= sequence.limit:
            return self._finish(sequence, "length", text)
        return LoopEvent(sequence, text)

    def _finish(self, sequence: Sequence, reason: StopReason, text: str = "") -> LoopEvent:
        """End a sequence: what its stream held back is given out, and it leaves the scheduler."""
        sequence.stop_reason = reason
        self.scheduler.remove(sequence)
        return LoopEvent(sequence, text + sequence.text.finish(), reason)

    @staticmethod
    def _count_ms(batch: Batch, started: float) -> None:
        elapsed_ms = (perf_counter() - started) * 1e3
        for sequence in batch.sequences:
            sequence.add_ms(batch.kind, elapsed_ms)


def _merge_cancel(own: Callable[[], bool] | None, signal: CancelSignal | None) -> Callable[[], bool] | None:
    """One callable that is true when either asks to stop."""
    given = signal.is_set if isinstance(signal, ThreadEvent) else signal
    asked = [c for c in (own, given) if c is not None]
    return (lambda: any(c() for c in asked)) if asked else None


def generate(
    decoder: Decoder,
    tokenizer: Tokenizer,
    request: Request,
    on_text: Callable[[str], None] | None = None,
    cancel: CancelSignal | None = None,
) -> Generation:
    """Answer one request. `on_text` gets each new non-empty piece of text; joined they are Generation.text.

    `cancel` is a callable or a threading.Event, asked before the prefill and before every token; it ends the answer
    with stop_reason "cancelled" and the text so far.

    InputError: a prompt that does not fit. WsiRtError: unusable logits. The decoder's own errors pass through.
    """
    loop = Loop(decoder, tokenizer)
    sequence = loop.submit(replace(request, cancel=_merge_cancel(request.cancel, cancel)))
    while not sequence.done:
        for event in loop.step():
            if event.error is not None:
                raise event.error
            if event.text and on_text is not None:
                on_text(event.text)
    return Generation.of(sequence)
