"""Values that are not finite: the stage computes them again in higher precision, names them, counts them."""

from __future__ import annotations

import json

import numpy as np
import pytest

from wsi_rt.runtime.bundle import Bundle
from wsi_rt.runtime.engines.ort import OrtEngine
from wsi_rt.runtime.errors import WsiRtError
from wsi_rt.runtime.pipeline import Pipeline
from wsi_rt.runtime.sentinel import Sentinel, wider_engine


@pytest.fixture(scope="module")
def narrow(tmp_path_factory):
    pytest.importorskip("torch", reason="the export extra is not installed")
    from wsi_rt.export.build import BuildRequest, build_engines, plan_build
    from wsi_rt.export.sources.checkpoint import Sources

    out, parts = tmp_path_factory.mktemp("narrow") / "engines", ("tile_encoder", "slide_encoder")
    precision = "tile_encoder=int8,slide_encoder=int8"
    build_engines(plan_build(BuildRequest(Sources(checkpoint="synthetic:nano"), out, "ort-cpu", precision, parts)))
    return out


@pytest.fixture
def poisoned(monkeypatch):
    """Engines of this precision give NaN in the rows told of their next run: {(component, precision): rows}."""
    rows: dict[tuple[str, str], list[int]] = {}
    honest = OrtEngine._run

    def run(self, inputs, outputs):
        found = honest(self, inputs, outputs)
        bad = rows.pop((self.manifest.name, self.precision), [])
        for name in {"features", "tokens"} & set(found):
            found[name][bad, 0] = np.nan
        return found

    monkeypatch.setattr(OrtEngine, "_run", run)
    return rows


def test_a_tile_is_computed_again_named_and_counted(narrow, slide, poisoned):
    with Pipeline.open(narrow) as pipeline:
        whole = pipeline.encode(slide, tokens=False)
        poisoned["tile_encoder", "int8"] = [0]  # of the first batch, which may be of one tile
        found = pipeline.encode(slide, tokens=False)
        with wider_engine(pipeline.bundle, "tile_encoder")() as wider:
            assert wider.precision == "fp32"
    at = found.grid.xy0[0].tolist()
    assert found.features.provenance.settings["retried_tiles"] == {"count": 1, "xy0": [at]}
    (note,) = [n for n in found.notes if "not finite" in n]
    assert note == f"1 row not finite in int8 and computed again with fp32 activations: {slide}: tile {at}"
    others = [i for i in range(len(whole.grid)) if i != 0]
    assert np.array_equal(found.features.x[others], whole.features.x[others])
    again, was = found.features.x[0].astype(np.float64), whole.features.x[0].astype(np.float64)
    assert again @ was / np.linalg.norm(again) / np.linalg.norm(was) > 0.99
    assert not np.array_equal(again, was), "the same arithmetic again would not help"
    json.dumps(dict(found.features.provenance.settings))


def test_a_tile_that_stays_so_ends_the_run(narrow, slide, poisoned):
    poisoned["tile_encoder", "int8"] = [0]
    poisoned["tile_encoder", "fp32"] = [0]  # the portable graph is given that tile alone
    with Pipeline.open(narrow) as pipeline, pytest.raises(WsiRtError) as e:
        pipeline.encode(slide, tokens=False)
    assert str(e.value).startswith(f"{slide}: tile [")
    assert "encodes to values that are not finite, in fp32 too (1 of " in str(e.value)


def test_fp32_has_nothing_higher(nano_bundle, slide, poisoned):
    assert wider_engine(Bundle.open(nano_bundle), "tile_encoder") is None
    poisoned["tile_encoder", "fp32"] = [0]
    with Pipeline.open(nano_bundle) as pipeline, pytest.raises(WsiRtError, match=r"tile \[.*not finite \(1 of "):
        pipeline.encode(slide, tokens=False)


def test_slide_tokens_too(narrow, slide, poisoned):
    with Pipeline.open(narrow) as pipeline:
        whole = pipeline.encode(slide)
        poisoned["slide_encoder", "int8"] = [0, 575]
        found = pipeline.encode(slide)
    assert any(
        n.startswith("2 rows not finite in int8") and n.endswith(f"{slide}: slide token 0, 575") for n in found.notes
    )
    assert np.isfinite(found.tokens.tokens).all()
    assert np.array_equal(found.tokens.tokens[1:575], whole.tokens.tokens[1:575])


def test_nothing_is_opened_for_finite_values():
    def never():
        raise AssertionError("opened")

    with Sentinel("slide: tile", None, never) as sentinel:
        sentinel.mend(np.ones((3, 2), np.float32), [0, 1, 2], lambda *_: None)
    assert sentinel.notes() == ()
