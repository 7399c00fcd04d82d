"""`wsi-rt diff-features`: every known difference, made on purpose, is named; nothing else is."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from wsi_rt.runtime.errors import FeatureFileError
from wsi_rt.runtime.features import write_slide_tokens, write_tensor, write_tile_features, write_tile_grid
from wsi_rt.runtime.features.diff.report import Report, render
from wsi_rt.runtime.features.diff.run import diff_files
from wsi_rt.runtime.features.diff.tiles import match
from wsi_rt.runtime.features.rounding import rounded, storage_of
from wsi_rt.runtime.types import Provenance, SlideTokens, TileFeatures, TileGrid

N, WIDTH, SIZE0 = 400, 48, 256


def tiles(seed: int = 0, encoder: int = 0, count: int = N) -> TileFeatures:
    """Tiles of a made-up slide, with gaps. An encoder has its own column means, as real ones do."""
    side = int(count**0.5 * 1.3) + 2
    cells = np.sort(np.random.default_rng(1).permutation(side * side)[:count])
    xy0 = np.stack([cells % side, cells // side], axis=1).astype(np.int64) * SIZE0
    means = np.random.default_rng(100 + encoder).standard_normal(WIDTH)
    x = (means + np.random.default_rng(seed).standard_normal((count, WIDTH))).astype(np.float32)
    return TileFeatures(x, TileGrid(xy0, SIZE0), Provenance("test"))


def changed(features: TileFeatures, x: np.ndarray | None = None, rows: Any = None, **grid: Any) -> TileFeatures:
    x = features.x if x is None else x
    xy0 = grid.pop("xy0", features.grid.xy0)
    if rows is not None:
        x, xy0 = x[rows], xy0[rows]
    grid = replace(features.grid, xy0=np.ascontiguousarray(xy0), **grid)
    return replace(features, x=np.ascontiguousarray(x, np.float32), grid=grid)


@pytest.fixture
def diff(tmp_path: Path) -> Callable[..., Report]:
    """diff(a, b, **flags): of tile features, or slide tokens, written to files."""

    def write(name: str, value: Any) -> Path:
        if isinstance(value, TileFeatures):
            write_tile_features(tmp_path / f"{name}.h5", value)
            return tmp_path / f"{name}.h5"
        write_slide_tokens(tmp_path / f"{name}.pt", value)
        return tmp_path / f"{name}.pt"

    def call(a: Any, b: Any, **flags: Any) -> Report:
        report = diff_files(write("a", a), write("b", b), **flags)
        assert json.loads(json.dumps(report.to_json()))["equal"] == report.equal
        assert render(report).splitlines()[-1].startswith("equal" if report.equal else "differ: ")
        return report

    return call


def kinds(report: Report) -> list[str]:
    return [f.kind for f in report.findings]


def test_equal_files(diff: Callable[..., Report]):
    report = diff(tiles(), tiles())
    assert report.equal
    assert report.worst == ()
    assert report.compared["same"] == N


# --- order
@pytest.mark.parametrize(
    ("order", "named"),
    [
        (lambda xy0: np.lexsort((xy0[:, 1], xy0[:, 0])), "column-major (x, y)"),
        (lambda xy0: np.arange(len(xy0))[::-1], "reversed row-major"),
        (lambda xy0: np.random.default_rng(0).permutation(len(xy0)), "no known order"),
    ],
    ids=["column-major", "reversed", "shuffled"],
)
def test_the_same_tiles_in_another_order(diff: Callable[..., Report], order: Callable[..., Any], named: str):
    a = tiles()
    report = diff(a, changed(a, rows=order(a.grid.xy0)))
    assert kinds(report) == ["order"]
    assert f"B in {named}" in report.findings[0].says
    assert "A is in row-major (y, x)" in report.findings[0].says
    assert report.compared["same"] == N


def test_features_that_stand_beside_other_tiles(diff: Callable[..., Report]):
    """Coordinates sorted, features not: what a careless script makes."""
    a = tiles()
    columns = np.lexsort((a.grid.xy0[:, 1], a.grid.xy0[:, 0]))
    report = diff(a, changed(a, x=a.x[columns]))
    assert kinds(report) == ["order"]
    assert "B holds A's numbers beside other tiles" in report.findings[0].says


# --- grids
def test_another_tile_size(diff: Callable[..., Report]):
    a = tiles()
    report = diff(a, changed(a, patch_size_level0=512))
    assert kinds(report) == ["mpp"]
    assert "of A is 256 level-0 px wide, of B 512" in report.findings[0].says
    assert report.compared == {}


def test_another_mpp_by_the_files_own_record(diff: Callable[..., Report]):
    sides = [changed(tiles(), provenance=Provenance("t", "", {"target_mpp": mpp})) for mpp in (0.5, 0.25)]
    report = diff(*sides)
    assert kinds(report) == ["mpp"]
    assert "A's tiles have 0.5 um/px, B's 0.25" in report.findings[0].says


def test_nearly_the_same_tile_size_is_compared(diff: Callable[..., Report]):
    a = tiles()
    report = diff(a, changed(a, patch_size_level0=255))
    assert kinds(report) == ["mpp"]
    assert "the same mpp within 5 %" in report.findings[0].says
    assert report.compared["same"] == N


def test_a_crop(diff: Callable[..., Report]):
    a = tiles()
    inside = (a.grid.xy0 >= 5 * SIZE0).all(axis=1) & (a.grid.xy0 <= 20 * SIZE0).all(axis=1)
    report = diff(a, changed(a, rows=inside))
    assert kinds(report) == ["crop"]
    assert f"B is a crop of A: all its {inside.sum()} tiles" in report.findings[0].says
    assert kinds(diff(changed(a, rows=inside), a)) == ["crop"]


def test_missing_and_extra_tiles_are_named(diff: Callable[..., Report]):
    a = tiles()
    left = np.setdiff1d(np.arange(N), [3, 200, 201])
    report = diff(changed(a, rows=left), changed(a, rows=np.setdiff1d(np.arange(N), [50])))
    assert kinds(report) == ["tiles"]
    figures = report.findings[0].figures
    assert (figures["common"], figures["only_a"], figures["only_b"]) == (N - 4, 1, 3)
    assert figures["first_only_a"] == [a.grid.xy0[50].tolist()]
    assert figures["first_only_b"][0] == a.grid.xy0[3].tolist()


@pytest.mark.parametrize("offset", [(77, 131), (512, 0), (0, 25 * 256)], ids=str)
def test_an_offset_of_the_grid(diff: Callable[..., Report], offset: tuple[int, int]):
    a = tiles()
    report = diff(changed(a, xy0=a.grid.xy0 + offset), a)
    assert kinds(report) == ["offset"]
    assert report.findings[0].figures["offset"] == list(offset)
    assert report.compared["same"] == N


def test_swapped_axes(diff: Callable[..., Report]):
    a = tiles()
    a = changed(a, rows=a.grid.xy0[:, 1] < 8 * SIZE0)  # wide, so that the transpose is another shape
    report = diff(a, changed(a, xy0=a.grid.xy0[:, ::-1]))
    assert kinds(report)[0] == "axes"
    assert report.compared["same"] == len(a.grid)


@pytest.mark.parametrize("scale", [2, 4, 16])
def test_coordinates_of_a_smaller_level(diff: Callable[..., Report], scale: int):
    a = tiles()
    for pair, which in (
        ((a, changed(a, xy0=a.grid.xy0 // scale)), "B"),
        ((changed(a, xy0=a.grid.xy0 // scale), a), "A"),
    ):
        report = diff(*pair)
        assert kinds(report) == ["scale"]
        assert f"{which}'s coordinates are px of a level {scale} times smaller" in report.findings[0].says


def test_tiles_in_one_place_pair_in_their_order():
    a, b = np.array([(0, 0), (0, 0), (256, 0)]), np.array([(256, 0), (0, 0), (0, 0), (0, 0)])
    rows_a, rows_b = match(a.astype(np.int64), b.astype(np.int64))
    assert rows_a.tolist() == [0, 1, 2]
    assert rows_b.tolist() == [1, 2, 0]


def test_unrelated_slides_share_nothing(diff: Callable[..., Report]):
    a = tiles()
    other = np.random.default_rng(9).integers(0, 10**6, (N, 2)) * 7 + 10**8
    report = diff(a, changed(a, xy0=other.astype(np.int64)))
    assert "tiles" in kinds(report)
    assert report.findings[0].figures["common"] == 0
    assert report.compared == {}


# --- numbers
@pytest.mark.parametrize("storage", ["fp16", "bf16"])
def test_rounded_by_storage(diff: Callable[..., Report], storage: str):
    a = tiles()
    b = changed(a, x=rounded(a.x, storage))
    assert storage_of(b.x) == storage
    for pair, which in (((a, b), f"B is A rounded to {storage}"), ((b, a), f"A is B rounded to {storage}")):
        report = diff(*pair)
        assert kinds(report) == ["precision"]
        assert which in report.findings[0].says


def test_rounding_is_torchs(tmp_path: Path):
    torch = pytest.importorskip("torch", reason="the export extra is missing")
    x = np.random.default_rng(0).standard_normal((100, 100)).astype(np.float32) * 10.0 ** np.arange(-20, 30, 0.5)
    x = x.astype(np.float32)
    for storage, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        np.testing.assert_array_equal(rounded(x, storage), torch.from_numpy(x).to(dtype).float().numpy())


@pytest.mark.parametrize(
    ("noise", "says"), [(1e-7, "within fp32 arithmetic"), (5e-3, "as close as reduced precision comes")], ids=str
)
def test_computed_in_another_precision(diff: Callable[..., Report], noise: float, says: str):
    a = tiles()
    b = changed(a, x=a.x * (1 + noise * np.random.default_rng(3).standard_normal(a.x.shape)))
    report = diff(a, b)
    assert kinds(report) == ["precision"]
    assert says in report.findings[0].says
    assert diff(a, b, tolerance=10 * noise).equal


@pytest.mark.parametrize("noise", [0.0, 5e-3], ids=["exact", "bf16"])
def test_a_few_tiles_stand_out(diff: Callable[..., Report], noise: float):
    a = tiles()
    x = a.x * (1 + noise * np.random.default_rng(3).standard_normal(a.x.shape))
    for row in (7, 123):
        x[row] = tiles(seed=5).x[row]
    report = diff(a, changed(a, x=x))
    assert kinds(report) == (["precision", "values"] if noise else ["values"])
    assert "2 of 400 rows stand out" in report.findings[-1].says
    assert {tuple(w["xy0"]) for w in report.worst[:2]} == {tuple(a.grid.xy0[r].tolist()) for r in (7, 123)}
    assert len(report.worst) == (10 if noise else 2)


def test_one_tile_of_white_is_found(diff: Callable[..., Report]):
    a = tiles()
    x = a.x.copy()
    x[11] = 0
    report = diff(a, changed(a, x=x))
    assert kinds(report) == ["values"]
    assert report.worst[0]["xy0"] == a.grid.xy0[11].tolist()


@pytest.mark.parametrize(
    ("scaled", "says"),
    [(lambda x: 2.5 * x, "2.5 times A's"), (lambda x: x / np.linalg.norm(x, axis=1, keepdims=True), "L2 norm")],
    ids=["factor", "norm"],
)
def test_scaled(diff: Callable[..., Report], scaled: Callable[..., Any], says: str):
    a = tiles()
    report = diff(a, changed(a, x=scaled(a.x)))
    assert kinds(report) == ["values"]
    assert says in report.findings[0].says


def test_another_encoder_of_the_same_width(diff: Callable[..., Report]):
    report = diff(tiles(), tiles(seed=1, encoder=1))
    assert kinds(report) == ["encoder"]
    assert "another encoder or other weights" in report.findings[0].says


def test_the_same_encoder_on_other_pixels(diff: Callable[..., Report]):
    report = diff(tiles(), tiles(seed=1))
    assert kinds(report) == ["values"]
    assert "one encoder (by their statistics), other pixels" in report.findings[0].says


def test_what_the_files_say_of_their_encoder_comes_first(diff: Callable[..., Report]):
    made = [replace(tiles(seed=i), provenance=Provenance("tile_encoder", d)) for i, d in enumerate(("aa", "bb"))]
    report = diff(*made)
    assert kinds(report) == ["encoder"]
    assert {"what": "weights", "a": "aa", "b": "bb"} in report.records
    same = [replace(tiles(seed=i), provenance=Provenance("tile_encoder", "aa")) for i in range(2)]
    assert "one encoder (they say so)" in diff(*same).findings[0].says


def test_another_width_is_another_encoder(diff: Callable[..., Report]):
    a = tiles()
    report = diff(a, changed(a, x=a.x[:, :32]))
    assert kinds(report) == ["encoder"]
    assert "A has 48 numbers a row, B 32" in report.findings[0].says


def test_records_alone_make_no_difference(diff: Callable[..., Report]):
    made = [replace(tiles(), provenance=Provenance("tile_encoder", "aa", {"slide": s})) for s in ("f1", "f2")]
    report = diff(*made)
    assert report.equal
    assert report.records == ({"what": "slide", "a": "f1", "b": "f2"},)


def test_values_that_are_not_finite_are_found(diff: Callable[..., Report], tmp_path: Path):
    a = tiles()
    x = a.x.copy()
    x[5, 0] = np.nan
    with h5py.File(tmp_path / "nan.h5", "w") as root:
        root["features"], root["coords"] = x, a.grid.xy0
        root["coords"].attrs["patch_size_level0"] = SIZE0
    write_tile_features(tmp_path / "a.h5", a)
    report = diff_files(tmp_path / "a.h5", tmp_path / "nan.h5")
    assert kinds(report) == ["not_finite"]
    assert f"1 of 400 rows of B hold values that are not finite, first row 5 at {tuple(a.grid.xy0[5].tolist())}" in (
        report.findings[0].says
    )


# --- slide tokens, and mixes
def tokens(seed: int = 0, width: int = 1024, count: int | None = None) -> SlideTokens:
    x = np.random.default_rng(seed).standard_normal((576, width)).astype(np.float32)
    x[:, 768:] = 0
    if count is not None:
        x = x[np.arange(576) * count // 576]
    return SlideTokens(x, Provenance("test"))


def test_tokens_padded_and_not(diff: Callable[..., Report]):
    a = tokens()
    report = diff(a, replace(a, tokens=np.ascontiguousarray(a.tokens[:, :768])))
    assert kinds(report) == ["width"]
    assert "A has 1024 numbers a row, the last 256 zeros: padding" in report.findings[0].says
    assert report.compared["same"] == 576


def test_tokens_of_other_tile_counts(diff: Callable[..., Report]):
    report = diff(tokens(count=96), tokens(count=144))
    assert kinds(report)[0] == "tiles"
    assert "A was pooled from 96 tiles, B from 144" in report.findings[0].says


def test_tokens_in_another_order(diff: Callable[..., Report]):
    a = tokens()
    report = diff(a, replace(a, tokens=a.tokens[::-1].copy()))
    assert kinds(report) == ["order"]


def test_bare_features_of_clam(tmp_path: Path):
    """CLAM writes h5_files and pt_files; the latter have no coordinates."""
    a = tiles()
    write_tile_features(tmp_path / "a.h5", a)
    write_tensor(tmp_path / "a.pt", a.x)
    write_tensor(tmp_path / "short.pt", a.x[:-1])
    assert diff_files(tmp_path / "a.h5", tmp_path / "a.pt").equal
    report = diff_files(tmp_path / "short.pt", tmp_path / "a.h5")
    assert kinds(report) == ["tiles"]
    assert "A has 399 rows, B 400" in report.findings[0].says


def test_a_grid_without_features(tmp_path: Path):
    a = tiles()
    write_tile_features(tmp_path / "a.h5", a)
    write_tile_grid(tmp_path / "grid.h5", a.grid)
    report = diff_files(tmp_path / "a.h5", tmp_path / "grid.h5")
    assert report.equal
    assert "no features" in render(report)
    columns = np.lexsort((a.grid.xy0[:, 1], a.grid.xy0[:, 0]))
    write_tile_grid(tmp_path / "columns.h5", changed(a, rows=columns).grid)
    assert kinds(diff_files(tmp_path / "a.h5", tmp_path / "columns.h5")) == ["order"]


def test_a_clam_file_without_a_tile_size(tmp_path: Path):
    a = tiles()
    with h5py.File(tmp_path / "clam.h5", "w") as root:
        root["features"], root["coords"] = a.x, a.grid.xy0
    write_tile_features(tmp_path / "a.h5", a)
    assert diff_files(tmp_path / "a.h5", tmp_path / "clam.h5").equal


# --- the command
@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    write_tile_features(tmp_path / "a.h5", tiles())
    write_tile_features(tmp_path / "b.h5", changed(tiles(), rows=np.arange(N)[::-1]))
    return tmp_path / "a.h5", tmp_path / "b.h5"


def test_exit_codes_and_json(pair: tuple[Path, Path], wsi_rt: Callable[..., Any]):
    assert wsi_rt("diff-features", pair[0], pair[0]).code == 0
    done = wsi_rt("diff-features", *pair)
    assert done.code == 1
    assert done.out.splitlines()[-1] == "differ: order"
    done = wsi_rt("diff-features", *pair, "--json")
    assert done.code == 1
    assert json.loads(done.out)["findings"][0]["kind"] == "order"


def test_bad_input_is_one_line(pair: tuple[Path, Path], wsi_rt: Callable[..., Any], tmp_path: Path):
    write_slide_tokens(tmp_path / "tokens.pt", tokens())
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "bad.h5").write_bytes(pair[0].read_bytes()[:1000])
    for other, words in (
        ("missing.h5", "no such file"),
        ("notes.txt", "expected a feature file"),
        ("bad.h5", "damaged or cut short"),
        ("tokens.pt", "nothing to compare"),
    ):
        done = wsi_rt("diff-features", pair[0], tmp_path / other)
        assert (done.code, done.out) == (2, "")
        assert words in done.err
        assert len(done.err.splitlines()) == 1
    with pytest.raises(FeatureFileError, match="nothing to compare"):
        diff_files(pair[0], tmp_path / "tokens.pt")
