"""Synthetic weights: published generator, written formula, pinned bytes."""

from __future__ import annotations

import hashlib
import math
from dataclasses import replace

import numpy as np
import pytest

from wsi_rt.export.sources import synthetic
from wsi_rt.export.sources.presets import PRESETS
from wsi_rt.export.sources.synthetic import SyntheticSource, content_digest, philox4x32, rule_for, uniform
from wsi_rt.runtime.errors import CheckpointError

# SHA-256 over every tensor of `synthetic:<preset>?seed=0` (content_digest, components in their order). A change
# here changes every synthetic checkpoint: bump the "wsi-rt synthetic 1" of SyntheticSource.digest with it.
DIGESTS = {
    "nano": "65d76e97d8b7ac1119e787a96bd8a9dcbee650742878f4598db8a3a07139d8f4",
    "wsi-llava-1b": "8d7d4faf50f7f7e8b513c436633d9729ad9096b767ce6900142822f6f36ba09e",
    "wsi-llava-7b": "6d1c3e010580aefdd2fa49938091881bcf85e1a27734fcddf3b6b7af38807265",
}


def philox_reference(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x32-10 as the paper writes it (Salmon et al., SC'11), one block in plain integers."""
    c, k = list(counter), list(key)
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [b >> 32 ^ c[1] ^ k[0], b & 0xFFFFFFFF, a >> 32 ^ c[3] ^ k[1], a & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    ],
)
def test_known_answers_of_the_reference(counter, key, expected):
    """Random123's published vectors hold for the plain form that the vectorised one is held against."""
    assert philox_reference(counter, key) == expected


def test_vectorised_known_answer():
    assert philox4x32(0, 1, (0, 0)).tolist() == [[0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]]


@pytest.mark.parametrize("start", [0, 1, 12345, 2**32 - 2, 2**40 + 7])
@pytest.mark.parametrize("key", [(0, 0), (0xFFFFFFFF, 0xFFFFFFFF), (0xDEADBEEF, 0x12345678)], ids=str)
def test_vectorised_equals_reference(start, key):
    blocks = philox4x32(start, 4, key)
    assert blocks.dtype == np.uint32
    for i, block in enumerate(blocks.tolist()):
        counter = [(start + i) & 0xFFFFFFFF, (start + i) >> 32, 0, 0]
        assert block == philox_reference(counter, list(key))


def test_value_formula():
    """Key from SHA-256("<seed>:<name>"), u = ((bits >> 8) + 0.5) * 2^-24, value = lo + (hi - lo) * u, in fp32."""
    digest = hashlib.sha256(b"42:some.tensor").digest()
    key = [int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little")]
    bits = [b for i in range(3) for b in philox_reference([i, 0, 0, 0], key)][:10]
    u = (np.array([b >> 8 for b in bits], np.float32) + np.float32(0.5)) * np.float32(2**-24)
    expected = np.float32(-0.25) + np.float32(0.75) * u
    actual = uniform(42, "some.tensor", 10, -0.25, 0.5)
    assert actual.dtype == np.float32
    assert np.array_equal(actual, expected)


def test_values_fill_the_range():
    x = uniform(0, "x", 200_000, -2, 3)
    assert -2 <= x.min() < -1.999
    assert 2.999 < x.max() <= 3
    assert abs(x.mean() - 0.5) < 0.02
    assert abs(x.std() - 5 / math.sqrt(12)) < 0.02


@pytest.mark.parametrize("chunk", [1, 7, 1024, 1 << 20])
def test_chunks_and_threads_do_not_matter(monkeypatch, chunk):
    expected = uniform(3, "x", 9_001, 0, 1)
    monkeypatch.setattr(synthetic, "_CHUNK_BLOCKS", chunk)
    assert np.array_equal(uniform(3, "x", 9_001, 0, 1), expected)
    assert np.array_equal(uniform(3, "x", 1_003, 0, 1), expected[:1_003]), "a longer tensor only goes on"


def test_seeds_and_names_differ():
    draws = [uniform(s, n, 64, 0, 1).tobytes() for s in (0, 1, 10) for n in ("a", "b")]
    assert len(set(draws)) == 6


@pytest.mark.parametrize(
    "preset", ["nano", *(pytest.param(p, marks=pytest.mark.slow) for p in sorted(PRESETS) if p != "nano")]
)
def test_preset_bytes_are_pinned(preset):
    """A preset is pinned here when it is made: all of the small one, one layer of each kind of the published size."""
    assert set(DIGESTS) == set(PRESETS)
    components = PRESETS[preset].components().values()
    depth = None if preset == "nano" else 1
    assert content_digest([SyntheticSource(c, preset, 0) for c in components], depth) == DIGESTS[preset]
    smallest = PRESETS[preset].projector
    digests = {content_digest([SyntheticSource(smallest, preset, seed)]) for seed in (0, 1, 2)}
    assert len(digests) == 3


def test_recipe_digest_follows_seed_and_config():
    c = PRESETS["nano"].projector
    a = SyntheticSource(c, "nano", 0).digest()
    assert a == SyntheticSource(c, "nano", 0).digest()
    assert (
        len({a, SyntheticSource(c, "nano", 1).digest(), SyntheticSource(replace(c, widths=(8, 8)), "x", 0).digest()})
        == 3
    )


def test_no_tensor_of_that_name():
    with pytest.raises(CheckpointError, match=r"synthetic:nano\?seed=0: no tensor named nope"):
        SyntheticSource(PRESETS["nano"].projector, "nano", 0).get("nope")


def test_weights_make_gates_bite():
    """LayerScale far from its published 1e-5, norms away from 1, outlier channels where the residual is written."""
    c = PRESETS["nano"].tile_encoder
    source = SyntheticSource(c, "nano", 0)
    gamma = source.get("blocks.0.ls1.gamma")
    assert gamma.min() >= 0.1
    assert gamma.max() <= 1.0
    assert gamma.std() > 0.2
    norm = source.get("blocks.0.norm1.weight")
    assert norm.min() >= 0.7
    assert norm.max() <= 1.3
    proj = np.abs(source.get("blocks.0.attn.proj.weight")).max(axis=1)
    outlier = np.zeros(c.width, bool)
    outlier[synthetic.OUTLIER_AT :: synthetic.OUTLIER_EVERY] = True
    assert outlier.sum() == 2
    assert proj[outlier].min() > 4 * proj[~outlier].max()


def test_rules_cover_every_tensor_of_the_presets():
    """No weight is left at zero width, and deeper models write smaller residuals."""
    for preset in PRESETS.values():
        for c in preset.components().values():
            for name, shape in c.tensors().items():
                rule = rule_for(name, shape, 4)
                assert rule.lo < rule.hi, name
                if rule.outliers:
                    assert rule_for(name, shape, 40).hi < rule.hi
