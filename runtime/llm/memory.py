"""Keys and values in memory: who holds how many bytes, and what goes when there is no room.

Counted exactly: prefixes in the store, those of sequences up to the tokens that they know (fed or not), prefixes under
way in full, and what conversations left behind.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from wsi_rt.runtime.llm.decoder import KV, DecoderSpec
from wsi_rt.runtime.llm.prefix import SlidePrefix
from wsi_rt.runtime.llm.prefix_store import PrefixStore
from wsi_rt.runtime.llm.request import Parked
from wsi_rt.runtime.llm.sequence import Sequence

SLACK = 8  # tokens that each running sequence may gain before one that lost its memory comes back


@dataclass(eq=False)
class Fill:
    """A prefix that is being computed, for the sequences in `waiting`."""

    prefix: SlidePrefix
    kv: KV
    waiting: list[Sequence] = field(default_factory=list)

    @property
    def pending(self) -> int:
        return self.prefix.length - self.kv.length


class Memory:
    """kv_bytes: of all keys and values (None: no bound). running: the sequences that hold some, the scheduler's list.
    new_kv(capacity): where a prefix is computed."""

    def __init__(
        self, spec: DecoderSpec, store: PrefixStore, new_kv: Callable[[int], KV], kv_bytes: int | None = None
    ) -> None:
        self.spec, self.store, self.kv_bytes = spec, store, kv_bytes
        self.running: list[Sequence] = []
        self.fills: dict[str, Fill] = {}
        self.parked: list[Parked] = []  # least recently used first
        self._new_kv = new_kv

    @property
    def held_bytes(self) -> int:
        """All keys and values, and what running sequences and prefixes under way are promised."""
        tokens = sum(f.prefix.length for f in self.fills.values()) + sum(s.reserved for s in self.running)
        parked = sum(p.kv.nbytes for p in self.parked if p.kv is not None)
        return self.store.nbytes + parked + tokens * self.spec.kv_bytes_per_token

    def fits(self, sequence: Sequence) -> bool:
        """Whether a sequence can start, once what is only kept has gone: that then goes."""
        if self.kv_bytes is None:
            return True
        tokens, prefix, parked = sequence.reserved, sequence.prefix, sequence.request.parked
        if sequence.kv_lost:  # else it would be put out again by the next few tokens of the others
            tokens += SLACK * len(self.running)
        if prefix is not None and prefix.key not in self.store and prefix.key not in self.fills:
            tokens += prefix.length
        missing = self.held_bytes + tokens * self.spec.kv_bytes_per_token - self.kv_bytes
        if parked is not None and parked.kv is not None:
            missing -= parked.kv.nbytes
        if missing > 0 and missing > self._reclaimable(sequence):
            return False
        self.reclaim(missing, sequence)
        return True

    def forget(self, parked: Parked) -> None:
        """A conversation is over."""
        if parked in self.parked:
            self.parked.remove(parked)
            self._unpark(parked)

    def start(self, sequence: Sequence) -> None:
        """Give it what is there: its conversation's keys and values, its prefix, or a place among those that wait for
        the prefix."""
        parked, prefix = sequence.request.parked, sequence.prefix
        if parked is not None and parked in self.parked:  # its hold on the prefix goes over as well
            self.parked.remove(parked)
            if parked.kv is not None:
                sequence.kv, parked.kv = parked.kv, None
                sequence.prefix_kv = sequence.kv.prefix
                return
        if prefix is None:
            return
        if prefix.key not in self.fills:
            sequence.prefix_kv = self.store.acquire(prefix)
            if sequence.prefix_kv is not None:
                return
            self.fills[prefix.key] = Fill(prefix, self._new_kv(prefix.length))
        self.fills[prefix.key].waiting.append(sequence)

    def let_go(self, sequence: Sequence) -> None:
        """Of its keys and values, and of the prefix."""
        sequence.kv = None
        if sequence.prefix_kv is not None and sequence.prefix is not None:
            sequence.prefix_kv = None
            self.store.release(sequence.prefix.key)
        for fill in [f for f in self.fills.values() if sequence in f.waiting]:
            fill.waiting.remove(sequence)
            if not fill.waiting:
                del self.fills[fill.prefix.key]

    def park(self, sequence: Sequence) -> None:
        """Its keys and values stay, as does its hold on the prefix."""
        sequence.rewind()
        sequence.parked = Parked(sequence.prefix, sequence.kv)
        self.parked.append(sequence.parked)
        sequence.kv = sequence.prefix_kv = None

    def _unpark(self, parked: Parked) -> None:
        parked.kv = None
        if parked.prefix is not None:
            self.store.release(parked.prefix.key)

    def _reclaimable(self, but_for: Sequence) -> int:
        """Bytes that `_reclaim` could free."""
        parked = [p for p in self.parked if p is not but_for.request.parked]
        users: dict[str, int] = {}
        for p in parked:
            if p.prefix is not None:
                users[p.prefix.key] = users.get(p.prefix.key, 0) + 1
        keep = but_for.prefix.key if but_for.prefix is not None else None
        prefixes = (
            x.nbytes for x in self.store.listed() if not x.pinned and x.key != keep and x.users == users.get(x.key, 0)
        )
        return sum(p.kv.nbytes for p in parked if p.kv is not None) + sum(prefixes)

    def reclaim(self, missing: int, but_for: Sequence | None = None) -> int:
        """Let go of unused prefixes and of conversations, least recently used first, until `missing` bytes are free or
        there is nothing left -> bytes freed. What `but_for` itself would use stays."""
        keep = but_for.prefix.key if but_for is not None and but_for.prefix is not None else None
        own = but_for.request.parked if but_for is not None else None
        freed = self.store.make_room(missing, keep)
        for p in [p for p in self.parked if p is not own]:
            if freed >= missing:
                break
            freed += p.kv.nbytes if p.kv is not None else 0
            self.forget(p)
            freed += self.store.make_room(missing - freed, keep)
        return freed
