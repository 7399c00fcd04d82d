"""What comes out of the loop: news of a sequence, and a finished answer."""

from __future__ import annotations

from dataclasses import dataclass

from wsi_rt.runtime.llm.request import StopReason
from wsi_rt.runtime.llm.sequence import Sequence


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

    text: without the EOS token and trimmed at a stop string; of a closed question the likeliest option.
    token_ids: every generated token, EOS and a stop string's tokens included; of a closed question the option's.
    prefill_ms, decode_ms: wall time of the steps it took part in; choosing the first token counts as prefill; waiting
    and `on_text` do not count. first_token_ms: from submission to the first token.
    prompt_tokens: all of the prompt, a shared prefix included. choices: probability by option.
    drafted, accepted: guessed tokens verified, and how many of them were right. kv_lost: how often it gave up its
    keys and values to others.
    """

    text: str
    token_ids: tuple[int, ...]
    stop_reason: StopReason
    prefill_ms: float
    decode_ms: float
    prompt_tokens: int
    notes: tuple[str, ...] = ()
    choices: dict[str, float] | None = None
    first_token_ms: float | None = None
    drafted: int = 0
    accepted: int = 0
    kv_lost: int = 0

    @classmethod
    def of(cls, sequence: Sequence) -> Generation:
        """The result of a sequence that ended with a stop reason."""
        if sequence.stop_reason is None:
            raise ValueError("the sequence has not finished")
        scorer = sequence.scorer if sequence.stop_reason == "choice" else None
        return cls(
            text=sequence.text.text if scorer is None else scorer.best().label,
            token_ids=tuple(sequence.token_ids) if scorer is None else scorer.best().token_ids,
            stop_reason=sequence.stop_reason,
            prefill_ms=sequence.prefill_ms,
            decode_ms=sequence.decode_ms,
            prompt_tokens=sequence.request.prompt_length,
            notes=sequence.notes(),
            choices=scorer.probabilities() if scorer is not None else None,
            first_token_ms=sequence.first_token_ms,
            drafted=sequence.drafted,
            accepted=sequence.accepted,
            kv_lost=sequence.kv_lost,
        )
