"""Slide tokens: references made with each known difference are told by its name; honest ones are accepted."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from wsi_rt.runtime import Pipeline
from wsi_rt.runtime.accept.reference import tile_count
from wsi_rt.runtime.features import write_tensor, write_tile_features
from wsi_rt.runtime.manifest import load_manifest
from wsi_rt.runtime.types import TileFeatures

Run = Callable[..., Any]
SIZE0 = 512  # as in conftest


def in_order(features: TileFeatures, order: np.ndarray) -> TileFeatures:
    return replace(features, x=features.x[order], grid=replace(features.grid, xy0=features.grid.xy0[order]))


COLUMN_MAJOR = "column-major order"
SHUFFLED = np.random.default_rng(7).permutation
ORDERS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    COLUMN_MAJOR: lambda xy: np.lexsort((xy[:, 1], xy[:, 0])),
    "reversed order": lambda xy: np.arange(len(xy))[::-1],
    "file-name order": lambda xy: np.array(sorted(range(len(xy)), key=lambda i: f"{xy[i, 0]}_{xy[i, 1]}")),
}


@pytest.fixture
def judge(wsi_rt: Run, nano_bundle: Path, tmp_path: Path) -> Callable[..., tuple[int, dict[str, Any]]]:
    """judge(reference tokens, features, *flags) -> (exit code, the JSON report)."""

    def call(
        reference: np.ndarray, features: TileFeatures, *flags: object, engines: Path = nano_bundle
    ) -> tuple[int, dict[str, Any]]:
        write_tensor(tmp_path / "REF.pt", reference)
        write_tile_features(tmp_path / "tiles.h5", features)
        files = ("--features", tmp_path / "REF.pt", "--slide", tmp_path / "tiles.h5")
        result = wsi_rt("accept", "--engines", engines, *files, "--threads", 1, "--json", *flags)
        assert result.code in (0, 5), result.err
        return result.code, json.loads(result.out)

    return call


@lru_cache(maxsize=2)
def torch_encoder(seed: int) -> Any:
    pytest.importorskip("torch", reason="the export extra is missing")
    from wsi_rt.export.models import reference_model
    from wsi_rt.export.sources.checkpoint import Sources, resolve

    part = resolve(Sources(checkpoint=f"synthetic:nano?seed={seed}")).parts["slide_encoder"]
    return reference_model(part.config, part.source)


def states_of(features: TileFeatures, seed: int = 0) -> tuple[Any, np.ndarray, np.ndarray]:
    """The fp32 torch slide encoder of this seed: (module, states [N + 1, C], tokens)."""
    module = torch_encoder(seed)
    import torch

    with torch.inference_mode():
        out = module(torch.from_numpy(features.x), torch.from_numpy(features.grid.xy0 // SIZE0))
    return module, out["encoder_out"].numpy(), out["tokens"].numpy()


def pooled_by_torch(states: np.ndarray) -> Any:
    torch = pytest.importorskip("torch", reason="the export extra is missing")
    x = torch.from_numpy(states).T[None]
    return torch.nn.functional.adaptive_avg_pool1d(x, 576)[0].T


@pytest.mark.parametrize("stored", ["as written", "unpadded", "leading 1", "fp16", "fp16 unpadded"])
@pytest.mark.parametrize("count", [54, 700], ids="N{}".format)
def test_honest_tokens_are_accepted(judge: Run, encode: Run, stored: str, count: int, tiles: Run) -> None:
    features = tiles(count)
    reference = encode(features)
    reference = reference[:, :768] if "unpadded" in stored else reference
    reference = reference.astype(np.float16) if "fp16" in stored else reference
    code, report = judge(reference[None] if stored == "leading 1" else reference, features)
    assert (code, report["verdict"]) == (0, "accept"), report["text"]
    assert report["tokens"]["as_run"]["agreeing"] == 576
    assert report["tokens"]["tried"] == []
    assert report["reference"]["storage"] == ("fp16" if "fp16" in stored else "fp32")
    assert report["reference"]["tiles"] == (54 if count == 54 else None)


def test_tokens_of_fp32_torch_are_accepted(judge: Run, tiles: Run) -> None:
    features = tiles(300)
    code, report = judge(states_of(features)[2], features)
    assert (code, report["text"]) == (0, "accept")


@pytest.mark.parametrize("name", list(ORDERS))
@pytest.mark.parametrize("count", [200, 600], ids="N{}".format)
def test_another_order_is_told(judge: Run, encode: Run, name: str, count: int, tiles: Run) -> None:
    features = tiles(count)
    code, report = judge(encode(in_order(features, ORDERS[name](features.grid.xy0))), features)
    assert code == 5
    assert report["tokens"]["explained_by"] == [name]
    assert report["verdict"] == "accept with these differences"
    assert report["reference"]["verdict"] == "accept"


def test_file_order_is_told_and_its_flag_agrees(judge: Run, encode: Run, tiles: Run) -> None:
    shuffled = in_order(tiles(700), SHUFFLED(700))
    reference = encode(shuffled)
    code, report = judge(reference, shuffled)
    assert (code, report["tokens"]["explained_by"]) == (5, ["file order"])
    assert "--keep-order" in report["text"]
    assert judge(reference, shuffled, "--keep-order")[0] == 0


def test_the_divisor_is_told_and_its_flag_agrees(judge: Run, encode: Run, tiles: Run) -> None:
    features = tiles(700)
    reference = encode(features, position_tile=256)
    code, report = judge(reference, features)
    assert (code, report["tokens"]["explained_by"]) == (5, ["divisor 256"])
    assert "--position-tile 256" in report["text"]
    assert judge(reference, features, "--position-tile", 256)[0] == 0


def test_order_and_divisor_together_are_told(judge: Run, encode: Run, tiles: Run) -> None:
    features = tiles(200)
    columns = in_order(features, ORDERS[COLUMN_MAJOR](features.grid.xy0))
    code, report = judge(encode(columns, position_tile=256).astype(np.float16), features)
    assert (code, set(report["tokens"]["explained_by"])) == (5, {COLUMN_MAJOR, "divisor 256"})


def test_swapped_coordinates_are_told(judge: Run, encode: Run, tiles: Run) -> None:
    features = tiles(200)
    swapped = replace(features, grid=replace(features.grid, xy0=features.grid.xy0[:, ::-1].copy()))
    code, report = judge(encode(swapped), features)
    assert (code, report["tokens"]["explained_by"]) == (5, ["coordinates (y, x)"])


@pytest.mark.parametrize("name", ["missing norm", "fresh norm", "padded before a fresh norm"])
def test_what_follows_the_encoder_is_told(judge: Run, name: str, tiles: Run) -> None:
    torch = pytest.importorskip("torch", reason="the export extra is missing")
    features = tiles(200)
    states = states_of(features)[1]
    x = pooled_by_torch(states[1:])
    norm = torch.nn.functional.layer_norm
    with torch.inference_mode():
        padded = torch.nn.functional.pad(x, (0, 256))
        made = {
            "missing norm": lambda: x,
            "fresh norm": lambda: norm(x, (768,), eps=1e-6),
            "padded before a fresh norm": lambda: norm(padded, (1024,), eps=1e-6),
        }[name]()
    code, report = judge(made.numpy(), features)
    assert (code, report["tokens"]["explained_by"]) == (5, [name])
    assert report["verdict"] == "accept with these differences"
    if name == "padded before a fresh norm":
        assert report["reference"]["padding_is_zero"] is False


def test_half_precision_arithmetic_is_told(judge: Run, tiles: Run) -> None:
    torch = pytest.importorskip("torch", reason="the export extra is missing")
    features = tiles(100)
    module, _, _ = states_of(features)
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        out = module(torch.from_numpy(features.x), torch.from_numpy(features.grid.xy0 // SIZE0))["tokens"]
    code, report = judge(out.float().numpy(), features)
    assert (code, report["verdict"]) == (5, "accept with these differences")
    assert "half-precision" in report["text"]
    assert report["tokens"]["explained_by"] == []


def test_another_checkpoint_is_not_accepted(judge: Run, tiles: Run) -> None:
    features = tiles(200)
    code, report = judge(states_of(features, seed=1)[2], features)
    assert (code, report["verdict"]) == (5, "do not accept")
    assert "tile encoder or checkpoint" in report["text"]
    assert report["tokens"]["as_run"]["agreeing"] == 0


@pytest.mark.parametrize(
    ("theirs", "words"), [(50, "2 times fewer"), (199, "made of 199 tiles"), (300, "more than 288")]
)
def test_another_tile_set_is_told_by_its_size(judge: Run, encode: Run, theirs: int, words: str, tiles: Run) -> None:
    features = tiles(200)
    code, report = judge(encode(in_order(tiles(theirs) if theirs > 200 else features, np.arange(theirs))), features)
    assert (code, report["verdict"]) == (5, "do not accept")
    assert words in report["text"]
    assert report["reference"]["verdict"] == "accept"  # the same norm made it


def test_a_slide_is_encoded_once(
    wsi_rt: Run, nano_bundle: Path, synth_slide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from wsi_rt.runtime import stored as module

    flags = ("--engines", nano_bundle, "--threads", 1)
    assert wsi_rt("encode", synth_slide, *flags, "--out", tmp_path / "a.pt", "--position-tile", 300).code == 0
    runs = []
    encode_chosen = module.encode_chosen
    monkeypatch.setattr(module, "encode_chosen", lambda *a: runs.append(a[0]) or encode_chosen(*a))
    compare = ("accept", "--features", tmp_path / "a.pt", "--slide", synth_slide, *flags)
    result = wsi_rt(*compare)
    assert (result.code, len(runs)) == (5, 1)
    assert "with column-major order: 0 agree" in result.out
    assert "do not accept" in result.out.splitlines()[-1]
    assert "no known difference" in result.out
    assert wsi_rt(*compare, "--position-tile", 300).code == 0


def test_repeated_tokens_tell_how_many_tiles_there_were() -> None:
    for count in (*range(1, 577, 7), 287, 288, 289, 576):
        x = np.random.default_rng(count).standard_normal((count, 2))
        assert tile_count(pooled_by_torch(x).numpy()) == (count if count <= 288 else None)


def test_a_norm_is_not_read_into_unrelated_tokens(judge: Run, encode: Run, tiles: Run) -> None:
    """A weight and a bias per column are fitted: to tokens of other tiles that must not come near."""
    features = tiles(200)
    other = replace(features, x=np.random.default_rng(1).permutation(features.x))
    code, report = judge(encode(other), features)
    assert (code, report["verdict"]) == (5, "do not accept")
    tried = {t["name"]: t for t in report["tokens"]["tried"]}
    assert tried["missing norm"]["median_error"] > 0.5


# --- reduced precision
@pytest.mark.parametrize("count", [54, 700], ids="N{}".format)
def test_an_int8_slide_encoder_is_named_and_nothing_else(
    judge: Run, encode: Run, tiles: Run, reduced_bundle: Path, count: int
) -> None:
    features = tiles(count)
    code, report = judge(encode(features), features, engines=reduced_bundle)
    assert (code, report["verdict"]) == (5, "accept with these differences")
    assert "--precision slide_encoder=fp32 would tell" in report["text"]
    for other in ("half-precision", "a few tiles", "tile_encoder", "order", "divided"):
        assert other not in report["text"]
    assert report["tokens"]["as_run"]["agreeing"] == 576
    assert report["tokens"]["as_run"]["closeness"] == "rounded"
    encoder = load_manifest(reduced_bundle).components["slide_encoder"]
    measured = encoder.rounding["outputs"]["max_rel"] + encoder.compiled("ort-cpu").parity["engine"]["max_rel"]
    assert report["tokens"]["gate"]["max_rel"] == pytest.approx(2 * measured + 5e-5)


def test_an_int8_slide_encoder_does_not_hide_another_setting(
    judge: Run, encode: Run, tiles: Run, reduced_bundle: Path
) -> None:
    features = tiles(200)
    code, report = judge(encode(features, position_tile=256), features, engines=reduced_bundle)
    assert (code, report["tokens"]["explained_by"]) == (5, ["divisor 256"])
    assert "--precision slide_encoder=fp32 would tell" in report["text"]
    code, report = judge(states_of(features, seed=1)[2], features, engines=reduced_bundle)
    assert (code, report["verdict"]) == (5, "do not accept")


def test_tokens_of_the_same_int8_encoder_are_accepted(
    judge: Run, tiles: Run, reduced_bundle: Path, tmp_path: Path
) -> None:
    write_tile_features(tmp_path / "own.h5", tiles(100))
    with Pipeline.open(reduced_bundle, threads=1) as reduced:
        own = reduced.encode(tmp_path / "own.h5").tokens
    assert own is not None
    assert judge(own.tokens, tiles(100), engines=reduced_bundle)[0] == 0


@pytest.mark.parametrize("given", ["slide", "features"])
@pytest.mark.parametrize("judged_by", ["fp32", "reduced"])
def test_an_int8_tile_encoder_is_named(
    wsi_rt: Run, nano_bundle: Path, reduced_bundle: Path, synth_slide: Path, tmp_path: Path, given: str, judged_by: str
) -> None:
    """The slide encoded by an int8 tile encoder, or features that one made; with fp32 features no word of it."""
    reference, features = tmp_path / "REF.pt", tmp_path / "tiles.h5"
    assert wsi_rt("encode", synth_slide, "--engines", nano_bundle, "--out", reference).code == 0
    assert wsi_rt("encode", synth_slide, "--engines", reduced_bundle, "--out", features).code == 0
    engines = nano_bundle if judged_by == "fp32" else reduced_bundle
    slide = synth_slide if given == "slide" else features
    result = wsi_rt("accept", "--engines", engines, "--features", reference, "--slide", slide, "--json")
    report = json.loads(result.out)
    rounded = {"slide_encoder"} if judged_by == "reduced" else set()
    rounded |= {"tile_encoder"} if given == "features" or judged_by == "reduced" else set()
    assert set(report["tokens"]["reduced_precision"]) == rounded
    assert (result.code, report["verdict"]) == ((5, "accept with these differences") if rounded else (0, "accept"))
    for name in ("tile_encoder", "slide_encoder"):
        assert (f"--precision {name}=fp32 would tell" in report["text"]) == (name in rounded)
    assert "half-precision" not in report["text"]
