"""Tiles that other tools chose: their files, and the slides they are read from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from wsi_rt.runtime import SlideSettings
from wsi_rt.runtime.errors import FeatureFileError
from wsi_rt.runtime.features import write_tile_grid
from wsi_rt.runtime.features.coords import plan_coords, read_coords
from wsi_rt.runtime.slides import open_slide, read_tile
from wsi_rt.runtime.types import Provenance, TileGrid

COLUMNS = np.array([(x, y) for x in (0, 256, 512) for y in (0, 256)], np.int64)  # column-major, as CLAM writes
ROWS = np.array([(x, y) for y in (0, 256) for x in (0, 256, 512)], np.int64)
CLAM = {"patch_size": 256, "patch_level": 0, "downsample": (1.0, 1.0), "name": "slide"}


def write(path: Path, coords: Any = COLUMNS, attrs: dict[str, Any] | None = None, on_file: bool = False) -> Path:
    with h5py.File(path, "w") as root:
        root["coords"] = coords
        (root if on_file else root["coords"]).attrs.update(CLAM if attrs is None else attrs)
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "coords.h5"


# --- files
@pytest.mark.parametrize(
    ("attrs", "size0"),
    [
        (CLAM, 256),
        ({"patch_size": 256, "patch_level": 1, "downsample": (4.0, 4.0)}, 1024),
        ({"patch_size": 256, "patch_level": 1, "downsample": (4.00011, 4.0003)}, 1024),
        ({"patch_size": 512, "patch_level": 1, "downsample": np.float64(2.0)}, 1024),
        ({"patch_size": 256, "patch_size_level0": 506, "target_magnification": 20, "overlap": 0}, 506),
    ],
    ids=["clam-level-0", "clam-level-1", "clam-uneven", "clam-number", "trident"],
)
def test_the_tile_size_of_each_tool(path: Path, attrs: dict[str, Any], size0: int):
    coords = read_coords(write(path, attrs=attrs))
    assert coords.grid.patch_size_level0 == size0
    np.testing.assert_array_equal(coords.grid.xy0, ROWS)
    assert coords.grid.order == "row-major"
    assert coords.notes == ("coordinates sorted to row-major (y, x): 4 of 6 tiles changed place",)


def test_atlaspatch(path: Path):
    five = np.concatenate([COLUMNS, np.tile([256, 256, 0], (6, 1))], axis=1)
    attrs = {"patch_size_level0": 256, "level0_width": 2000, "level0_height": 1000}
    coords = read_coords(write(path, five, attrs, on_file=True))
    np.testing.assert_array_equal(coords.grid.xy0, ROWS)
    assert coords.size0 == (2000, 1000)
    assert coords.grid.provenance.maker == "external atlaspatch coordinates"


def test_our_own_grid_file(path: Path):
    grid = TileGrid(ROWS, 256, cells=40, provenance=Provenance("wsi_rt otsu tissue", "f1", {"mpp0": 0.5}))
    write_tile_grid(path, grid, name="slide", size0=(1000, 700), target_magnification=20)
    first = path.read_bytes()
    coords = read_coords(path)
    np.testing.assert_array_equal(coords.grid.xy0, ROWS)
    assert (coords.grid.patch_size_level0, coords.size0, coords.notes) == (256, (1000, 700), ())
    write_tile_grid(path, grid, name="slide", size0=(1000, 700), target_magnification=20)
    assert path.read_bytes() == first
    with h5py.File(path) as root:
        assert "features" not in root
        assert root["coords"].attrs["target_magnification"] == 20


def test_the_order_of_the_file_stays_when_asked(path: Path):
    coords = read_coords(write(path), sort=False)
    np.testing.assert_array_equal(coords.grid.xy0, COLUMNS)
    assert coords.grid.order == "file"
    assert "kept in the file's order" in coords.notes[0]


def test_tiles_in_one_place_are_counted(path: Path):
    coords = read_coords(write(path, np.concatenate([ROWS, ROWS[:2]])))
    assert len(coords.grid) == 8
    assert "2 of 8 tiles lie where another one does" in coords.notes


@pytest.mark.parametrize(
    ("attrs", "words"),
    [
        ({}, "--patch-size-level0"),
        ({"patch_size": 256, "patch_level": 1}, "--patch-size-level0"),
        ({"patch_size": 256, "patch_level": 1, "downsample": (4.0, 2.0)}, "--patch-size-level0"),
        ({"patch_size": 256, "patch_level": 1, "downsample": (np.nan, 2.0)}, "--patch-size-level0"),
        ({"patch_size": "many", "patch_level": 1, "downsample": 2.0}, "--patch-size-level0"),
    ],
    ids=["nothing", "no-downsample", "uneven", "nan", "text"],
)
def test_a_tile_size_is_never_guessed(path: Path, attrs: dict[str, Any], words: str):
    write(path, attrs=attrs)
    with pytest.raises(FeatureFileError, match=words):
        read_coords(path)
    assert read_coords(path, patch_size_level0=300).grid.patch_size_level0 == 300


@pytest.mark.parametrize(
    "coords",
    [np.empty((0, 2), np.int64), COLUMNS[:, 0], np.tile(COLUMNS, (1, 2)), COLUMNS - 300, COLUMNS + 0.5],
    ids=["none", "one-column", "four-columns", "negative", "fractions"],
)
def test_unusable_coordinates_are_refused(path: Path, coords: np.ndarray):
    with pytest.raises(FeatureFileError):
        read_coords(write(path, coords))


def test_a_file_without_coordinates_says_what_makes_them(path: Path):
    with h5py.File(path, "w") as root:
        root["other"] = [1]
    with pytest.raises(FeatureFileError, match=r"holds no 'coords'.*`wsi-rt tile SLIDE --out DIR`"):
        read_coords(path)


# --- with a slide (the fixture: about 0.5 um/px)
def test_tiles_of_the_slides_own_size_are_read_as_they_are(slide: Path, path: Path):
    with open_slide(slide) as reader:
        plan, grid = plan_coords(reader, read_coords(write(path)), SlideSettings())
        assert (plan.level, plan.resample, plan.patch_size_level0, plan.read_px) == (0, False, 256, 256)
        assert len(grid) == 6
        pixels = read_tile(reader, plan, (256, 256))
        np.testing.assert_array_equal(pixels, reader.read_region((256, 256), 0, (256, 256)))
        assert grid.provenance.settings["mpp0"] == reader.mpp0


def test_tiles_of_nearly_that_size_are_resampled(slide: Path, path: Path):
    attrs = {"patch_size": 256, "patch_size_level0": 250}
    with open_slide(slide) as reader:
        plan, grid = plan_coords(reader, read_coords(write(path, attrs=attrs)), SlideSettings())
        assert (plan.level, plan.resample, plan.patch_size_level0) == (0, True, 250)
        assert grid.patch_size_level0 == 250
        assert read_tile(reader, plan, (0, 0)).shape == (256, 256, 3)


def test_another_mpp_is_refused_and_can_be_meant(slide: Path, path: Path):
    attrs = {"patch_size": 256, "patch_level": 1, "downsample": (2.0, 2.0)}
    write(path, attrs=attrs)
    with open_slide(slide) as reader:
        with pytest.raises(FeatureFileError, match=r"another mpp; .* --target-mpp (0\.99|1)"):
            plan_coords(reader, read_coords(path), SlideSettings())
        plan, _ = plan_coords(reader, read_coords(path), SlideSettings(target_mpp=1.0))
        assert plan.patch_size_level0 == 512


@pytest.mark.parametrize(
    ("coords", "attrs", "words"),
    [
        (COLUMNS, {**CLAM, "level0_width": 1234, "level0_height": 777}, "1234 x 777 px.*another slide"),
        (COLUMNS + 10**6, CLAM, "6 of 6 tiles lie outside the slide"),
    ],
    ids=["size", "outside"],
)
def test_coordinates_of_another_slide_are_refused(
    slide: Path, path: Path, coords: np.ndarray, attrs: dict[str, Any], words: str
):
    with open_slide(slide) as reader, pytest.raises(FeatureFileError, match=words):
        plan_coords(reader, read_coords(write(path, coords, attrs)), SlideSettings())


# --- the command
def test_encode_at_coordinates(nano_bundle: Path, slide: Path, path: Path, wsi_rt: Callable[..., Any], tmp_path: Path):
    """The tiles that our own detection keeps, as CLAM would write them: the same features."""
    own, theirs = tmp_path / "own.h5", tmp_path / "theirs.h5"
    assert wsi_rt("encode", slide, "--engines", nano_bundle, "--out", own).code == 0
    with h5py.File(own) as root:
        xy0 = root["coords"][:]
    write(path, xy0[np.lexsort((xy0[:, 1], xy0[:, 0]))])
    done = wsi_rt("encode", slide, "--engines", nano_bundle, "--coords", path, "--out", theirs)
    assert done.code == 0, done.err
    assert "coordinates sorted to row-major" in done.err
    assert "--keep-order" not in done.err
    with h5py.File(own) as a, h5py.File(theirs) as b:
        np.testing.assert_array_equal(a["coords"][:], b["coords"][:])
        np.testing.assert_array_equal(a["features"][:], b["features"][:])
    assert wsi_rt("diff-features", own, theirs).code == 0


def test_coordinates_of_no_slide_are_refused(nano_bundle: Path, path: Path, wsi_rt: Callable[..., Any], tmp_path: Path):
    done = wsi_rt("encode", write(path), "--engines", nano_bundle, "--coords", path, "--out", tmp_path / "a.pt")
    assert done.code == 2
    assert "--coords given, but" in done.err
