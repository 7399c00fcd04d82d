"""`wsi-rt tile`: the files, what they say, and what stands in the way."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from PIL import Image

from wsi_rt.runtime.config import SlideSettings
from wsi_rt.runtime.features.coords import read_coords
from wsi_rt.runtime.slides import find_tissue, open_slide, plan_reads, select_tiles
from wsi_rt.runtime.slides.synth import write_synth_slide

Command = Callable[..., Any]
FILES = ["overlay.png", "tiles.h5", "tissue.geojson"]


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_the_three_files(wsi_rt: Command, slide: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "tiling"
    result = wsi_rt("tile", slide, "--out", out, "--json")
    assert result.code == 0
    assert names(out) == FILES
    with open_slide(slide) as reader:
        mask = find_tissue(reader)
        grid, size0, mpp0 = select_tiles(plan_reads(reader, SlideSettings()), mask), reader.size0, reader.mpp0
    with h5py.File(out / "tiles.h5") as root:
        coords = root["coords"]
        assert coords.dtype == np.int64
        np.testing.assert_array_equal(coords[...], grid.xy0)
        told = {k: v for k, v in coords.attrs.items() if k != "wsi_rt"}
    assert told == {
        "patch_size": 256,
        "overlap": 0,
        "target_magnification": 20,
        "patch_size_level0": 256,
        "level0_width": size0[0],
        "level0_height": size0[1],
        "level0_magnification": pytest.approx(10 / mpp0, abs=0.01),
        "name": slide.stem,
    }
    np.testing.assert_array_equal(read_coords(out / "tiles.h5").grid.xy0, grid.xy0)  # our own reader takes it
    with Image.open(out / "overlay.png") as picture:
        assert max(picture.size) > 1000
    said = json.loads(result.out)
    assert said["out"] == [str(out / n) for n in ("tiles.h5", "overlay.png", "tissue.geojson")]
    assert said["tiles"] == {"grid": grid.cells, "kept": len(grid)}
    assert said["tissue"]["rule"] == "otsu"
    assert said["tissue"]["threshold"] == mask.threshold
    assert said["notes"] == []
    assert said["slide"]["mpp0"] == mpp0


def test_its_tissue_as_region_gives_the_same_tiles(wsi_rt: Command, slide: Path, tmp_path: Path) -> None:
    assert wsi_rt("tile", slide, "--out", tmp_path / "a", "--tile-objects").code == 0
    again = wsi_rt("tile", slide, "--out", tmp_path / "b", "--roi", tmp_path / "a" / "tissue.geojson")
    assert again.code == 0
    assert "note: regions of interest: 1 (Tissue 1)" in again.err
    grids = [read_coords(tmp_path / n / "tiles.h5").grid for n in "ab"]
    np.testing.assert_array_equal(grids[0].xy0, grids[1].xy0)
    assert str(tmp_path) not in (tmp_path / "b" / "tiles.h5").read_bytes().decode("latin-1")  # names may be patients'


def test_same_slide_same_bytes(wsi_rt: Command, synth_slide: Path, tmp_path: Path) -> None:
    for n in "ab":
        assert wsi_rt("tile", synth_slide, "--out", tmp_path / n).code == 0
    for name in FILES:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_an_earlier_run_is_replaced_only_with_force(wsi_rt: Command, synth_slide: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()  # an empty folder is a place
    assert wsi_rt("tile", synth_slide, "--out", out).code == 0
    before = (out / "tiles.h5").read_bytes()
    refused = wsi_rt("tile", synth_slide, "--out", out, "--target-mpp", "1")
    assert (refused.code, "--force" in refused.err) == (2, True)
    assert (out / "tiles.h5").read_bytes() == before
    assert wsi_rt("tile", synth_slide, "--out", out, "--target-mpp", "1", "--force").code == 0
    assert (out / "tiles.h5").read_bytes() != before
    assert names(out) == FILES


@pytest.mark.parametrize("force", [(), ("--force",)])
def test_a_folder_of_other_things_is_left_alone(
    wsi_rt: Command, synth_slide: Path, tmp_path: Path, force: tuple[str, ...]
) -> None:
    (tmp_path / "mine.txt").write_text("x")
    refused = wsi_rt("tile", synth_slide, "--out", tmp_path, *force)
    assert refused.code == 2
    assert "also holds 'mine.txt'" in refused.err
    assert names(tmp_path) == ["mine.txt"]


def test_a_failure_leaves_nothing(wsi_rt: Command, tmp_path: Path) -> None:
    blank = write_synth_slide(tmp_path / "blank.svs", width=600, height=600, tissue=0)
    failed = wsi_rt("tile", blank, "--out", tmp_path / "deep" / "out")
    assert failed.code == 2
    assert "no tissue" in failed.err
    assert len(failed.err.splitlines()) == 1
    assert names(tmp_path) == ["blank.svs"]


def test_settings_without_effect_are_named(wsi_rt: Command, synth_slide: Path, tmp_path: Path) -> None:
    done = wsi_rt("tile", synth_slide, "--out", tmp_path / "o", "--keep-order", "--on-bad-tile", "skip")
    assert done.code == 0
    assert "note: --keep-order given, but the input is a slide: no effect" in done.err
    assert "note: --on-bad-tile given, but tiles are not read here: no effect" in done.err
