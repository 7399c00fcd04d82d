"""From an input to an answer on a real bundle, through the Python API."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from threading import Event
from typing import Any

import h5py
import numpy as np
import pytest

import wsi_rt.runtime.slides.open as open_module
from wsi_rt.runtime import GenerationSettings, Pipeline, SlideSettings, encode, encode_slide
from wsi_rt.runtime.encode import Encoded
from wsi_rt.runtime.errors import FeatureFileError, InputError, WsiRtError
from wsi_rt.runtime.features import read_slide_tokens, write_slide_tokens, write_tile_features
from wsi_rt.runtime.llm.prompt import encode_prompt
from wsi_rt.runtime.pipeline import STAGES
from wsi_rt.runtime.slides import iter_tiles
from wsi_rt.runtime.types import Answer, Provenance, SlideTokens, TileFeatures, TileGrid

QUESTION = "Is there necrosis?"
GREEDY = GenerationSettings(max_new_tokens=16)
WIDTH = 96  # numbers per tile of the nano tile encoder


@pytest.fixture(scope="module")
def pipeline(nano_bundle: Path) -> Iterator[Pipeline]:
    with Pipeline.open(nano_bundle, threads=2) as opened:
        yield opened


@pytest.fixture(scope="module")
def encoded(pipeline: Pipeline, slide: Path) -> Encoded:
    return pipeline.encode(slide)


@pytest.fixture(scope="module")
def files(encoded: Encoded, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The slide's (.h5, .pt)."""
    folder = tmp_path_factory.mktemp("encoded")
    assert encoded.features is not None
    assert encoded.tokens is not None
    write_tile_features(folder / "slide.h5", encoded.features, name="slide")
    write_slide_tokens(folder / "slide.pt", encoded.tokens)
    return folder / "slide.h5", folder / "slide.pt"


def features_at(xy0: list[tuple[int, int]], size0: int = 256, width: int = WIDTH) -> TileFeatures:
    x = np.random.default_rng(0).standard_normal((len(xy0), width), np.float32)
    return TileFeatures(x, TileGrid(np.array(xy0, np.int64), size0), Provenance("test"))


def write_h5(path: Path, features: TileFeatures) -> Path:
    write_tile_features(path, features)
    return path


def same(a: Answer, b: Answer) -> bool:
    return (a.token_ids, a.text, a.stop_reason) == (b.token_ids, b.text, b.stop_reason)


# --- the same answer, whatever the input was stored as
def test_slide_features_and_tokens_give_the_same_answer(
    pipeline: Pipeline, slide: Path, files: tuple[Path, Path]
) -> None:
    first = pipeline.ask(slide, QUESTION, GREEDY)
    assert len(first.token_ids) == 16
    for path in files:
        assert same(pipeline.ask(path, QUESTION, GREEDY), first)
    assert same(pipeline.ask(str(slide), QUESTION, GREEDY), first)


def test_torch_reads_what_encode_wrote(files: tuple[Path, Path], encoded: Encoded) -> None:
    torch = pytest.importorskip("torch", reason="the export extra is missing")
    tensor = torch.load(files[1], weights_only=True)
    assert tensor.shape == (576, 1024)
    assert encoded.tokens is not None
    np.testing.assert_array_equal(tensor.numpy(), encoded.tokens.tokens)


@pytest.mark.parametrize("leading", [False, True], ids=["576", "1x576"])
def test_unpadded_tokens_equal_padded_ones(
    pipeline: Pipeline, encoded: Encoded, files: tuple[Path, Path], tmp_path: Path, leading: bool
) -> None:
    torch = pytest.importorskip("torch", reason="the export extra is missing")
    assert encoded.tokens is not None
    tokens = encoded.tokens.tokens
    assert not tokens[:, 768:].any()
    narrow = torch.from_numpy(tokens)[:, :768]  # a view into the wider storage
    path = tmp_path / "narrow.pt"
    torch.save(narrow[None] if leading else narrow, path)
    answer = pipeline.ask(path, QUESTION, GREEDY)
    assert same(answer, pipeline.ask(files[1], QUESTION, GREEDY))
    assert any("zero-padded from 768 to 1024" in note for note in answer.notes)


def test_shuffled_features_are_sorted_and_told(pipeline: Pipeline, files: tuple[Path, Path], tmp_path: Path) -> None:
    shuffled = tmp_path / "shuffled.h5"
    with h5py.File(files[0]) as source, h5py.File(shuffled, "w") as target:
        order = np.random.default_rng(0).permutation(len(source["coords"]))
        target["features"], target["coords"] = source["features"][:][order], source["coords"][:][order]
        target["coords"].attrs["patch_size_level0"] = source["coords"].attrs["patch_size_level0"]
    answer = pipeline.ask(shuffled, QUESTION, GREEDY)
    assert same(answer, pipeline.ask(files[0], QUESTION, GREEDY))
    assert any("sort" in note for note in answer.notes)


@pytest.mark.parametrize("threads", [1, 3])
def test_thread_count_changes_no_tiles(
    nano_bundle: Path, slide: Path, encoded: Encoded, files: tuple[Path, Path], pipeline: Pipeline, threads: int
) -> None:
    with Pipeline.open(nano_bundle, threads=threads) as other:
        again = other.encode(slide, tokens=False)
        assert again.tiles == {**encoded.tiles, "distinct_tokens": None}
        assert again.features is not None
        assert encoded.features is not None
        np.testing.assert_array_equal(again.features.grid.xy0, encoded.features.grid.xy0)
        np.testing.assert_allclose(again.features.x, encoded.features.x, rtol=1e-4, atol=1e-4)
        alone = other.ask(files[1], QUESTION, GREEDY)
    assert alone.settings["threads"] == threads
    assert same(alone, pipeline.ask(files[1], QUESTION, GREEDY))


@pytest.mark.parametrize(("threads", "readers"), [(1, 1), (2, 1), (3, 1), (4, 2)])
def test_half_of_the_threads_read(
    nano_bundle: Path, slide: Path, threads: int, readers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []

    def counted(*arguments: Any, threads: int, **options: Any) -> Iterator[Any]:
        seen.append(threads)
        return iter_tiles(*arguments, threads=threads, **options)

    monkeypatch.setattr(encode_slide, "iter_tiles", counted)
    with Pipeline.open(nano_bundle, threads=threads) as pipeline:
        pipeline.encode(slide, tokens=False)
    assert seen == [readers]


# --- many questions on one slide
def test_the_prefix_is_computed_once_and_changes_nothing(
    pipeline: Pipeline, encoded: Encoded, nano_bundle: Path
) -> None:
    """A longer answer before and a different question between must leave no trace in the shared KV."""
    questions = (QUESTION, "What is the grade of this tumour, and why?", QUESTION)
    shared = [pipeline.ask(encoded, q, GREEDY) for q in questions]
    assert [a.timings_ms["projector"] == 0 for a in shared[1:]] == [True, True]
    assert same(shared[0], shared[2])
    for question, answer in zip(questions[:2], shared[:2], strict=True):
        with Pipeline.open(nano_bundle, threads=2) as fresh:
            assert same(fresh.ask(encoded, question, GREEDY), answer)


def test_another_slide_and_another_template_get_their_own_prefix(pipeline: Pipeline, encoded: Encoded) -> None:
    assert encoded.tokens is not None
    other = replace(encoded, tokens=SlideTokens(-encoded.tokens.tokens, Provenance("test"), 1))
    first = pipeline.ask(encoded, QUESTION, GREEDY)
    assert not same(pipeline.ask(other, QUESTION, GREEDY), first)
    assert not same(pipeline.ask(encoded, QUESTION, replace(GREEDY, template="llava_v1")), first)
    assert same(pipeline.ask(encoded, QUESTION, GREEDY), first)


def test_a_longer_answer_gets_a_larger_kv(pipeline: Pipeline, encoded: Encoded) -> None:
    short = pipeline.ask(encoded, QUESTION, GREEDY)
    long = pipeline.ask(encoded, QUESTION, replace(GREEDY, max_new_tokens=64))
    assert long.token_ids[:16] == short.token_ids
    assert len(long.token_ids) == 64


# --- generation
def test_sampling_follows_the_seed(pipeline: Pipeline, encoded: Encoded) -> None:
    warm = replace(GREEDY, temperature=1.0, top_k=0)
    by_seed = {seed: pipeline.ask(encoded, QUESTION, replace(warm, seed=seed)) for seed in (0, 1, 2**64 - 1)}
    assert len({a.token_ids for a in by_seed.values()}) == 3
    assert same(pipeline.ask(encoded, QUESTION, replace(warm, seed=1)), by_seed[1])
    assert same(pipeline.ask(encoded, QUESTION, replace(warm, top_k=1)), pipeline.ask(encoded, QUESTION, GREEDY))


def test_streamed_pieces_join_to_the_text(pipeline: Pipeline, encoded: Encoded) -> None:
    pieces: list[str] = []
    answer = pipeline.ask(encoded, QUESTION, replace(GREEDY, max_new_tokens=100), on_text=pieces.append)
    assert "".join(pieces) == answer.text
    assert len(pieces) > 10
    assert all(pieces)


def test_cancelling_keeps_the_text_so_far(pipeline: Pipeline, encoded: Encoded) -> None:
    whole = pipeline.ask(encoded, QUESTION, replace(GREEDY, max_new_tokens=60))
    stop, pieces = Event(), []

    def on_text(piece: str) -> None:
        pieces.append(piece)
        if len(pieces) == 5:
            stop.set()

    answer = pipeline.ask(encoded, QUESTION, replace(GREEDY, max_new_tokens=60), on_text=on_text, cancel=stop)
    assert answer.stop_reason == "cancelled"
    assert 5 <= len(answer.token_ids) < 60
    assert answer.token_ids == whole.token_ids[: len(answer.token_ids)]
    assert answer.text == "".join(pieces)
    assert same(pipeline.ask(encoded, QUESTION, replace(GREEDY, max_new_tokens=60)), whole)


def test_a_stop_string_ends_and_trims_the_answer(pipeline: Pipeline, encoded: Encoded) -> None:
    whole = pipeline.ask(encoded, QUESTION, replace(GREEDY, max_new_tokens=30)).text
    mark = whole[len(whole) // 2 :][:4]
    answer = pipeline.ask(encoded, QUESTION, replace(GREEDY, max_new_tokens=30, stop=(mark,)))
    assert answer.stop_reason == "stop_string"
    assert answer.text == whole[: whole.index(mark)]


def test_an_answer_stops_at_the_end_of_the_context(pipeline: Pipeline, encoded: Encoded) -> None:
    question = "word " * 1100  # about 3,300 tokens of the nano tokenizer
    answer = pipeline.ask(encoded, question, replace(GREEDY, max_new_tokens=4000))
    assert answer.stop_reason == "length"
    prompt = encode_prompt(pipeline.bundle.tokenizer(), GREEDY.template, question)
    context = pipeline.bundle.component("llm").config["context"]
    assert len(answer.token_ids) == context - prompt.text_tokens - 576
    assert any("no more fit" in note for note in answer.notes)


# --- what an answer tells
def test_an_answer_tells_how_it_was_made(nano_bundle: Path, slide: Path) -> None:
    with Pipeline.open(nano_bundle, threads=2) as pipeline:
        answer = pipeline.ask(slide, QUESTION, GREEDY)
    assert tuple(answer.timings_ms) == STAGES
    assert all(answer.timings_ms[stage] > 0 for stage in STAGES)
    assert answer.tiles["kept"] == answer.tiles["distinct_tokens"]
    assert answer.tiles["failed"] == 0
    assert answer.settings["slide"]["position_tile"] == answer.settings["slide"]["patch_size_level0"]
    assert set(answer.engines) == set(pipeline.bundle.manifest.components)


def test_an_answer_tells_the_settings_its_slide_was_read_with(pipeline: Pipeline, slide: Path) -> None:
    settings = SlideSettings(target_mpp=1.0, mpp=0.48, position_tile=600)
    encoded = pipeline.encode(slide, settings)
    told = pipeline.ask(encoded, QUESTION, GREEDY).settings["slide"]
    assert {k: told[k] for k in ("target_mpp", "mpp", "mpp0", "position_tile")} == {
        "target_mpp": 1.0,
        "mpp": 0.48,
        "mpp0": 0.48,
        "position_tile": 600,
    }
    assert told == pipeline.ask(slide, QUESTION, GREEDY, settings).settings["slide"]


def test_settings_for_a_slide_that_is_read_already_are_refused(pipeline: Pipeline, encoded: Encoded) -> None:
    with pytest.raises(InputError, match=r"slide_settings given with .* encoded already: give them to encode\(\)"):
        pipeline.ask(encoded, QUESTION, GREEDY, SlideSettings())


def test_a_region_read_again_is_told(pipeline: Pipeline, slide: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    openslide = pytest.importorskip("openslide")
    read, failures = openslide.OpenSlide.read_region, [openslide.OpenSlideError("a moment of weakness")]

    def fails_once(self: Any, *arguments: Any) -> Any:
        if failures:
            raise failures.pop()
        return read(self, *arguments)

    monkeypatch.setattr(openslide.OpenSlide, "read_region", fails_once)
    in_this_process = replace(open_module._READERS["openslide"], apart=False)  # else the worker has its own openslide
    monkeypatch.setitem(open_module._READERS, "openslide", in_this_process)
    settings = SlideSettings(reader="openslide")
    assert "1 region was read again after an error" in pipeline.encode(slide, settings, tokens=False).notes
    assert not [n for n in pipeline.encode(slide, settings, tokens=False).notes if "again" in n]


@pytest.mark.parametrize(("precision", "advised"), [("fp32", False), ("int8", True)])
def test_values_that_are_not_finite_name_the_tile_and_what_helps(
    nano_bundle: Path, slide: Path, precision: str, advised: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Pipeline.open(nano_bundle, threads=2) as pipeline:
        engine = pipeline._engine("tile_encoder")
        targets = {name: replace(c, precision=precision) for name, c in engine.manifest.targets.items()}
        engine.manifest = replace(engine.manifest, targets=targets)
        monkeypatch.setattr(engine, "run", lambda _, outputs: outputs["features"].fill(np.nan))
        with pytest.raises(
            WsiRtError, match=r"tile \[\d+, \d+\] encodes to .* not finite .*`wsi-rt verify DIR`"
        ) as told:
            pipeline.encode(slide)
    assert ("--precision tile_encoder=fp32" in str(told.value)) == advised


def test_progress_reaches_the_end_of_every_stage(pipeline: Pipeline, slide: Path, encoded: Encoded) -> None:
    seen: dict[str, tuple[int, int]] = {}
    pipeline.encode(slide, on_progress=lambda stage, done, total: seen.__setitem__(stage, (done, total)))
    assert set(seen) == {"tissue", "tile encoder", "slide encoder"}
    assert all(done == total for done, total in seen.values())
    assert seen["tile encoder"][1] == encoded.tiles["kept"]


# --- positions
def test_the_position_divisor_matters_on_40x_coordinates(pipeline: Pipeline, tmp_path: Path) -> None:
    path = write_h5(tmp_path / "40x.h5", features_at([(x * 512, y * 512) for y in range(4) for x in range(5)], 512))
    own = pipeline.ask(path, QUESTION, GREEDY)
    published = pipeline.ask(path, QUESTION, GREEDY, SlideSettings(position_tile=256))
    assert own.settings["slide"]["position_tile"] == 512
    assert published.settings["slide"]["position_tile"] == 256
    tokens = [pipeline.encode(path, SlideSettings(position_tile=t)).tokens for t in (None, 512, 256)]
    assert all(t is not None for t in tokens)
    by_default, by_512, by_256 = (t.tokens for t in tokens if t is not None)
    np.testing.assert_array_equal(by_default, by_512)
    assert np.abs(by_default - by_256).max() > 1e-3


def test_the_divisor_is_recorded_in_token_files(pipeline: Pipeline, tmp_path: Path) -> None:
    path = write_h5(tmp_path / "40x.h5", features_at([(0, 0), (512, 0)], 512))
    tokens = pipeline.encode(path, SlideSettings(position_tile=256)).tokens
    assert tokens is not None
    write_slide_tokens(tmp_path / "40x.pt", tokens)
    assert read_slide_tokens(tmp_path / "40x.pt").provenance.settings["position_tile"] == 256
    answer = pipeline.ask(tmp_path / "40x.pt", QUESTION, GREEDY)
    assert answer.settings["slide"]["position_tile"] == 256


def test_tiles_that_share_a_position_are_counted_once(pipeline: Pipeline, tmp_path: Path) -> None:
    """The position decides, not the file's tile size; a note per encoding, with the divisor."""
    crowded = write_h5(
        tmp_path / "crowded.h5", features_at([(0, 0), (10, 0), (10, 0), (300, 0), (300, 300), (400, 300)])
    )
    for divisor, count in ((None, 3), (400, 4), (10, 1), (1, 1)):
        notes = [n for n in pipeline.encode(crowded, SlideSettings(position_tile=divisor)).notes if "share" in n]
        assert notes == [f"{count} of 6 tiles share a position with another tile (divisor {divisor or 256} px)"]
    apart = write_h5(tmp_path / "apart.h5", features_at([(0, 0), (256, 0)]))
    assert not [n for n in pipeline.encode(apart).notes if "share" in n]


def test_a_slides_tiles_may_share_positions_too(pipeline: Pipeline, slide: Path, encoded: Encoded) -> None:
    assert encoded.features is not None
    cells = encoded.features.grid.xy0 // 512
    shared = len(cells) - len({tuple(c) for c in cells.tolist()})
    assert shared > 0
    notes = pipeline.encode(slide, SlideSettings(position_tile=512)).notes
    assert f"{shared} of {len(cells)} tiles share a position with another tile (divisor 512 px)" in notes
    assert not [n for n in encoded.notes if "share" in n]


@pytest.mark.parametrize(("xy0", "fits"), [((999 * 256, 0), True), ((1000 * 256, 0), False), ((0, 256_000), False)])
def test_tiles_off_the_position_grid_are_refused(
    pipeline: Pipeline, tmp_path: Path, xy0: tuple[int, int], fits: bool
) -> None:
    path = write_h5(tmp_path / "large.h5", features_at([(0, 0), xy0]))
    if fits:
        assert pipeline.encode(path).tiles["kept"] == 2
        return
    with pytest.raises(InputError, match=r"1 tiles? lie"):
        pipeline.encode(path)
    assert pipeline.encode(path, SlideSettings(position_tile=512)).tiles["kept"] == 2


# --- what is refused, and what is told
def test_features_of_another_encoder_are_refused(pipeline: Pipeline, tmp_path: Path) -> None:
    path = write_h5(tmp_path / "wide.h5", features_at([(0, 0)], width=1536))
    with pytest.raises(FeatureFileError, match="1536 numbers each, this bundle's slide encoder takes 96"):
        pipeline.ask(path, QUESTION, GREEDY)


def test_numbers_of_another_checkpoint_are_refused(
    pipeline: Pipeline, encoded: Encoded, files: tuple[Path, Path], tmp_path: Path
) -> None:
    components = pipeline.bundle.manifest.components
    assert encoded.features is not None
    assert encoded.tokens is not None
    other = "f00d" * 16
    features = replace(encoded.features, provenance=Provenance("tile_encoder", other))
    write_tile_features(tmp_path / "other.h5", features)
    told = f"another tile_encoder (weights f00df00df00d) than this bundle's ({components['tile_encoder'].weights[:12]})"
    with pytest.raises(FeatureFileError, match=re.escape(told)) as caught:
        pipeline.ask(tmp_path / "other.h5", QUESTION, GREEDY)
    assert "other.h5" in str(caught.value)
    own = encoded.tokens.provenance
    for name, made_by in (
        ("slide_encoder", replace(own, digest=other)),
        ("tile_encoder", replace(own, settings={**own.settings, "tile_encoder": other})),
    ):
        tokens = replace(encoded.tokens, provenance=made_by)
        write_slide_tokens(tmp_path / "other.pt", tokens)
        for source in (tmp_path / "other.pt", replace(encoded, tokens=tokens)):
            with pytest.raises(FeatureFileError, match=f"another {name} .weights f00df00df00d"):
                pipeline.ask(source, QUESTION, GREEDY)


def test_other_makers_and_missing_components_are_not_compared(encoded: Encoded, pipeline: Pipeline) -> None:
    components = pipeline.bundle.manifest.components
    assert encoded.features is not None
    for made_by in (Provenance("external trident", "f00d"), Provenance("tile_encoder", "", {"source_digest": 3})):
        encode.require_own(replace(encoded, features=replace(encoded.features, provenance=made_by)), components, "x")
    foreign = replace(encoded, features=replace(encoded.features, provenance=Provenance("tile_encoder", "f00d")))
    encode.require_own(foreign, {k: v for k, v in components.items() if k != "tile_encoder"}, "x")
    with pytest.raises(FeatureFileError):
        encode.require_own(foreign, components, "x")


def test_an_input_encoded_without_tokens_cannot_be_asked(pipeline: Pipeline, files: tuple[Path, Path]) -> None:
    with pytest.raises(InputError, match="without slide tokens"):
        pipeline.ask(pipeline.encode(files[0], tokens=False), QUESTION, GREEDY)


def test_questions_are_refused_before_the_slide_is_read(pipeline: Pipeline, tmp_path: Path) -> None:
    for question, reason in (("<image>", "contains <image>"), (" ", "some text"), ("word " * 9000, "context of 4096")):
        with pytest.raises(InputError, match=reason):
            pipeline.ask(tmp_path / "missing.svs", question, GREEDY)


def test_features_that_do_not_say_their_tile_size(
    pipeline: Pipeline, files: tuple[Path, Path], encoded: Encoded, tmp_path: Path
) -> None:
    """The error names the flag, and the flag works."""
    path = tmp_path / "bare.h5"
    with h5py.File(files[0]) as source, h5py.File(path, "w") as target:
        for name in ("features", "coords"):
            target[name] = source[name][()]
    with pytest.raises(FeatureFileError, match="--patch-size-level0"):
        pipeline.encode(path)
    again = pipeline.encode(path, SlideSettings(patch_size_level0=256))
    assert again.tokens is not None
    assert encoded.tokens is not None
    assert np.array_equal(again.tokens.tokens, encoded.tokens.tokens)


def test_keep_order_leaves_the_order(pipeline: Pipeline, tmp_path: Path) -> None:
    path = write_h5(tmp_path / "columns.h5", features_at([(0, 0), (0, 256), (256, 0), (256, 256)]))
    kept, moved = (pipeline.encode(path, SlideSettings(keep_order=order)) for order in (True, False))
    assert kept.features is not None
    assert moved.features is not None
    assert kept.features.grid.order == "file"
    assert kept.features.grid.xy0.tolist() == [[0, 0], [0, 256], [256, 0], [256, 256]]
    assert moved.features.grid.xy0.tolist() == [[0, 0], [256, 0], [0, 256], [256, 256]]
    assert kept.tokens is not None
    assert moved.tokens is not None
    assert not np.array_equal(kept.tokens.tokens, moved.tokens.tokens)


def test_settings_without_effect_are_told(pipeline: Pipeline, files: tuple[Path, Path]) -> None:
    settings = SlideSettings(mpp=0.25, position_tile=512)
    features, tokens = (pipeline.encode(f, settings).notes for f in files)
    assert "--mpp given, but the input is a file of tile features: no effect" in features
    assert "--mpp, --position-tile given, but the input is a file of slide tokens: no effect" in tokens
    assert not [n for f in files for n in pipeline.encode(f).notes if "no effect" in n]


def test_a_closed_pipeline_opens_again(nano_bundle: Path, files: tuple[Path, Path]) -> None:
    pipeline = Pipeline.open(nano_bundle, threads=2)
    first = pipeline.ask(files[1], QUESTION, GREEDY)
    pipeline.close()
    pipeline.close()
    assert same(pipeline.ask(files[1], QUESTION, GREEDY), first)
    pipeline.close()
