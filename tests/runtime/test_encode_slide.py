"""Tiles of a slide through a real tile encoder: choosing them, and what becomes of those that cannot be read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tifffile

from wsi_rt.runtime.bundle import Bundle
from wsi_rt.runtime.config import SlideSettings
from wsi_rt.runtime.encode import Encoded, ignored_settings
from wsi_rt.runtime.encode_slide import choose_tiles, encode_chosen
from wsi_rt.runtime.engines.base import Engine
from wsi_rt.runtime.errors import InputError, SlideError
from wsi_rt.runtime.features import read_tile_features, write_tile_features, write_tile_grid
from wsi_rt.runtime.features.coords import read_coords
from wsi_rt.runtime.slides.synth import write_synth_slide
from wsi_rt.runtime.timing import Stopwatch

WIDTH, HEIGHT = 1024, 768  # 4 x 3 tiles, stored as they are cut


def damaged(path: Path, *tiles: int) -> Path:
    """A slide whose only level has these stored tiles zeroed; tissue is read before, from the same level."""
    write_synth_slide(path, width=WIDTH, height=HEIGHT, levels=(1, 16), tissue=0.9, seed=2)
    with tifffile.TiffFile(path) as tiff:
        page = tiff.pages[0]
        places = [(page.dataoffsets[i], page.databytecounts[i]) for i in tiles]
    with path.open("r+b") as file:
        for offset, count in places:
            file.seek(offset)
            file.write(bytes(count))
    return path


@pytest.fixture(scope="module")
def encoder(nano_bundle: Path) -> Iterator[Engine]:
    with Bundle.open(nano_bundle).engine("tile_encoder") as engine:
        yield engine


def encode(path: Path, encoder: Engine, **settings: object) -> Encoded:
    chosen_by = SlideSettings(**settings)
    with choose_tiles(path, chosen_by, 2, Stopwatch(), lambda *_: None) as chosen:
        return encode_chosen(chosen, encoder, 2, Stopwatch(), lambda *_: None)


@pytest.fixture(scope="module")
def whole(encoder: Engine, tmp_path_factory: pytest.TempPathFactory) -> Encoded:
    encoded = encode(damaged(tmp_path_factory.mktemp("whole") / "slide.svs"), encoder)
    assert encoded.grid is not None
    assert len(encoded.grid) == 12  # all of the grid, so that tile k of the file is tile k of the grid
    assert (encoded.tiles["failed"], encoded.failures, encoded.notes) == (0, (), ())
    return encoded


def test_a_bad_tile_stops_by_default(tmp_path: Path, encoder: Engine, whole: Encoded) -> None:
    path = damaged(tmp_path / "bad.svs", 5)
    with pytest.raises(SlideError) as caught:
        encode(path, encoder)
    for part in ("tile 5 at level-0 position (256, 256)", str(path), "of 12 tiles", "twice", "--on-bad-tile skip"):
        assert part in str(caught.value)


def test_skipped_tiles_leave_the_grid_and_are_named(tmp_path: Path, encoder: Engine, whole: Encoded) -> None:
    encoded = encode(damaged(tmp_path / "bad.svs", 5, 11), encoder, on_bad_tile="skip")
    left = [i for i in range(12) if i not in (5, 11)]
    assert encoded.grid is not None
    assert encoded.features is not None
    assert whole.grid is not None
    assert whole.features is not None
    np.testing.assert_array_equal(encoded.grid.xy0, whole.grid.xy0[left])
    np.testing.assert_array_equal(encoded.features.grid.xy0, encoded.grid.xy0)
    np.testing.assert_allclose(encoded.features.x, whole.features.x[left], atol=1e-5)
    assert encoded.tiles == {"grid": 12, "kept": 10, "failed": 2, "distinct_tokens": None}
    assert [(f.index, f.xy0) for f in encoded.failures] == [(5, (256, 256)), (11, (768, 512))]
    (note,) = [n for n in encoded.notes if "could not be read" in n]
    assert note.startswith(
        "2 of 12 tiles could not be read, tried twice, and were left out: tile 5 at level-0 position"
    )
    assert "tile 11 at level-0 position (768, 512)" in note
    told = {"policy": "skip", "count": 2, "xy0": [[256, 256], [768, 512]]}
    assert encoded.grid.provenance.settings["bad_tiles"] == told
    assert encoded.features.provenance.settings["bad_tiles"] == told


def test_white_tiles_stay_and_are_named(tmp_path: Path, encoder: Engine, whole: Encoded) -> None:
    encoded = encode(damaged(tmp_path / "bad.svs", 5), encoder, on_bad_tile="white")
    assert encoded.features is not None
    assert whole.features is not None
    others = np.arange(12) != 5
    np.testing.assert_allclose(encoded.features.x[others], whole.features.x[others], atol=1e-5)
    white = np.empty((1, encoded.features.x.shape[1]), np.float32)
    encoder.run({"tiles": np.full((1, 256, 256, 3), 255, np.uint8)}, {"features": white})
    np.testing.assert_allclose(encoded.features.x[5], white[0], atol=1e-5)
    assert encoded.tiles == {"grid": 12, "kept": 12, "failed": 1, "distinct_tokens": None}
    assert any("1 of 12 tiles could not be read, tried twice, and were taken as white" in n for n in encoded.notes)
    assert encoded.features.provenance.settings["bad_tiles"]["policy"] == "white"


def test_the_file_tells_of_skipped_tiles(tmp_path: Path, encoder: Engine, whole: Encoded) -> None:
    encoded = encode(damaged(tmp_path / "bad.svs", 3), encoder, on_bad_tile="skip")
    assert encoded.features is not None
    write_tile_features(tmp_path / "x.h5", encoded.features)
    back = read_tile_features(tmp_path / "x.h5")
    assert len(back.grid) == 11
    assert back.provenance.settings["bad_tiles"] == {"policy": "skip", "count": 1, "xy0": [[768, 0]]}


@pytest.mark.parametrize("policy", ["skip", "white"])
def test_no_tile_at_all_is_an_error_whatever_the_policy(tmp_path: Path, encoder: Engine, policy: str) -> None:
    with pytest.raises(SlideError, match="none of 12 tiles can be read; the first: tile 0 at level-0 position"):
        encode(damaged(tmp_path / "bad.svs", *range(12)), encoder, on_bad_tile=policy)


def test_regions_are_refused_before_the_slide_is_opened(tmp_path: Path, encoder: Engine) -> None:
    (tmp_path / "bad.geojson").write_text("{")
    with pytest.raises(InputError, match="--roi"):
        encode(tmp_path / "no-such.svs", encoder, roi=tmp_path / "bad.geojson")


def test_settings_are_checked_where_they_are_made() -> None:
    with pytest.raises(InputError, match=r"--on-bad-tile is 'ignore', expected fail, skip, white"):
        SlideSettings(on_bad_tile="ignore")
    settings = SlideSettings(roi=Path("a.geojson"), on_bad_tile="skip", reader="openslide", plain_otsu=True)
    assert settings.to_json()["roi"] == "a.geojson"
    assert ignored_settings("slide", settings) == ()
    assert ignored_settings("tile_features", settings) == (
        "--on-bad-tile, --plain-otsu, --reader, --roi given, but the input is a file of tile features: no effect",
    )


def test_tiles_of_a_file_need_no_tissue(tmp_path: Path, whole: Encoded) -> None:
    """`encode --coords`: the file's tiles as they are, and what then has no effect is said."""
    assert whole.grid is not None
    write_tile_grid(tmp_path / "tiles.h5", replace(whole.grid, xy0=whole.grid.xy0[[1, 6]]))
    settings, clock = SlideSettings(plain_otsu=True, allow_dark=True), Stopwatch()
    coords = read_coords(tmp_path / "tiles.h5")
    slide = damaged(tmp_path / "slide.svs")
    with choose_tiles(slide, settings, 1, clock, lambda *_: None, coords=coords) as chosen:
        assert chosen.grid.xy0.tolist() == [[256, 0], [512, 256]]
        assert chosen.mask is None
        assert "--allow-dark, --plain-otsu given, but the tiles come from a file: no effect" in chosen.notes
