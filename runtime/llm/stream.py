"""Text that appears while tokens arrive, trimmed at stop strings, never taken back once given out."""

from __future__ import annotations

from collections.abc import Sequence

from wsi_rt.runtime.llm.tokenizer import TokenDecoder, Tokenizer


class StopScanner:
    """Passes text on until a stop string appears, holding back what may be the beginning of one.

    The stop string that is complete first wins (of two that end together, the longer), so the result does not depend
    on how the text was cut into chunks. The held text is shorter than the longest stop string: the cost is linear.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.matched: str | None = None

    def push(self, chunk: str) -> str:
        """Text that can no longer belong to a stop string; nothing after a match."""
        if self.matched is not None or not chunk:
            return ""
        text = self._held + chunk
        found = [(text.find(stop) + len(stop), text.find(stop), stop) for stop in self._stops if stop in text]
        if found:
            _, start, self.matched = min(found)
            self._held = ""
            return text[:start]
        keep = max((self._overlap(text, stop) for stop in self._stops), default=0)
        cut = len(text) - keep
        self._held = text[cut:]
        return text[:cut]

    def flush(self) -> str:
        """What was held back, once no more text comes."""
        held, self._held = self._held, ""
        return held

    @staticmethod
    def _overlap(text: str, stop: str) -> int:
        """Length of the longest end of `text` that begins `stop` without completing it."""
        for size in range(min(len(text), len(stop) - 1), 0, -1):
            if stop.startswith(text[-size:]):
                return size
        return 0


class TextStream:
    """Token ids in, final text out, in pieces.

    `text` is what has been given out so far; the pieces returned by push() and finish() joined are the final text.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()) -> None:
        self._decoder = TokenDecoder(tokenizer)
        self._scanner = StopScanner(stops)
        self._pieces: list[str] = []

    @property
    def stopped(self) -> bool:
        """Whether a stop string was met; the text ends just before it."""
        return self._scanner.matched is not None

    @property
    def stop_string(self) -> str | None:
        return self._scanner.matched

    @property
    def text(self) -> str:
        return "".join(self._pieces)

    def push(self, token_id: int) -> str:
        """Text that `token_id` made certain; may be empty."""
        return self._emit(self._scanner.push(self._decoder.push(token_id)))

    def finish(self) -> str:
        """The rest: unfinished characters as U+FFFD and text held back for a stop string that did not come."""
        return self._emit(self._scanner.push(self._decoder.flush()) + self._scanner.flush())

    def _emit(self, piece: str) -> str:
        if piece:
            self._pieces.append(piece)
        return piece
