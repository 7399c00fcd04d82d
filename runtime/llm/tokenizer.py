"""Text to token ids and back, from the bundle's `tokenizer/` folder (written by export/tokenizer/).

Decoding works on bytes rather than on strings: every token is a fixed byte string, so text can be produced token by
token without decoding anything twice, and what was produced is never taken back. For a sentencepiece-style tokenizer
the result equals sentencepiece's own decoding, malformed byte sequences included (one U+FFFD per byte).
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

from wsi_rt.runtime.errors import EngineMismatchError

TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
STYLES = ("sentencepiece", "bytelevel")
_REBUILD = "rebuild the bundle with `wsi-rt build-engines`"
_SPACE = "\u2581"  # sentencepiece's visible space
_ERRORS = "wsi_rt_replace_each_byte"


def _replace_each_byte(exc: UnicodeError) -> tuple[str, int]:
    """One U+FFFD per undecodable byte, as sentencepiece does (Python's own handler gives one per sequence)."""
    if not isinstance(exc, UnicodeDecodeError):
        raise exc
    return "\ufffd" * (exc.end - exc.start), exc.end


codecs.register_error(_ERRORS, _replace_each_byte)


def _read_config(path: Path) -> dict[str, Any]:
    """tokenizer_config.json, its keys and types checked. EngineMismatchError otherwise."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise EngineMismatchError(f"{path} is missing, expected the bundle's tokenizer; {_REBUILD}") from None
    except (OSError, ValueError) as exc:
        raise EngineMismatchError(f"{path} cannot be read ({exc}), expected JSON; {_REBUILD}") from exc

    def is_int(value: object) -> bool:
        return isinstance(value, int) and not isinstance(value, bool)

    def is_ids(value: object) -> bool:
        return isinstance(value, list) and all(map(is_int, value))

    checks = {
        "style": lambda v: v in STYLES,
        "bos_id": is_int,
        "eos_ids": lambda v: is_ids(v) and len(v) > 0,
        "special_ids": is_ids,
        "vocab_size": is_int,
        "dummy_prefix": lambda v: isinstance(v, bool),
    }
    for key, ok in checks.items():
        if not isinstance(config, dict) or key not in config or not ok(config[key]):
            raise EngineMismatchError(f"{path} has no valid {key!r}, expected what export wrote; {_REBUILD}")
    return config


@lru_cache(maxsize=1)
def _bytelevel_alphabet() -> dict[str, int]:
    """GPT-2's character -> byte table: printable bytes stand for themselves, the others from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in set(printable)]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


class Tokenizer:
    """A bundle's tokenizer. Threads may share it.

    Special tokens are never made from text: a question holding `</s>` is encoded as the characters `</s>`, as
    sentencepiece does. Decoding drops special tokens.
    """

    def __init__(self, folder: Path) -> None:
        """Open `folder`/tokenizer.json and tokenizer_config.json.

        EngineMismatchError: a file that is missing, malformed, or does not belong to the other.
        """
        self.folder = Path(folder)
        config = _read_config(self.folder / CONFIG_FILE)
        path = self.folder / TOKENIZER_FILE
        if not path.is_file():
            raise EngineMismatchError(f"{path} is missing, expected the bundle's tokenizer; {_REBUILD}")
        from tokenizers import Tokenizer as HFTokenizer  # lazy: 40 ms that `--help` need not pay

        try:
            self._hf = HFTokenizer.from_file(str(path))
        except Exception as exc:  # tokenizers raises a bare Exception
            raise EngineMismatchError(f"{path} cannot be read ({exc}), expected a tokenizer.json; {_REBUILD}") from exc
        self._hf.encode_special_tokens = True  # `</s>` in a question is text
        self._hf.no_padding()
        self._hf.no_truncation()
        self.vocab_size: int = self._hf.get_vocab_size(with_added_tokens=True)
        if self.vocab_size != config["vocab_size"]:
            raise EngineMismatchError(
                f"{path} has {self.vocab_size} tokens, {CONFIG_FILE} says {config['vocab_size']}; {_REBUILD}"
            )
        self.bos_id: int = config["bos_id"]
        self.eos_ids: tuple[int, ...] = tuple(config["eos_ids"])
        self.style: str = config["style"]
        self.dummy_prefix: bool = config["dummy_prefix"]
        self._special = frozenset(config["special_ids"]) | {self.bos_id, *self.eos_ids}
        self._added = {i: t.content for i, t in self._hf.get_added_tokens_decoder().items()}
        self._bytes: dict[int, bytes] = {}

    def encode(self, text: str) -> list[int]:
        """Token ids of `text` without BOS or EOS; a sentencepiece-style tokenizer adds its dummy prefix."""
        ids: list[int] = self._hf.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`, special tokens dropped, one leading dummy-prefix space stripped."""
        stream = TokenDecoder(self)
        return "".join([stream.push(i) for i in ids]) + stream.flush()

    def is_special(self, token_id: int) -> bool:
        """Whether decoding drops this id: special tokens, and ids that the tokenizer does not have."""
        return token_id in self._special or not 0 <= token_id < self.vocab_size

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes one token stands for; empty for an id that decoding drops."""
        if token_id not in self._bytes:
            self._bytes[token_id] = b"" if self.is_special(token_id) else self._make_bytes(token_id)
        return self._bytes[token_id]

    def starts_with_prefix(self, token_id: int) -> bool:
        """Whether the token begins with the space that the dummy prefix would have put there.

        The byte token <0x20> does not count (sentencepiece keeps it).
        """
        piece = self._hf.id_to_token(token_id) if self.dummy_prefix else None
        return piece is not None and piece.startswith(_SPACE)

    def _make_bytes(self, token_id: int) -> bytes:
        if token_id in self._added:
            return self._added[token_id].encode("utf-8")
        piece: str = self._hf.id_to_token(token_id) or ""
        if self.style == "bytelevel":
            table = _bytelevel_alphabet()
            return b"".join(bytes([table[c]]) if c in table else c.encode("utf-8") for c in piece)
        if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            return bytes([int(piece[3:5], 16)])
        return piece.replace(_SPACE, " ").encode("utf-8")


class TokenDecoder:
    """Token ids to text, one at a time: bytes of an unfinished character wait for the next token.

    The pieces of text joined are Tokenizer.decode() of the ids. Constant work per token.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(_ERRORS)
        self._at_start = True

    def push(self, token_id: int) -> str:
        """The text that `token_id` completes; may be empty."""
        data = self._tokenizer.token_bytes(token_id)
        if not data:
            return ""
        if self._at_start:
            self._at_start = False
            if self._tokenizer.starts_with_prefix(token_id):
                data = data[1:]
        return self._utf8.decode(data)

    def flush(self) -> str:
        """The end of the text: an unfinished character becomes U+FFFD, one per byte."""
        return self._utf8.decode(b"", final=True)
