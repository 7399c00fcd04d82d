"""Small components of every kind, and their sources in half precision."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="the export extra is not installed")
pytest.importorskip("onnx", reason="the export extra is not installed")

from wsi_rt.export.arch import LlamaConfig, LongNetConfig, ProjectorConfig, ViTConfig
from wsi_rt.export.graphs.builder import WeightFile
from wsi_rt.export.graphs.layers import Style
from wsi_rt.export.graphs.write import Component, write_graphs
from wsi_rt.export.sources.synthetic import SyntheticSource

# Narrow: half precision is slow on a CPU.
SMALL = {
    "tile_encoder": ViTConfig(
        width=32, depth=2, heads=2, mlp_hidden=48, mlp="swiglu_packed", act="silu", layer_scale=True
    ),
    "slide_encoder": LongNetConfig(in_width=32, width=64, depth=2, heads=4, ffn=128, norm_width=64, padded=96),
    "projector": ProjectorConfig((96, 48, 64)),
    "llm": LlamaConfig(hidden=64, layers=2, heads=4, kv_heads=2, head_width=16, ffn=96, vocab=101, context=96),
}


@pytest.fixture(scope="session")
def small() -> dict[str, Any]:
    return SMALL


@pytest.fixture(scope="session")
def open_small() -> Callable[..., Component]:
    """(config, empty folder) -> the component from synthetic weights, its portable graphs written."""

    def make(config: Any, folder: Path) -> Component:
        folder.mkdir(parents=True, exist_ok=True)
        source = SyntheticSource(config, "test", 1)
        component = Component(config, source, WeightFile(folder / "weights.data"), lambda _: None)
        write_graphs(component, folder, Style())
        return component

    return make
