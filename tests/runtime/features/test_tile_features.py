"""Tile features in HDF5: layouts, order, geometry, damage."""

from __future__ import annotations

import hashlib
from pathlib import Path

import h5py
import numpy as np
import pytest

from wsi_rt.runtime.errors import FeatureFileError
from wsi_rt.runtime.features import read_tile_features, read_tile_file, write_tile_features
from wsi_rt.runtime.features.stamp import maker_digest
from wsi_rt.runtime.types import Provenance, TileFeatures, TileGrid

SHARED = Path(__file__).resolve().parents[3].parent / "shared"
GRID = np.array([(x, y) for y in (0, 256, 512) for x in (0, 256, 768)], np.int64)


def _features(count: int = 9, width: int = 6, dtype="float32") -> np.ndarray:
    return np.random.default_rng(5).standard_normal((count, width)).astype(dtype)


def _file(path, x=None, coords=None, where="coords", attrs=None, name="features"):
    attrs = {"patch_size_level0": 256, "patch_size": 256} if attrs is None else attrs
    with h5py.File(path, "w") as root:
        if x is not False:
            root[name] = _features() if x is None else x
        if coords is not False:
            root["coords"] = GRID if coords is None else coords
        target = root if where == "file" else root[where]
        for key, value in attrs.items():
            target.attrs[key] = value
    return path


def _refused(path, words: str, **kwargs) -> None:
    with pytest.raises(FeatureFileError, match=words) as caught:
        read_tile_features(path, **kwargs)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", ">f4"])
@pytest.mark.parametrize("leading", [False, True])
@pytest.mark.parametrize("where", ["coords", "file", "features"])
def test_trident(tmp_path, dtype, leading, where):
    x = _features(dtype=dtype)
    path = _file(tmp_path / "a.h5", x[None] if leading else x, where=where)
    tiles = read_tile_features(path)
    assert tiles.x.dtype == np.float32
    np.testing.assert_array_equal(tiles.x, x.astype(np.float32))
    assert tiles.grid.xy0.dtype == np.int64
    np.testing.assert_array_equal(tiles.grid.xy0, GRID)
    assert (tiles.grid.patch_size_level0, tiles.grid.order, tiles.notes) == (256, "row-major", ())
    assert tiles.provenance.maker == "external trident"
    assert tiles.provenance.digest == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("dtype", ["int32", "uint32", "uint64", "float64"])
def test_coordinate_dtypes(tmp_path, dtype):
    tiles = read_tile_features(_file(tmp_path / "a.h5", coords=GRID.astype(dtype)))
    np.testing.assert_array_equal(tiles.grid.xy0, GRID)


def test_sorts_by_exact_y_then_x_and_says_so(tmp_path):
    x, shuffle = _features(), np.random.default_rng(1).permutation(9)
    path = _file(tmp_path / "a.h5", x[shuffle], GRID[shuffle])
    tiles = read_tile_features(path)
    np.testing.assert_array_equal(tiles.grid.xy0, GRID)
    np.testing.assert_array_equal(tiles.x, x)
    assert len(tiles.notes) == 1
    assert "sorted to row-major (y, x)" in tiles.notes[0]
    kept = read_tile_features(path, sort=False)
    np.testing.assert_array_equal(kept.grid.xy0, GRID[shuffle])
    np.testing.assert_array_equal(kept.x, x[shuffle])
    assert kept.grid.order == "file"
    assert "order kept" in kept.notes[0]


def test_exact_coordinates_decide_not_cells(tmp_path):
    coords = np.array([[0, 10], [300, 5], [600, 10]])  # one row of cells, slightly off the grid
    tiles = read_tile_features(_file(tmp_path / "a.h5", _features(3), coords))
    assert tiles.grid.xy0.tolist() == [[300, 5], [0, 10], [600, 10]]


def test_two_tiles_in_one_place_are_allowed(tmp_path):
    coords = np.array([[0, 0], [10, 0], [10, 0], [300, 0]])
    tiles = read_tile_features(_file(tmp_path / "a.h5", _features(4), coords))
    assert tiles.grid.xy0.tolist() == coords.tolist()
    assert tiles.notes == ()  # the divisor of positions is not known here: encode_tokens counts


def test_patch_size_level0(tmp_path):
    path = _file(tmp_path / "a.h5", attrs={"patch_size": 512, "downsample": np.array([4.0, 4.0])})
    _refused(path, r"no attribute patch_size_level0.*--patch-size-level0 PX.*512 x downsample 4 suggests 2048")
    assert read_tile_features(path, patch_size_level0=2048).grid.patch_size_level0 == 2048
    for bad in (0, -1, True, 2.5):
        _refused(path, "--patch-size-level0", patch_size_level0=bad)
    for bad in (0, -3, 1.5, "256", np.nan, np.array([1, 2])):
        _refused(_file(tmp_path / "b.h5", attrs={"patch_size_level0": bad}), "expected a positive integer")
    told = read_tile_features(_file(tmp_path / "c.h5"), patch_size_level0=512)
    assert told.notes == ("patch_size_level0 512 as given; the file says 256",)
    for good in (np.int32(256), 256.0, np.array([256])):
        assert read_tile_features(_file(tmp_path / "d.h5", attrs={"patch_size_level0": good})).grid.patch_size_level0


def test_clam_coordinates_without_features():
    files = sorted((SHARED / "data" / "tiles").glob("clam_coords_*.h5"))
    if not files:
        pytest.skip("needs shared/data/tiles/clam_coords_*.h5")
    _refused(files[0], "coordinates of 1481 tiles but no features.*wsi-rt encode")


def test_real_clam_coordinates_with_features(tmp_path):
    files = sorted((SHARED / "data" / "tiles").glob("clam_coords_*.h5"))
    if not files:
        pytest.skip("needs shared/data/tiles/clam_coords_*.h5")
    with h5py.File(files[0]) as root:
        coords, attrs = root["coords"][...], dict(root["coords"].attrs)
    path = _file(tmp_path / "a.h5", _features(1481), coords, attrs=attrs)
    _refused(path, "512 x downsample 1 suggests 512")
    tiles = read_tile_features(path, patch_size_level0=512)
    assert (np.diff(tiles.grid.xy0[:, 1]) >= 0).all()
    assert "sorted" in tiles.notes[0]


def test_atlaspatch(tmp_path):
    coords = np.concatenate([GRID, np.full((9, 2), 256), np.zeros((9, 1))], axis=1).astype(np.int32)
    one = _file(tmp_path / "one.h5", coords=coords, where="file", name="features/uni_v2")
    tiles = read_tile_features(one)
    np.testing.assert_array_equal(tiles.grid.xy0, GRID)
    assert tiles.provenance.maker == "external atlaspatch"
    with h5py.File(one, "a") as root:
        root["features/resnet50"] = _features()
    _refused(one, r"2 feature sets \['resnet50', 'uni_v2'\], expected one")
    with h5py.File(one, "a") as root:
        del root["features/resnet50"], root["features/uni_v2"]
    _refused(one, "no features")


def test_values_that_are_not_finite_are_counted(tmp_path):
    x = _features(5000)
    x[4321, 1], x[4990, :3] = np.inf, np.nan
    coords = np.stack([np.arange(5000) % 100, np.arange(5000) // 100], 1) * 256
    path = _file(tmp_path / "a.h5", x, coords)
    _refused(path, rf"2 of 5000 tiles .* first tile 4321 at \(x, y\) = \({21 * 256}, {43 * 256}\)")
    grid = TileGrid(coords.astype(np.int64), 256)
    with pytest.raises(FeatureFileError, match="not finite"):
        write_tile_features(tmp_path / "w.h5", TileFeatures(x, grid, Provenance("x")))
    assert not (tmp_path / "w.h5").exists()


def test_shapes_and_counts(tmp_path):
    path = tmp_path / "a.h5"
    _refused(_file(path, _features(8)), "8 features for 9 coordinates")
    _refused(_file(path, _features(0), GRID[:0]), "0 tiles")
    _refused(_file(path, np.ones((9, 2, 3), np.float32)), r"float32\[9, 2, 3\]")
    _refused(_file(path, np.ones((9, 0), np.float32)), r"\[9, 0\]")
    _refused(_file(path, np.ones((9, 2), np.int32)), "int32")
    _refused(_file(path, np.full((9, 2), b"a")), "features are")
    _refused(_file(path, coords=np.ones((9, 3), np.int64)), r"int64\[9, 3\]")
    _refused(_file(path, coords=False, where="file"), "features but no 'coords'")
    _refused(_file(path, x=False, coords=False, where="file"), "no tiles but no features")
    _refused(_file(path, coords=GRID - 1), r"tile 0 is at \[-1, -1\]")
    _refused(_file(path, coords=GRID + 0.5), r"tile 0 is at \[0.5, 0.5\]")
    _refused(_file(path, coords=np.full((9, 2), np.nan)), "tile 0")
    _refused(_file(path, coords=GRID + 2**40), "tile 0")
    _refused(_file(path, coords=np.full((9, 2), 2**64 - 1, np.uint64)), "tile 0")
    _refused(_file(path), "expected at most 215", max_bytes=215)
    assert len(read_tile_features(path, max_bytes=216).grid) == 9


def test_declared_sizes_are_checked_before_reading(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as root:
        root.create_dataset("features", (2**30, 1536), "f4", chunks=(1, 1536))
        root.create_dataset("coords", (2**30, 2), "i8", chunks=(1024, 2))
    _refused(tmp_path / "a.h5", "expected at most")


def test_data_outside_the_file_is_refused(tmp_path):
    secret = _file(tmp_path / "secret.h5")
    (tmp_path / "raw.bin").write_bytes(bytes(9 * 6 * 4))
    links = {"soft": h5py.SoftLink("/other"), "external": h5py.ExternalLink(str(secret), "features")}
    for name, link in links.items():
        path = _file(tmp_path / f"{name}.h5", x=False)
        with h5py.File(path, "a") as root:
            root["features"] = link
        _refused(path, "is a link to elsewhere")
    path = _file(tmp_path / "raw.h5", x=False)
    with h5py.File(path, "a") as root:
        root.create_dataset("features", (9, 6), "f4", external=[(str(tmp_path / "raw.bin"), 0, 9 * 6 * 4)])
    _refused(path, "stored outside the file")
    path, layout = _file(tmp_path / "virtual.h5", x=False), h5py.VirtualLayout((9, 6), "f4")
    layout[:] = h5py.VirtualSource(str(secret), "features", (9, 6))
    with h5py.File(path, "a") as root:
        root.create_virtual_dataset("features", layout)
    _refused(path, "stored outside the file")


def test_odd_objects(tmp_path):
    path = _file(tmp_path / "a.h5", coords=False, where="file")
    with h5py.File(path, "a") as root:
        root.create_group("coords")
    _refused(path, "'coords' holds no array")
    with h5py.File(path, "a") as root:
        del root["coords"]
        root["coords"] = h5py.Empty("f4")
    _refused(path, "'coords' holds no array")


def test_damaged_and_other_files(tmp_path):
    data = _file(tmp_path / "a.h5").read_bytes()
    for end in (*range(9, len(data) - 1, 97), len(data) - 1):
        (tmp_path / "cut.h5").write_bytes(data[:end])
        _refused(tmp_path / "cut.h5", "damaged|features")
    for content in (b"", b"PK\x03\x04hello", b"hello"):
        (tmp_path / "b.h5").write_bytes(content)
        _refused(tmp_path / "b.h5", "is no HDF5 file")
    _refused(tmp_path / "none.h5", "no such file")
    _refused(tmp_path, "directory|regular")
    _refused("/dev/zero", "regular")


def test_round_trip_and_trident_attributes(tmp_path):
    made = Provenance("tile encoder", "abc", {"precision": "int8"})
    grid = TileGrid(GRID, 512, cells=40, provenance=Provenance("tiler", "d", {"mpp": 0.25}))
    tiles = TileFeatures(_features(), grid, made)
    kwargs = {"name": "slide", "size0": (4000, 3000), "target_magnification": 20}
    write_tile_features(tmp_path / "a.h5", tiles, **kwargs)
    write_tile_features(tmp_path / "b.h5", tiles, **kwargs)
    assert (tmp_path / "a.h5").read_bytes() == (tmp_path / "b.h5").read_bytes()
    with h5py.File(tmp_path / "a.h5") as root:
        assert (root["features"].dtype, root["coords"].dtype) == (np.float32, np.int64)
        assert dict(root["coords"].attrs) == {
            "patch_size": 256,
            "patch_size_level0": 512,
            "overlap": 0,
            "target_magnification": 20,
            "level0_width": 4000,
            "level0_height": 3000,
            "name": "slide",
        }
    back = read_tile_features(tmp_path / "a.h5")
    np.testing.assert_array_equal(back.x, tiles.x)
    np.testing.assert_array_equal(back.grid.xy0, GRID)
    assert (back.grid.patch_size_level0, back.grid.cells, back.grid.order) == (512, 40, "row-major")
    assert back.grid.provenance == grid.provenance
    assert back.provenance.maker == "tile encoder"
    assert back.provenance.settings == {"precision": "int8", "source_digest": "abc"}
    assert "sorted" not in "".join(back.notes)


def test_what_a_file_says_of_its_slide_is_carried_on(tmp_path):
    said = {"patch_size": 512, "overlap": 16, "target_magnification": 40, "level0_magnification": 40}
    said |= {"level0_width": 90_000, "level0_height": 70_000, "patch_level": 0, "name": "TCGA-1"}
    said |= {"patch_size_level0": 512, "downsample": np.array([1.0, 1.0]), "save_path": "/home/someone"}
    tiles, attributes = read_tile_file(_file(tmp_path / "a.h5", attrs=said))
    write_tile_features(tmp_path / "b.h5", tiles, attributes=attributes)
    with h5py.File(tmp_path / "b.h5") as root:
        carried = dict(root["coords"].attrs)
    assert carried.pop("downsample").tolist() == [1.0, 1.0]
    assert carried == {k: v for k, v in said.items() if k not in ("downsample", "save_path")}


def test_what_a_file_does_not_say_is_not_made_up(tmp_path):
    odd = {"name": "x" * 2000, "overlap": np.arange(99), "level0_width": h5py.Empty("i4")}
    tiles, attributes = read_tile_file(_file(tmp_path / "a.h5", attrs={"patch_size_level0": 256, **odd}))
    write_tile_features(tmp_path / "b.h5", tiles, attributes=attributes)
    with h5py.File(tmp_path / "b.h5") as root:
        assert dict(root["coords"].attrs) == {"patch_size_level0": 256}


def test_the_maker_survives_copies(tmp_path):
    """What is compared with a bundle is the digest of what made the numbers, not of the file they last lay in."""
    tiles = TileFeatures(_features(), TileGrid(GRID, 256), Provenance("tile_encoder", "abc", {"slide": "s"}))
    for name in ("a.h5", "b.h5", "c.h5"):
        write_tile_features(tmp_path / name, tiles)
        tiles = read_tile_features(tmp_path / name)
        assert maker_digest(tiles.provenance, "tile_encoder") == "abc"
        assert maker_digest(tiles.provenance, "slide_encoder") is None
        assert tiles.provenance.settings == {"slide": "s", "source_digest": "abc"}
    assert (tmp_path / "b.h5").read_bytes() == (tmp_path / "c.h5").read_bytes()


def test_damage_to_our_own_numbers_is_seen(tmp_path):
    x = _features(600, 16)
    coords = np.stack([np.arange(600) % 25, np.arange(600) // 25], 1).astype(np.int64) * 256
    write_tile_features(tmp_path / "a.h5", TileFeatures(x, TileGrid(coords, 256), Provenance("x")))
    np.testing.assert_array_equal(read_tile_features(tmp_path / "a.h5").x, x)
    data = (tmp_path / "a.h5").read_bytes()
    for needle in (x[0].tobytes(), x[599].tobytes(), coords[300:302].tobytes()):
        at = data.index(needle)
        (tmp_path / "b.h5").write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        _refused(tmp_path / "b.h5", "damaged")


def test_writes_no_empty_file(tmp_path):
    for shape in ((0, 3), (2, 0)):
        grid = TileGrid(np.ones((shape[0], 2), np.int64), 256)
        with pytest.raises(FeatureFileError, match=f"{shape[0]} tiles of {shape[1]} numbers"):
            write_tile_features(tmp_path / "a.h5", TileFeatures(np.ones(shape, np.float32), grid, Provenance("x")))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("stamp", ["[]", "{", '{"maker": "x", "cells": "y", "grid": 3, "settings": 1}', 7])
def test_a_malformed_stamp_does_no_harm(tmp_path, stamp):
    path = _file(tmp_path / "a.h5")
    with h5py.File(path, "a") as root:
        root.attrs["wsi_rt"] = stamp
    assert read_tile_features(path).grid.cells == 9
