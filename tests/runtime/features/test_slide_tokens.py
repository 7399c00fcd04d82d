"""Slide tokens: shapes, widths, dtypes, finiteness, provenance."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from wsi_rt.runtime.errors import FeatureFileError
from wsi_rt.runtime.features import read_slide_tokens, write_slide_tokens, write_tensor
from wsi_rt.runtime.types import Provenance, SlideTokens


def _tokens(width: int = 768, dtype="float32") -> np.ndarray:
    return np.random.default_rng(3).standard_normal((576, width)).astype(dtype)


@pytest.mark.parametrize("width", [64, 768, 1024])
@pytest.mark.parametrize("leading", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_reads_published_shapes(tmp_path, width, leading, dtype):
    array = _tokens(width, dtype)
    write_tensor(tmp_path / "t.pt", array[None] if leading else array)
    tokens = read_slide_tokens(tmp_path / "t.pt", (64, 768, 1024))
    assert tokens.tokens.dtype == np.float32
    np.testing.assert_array_equal(tokens.tokens, array.astype(np.float32))
    assert tokens.distinct is None
    assert tokens.provenance.digest == hashlib.sha256((tmp_path / "t.pt").read_bytes()).hexdigest()
    assert tokens.provenance.maker == "external slide tokens"


def test_reads_bfloat16_of_torch(tmp_path):
    torch = pytest.importorskip("torch", reason="numpy has no bfloat16 to write")
    tensor = torch.from_numpy(_tokens()).bfloat16()[None]
    torch.save(tensor, tmp_path / "t.pt")
    np.testing.assert_array_equal(read_slide_tokens(tmp_path / "t.pt").tokens, tensor[0].float().numpy())


def test_round_trip(tmp_path):
    made = Provenance("slide encoder", "abc", {"precision": "fp32", "position_tile": 256})
    tokens = SlideTokens(_tokens(), made, distinct=123)
    write_slide_tokens(tmp_path / "a.pt", tokens)
    write_slide_tokens(tmp_path / "b.pt", tokens)
    assert (tmp_path / "a.pt").read_bytes() == (tmp_path / "b.pt").read_bytes()
    back = read_slide_tokens(tmp_path / "a.pt", {768})
    np.testing.assert_array_equal(back.tokens, tokens.tokens)
    assert back.distinct == 123
    assert back.provenance.maker == "slide encoder"
    assert back.provenance.settings == {"precision": "fp32", "position_tile": 256, "source_digest": "abc"}
    assert back.provenance.digest == hashlib.sha256((tmp_path / "a.pt").read_bytes()).hexdigest()


def test_torch_reads_what_we_write(tmp_path):
    torch = pytest.importorskip("torch", reason="reads with real torch")
    tokens = SlideTokens(_tokens(1024), Provenance("x"), distinct=5)
    write_slide_tokens(tmp_path / "t.pt", tokens)
    for mmap in (False, True):
        loaded = torch.load(tmp_path / "t.pt", weights_only=True, mmap=mmap)
        np.testing.assert_array_equal(loaded.numpy(), tokens.tokens)


@pytest.mark.parametrize(
    "shape", [(1536,), (575, 768), (2, 576, 768), (576, 512), (576,), (1, 1, 576, 768), (576, 0)], ids=str
)
def test_other_shapes_name_given_and_accepted(tmp_path, shape):
    write_tensor(tmp_path / "t.pt", np.zeros(shape, np.float32))
    with pytest.raises(FeatureFileError) as caught:
        read_slide_tokens(tmp_path / "t.pt", (1024, 768))
    assert str(list(shape)) in str(caught.value)
    assert "[576, 768] or [576, 1024]" in str(caught.value)


def test_any_width_without_widths(tmp_path):
    write_tensor(tmp_path / "t.pt", np.zeros((576, 5), np.float32))
    assert read_slide_tokens(tmp_path / "t.pt").tokens.shape == (576, 5)
    with pytest.raises(FeatureFileError, match=r"expected slide tokens \[576, 768\]"):
        read_slide_tokens(tmp_path / "t.pt", (768,))


def test_integers_and_values_that_are_not_finite(tmp_path):
    write_tensor(tmp_path / "i.pt", np.zeros((576, 8), np.int64))
    with pytest.raises(FeatureFileError, match="int64"):
        read_slide_tokens(tmp_path / "i.pt")
    array = _tokens(8)
    array[7, 2:4] = np.nan
    array[9, 0] = -np.inf
    write_tensor(tmp_path / "n.pt", array)
    with pytest.raises(FeatureFileError, match=r"3 values of 4608 that are not finite \(first in token 7\)"):
        read_slide_tokens(tmp_path / "n.pt")
    with pytest.raises(FeatureFileError, match="not finite"):
        write_slide_tokens(tmp_path / "w.pt", SlideTokens(array, Provenance("x")))
    write_tensor(tmp_path / "d.pt", np.full((576, 2), 1e300))
    with pytest.raises(FeatureFileError, match="1152 values"):
        read_slide_tokens(tmp_path / "d.pt")
    assert not (tmp_path / "w.pt").exists()


@pytest.mark.parametrize(
    "stamp", [b"", b"\xff", b"[" * 9999, b"[]", b'{"maker": 3}', b'{"maker": "x", "distinct": 9e9}']
)
def test_a_malformed_stamp_counts_as_none(tmp_path, stamp):
    write_tensor(tmp_path / "t.pt", _tokens(8), extra={"wsi_rt.json": stamp})
    tokens = read_slide_tokens(tmp_path / "t.pt")
    assert tokens.distinct is None
    assert tokens.provenance.settings == {}


def test_a_provenance_too_long_is_refused(tmp_path):
    with pytest.raises(FeatureFileError, match="provenance takes"):
        write_slide_tokens(tmp_path / "t.pt", SlideTokens(_tokens(8), Provenance("x", "", {"a": "b" * 70_000})))
    assert list(tmp_path.iterdir()) == []
