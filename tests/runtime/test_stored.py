"""Encoding slides through the feature store, on a real bundle."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from wsi_rt.runtime import Pipeline, SlideSettings, encode_slide
from wsi_rt.runtime.encode import Encoded
from wsi_rt.runtime.errors import SlideError
from wsi_rt.runtime.features import write_slide_tokens, write_tile_features
from wsi_rt.runtime.features.store import FeatureStore
from wsi_rt.runtime.features.store_entries import listed
from wsi_rt.runtime.stored import TILES_HIT, TOKENS_HIT


@pytest.fixture
def store(tmp_path: Path) -> FeatureStore:
    return FeatureStore(tmp_path / "cache")


def opened(bundle: Path, store: FeatureStore | None) -> Pipeline:
    return Pipeline.open(bundle, threads=1, store=store)


def hits(encoded: Encoded) -> list[str]:
    return [n for n in encoded.notes if "from the cache" in n]


def written(encoded: Encoded, folder: Path) -> tuple[bytes, bytes]:
    """The bytes of the files that `encode --out` would write."""
    assert encoded.features is not None
    assert encoded.tokens is not None
    assert encoded.slide is not None
    folder.mkdir(parents=True, exist_ok=True)
    write_tile_features(folder / "a.h5", encoded.features, name="slide", size0=encoded.slide.size0)
    write_slide_tokens(folder / "a.pt", encoded.tokens)
    return (folder / "a.h5").read_bytes(), (folder / "a.pt").read_bytes()


def test_the_second_time_no_encoder_runs_or_opens(nano_bundle: Path, slide: Path, store: FeatureStore, tmp_path: Path):
    with opened(nano_bundle, store) as pipeline:
        first = pipeline.encode(slide)
    with opened(nano_bundle, store) as pipeline:
        second = pipeline.encode(slide)
        assert pipeline._engines == {}
    assert hits(first) == []
    assert first.timings_ms["tile_encoder"] > 0
    assert hits(second) == [TILES_HIT, TOKENS_HIT]
    assert set(second.timings_ms) == {"tissue", "tiles"}
    assert second.tiles == first.tiles
    assert [n for n in second.notes if n not in hits(second)] == list(first.notes)
    assert second.slide == first.slide
    assert written(first, tmp_path / "1") == written(second, tmp_path / "2")


def test_the_store_changes_nothing(nano_bundle: Path, slide: Path, store: FeatureStore, tmp_path: Path):
    with opened(nano_bundle, None) as plain, opened(nano_bundle, store) as stored:
        assert written(plain.encode(slide), tmp_path / "1") == written(stored.encode(slide), tmp_path / "2")


def test_tokens_alone_are_enough_where_only_they_are_wanted(nano_bundle: Path, slide: Path, store: FeatureStore):
    with opened(nano_bundle, store) as pipeline:
        first = pipeline.encode(slide)
        for item in listed(store.root):
            if item.entry.kind == "tiles":
                item.entry.path(store.root).unlink()
        second = pipeline.encode(slide, features=False)
    assert second.features is None
    assert second.grid is not None
    assert first.grid is not None
    np.testing.assert_array_equal(second.grid.xy0, first.grid.xy0)
    assert hits(second) == [TOKENS_HIT]


def test_another_divisor_needs_new_tokens_only(nano_bundle: Path, slide: Path, store: FeatureStore):
    with opened(nano_bundle, store) as pipeline:
        pipeline.encode(slide)
        other = pipeline.encode(slide, SlideSettings(position_tile=600))
    assert hits(other) == [TILES_HIT]
    assert other.timings_ms["slide_encoder"] > 0
    assert "tile_encoder" not in other.timings_ms


@pytest.mark.parametrize(
    "settings", [{"target_mpp": 1.0}, {"mpp": 0.25}, {"reader": "openslide"}], ids=["target-mpp", "mpp", "reader"]
)
def test_what_changes_the_tiles_finds_nothing(
    nano_bundle: Path, slide: Path, store: FeatureStore, settings: dict[str, Any]
):
    with opened(nano_bundle, store) as pipeline:
        plain = pipeline.encode(slide)
        other = pipeline.encode(slide, SlideSettings(**settings))
    assert plain.slide is not None
    assert other.slide is not None
    if settings.get("reader") and plain.slide.provenance.maker == other.slide.provenance.maker:
        pytest.skip("openslide is the reader of choice already")
    assert hits(other) == []


def test_a_changed_slide_is_encoded_again(nano_bundle: Path, slide: Path, store: FeatureStore, tmp_path: Path):
    """By a byte that no pixel depends on: a digest of the bytes cannot know that."""
    own = Path(shutil.copy(slide, tmp_path / "own.svs"))
    with opened(nano_bundle, store) as pipeline:
        pipeline.encode(own, tokens=False)
        own.chmod(0o644)
        with own.open("ab") as file:
            file.write(b"\0")
        assert hits(pipeline.encode(own, tokens=False)) == []


def test_a_renamed_slide_is_found(nano_bundle: Path, slide: Path, store: FeatureStore, tmp_path: Path):
    with opened(nano_bundle, store) as pipeline:
        pipeline.encode(slide, tokens=False)
        copy = shutil.copy(slide, tmp_path / "copy.svs")
        assert hits(pipeline.encode(copy, tokens=False)) == [TILES_HIT]


def test_no_name_gets_into_the_cache(nano_bundle: Path, slide: Path, store: FeatureStore, tmp_path: Path):
    """Neither of the slide, nor of its folder, nor of the region file."""
    folder = tmp_path / "WARD-7731"
    folder.mkdir()
    own = Path(shutil.copy(slide, folder / "SMITH^JOHN.svs"))
    roi = folder / "case-4711.geojson"
    ring = [[0, 0], [10**5, 0], [10**5, 10**5], [0, 10**5], [0, 0]]
    geometry = {"type": "Polygon", "coordinates": [ring]}
    roi.write_text(json.dumps({"type": "Feature", "properties": {"name": "JANE"}, "geometry": geometry}))
    with opened(nano_bundle, store) as pipeline:
        for settings in (SlideSettings(), SlideSettings(roi=roi)):
            pipeline.encode(own, settings)
    kept = [p for p in store.root.rglob("*") if p.is_file()]
    assert len([p for p in kept if p.suffix in (".h5", ".pt")]) >= 2
    for path in kept:
        data = path.name.encode() + path.read_bytes()
        for word in (b"SMITH", b"JOHN", b"WARD", b"7731", b"case-4711", b"JANE", b"CMU", b"svs"):
            assert word not in data, (path, word)


def test_damage_is_told_and_encoded_again(nano_bundle: Path, slide: Path, store: FeatureStore, tmp_path: Path):
    with opened(nano_bundle, store) as pipeline:
        first = pipeline.encode(slide)
        for item in listed(store.root):
            path = item.entry.path(store.root)
            path.write_bytes(path.read_bytes()[:-1] + b"?")
        again = pipeline.encode(slide)
        assert hits(again) == []
        assert len([n for n in again.notes if "damaged cache entry" in n]) == 2
        assert hits(pipeline.encode(slide)) == [TILES_HIT, TOKENS_HIT]
    assert written(first, tmp_path / "1") == written(again, tmp_path / "2")


def test_a_slide_that_changes_meanwhile_is_not_kept(
    nano_bundle: Path, slide: Path, store: FeatureStore, tmp_path: Path
):
    own = Path(shutil.copy(slide, tmp_path / "own.svs"))
    own.chmod(0o644)

    def touch(stage: str, done: int, total: int) -> None:
        if stage == "tile encoder":
            os.utime(own)

    with opened(nano_bundle, store) as pipeline:
        encoded = pipeline.encode(own, on_progress=touch)
    assert "not kept in the cache: the slide changed while it was encoded" in encoded.notes
    assert listed(store.root) == []


def test_tiles_that_could_not_be_read_are_not_kept(
    nano_bundle: Path, slide: Path, store: FeatureStore, monkeypatch: pytest.MonkeyPatch
):
    """White in their place is an answer to this run's question, not what the slide holds."""
    from dataclasses import replace

    from wsi_rt.runtime.types import TileFailure

    real = encode_slide.iter_tiles

    def first_tile_fails(reader: Any, grid: Any, *arguments: Any, **more: Any) -> Any:
        for batch in real(reader, grid, *arguments, **more):
            if batch.index[0] == 0:
                place = (int(grid.xy0[0][0]), int(grid.xy0[0][1]))
                batch = replace(batch, failures=(TileFailure(0, place, "made up"),))
            yield batch

    with opened(nano_bundle, store) as pipeline:
        monkeypatch.setattr(encode_slide, "iter_tiles", first_tile_fails)
        encoded = pipeline.encode(slide, SlideSettings(on_bad_tile="white"))
        assert encoded.tiles["failed"] == 1
        assert "not kept in the cache: some tiles could not be read" in encoded.notes
        assert listed(store.root) == []
        monkeypatch.setattr(encode_slide, "iter_tiles", real)
        assert hits(pipeline.encode(slide, SlideSettings(on_bad_tile="white"))) == []


def test_a_failed_run_keeps_nothing_and_blocks_nobody(
    nano_bundle: Path, slide: Path, store: FeatureStore, monkeypatch: pytest.MonkeyPatch
):
    def fails(*_: Any, **__: Any) -> Any:
        raise SlideError("made up")

    with opened(nano_bundle, store) as pipeline:
        with monkeypatch.context() as patch:
            patch.setattr(encode_slide, "iter_tiles", fails)
            with pytest.raises(SlideError):
                pipeline.encode(slide)
        assert listed(store.root) == []
        assert hits(pipeline.encode(slide)) == []


# --- the commands
def test_ask_twice_in_two_processes(
    nano_bundle: Path, slide: Path, wsi_rt_process: Callable[..., Any], own_cache: Path
):
    """Another question does not matter."""
    answers = []
    for question in ("What is it?", "Is there necrosis?"):
        done = wsi_rt_process("ask", slide, question, "--engines", nano_bundle, "--max-new-tokens", 4, "--json")
        assert done.code == 0, done.err
        answers.append(json.loads(done.out))
    assert answers[0]["timings_ms"]["tile_encoder"] > 0
    assert answers[1]["timings_ms"]["tile_encoder"] == answers[1]["timings_ms"]["slide_encoder"] == 0
    assert TOKENS_HIT in answers[1]["notes"]
    assert answers[1]["settings"]["slide"] == answers[0]["settings"]["slide"]
    assert answers[1]["tiles"] == answers[0]["tiles"]
    assert len(listed(own_cache)) == 2


def test_no_cache_reads_and_keeps_nothing(
    nano_bundle: Path, slide: Path, wsi_rt: Callable[..., Any], own_cache: Path, tmp_path: Path
):
    for flags, encoders in (((), True), (("--no-cache",), True), ((), False)):
        out = tmp_path / "a.h5"
        done = wsi_rt("encode", slide, "--engines", nano_bundle, "--out", out, "--json", *flags)
        assert done.code == 0, done.err
        assert ("tile_encoder" in json.loads(done.out)["timings_ms"]) == encoders
    done = wsi_rt("encode", slide, "--engines", nano_bundle, "--out", out, "--no-cache", "--cache", tmp_path)
    assert done.code == 2
    assert "--cache and --no-cache given" in done.err


def test_a_cache_asked_for_that_cannot_be_used_is_refused_first(
    nano_bundle: Path, slide: Path, wsi_rt: Callable[..., Any], tmp_path: Path
):
    (tmp_path / "file").write_text("")
    done = wsi_rt("ask", slide, "?", "--engines", nano_bundle, "--cache", tmp_path / "file" / "cache")
    assert done.code in (2, 3)
    assert "cannot write" in done.err
    assert len(done.err.splitlines()) == 1


@pytest.mark.slow
def test_two_processes_encode_a_slide_once(nano_bundle: Path, slide: Path, own_cache: Path, tmp_path: Path):
    from tests.conftest import COMMAND

    runs = []
    for i in range(2):
        out = str(tmp_path / f"{i}.h5")
        command = [*COMMAND, "encode", str(slide), "--engines", str(nano_bundle), "--out", out, "--json"]
        runs.append(subprocess.Popen([*command, "--threads", "1"], stdout=subprocess.PIPE, text=True))
    told = [json.loads(run.communicate(timeout=120)[0]) for run in runs]
    assert [run.returncode for run in runs] == [0, 0]
    assert sorted("tile_encoder" in t["timings_ms"] for t in told) == [False, True]
    assert (tmp_path / "0.h5").read_bytes() == (tmp_path / "1.h5").read_bytes()


def test_cache_list_path_and_prune(
    nano_bundle: Path, slide: Path, wsi_rt: Callable[..., Any], own_cache: Path, tmp_path: Path
):
    assert wsi_rt("cache", "path").out == f"{own_cache}\n"
    assert json.loads(wsi_rt("cache", "list", "--json").out)["entries"] == []
    assert wsi_rt("encode", slide, "--engines", nano_bundle, "--out", tmp_path / "a.pt").code == 0
    told = json.loads(wsi_rt("cache", "list", "--json").out)
    assert [e["kind"] for e in told["entries"]] == ["tokens", "tiles"]
    assert told["bytes"] == sum(e["bytes"] for e in told["entries"])
    assert len({e["slide"] for e in told["entries"]}) == 1
    shown = wsi_rt("cache", "list")
    assert "tiles x 96" in shown.out
    assert "2 entries" in shown.err
    assert slide.stem not in shown.out + shown.err
    assert json.loads(wsi_rt("cache", "prune", "--older-than", "1h", "--json").out)["left"] == 2
    assert json.loads(wsi_rt("cache", "prune", "--max-bytes", "1M", "--json").out)["left"] == 1
    done = wsi_rt("cache", "prune", "--max-bytes", "0")
    assert (done.code, done.out) == (0, "")
    assert "0 entries left" in done.err
    for flags in (("--max-bytes", "lots"), ("--older-than", "yesterday")):
        assert wsi_rt("cache", "prune", *flags).code == 2
