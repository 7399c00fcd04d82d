"""Who runs next, and who holds memory: the first of the loop's three verbs.

Order of arrival decides, with one exception: a request whose slide prefix is in use already may overtake those that
would need another one, which keeps few prefixes in memory and lets attention read each once for many sequences.
`Limits.overtakes` bounds it. A step takes one row of every sequence that decodes, then prompt rows in order of arrival,
then guesses (speculate.py).

Nothing is computed that would exceed `Limits.kv_bytes` (memory.py): first what is only kept goes (unused prefixes,
conversations), then the sequence that arrived last gives up its keys and values and waits again; its tokens are fed
again later. The first to arrive never does, so every request ends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from wsi_rt.runtime.errors import MachineError
from wsi_rt.runtime.llm.decoder import KV, DecoderSpec
from wsi_rt.runtime.llm.memory import Fill, Memory
from wsi_rt.runtime.llm.prefix_store import PrefixStore
from wsi_rt.runtime.llm.sequence import Sequence
from wsi_rt.runtime.llm.speculate import Speculation

WINDOW = 64  # waiting requests looked at: thousands may wait


@dataclass(frozen=True)
class Limits:
    """max_running: sequences admitted at once. step_tokens: rows of a step while any sequence decodes, which bounds
    how long it waits for its next token; lone_tokens: while none does. kv_bytes: of all keys and values (None: no
    bound). overtakes: how many later requests may be admitted before a waiting one.

    64 rows are where 4 bit weights have reached their peak on a CPU: wider steps are no faster per token.
    """

    max_running: int = 32
    step_tokens: int = 64
    lone_tokens: int = 256
    kv_bytes: int | None = None
    overtakes: int = 32

    def __post_init__(self) -> None:
        if not 1 <= self.max_running < self.step_tokens <= self.lone_tokens:
            raise ValueError(
                f"max_running {self.max_running}, step_tokens {self.step_tokens}, lone_tokens {self.lone_tokens}: "
                "expected 1 <= max_running < step_tokens <= lone_tokens"
            )
        if self.overtakes < 0:
            raise ValueError(f"overtakes is {self.overtakes}, expected 0 or more")


@dataclass(frozen=True)
class Work:
    """Rows of one step: `count` tokens of `target` from `start` on, then `tail` (guesses, or an option's tokens).
    logits: of how many of the last positions."""

    target: Sequence | Fill
    start: int
    count: int
    tail: tuple[int, ...] = ()
    logits: int = 0

    @property
    def rows(self) -> int:
        return self.count + len(self.tail)


@dataclass(frozen=True)
class Batch:
    """What one run() computes. failed: sequences there is no memory for, with the reason in `error`."""

    work: tuple[Work, ...] = ()
    failed: tuple[Sequence, ...] = ()

    @property
    def rows(self) -> int:
        return sum(w.rows for w in self.work)


class Scheduler:
    def __init__(
        self,
        spec: DecoderSpec,
        store: PrefixStore,
        new_kv: Callable[[int], KV],
        limits: Limits | None = None,
        speculation: Speculation | None = None,
    ) -> None:
        """new_kv(capacity): where a prefix is computed."""
        self.limits, self.spec, self.store = limits or Limits(), spec, store
        self.memory = Memory(spec, store, new_kv, self.limits.kv_bytes)
        self.waiting: list[Sequence] = []  # in order of arrival
        self.running = self.memory.running  # in order of arrival
        self._speculation = speculation

    @property
    def sequences(self) -> tuple[Sequence, ...]:
        """Every sequence that has not ended, running ones first."""
        return (*self.running, *self.waiting)

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, sequence: Sequence) -> None:
        _insert(self.waiting, sequence)

    def schedule(self) -> Batch:
        """The next step; without work when there is nothing to do, or only failures to tell."""
        failed = self._shrink()
        failed += self._admit()
        return Batch(tuple(self._compose()), tuple(failed))

    def cancelled(self) -> list[Sequence]:
        """Sequences, waiting or running, whose caller asked to stop."""
        return [s for s in self.sequences if s.cancel_requested]

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out, wherever it is, with what it holds; no error when it is not there."""
        if sequence in self.waiting:
            self.waiting.remove(sequence)
        if sequence in self.running:
            self.running.remove(sequence)
            if sequence.request.keep_kv and sequence.error is None and sequence.kv is not None:
                self.memory.park(sequence)
            self.memory.let_go(sequence)

    def filled(self, fill: Fill, add: Callable[[], object]) -> None:
        """A prefix is computed; `add` puts it into the store."""
        add()
        del self.memory.fills[fill.prefix.key]
        for sequence in fill.waiting:
            sequence.prefix_kv = self.store.acquire(fill.prefix)

    def abandon(self, fill: Fill) -> list[Sequence]:
        """A prefix that cannot be computed -> the sequences that waited for it, taken out."""
        del self.memory.fills[fill.prefix.key]
        waiting, fill.waiting = fill.waiting, []
        for sequence in waiting:
            self.running.remove(sequence)
        return waiting

    def _admit(self) -> list[Sequence]:
        """Start waiting sequences while there is room -> those that can never start."""
        while self.waiting and len(self.running) < self.limits.max_running:
            for place in self._candidates():
                if self.memory.fits(self.waiting[place]):
                    break
            else:
                if self.running:
                    return []
                return [self._fail(self.waiting[0])]
            sequence = self.waiting.pop(place)
            for overtaken in self.waiting[:place]:
                overtaken.overtaken += 1
            _insert(self.running, sequence)
            self.memory.start(sequence)
        return []

    def _candidates(self) -> Iterator[int]:
        """Places in `waiting`, the best first: sharing a prefix in use, then the first to arrive, then any other."""
        near = self.waiting[:WINDOW]
        last = next((i for i, s in enumerate(near) if s.overtaken >= self.limits.overtakes), len(near) - 1)
        in_use = {s.prefix.key for s in self.running if s.prefix is not None}
        sharing = [i for i in range(last + 1) if (p := near[i].prefix) is not None and p.key in in_use]
        yield from sharing
        yield from (i for i in range(last + 1) if i not in sharing)

    def _shrink(self) -> list[Sequence]:
        """Make the promises fit: tokens came since -> sequences that do not fit even alone."""
        failed: list[Sequence] = []
        while self.limits.kv_bytes is not None and (missing := self.memory.held_bytes - self.limits.kv_bytes) > 0:
            if self.memory.reclaim(missing):
                continue
            if not self.running:
                break  # pinned prefixes alone exceed it
            if len(self.running) > 1:
                self._preempt(self.running[-1])
            else:
                failed.append(self._fail(self.running[0]))
        return failed

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self.memory.let_go(sequence)
        sequence.kv_lost += 1
        _insert(self.waiting, sequence)

    def _fail(self, sequence: Sequence) -> Sequence:
        pinned = sum(x.nbytes for x in self.store.listed() if x.pinned)
        sequence.error = MachineError(
            f"no room for the keys and values of a question: {self.limits.kv_bytes} bytes are allowed, pinned "
            f"prefixes take {pinned} of them; raise --kv-bytes or unpin a prefix"
        )
        self.remove(sequence)
        return sequence

    def _compose(self) -> list[Work]:
        """One step's rows."""
        ready = [s for s in self.running if s.prefix is None or s.prefix_kv is not None]
        decoding = [s for s in ready if s.decoding]
        work = [Work(s, s.fed, 1, logits=1) for s in decoding]
        room = (self.limits.step_tokens if decoding else self.limits.lone_tokens) - len(work)
        filled: set[str] = set()
        for s in self.running:
            if room <= 0:
                break
            if s.decoding and s in ready:
                continue
            if s in ready:
                step = self._prompt_work(s, room)
            elif s.prefix is not None and s.prefix.key not in filled:
                filled.add(s.prefix.key)
                fill = self.memory.fills[s.prefix.key]
                step = Work(fill, fill.kv.length, min(fill.pending, room))
            else:
                continue
            work.append(step)
            room -= step.rows
        return self._with_guesses(work, decoding, room)

    def _prompt_work(self, s: Sequence, room: int) -> Work:
        """The next of its tokens that have no keys and values yet, options after the last of them."""
        count = min(s.pending, room)
        replayed = s.fed >= s.prompt_tokens
        if not self.spec.row_exact and s.token_ids:  # replay goes through the same calls as the first time
            count = 1 if replayed else min(count, s.prompt_tokens - s.fed)
        if s.fed + count < s.known:
            return Work(s, s.fed, count)
        tail = s.scorer.tail() if s.scorer is not None else ()
        return Work(s, s.fed, count, tail, len(tail) + (count > 0))

    def _with_guesses(self, work: list[Work], decoding: list[Sequence], room: int) -> list[Work]:
        if self._speculation is None or not decoding:
            return work
        if self.limits.kv_bytes is not None:
            room = min(room, (self.limits.kv_bytes - self.memory.held_bytes) // self.spec.kv_bytes_per_token)
        guesses = self._speculation.plan(decoding, sum(w.rows for w in work), max(room, 0))
        return [
            Work(w.target, w.start, w.count, g, 1 + len(g))
            if isinstance(w.target, Sequence) and (g := guesses.get(w.target))
            else w
            for w in work
        ]


def _insert(line: list[Sequence], sequence: Sequence) -> None:
    """By order of arrival."""
    place = next((i for i, s in enumerate(line) if s.number > sequence.number), len(line))
    line.insert(place, sequence)
