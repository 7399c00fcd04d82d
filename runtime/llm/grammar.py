"""Answers that are JSON of a given schema, by masking at every step what cannot continue it.

llguidance does the parsing: maintained, MIT, 3 MB and no dependencies, where xgrammar would bring torch and
transformers into the runtime. It works on the bytes our own tokenizer gives each token, so what it allows is what our
decoding writes. Needs the extra: pip install 'wsi-rt[json]'.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from wsi_rt.runtime.errors import InputError, MachineError, WsiRtError
from wsi_rt.runtime.llm.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher

_SENTINEL = "\x02"
# One space may come first: "ASSISTANT:" is followed by one, which sentencepiece's decoding then strips.
# Room for a new line and indentation, but no endless one: a greedy model may never leave free white space.
_STYLE = {"whitespace_pattern": "[ \\n]{0,9}"}
_LARK = 'start: (" ")? answer\nanswer: %json '


class Grammar:
    """One schema, ready for any number of requests."""

    def __init__(self, tokenizer: Tokenizer, schema: str) -> None:
        """schema: JSON Schema as text. Raises InputError (no JSON, or what llguidance does not support), MachineError
        (the extra is missing)."""
        try:
            from llguidance import LLMatcher, LLTokenizer
        except ImportError as error:
            raise MachineError("--json-schema needs llguidance; install it: pip install 'wsi-rt[json]'") from error
        try:
            parsed = json.loads(schema)
        except (ValueError, RecursionError) as error:
            raise InputError(f"--json-schema is no JSON ({error}), expected a JSON Schema") from error
        if not isinstance(parsed, dict):
            raise InputError(f"--json-schema is {type(parsed).__name__} in JSON, expected a JSON Schema (an object)")
        lark = _LARK + json.dumps({"x-guidance": _STYLE, **parsed})
        vocabulary = LLTokenizer(cast(Any, _Vocabulary(tokenizer)), eos_token=list(tokenizer.eos_ids))
        problem = LLMatcher.validate_grammar(lark, vocabulary)
        if problem and not problem.startswith("WARNING"):
            raise InputError(f"--json-schema cannot be followed: {problem.splitlines()[0]}")
        self._make: Callable[[], LLMatcher] = lambda: LLMatcher(vocabulary, lark, log_level=0)
        self._eos = tokenizer.eos_ids

    def start(self) -> JsonConstraint:
        """For one answer."""
        return JsonConstraint(self._make(), self._eos)


class JsonConstraint:
    """Where one answer stands in its schema (sampling.Constraint)."""

    def __init__(self, matcher: LLMatcher, eos: tuple[int, ...]) -> None:
        self._matcher, self._eos = matcher, eos

    @property
    def complete(self) -> bool:
        return self._matcher.is_accepting() or self._matcher.is_stopped()

    def allowed(self, vocab_size: int) -> NDArray[np.bool_]:
        """[vocab]; ids beyond the tokenizer's are never allowed. WsiRtError: the schema is too complex."""
        if self._matcher.is_stopped() and not self._matcher.is_error():
            found = np.zeros(vocab_size, bool)
            found[list(self._eos)] = True
            return found
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._require_working()
        found = np.unpackbits(bits, bitorder="little")[:vocab_size].astype(bool)
        return np.pad(found, (0, vocab_size - len(found)))

    def accept(self, token: int) -> None:
        if self._matcher.is_stopped() and token in self._eos:
            return
        self._matcher.consume_token(token)
        self._require_working()

    def _require_working(self) -> None:
        if self._matcher.is_error():
            raise WsiRtError(f"--json-schema cannot be followed further: {self._matcher.get_error().splitlines()[0]}")


class _Vocabulary:
    """Our tokenizer as llguidance wants to see one."""

    is_tokenizer_wrapper = True

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id, self.bos_token_id = tokenizer.eos_ids[0], tokenizer.bos_id
        self.special_token_ids = [i for i in range(tokenizer.vocab_size) if tokenizer.is_special(i)]
        special = set(self.special_token_ids)
        # Special tokens have no bytes in text; here each needs a name that no text can be mistaken for.
        self.tokens = [
            b"<|special_%d|>" % i if i in special else tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)
        ]

    def __call__(self, text: bytes | str) -> list[int]:
        """In the middle of a text, so without dummy prefix: encoded behind a character that merges with nothing."""
        text = text.decode("utf-8", "replace") if isinstance(text, bytes) else text
        ids, lead = self._tokenizer.encode(_SENTINEL + text), b""
        for count, token in enumerate(ids, start=1):
            lead += self.tokens[token]
            if lead.endswith(_SENTINEL.encode()):
                return ids[count:]
        raise ValueError("this tokenizer merges U+0002 with what follows it")
