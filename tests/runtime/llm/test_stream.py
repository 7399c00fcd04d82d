"""Streaming: the pieces joined are the final text, nothing is taken back, stop strings cut across tokens."""

from __future__ import annotations

import random

import pytest

from wsi_rt.export.tokenizer import synthetic_tokenizer
from wsi_rt.runtime.config import STOP_STRINGS
from wsi_rt.runtime.llm.stream import StopScanner, TextStream
from wsi_rt.runtime.llm.tokenizer import TokenDecoder, Tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("synthetic")
    synthetic_tokenizer(folder)
    return Tokenizer(folder)


def oracle(text: str, stops: tuple[str, ...]) -> tuple[str, bool]:
    """Character by character: cut where the first stop string is complete, at its (earliest) start."""
    for end in range(1, len(text) + 1):
        starts = [end - len(s) for s in stops if text[:end].endswith(s)]
        if starts:
            return text[: min(starts)], True
    return text, False


def bytes_tokens(tokenizer: Tokenizer, text: str) -> list[int]:
    """`text` as byte tokens, the worst cut there is."""
    table = {tokenizer.token_bytes(i): i for i in range(3, 259)}
    return [table[bytes([b])] for b in text.encode("utf-8")]


def run(tokenizer: Tokenizer, ids: list[int], stops: tuple[str, ...]) -> tuple[list[str], TextStream]:
    stream = TextStream(tokenizer, stops)
    pieces = [stream.push(i) for i in ids]
    pieces.append(stream.finish())
    return pieces, stream


def test_random_tokens_stream_to_the_decoded_text(tokenizer: Tokenizer) -> None:
    rng = random.Random(0)
    seen_stop = seen_malformed = 0
    stops = ("th", "e ca", "\ufffd\ufffd\ufffd\ufffd\ufffd", "is ", "is the", "aba")
    words = bytes_tokens(tokenizer, "細胞😀é\n")
    for case in range(3000):
        pick = [lambda: rng.randrange(tokenizer.vocab_size), lambda: rng.randrange(3, 259), lambda: rng.choice(words)]
        ids = [rng.choice(pick)() for _ in range(rng.randint(0, 25))]
        if case % 3 == 0:
            ids += bytes_tokens(tokenizer, "細胞😀 ababab is the case"[: rng.randint(0, 24)])
        chosen = tuple(rng.sample(stops, rng.randint(0, 3)))
        pieces, stream = run(tokenizer, ids, chosen)
        text, stopped = oracle(tokenizer.decode(ids), chosen)
        assert "".join(pieces) == text == stream.text
        assert stream.stopped == stopped
        seen_stop += stopped
        seen_malformed += "\ufffd" in text
    assert seen_stop > 100  # the cases reach what they are for
    assert seen_malformed > 100


def test_a_character_appears_when_it_is_complete(tokenizer: Tokenizer) -> None:
    pieces, _ = run(tokenizer, bytes_tokens(tokenizer, "a細😀"), ())
    assert pieces == ["a", "", "", "細", "", "", "", "😀", ""]


def test_an_unfinished_character_ends_as_one_mark_per_byte(tokenizer: Tokenizer) -> None:
    pieces, _ = run(tokenizer, bytes_tokens(tokenizer, "😀")[:3], ())
    assert pieces == ["", "", "", "\ufffd\ufffd\ufffd"]


@pytest.mark.parametrize("stop", STOP_STRINGS)
def test_stop_string_straddling_tokens(tokenizer: Tokenizer, stop: str) -> None:
    ids = bytes_tokens(tokenizer, f"Grade 2.{stop} more")
    pieces, stream = run(tokenizer, ids, STOP_STRINGS)
    assert "".join(pieces) == "Grade 2."
    assert stream.stop_string == stop
    assert pieces[len("Grade 2.") :] == [""] * (len(pieces) - len("Grade 2."))


def test_what_only_begins_like_a_stop_string_is_given_out(tokenizer: Tokenizer) -> None:
    pieces, stream = run(tokenizer, bytes_tokens(tokenizer, "a\nUSE it\nUSE"), STOP_STRINGS)
    assert pieces[1:5] == ["", "", "", ""]  # held back while it may become "\nUSER:"
    assert pieces[5] == "\nUSE "
    assert "".join(pieces) == "a\nUSE it\nUSE"
    assert not stream.stopped


def test_special_tokens_leave_no_text(tokenizer: Tokenizer) -> None:
    tumor = tokenizer.encode("tumor")
    pieces, _ = run(tokenizer, [1, 2, 0, *tumor, 2, tokenizer.vocab_size + 5], ())
    assert "".join(pieces) == "tumor"


def test_chunks_do_not_matter_to_the_scanner() -> None:
    rng = random.Random(1)
    for _ in range(2000):
        text = "".join(rng.choice("ab") for _ in range(12))
        stops = tuple({"".join(rng.choice("ab") for _ in range(rng.randint(1, 5))) for _ in range(2)})
        scanner, got, i = StopScanner(stops), "", 0
        while i < len(text):
            size = rng.randint(1, 4)
            got += scanner.push(text[i : i + size])
            i += size
        got += scanner.flush()
        assert (got, scanner.matched is not None) == oracle(text, stops), (text, stops)


def test_every_token_is_decoded_once(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    original = Tokenizer.token_bytes
    monkeypatch.setattr(Tokenizer, "token_bytes", lambda self, i: calls.append(i) or original(self, i))
    ids = tokenizer.encode("The tumor is poorly differentiated. " * 50)
    decoder = TokenDecoder(tokenizer)
    text = "".join(decoder.push(i) for i in ids) + decoder.flush()
    assert calls == ids
    assert text == "The tumor is poorly differentiated. " * 50
