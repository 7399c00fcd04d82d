"""A request while it waits and runs."""

from __future__ import annotations

from dataclasses import dataclass, field
from time import perf_counter

from wsi_rt.runtime.llm.choices import OptionScorer
from wsi_rt.runtime.llm.decoder import F32, KV, PrefixKV
from wsi_rt.runtime.llm.ngrams import OwnText
from wsi_rt.runtime.llm.prefix import SlidePrefix
from wsi_rt.runtime.llm.request import Parked, Request, StopReason
from wsi_rt.runtime.llm.sampling import Sampler
from wsi_rt.runtime.llm.stream import TextStream
from wsi_rt.runtime.llm.tokenizer import Tokenizer


@dataclass(eq=False)
class Sequence:
    """Its own tokens are those of the prompt after the prefix, then the generated ones; `kv` holds the first of them.

    number: order of arrival. limit: tokens it may generate (request.answer_room). overtaken: how many that arrived
    later were admitted before it. text_seen: where guesses come from (ngrams.py); drafted, accepted: how many there
    were, and were right. parked: what it left for a next turn. kv_lost: how often its keys and values were taken away.
    """

    request: Request
    number: int
    limit: int
    sampler: Sampler
    text: TextStream
    text_seen: OwnText
    scorer: OptionScorer | None = None
    prefix_kv: PrefixKV | None = None
    kv: KV | None = None
    parked: Parked | None = None
    token_ids: list[int] = field(default_factory=list)
    overtaken: int = 0
    kv_lost: int = 0
    drafted: int = 0
    accepted: int = 0
    stop_reason: StopReason | None = None
    error: Exception | None = None
    prefill_ms: float = 0.0
    decode_ms: float = 0.0
    said_ms: float = 0.0  # spent in on_text
    submitted: float = field(default_factory=perf_counter)
    first_token_ms: float | None = None

    @classmethod
    def start(cls, request: Request, number: int, limit: int, tokenizer: Tokenizer) -> Sequence:
        constraint = request.grammar.start() if request.grammar is not None else None
        return cls(
            request=request,
            number=number,
            limit=limit,
            sampler=Sampler(request.settings, request.stream, constraint),
            text=TextStream(tokenizer, request.settings.stop),
            text_seen=OwnText(request.prompt_ids),
            scorer=OptionScorer(request.options) if request.options else None,
        )

    @property
    def prefix(self) -> SlidePrefix | None:
        return self.request.prefix

    @property
    def prompt_tokens(self) -> int:
        """Of its own, the prefix's not counted."""
        return int(self.request.embeds.shape[0])

    @property
    def known(self) -> int:
        """Own tokens that there are, fed or not."""
        return self.prompt_tokens + len(self.token_ids)

    @property
    def fed(self) -> int:
        """Own tokens whose keys and values are there."""
        return 0 if self.kv is None else self.kv.length - self.request.prefix_length

    @property
    def pending(self) -> int:
        """Own tokens still to be fed."""
        return self.known - self.fed

    @property
    def reserved(self) -> int:
        """Own tokens there must be room for: all that it has, and options under way."""
        return self.known + (self.scorer.longest_tail if self.scorer is not None else 0)

    @property
    def decoding(self) -> bool:
        """Only its last token is new."""
        return bool(self.token_ids) and self.pending == 1

    @property
    def done(self) -> bool:
        return self.stop_reason is not None or self.error is not None

    @property
    def cancel_requested(self) -> bool:
        return self.request.cancel is not None and self.request.cancel()

    def rows(self, start: int, count: int) -> tuple[F32, list[int]]:
        """Own tokens from `start` on: embeddings of those of the prompt, ids of the generated ones after them."""
        stop = start + count
        generated = self.token_ids[max(0, start - self.prompt_tokens) : max(0, stop - self.prompt_tokens)]
        return self.request.embeds[start:stop], generated

    def took(self, token: int) -> None:
        """A token was chosen."""
        self.token_ids.append(token)
        self.text_seen.push(token)
        if self.first_token_ms is None:
            self.first_token_ms = (perf_counter() - self.submitted) * 1e3

    def say(self, piece: str) -> str:
        """Give new text out at once -> the same text."""
        if piece and self.request.on_text is not None:
            started = perf_counter()
            self.request.on_text(piece)
            self.said_ms += (perf_counter() - started) * 1e3
        return piece

    def rewind(self) -> None:
        """Forget keys and values of drafts that were not taken: all but the last token are fed at most."""
        if self.kv is not None:
            fed = self.request.prefix_length + max(self.known - bool(self.token_ids), 0)
            self.kv.rewind(min(self.kv.length, fed))

    def add_ms(self, kind: str, elapsed_ms: float) -> None:
        """Count wall time as this request saw it: a step's time counts in full for each of its sequences."""
        if kind == "prefill":
            self.prefill_ms += elapsed_ms
        else:
            self.decode_ms += elapsed_ms

    def notes(self) -> tuple[str, ...]:
        """What the caller should be told about a finished sequence."""
        found = []
        asked = self.request.settings.max_new_tokens
        if self.stop_reason == "length" and self.limit < asked:
            found.append(
                f"the answer was cut after {self.limit} tokens instead of {asked}: "
                f"with {self.request.prompt_length} prompt tokens no more fit"
            )
        if self.request.grammar is not None and not self.sampler.complete and self.stop_reason != "cancelled":
            found.append("the answer ends before its JSON is complete; raise --max-new-tokens")
        return tuple(found)
