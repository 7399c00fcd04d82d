"""Opening the bundle's tokenizer folder: what is refused, and that torch and transformers stay out."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from wsi_rt.export.tokenizer import synthetic_tokenizer
from wsi_rt.runtime.errors import EngineMismatchError
from wsi_rt.runtime.llm.tokenizer import Tokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    synthetic_tokenizer(tmp_path / "tokenizer", 512)
    return tmp_path / "tokenizer"


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", [None, b"", b"{", b"[]", b"{}", b"\xff\xfe"])
def test_missing_or_malformed_file(folder: Path, name: str, content: bytes | None) -> None:
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_bytes(content)
    with pytest.raises(EngineMismatchError, match="wsi-rt build-engines") as caught:
        Tokenizer(folder)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("bos_id", None),
        ("bos_id", True),
        ("eos_ids", []),
        ("eos_ids", ["2"]),
        ("style", "wordpiece"),
        ("dummy_prefix", 1),
        ("vocab_size", 513),
    ],
)
def test_config_that_does_not_belong(folder: Path, key: str, value: object) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(EngineMismatchError, match=str(value) if key == "vocab_size" else key):
        Tokenizer(folder)


def test_decode_accepts_any_id(folder: Path) -> None:
    tokenizer = Tokenizer(folder)
    assert tokenizer.decode([-1, 0, 1, 2, 512, 10**9]) == ""
    assert tokenizer.is_special(512)
    assert not tokenizer.is_special(511)


def test_one_leading_space_is_the_dummy_prefix(folder: Path) -> None:
    tokenizer = Tokenizer(folder)
    for text in ("tumor", " tumor", "  tumor"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    space = next(i for i in range(3, 259) if tokenizer.token_bytes(i) == b" ")
    assert tokenizer.decode([space]) == " "  # a byte token is no dummy prefix


def test_the_loop_imports_neither_torch_nor_tokenizers() -> None:
    code = (
        "import sys, wsi_rt.runtime.llm.loop, wsi_rt.runtime.llm.prompt\n"
        "print([m for m in ('torch', 'transformers', 'sentencepiece', 'tokenizers') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
