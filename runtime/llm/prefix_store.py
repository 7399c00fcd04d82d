"""Slide prefixes whose keys and values are in memory: shared by the sequences that use them, kept afterwards as long as
there is room, least recently used first to go; a PrefixDisk behind it keeps them over restarts."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from wsi_rt.runtime.errors import InputError, WsiRtError
from wsi_rt.runtime.llm.decoder import F32, Decoder, PrefixKV
from wsi_rt.runtime.llm.prefix import SlidePrefix
from wsi_rt.runtime.llm.prefix_disk import PrefixDisk

PREFIX_DTYPES = ("fp32", "fp16")


@dataclass
class _Resident:
    kv: PrefixKV
    made_of: Mapping[str, Any]
    origin: Literal["computed", "disk"]
    users: int = 0
    pinned: bool = False


@dataclass(frozen=True)
class Listed:
    """A prefix in memory. users: sequences and conversations that need it now."""

    key: str
    length: int
    nbytes: int
    origin: Literal["computed", "disk"]
    users: int
    pinned: bool
    made_of: Mapping[str, Any]


@dataclass
class PrefixStore:
    """max_bytes: of prefixes that nobody uses and nobody pinned, which are dropped beyond it (None: only `make_room`
    drops). dtype "fp16": keys and values are rounded before their first use, so that one read back is the same.

    notes: what a user should hear (a damaged file, a full disk), emptied by `take_notes`.
    """

    decoder: Decoder
    disk: PrefixDisk | None = None
    max_bytes: int | None = None
    dtype: str = "fp32"
    notes: list[str] = field(default_factory=list)
    _held: OrderedDict[str, _Resident] = field(default_factory=OrderedDict)  # least recently used first

    def __post_init__(self) -> None:
        if self.dtype not in PREFIX_DTYPES:
            raise InputError(f"--prefix-dtype is {self.dtype!r}, expected {' or '.join(PREFIX_DTYPES)}")

    @property
    def nbytes(self) -> int:
        """Of all prefixes in memory."""
        return sum(x.kv.nbytes for x in self._held.values())

    @property
    def idle_bytes(self) -> int:
        """Of those that could go."""
        return sum(x.kv.nbytes for x in self._held.values() if _idle(x))

    def __contains__(self, key: str) -> bool:
        return key in self._held

    def acquire(self, prefix: SlidePrefix) -> PrefixKV | None:
        """Its keys and values, from memory or disk, which stay until `release`; None: they must be computed."""
        if prefix.key not in self._held and not self._read(prefix):
            return None
        self._held.move_to_end(prefix.key)
        self._held[prefix.key].users += 1
        return self._held[prefix.key].kv

    def release(self, key: str) -> None:
        """Undo one `acquire`."""
        self._held[key].users -= 1
        self._trim()

    def add(self, prefix: SlidePrefix, kv: PrefixKV) -> PrefixKV:
        """Take in what was just computed, rounded to `dtype`; written to the disk, if there is one.

        Raises WsiRtError when a number does not fit the dtype.
        """
        layers = [self._rounded(x) for x in kv.layers()] if self.dtype == "fp16" else None
        if layers is not None:
            kv = self.decoder.load_prefix([x.astype(np.float32) for x in layers])
        self._held[prefix.key] = _Resident(kv, prefix.made_of, "computed")
        if self.disk is not None:
            try:
                self.disk.write(self.stored_key(prefix), prefix.made_of, kv.layers() if layers is None else layers)
            except WsiRtError as error:
                self.notes.append(f"the prefix is not kept on disk: {error}")
            self.notes += self.disk.take_notes()
        return kv

    def make_room(self, needed_bytes: int, keep: str | None = None) -> int:
        """Drop unused prefixes, `keep` excepted, least recently used first, until `needed_bytes` are free -> bytes."""
        freed = 0
        for key in [k for k, x in self._held.items() if _idle(x) and k != keep]:
            if freed >= needed_bytes:
                break
            freed += self._held.pop(key).kv.nbytes
        return freed

    def pin(self, key: str, pinned: bool = True) -> None:
        """A pinned prefix stays in memory. Raises InputError when it is not there."""
        self._require(key).pinned = pinned
        self._trim()

    def drop(self, key: str) -> None:
        """Raises InputError when it is not there, or is in use."""
        if self._require(key).users:
            raise InputError(f"the prefix {key[:12]} is in use, it cannot be dropped now")
        del self._held[key]

    def listed(self) -> list[Listed]:
        """Most recently used first."""
        return [
            Listed(key, x.kv.length, x.kv.nbytes, x.origin, x.users, x.pinned, x.made_of)
            for key, x in reversed(self._held.items())
        ]

    def take_notes(self) -> tuple[str, ...]:
        notes, self.notes = tuple(dict.fromkeys(self.notes)), []
        return notes

    def clear(self) -> None:
        """Forget all; for closing."""
        self._held.clear()

    def stored_key(self, prefix: SlidePrefix) -> str:
        """Its name on disk: what is stored narrower is another thing."""
        return prefix.key if self.dtype == "fp32" else f"{prefix.key}-{self.dtype}"

    def _read(self, prefix: SlidePrefix) -> bool:
        if self.disk is None:
            return False
        layers = self.disk.read(self.stored_key(prefix), prefix.made_of)
        self.notes += self.disk.take_notes()
        if layers is None:
            return False
        try:
            kv = self.decoder.load_prefix([x if x.dtype == np.float32 else x.astype(np.float32) for x in layers])
        except ValueError as error:
            self.disk.discard(self.stored_key(prefix), str(error))
            self.notes += self.disk.take_notes()
            return False
        if kv.length != prefix.length:
            self.disk.discard(self.stored_key(prefix), f"{kv.length} tokens, expected {prefix.length}")
            self.notes += self.disk.take_notes()
            return False
        self._held[prefix.key] = _Resident(kv, prefix.made_of, "disk")
        return True

    def _rounded(self, layer: F32) -> np.ndarray:
        with np.errstate(over="ignore"):
            narrow = layer.astype(np.float16)
        if not np.isfinite(narrow).all():
            raise WsiRtError("a key or value of the slide prefix exceeds fp16; use --prefix-dtype fp32")
        return narrow

    def _require(self, key: str) -> _Resident:
        if key not in self._held:
            raise InputError(
                f"no prefix {key[:12]} in memory, expected one of: {', '.join(k[:12] for k in self._held)}"
            )
        return self._held[key]

    def _trim(self) -> None:
        if self.max_bytes is not None and self.idle_bytes > self.max_bytes:
            self.make_room(self.idle_bytes - self.max_bytes)


def _idle(x: _Resident) -> bool:
    return not x.users and not x.pinned
