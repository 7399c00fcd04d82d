"""A reference answer as text, and which tokens may come next if the answer is to be that text.

Answers files hold text, and one text has many token sequences: a token is allowed when its bytes go on along the text.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from wsi_rt.runtime.llm.tokenizer import Tokenizer

_BLANK = b" \t\n\r\v\f\x1c\x1d\x1e\x1f"  # what str.strip takes off, of one byte; bytes.strip keeps the last four
_UNDECODABLE = "\ufffd".encode()  # in text, where the model gave a byte that belongs to no character


class Vocabulary:
    """A tokenizer's tokens by their first byte."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.eos = tuple(tokenizer.eos_ids)
        self.by_first: dict[int, list[int]] = defaultdict(list)  # of the bytes as they are
        self.by_first_letter: dict[int, list[int]] = defaultdict(list)  # leading white space left out
        self.blank: list[int] = []
        for token in range(tokenizer.vocab_size):
            data = tokenizer.token_bytes(token)
            if data:
                self.by_first[data[0]].append(token)
            if data.strip(_BLANK):
                self.by_first_letter[data.lstrip(_BLANK)[0]].append(token)
            elif data:
                self.blank.append(token)


class Spelling:
    """How far an answer has come along `reference` (trimmed, as it is compared).

    White space before and after it is free, as is the beginning of a stop marker after it.
    """

    def __init__(self, vocabulary: Vocabulary, reference: str, stops: Sequence[str]) -> None:
        self.vocabulary = vocabulary
        self.text = reference.strip().encode("utf-8", "replace")
        self.stops = tuple(stops)
        ends = [self.text.find(s) + len(s) for s in (stop.encode() for stop in stops) if s in self.text]
        self._stop_end = min(ends, default=None)
        self._at, self._tail = 0, b""

    @property
    def complete(self) -> bool:
        """All of the reference has been said."""
        return self._at == len(self.text)

    @property
    def stopped(self) -> bool:
        """A stop marker is complete: an answer ends here."""
        inside = self._stop_end is not None and self._at >= self._stop_end
        return inside or any(stop in _text(self._tail) for stop in self.stops)

    @property
    def trimmed(self) -> bool:
        """It ended at a marker that the reference goes on behind, or ends with: there was no trimming."""
        return self._stop_end is not None and self._at >= self._stop_end

    def allows(self, token: int) -> bool:
        if token in self.vocabulary.eos:
            return self.complete and not _text(self._tail).strip()
        # A special token has no bytes, is dropped from text, and so may stand anywhere.
        return self._after(self.vocabulary.tokenizer.token_bytes(token)) is not None

    def push(self, token: int) -> None:
        """Go on by an allowed token."""
        after = self._after(self.vocabulary.tokenizer.token_bytes(token))
        if after is None:
            raise ValueError(f"token {token} does not go on along the reference")
        self._at, self._tail = after

    def candidates(self) -> NDArray[np.int64]:
        """Every allowed token."""
        v = self.vocabulary
        if self.complete:
            found = [t for t in (*v.eos, *v.blank) if self.allows(t)]
        else:
            first = self.text[self._at]
            found = [*v.by_first[first], *(v.by_first_letter[first] + v.blank if self._at == 0 else [])]
            if self.text.startswith(_UNDECODABLE, self._at):
                found += [t for b in range(0x80, 0x100) for t in v.by_first[b]]
            found = [t for t in found if self.allows(t)]
        return np.unique(np.array(found, np.int64))

    def _after(self, data: bytes) -> tuple[int, bytes] | None:
        """(place in the text, what came after its end) once `data` was said; None when that is another text."""
        at, tail = self._at, self._tail
        if at == 0:
            data = data.lstrip(_BLANK)
        for i, byte in enumerate(data):
            if at == len(self.text):
                tail += data[i:]
                break
            if self.text[at] == byte:
                at += 1
            elif byte >= 0x80 and self.text.startswith(_UNDECODABLE, at):
                at += len(_UNDECODABLE)
            else:
                return None
        return (at, tail) if self._may_follow(tail) else None

    def _may_follow(self, tail: bytes) -> bool:
        """White space, with nothing or the beginning of a stop marker (or all of one) behind it."""
        text = _text(tail)
        words = text.lstrip()
        blank = text[: len(text) - len(words)]
        if not words:
            return True
        return any(
            stop.startswith(blank[i:] + words) or (blank[i:] + words).startswith(stop)
            for stop in self.stops
            for i in range(len(blank) + 1)
        )


def _text(tail: bytes) -> str:
    """What stands behind the reference's end; a character that has only begun does not count yet."""
    return tail.decode("utf-8", "ignore")
