"""Small components, their graphs, and checkpoints of the ecosystem's layouts written from them."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from wsi_rt.export.arch import ComponentConfig, LlamaConfig, LongNetConfig, ProjectorConfig, ViTConfig
from wsi_rt.export.sources.presets import PRESETS, Preset
from wsi_rt.export.sources.synthetic import SyntheticSource
from wsi_rt.export.sources.weights import F32, Derived, WeightSource

# Before torch is imported: its thread pool, fighting over few cores, makes tiny models twenty times slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")

SHARED = Path(__file__).resolve().parents[2].parent / "shared"

# Every part of the architecture, as small as it goes. Slide tokens are 64 wide, padded to 96.
TINY = Preset(
    tile_encoder=ViTConfig(
        width=32, depth=2, heads=2, mlp_hidden=48, mlp="swiglu_packed", act="silu", layer_scale=True
    ),
    slide_encoder=LongNetConfig(in_width=32, width=64, depth=2, heads=16, ffn=128, norm_width=64, padded=96),
    projector=ProjectorConfig(widths=(96, 48, 64)),
    llm=LlamaConfig(hidden=64, layers=2, heads=4, kv_heads=2, head_width=16, ffn=96, vocab=512, context=256),
)


class Changed(Derived):
    """Another source with some tensors replaced."""

    def __init__(self, source: WeightSource, tensors: Mapping[str, NDArray[Any]]) -> None:
        super().__init__(source)
        self.tensors = tensors

    def get(self, name: str) -> F32:
        return np.ascontiguousarray(self.tensors.get(name, self._source.get(name)), np.float32)


@pytest.fixture(scope="session")
def tiny() -> Preset:
    return TINY


@pytest.fixture
def tiny_preset(monkeypatch: pytest.MonkeyPatch) -> str:
    """`synthetic:tiny` for the length of a test."""
    monkeypatch.setitem(PRESETS, "tiny", TINY)
    return "synthetic:tiny"


@pytest.fixture(scope="session")
def changed() -> type[Changed]:
    return Changed


@pytest.fixture(scope="session")
def ort_run():
    """Run an ONNX file in onnxruntime on the CPU: (path, inputs) -> outputs by name."""

    def run(path: Path, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.log_severity_level, options.intra_op_num_threads = 3, 1
        options.add_session_config_entry("session.disable_quant_qdq", "1")  # fp32 products of dequantised weights
        session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        names = [o.name for o in session.get_outputs()]
        return dict(zip(names, session.run(names, dict(inputs)), strict=True))

    return run


def synthetic_tensors(config: ComponentConfig, seed: int) -> dict[str, F32]:
    source = SyntheticSource(config, "tiny", seed)
    return {name: source.get(name) for name in source.shapes()}


@dataclass
class CheckpointFolder:
    """`tile_encoder/`, `slide_encoder/` and `llava/` of TINY as the ecosystem stores them, ready to be spoilt."""

    root: Path
    preset: Preset = TINY
    seed: int = 5
    tensors: dict[str, dict[str, F32]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.tensors = {name: synthetic_tensors(config, self.seed) for name, config in self.preset.components().items()}

    @property
    def tile(self) -> Path:
        return self.root / "tile_encoder"

    @property
    def slide(self) -> Path:
        return self.root / "slide_encoder"

    @property
    def llava(self) -> Path:
        return self.root / "llava"

    def write(self) -> CheckpointFolder:
        self.write_tile()
        self.write_slide()
        self.write_llava()
        return self

    def write_tile(self, **model_args: Any) -> None:
        from wsi_rt.export.layouts.configs import timm_json

        config = timm_json(self.preset.tile_encoder)
        self.write_json(self.tile / "config.json", config | {"model_args": config["model_args"] | model_args})
        self.save(self.tile / "model.safetensors", self.tensors["tile_encoder"])

    def write_slide(self, **config: Any) -> None:
        if config:
            self.write_json(self.slide / "config.json", config)
        self.save(self.slide / "slide_encoder.safetensors", self.tensors["slide_encoder"])

    def llama_json(self) -> dict[str, Any]:
        """What a merged LLaVA release's config.json holds, its wrong mm_hidden_size included."""
        from wsi_rt.export.layouts.configs import llava_json

        return llava_json(self.preset.llm, self.preset.projector) | {"mm_hidden_size": 512}

    def write_llava(self, **changes: Any) -> None:
        """Merged: two shards and an index, CLIP's weights among them."""
        extras = {
            "model.vision_tower.vision_tower.vision_model.embeddings.class_embedding": np.ones(4, np.float32),
            "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32),
        }
        self.write_base(self.llava, {**self.tensors["projector"], **extras}, **changes)

    def write_base(self, folder: Path, more: Mapping[str, F32] = {}, **changes: Any) -> None:
        """A language-model folder: config.json, two shards, index, tokenizer."""
        from wsi_rt.export.tokenizer import synthetic_tokenizer

        self.write_json(folder / "config.json", {**self.llama_json(), **changes})
        everything = {**self.tensors["llm"], **more}
        names = list(everything)
        parts = {f"model-0000{i + 1}-of-00002.safetensors": names[i::2] for i in range(2)}
        for file, part in parts.items():
            self.save(folder / file, {n: everything[n] for n in part})
        index = {"metadata": {"total_size": 0}, "weight_map": {n: file for file, part in parts.items() for n in part}}
        self.write_json(folder / "model.safetensors.index.json", index)
        synthetic_tokenizer(folder, self.preset.llm.vocab)

    @staticmethod
    def write_json(path: Path, data: Any) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(data))

    @staticmethod
    def save(path: Path, tensors: Mapping[str, NDArray[Any]]) -> None:
        from safetensors.numpy import save_file

        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: np.ascontiguousarray(x) for name, x in tensors.items()}, str(path))


@pytest.fixture(scope="session")
def _checkpoint_template(tmp_path_factory: pytest.TempPathFactory) -> CheckpointFolder:
    pytest.importorskip("safetensors", reason="the export extra is not installed")
    return CheckpointFolder(tmp_path_factory.mktemp("template") / "checkpoint").write()


@pytest.fixture
def checkpoint(_checkpoint_template: CheckpointFolder, tmp_path: Path) -> CheckpointFolder:
    """A fresh copy of every folder."""
    root = shutil.copytree(_checkpoint_template.root, tmp_path / "checkpoint")
    return CheckpointFolder(root)
