"""`wsi-rt plan` and the check before each run: what is predicted, what is refused, what is kept of a measurement."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest

from wsi_rt.runtime import plan as plan_module
from wsi_rt.runtime.bundle import Bundle
from wsi_rt.runtime.errors import InputError
from wsi_rt.runtime.pipeline import Pipeline
from wsi_rt.runtime.plan import attention_pairs, plan_encode, plan_run
from wsi_rt.runtime.plan_measure import (
    FILE_NAME,
    Measured,
    SlideCost,
    TileCost,
    fastest_threads,
    line_through,
    measure,
    stored,
    this_machine,
)

MB = 1_000_000
TILE = TileCost(2, 4, {1: 1.2, 2: 1.1, 4: 1.0, 8: 1.0}, 1000 * MB, {1: 10 * MB, 2: 20 * MB, 4: 40 * MB, 8: 80 * MB})


@pytest.fixture
def bundle(nano_bundle, tmp_path):
    """Not measured yet."""
    root = shutil.copytree(nano_bundle, tmp_path / "engines")
    (root / FILE_NAME).unlink(missing_ok=True)
    return Bundle.open(root, 2)


def slide_cost(config, per_tile=1e-3, per_pair=1e-9):
    sizes = (576, 1152, 2304)
    seconds = {n: per_tile * n + per_pair * attention_pairs(config, n) for n in sizes}
    return SlideCost(2, seconds, 100 * MB, {n: n * 20_000 for n in sizes})


def measured(bundle, tile=TILE):
    config = bundle.component("slide_encoder").config
    return Measured(this_machine(bundle.target), 60 * MB, tile, slide_cost(config))


def test_stages_add_up(bundle):
    found = plan_encode(bundle, measured(bundle), 10_000, held_bytes=50 * MB, available=50_000 * MB)
    tile, slide = found.stages
    features = 10_000 * (96 * 4 + 16)
    assert (found.batch, found.threads) == (4, 2)
    assert tile.seconds == pytest.approx(10_000)
    assert tile.peak_bytes == 50 * MB + features + 1040 * MB + 3 * 4 * 196_608
    config = bundle.component("slide_encoder").config
    assert slide.seconds == pytest.approx(10 + 1e-9 * attention_pairs(config, 10_000), rel=1e-6)
    assert slide.peak_bytes == 50 * MB + features + 1040 * MB + 100 * MB + 200 * MB
    assert found.peak_bytes == slide.peak_bytes
    assert found.seconds == tile.seconds + slide.seconds
    assert plan_encode(bundle, measured(bundle), 10, tokens=False, held_bytes=0, available=10**12).stages[1:] == ()


@pytest.mark.parametrize(("spare_mb", "batch"), [(60, 4), (25, 2), (15, 1)])
def test_a_batch_that_does_not_fit_is_made_smaller(bundle, spare_mb, batch):
    cost = measured(bundle)
    found = plan_encode(bundle, cost, 100, tokens=False, held_bytes=0, available=(1000 + spare_mb) * MB)
    assert found.batch == batch


@pytest.mark.parametrize(("available", "stage"), [(900 * MB, "tile_encoder"), (1100 * MB, "slide_encoder")])
def test_what_cannot_be_made_smaller_is_refused(bundle, available, stage):
    with pytest.raises(
        InputError, match=rf"{stage} of 10000 tiles needs 1\.\d\d GB beside .* are free: take fewer"
    ) as e:
        plan_encode(bundle, measured(bundle), 10_000, held_bytes=0, available=available)
    assert e.value.exit_code == 2


def test_pairs_are_those_of_the_masks():
    """Counted one by one, for every branch, segment, head and position that the branch keeps."""
    config = {"heads": 4, "segment_lengths": (8, 20), "dilated_ratios": (1, 2)}
    for tiles in (3, 7, 8, 19, 45):
        length, expected = tiles + 1, 0
        for segment, ratio in ((8, 1), (20, 2)):
            inside = min(segment, length)
            for _ in range(0, length, inside):
                expected += 4 * len(range(0, inside, ratio)) ** 2
        assert attention_pairs(config, tiles) == expected


def test_lines():
    points = {1: 10.0, 2: 20.0, 4: 30.0}
    assert [line_through(points, n) for n in (1, 2, 3, 4, 8)] == [10, 20, 25, 30, 50]
    assert line_through({576: 10.0, 2304: 40.0}, 0) == 0
    assert line_through({2: 10.0}, 4) == 20


def test_it_is_measured_once_on_each_machine(bundle):
    assert stored(bundle) is None
    first = measure(bundle)
    assert stored(bundle) == first
    assert first.tile_encoder.batch in first.tile_encoder.seconds
    assert min(first.tile_encoder.seconds.values()) > 0
    assert first.process_bytes > 20 * MB
    assert first.slide_encoder.run_bytes[2304] > first.slide_encoder.run_bytes[576] > 0
    path = bundle.root / FILE_NAME
    data = json.loads(path.read_text())
    for change in ({"machine": {**data["machine"], "cpu": "another"}}, {"engines": {}}, {"tile_encoder": 3}):
        path.write_text(json.dumps({**data, **change}))
        assert stored(bundle) is None, change
    path.write_text("{")
    assert stored(bundle) is None
    assert plan_run(bundle, 100, True).notes[0].startswith("memory is not planned")


def test_a_run_uses_the_threads_that_were_fastest(bundle):
    assert fastest_threads(bundle, "tile_encoder") == 2
    cost = measure(bundle)
    data = json.loads((bundle.root / FILE_NAME).read_text())
    data["tile_encoder"]["threads"] = 1
    (bundle.root / FILE_NAME).write_text(json.dumps(data))
    assert cost.tile_encoder is not None
    assert fastest_threads(bundle, "tile_encoder") == 1
    assert fastest_threads(bundle, "slide_encoder") == 2


def test_a_run_that_would_not_fit_is_refused_before_its_weights_are_loaded(bundle, slide, monkeypatch):
    opened = []
    monkeypatch.setattr(plan_module, "stored", measured)
    monkeypatch.setattr(plan_module, "available_bytes", lambda: 500 * MB)
    with Pipeline(bundle) as pipeline:
        monkeypatch.setattr(pipeline.bundle, "engine", opened.append)
        with pytest.raises(InputError, match=r"tile_encoder of \d+ tiles needs 1"):
            pipeline.encode(slide)
    assert opened == []


def test_a_run_in_short_memory_takes_smaller_batches_and_the_same_bits(bundle, slide, monkeypatch):
    with Pipeline(bundle) as pipeline:
        whole = pipeline.encode(slide)
        monkeypatch.setattr(plan_module, "stored", lambda b: replace(measured(b), slide_encoder=None))
        monkeypatch.setattr(plan_module, "available_bytes", lambda: 1012 * MB)
        small = pipeline.encode(slide)
    assert np.array_equal(whole.features.x, small.features.x)
    assert "tiles are encoded 1 at a time instead of 4: memory is short" in small.notes


def test_the_command(bundle, slide, wsi_rt):
    told = wsi_rt("plan", slide, "--engines", bundle.root)
    assert told.code == 0, told.err
    assert "tile_encoder" in told.out
    assert "slide_encoder" in told.out
    found = json.loads(wsi_rt("plan", slide, "--engines", bundle.root, "--json").out)
    encoded = wsi_rt("encode", slide, "--engines", bundle.root, "--out", bundle.root.parent / "x.pt", "--json")
    assert found["tiles"] == json.loads(encoded.out)["tiles"]["kept"]
    assert found["peak_bytes"] > 60 * MB
    assert found["seconds"] > 0
    assert wsi_rt("plan", bundle.root / "x.pt", "--engines", bundle.root).code == 2
