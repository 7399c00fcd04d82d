"""What the tests of `accept` share: tiles of a made-up slide, our own tokens of them, bundles of reduced precision."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from wsi_rt.runtime import Pipeline, SlideSettings
from wsi_rt.runtime.features import write_tile_features
from wsi_rt.runtime.types import Provenance, TileFeatures, TileGrid

WIDTH = 96  # numbers per tile of the nano tile encoder
SIZE0 = 512  # level-0 px of a tile: 40x, where the divisor matters


@pytest.fixture(scope="session")
def tiles() -> Callable[[int], TileFeatures]:
    """tiles(count): of a made-up 40x slide, in row-major order, with gaps."""

    def call(count: int) -> TileFeatures:
        rng, side = np.random.default_rng(count), int(count**0.5 * 1.3) + 2
        cells = np.sort(rng.permutation(side * side)[:count])
        xy0 = np.stack([cells % side, cells // side], axis=1).astype(np.int64) * SIZE0
        x = rng.standard_normal((count, WIDTH)).astype(np.float32)
        return TileFeatures(x, TileGrid(xy0, SIZE0), Provenance("test"))

    return call


@pytest.fixture(scope="module")
def pipeline(nano_bundle: Path) -> Iterator[Pipeline]:
    with Pipeline.open(nano_bundle, threads=1) as opened:
        yield opened


@pytest.fixture(scope="module")
def encode(pipeline: Pipeline, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., np.ndarray]:
    """encode(features, **settings) -> [576, 1024]: our tokens of tiles in the order given."""
    folder = tmp_path_factory.mktemp("encode")

    def call(features: TileFeatures, **settings: Any) -> np.ndarray:
        write_tile_features(folder / "tiles.h5", features)
        encoded = pipeline.encode(folder / "tiles.h5", SlideSettings(keep_order=True, **settings))
        assert encoded.tokens is not None
        return encoded.tokens.tokens

    return call


@pytest.fixture(scope="session")
def reduced_bundle(export_extra: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """synthetic:nano?seed=0 with int8 encoders and an int4 language model."""
    from wsi_rt.runtime.cli import run

    bundle = tmp_path_factory.mktemp("bundle") / "reduced"
    flags = ["--checkpoint", "synthetic:nano?seed=0", "--precision", "tile_encoder=int8,slide_encoder=int8,llm=int4"]
    assert run(["build-engines", *flags, "--out", str(bundle)]) == 0
    return bundle
