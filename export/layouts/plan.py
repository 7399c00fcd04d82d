"""`wsi-rt synth-checkpoint`: which files a layout has, how large they are, and the writing of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from wsi_rt.export.layouts.configs import adapter_json, llama_json, llava_json, longnet_json, timm_json
from wsi_rt.export.layouts.lora_split import TARGETS, alpha_for, rank_for, split
from wsi_rt.export.layouts.writers import DTYPES, Piece, index_of, shards
from wsi_rt.export.sources.presets import PRESETS, Preset
from wsi_rt.export.sources.synthetic import SyntheticSource, uniform
from wsi_rt.export.sources.weights import F32, Overlay, Renamed, WeightSource
from wsi_rt.export.tokenizer import synthetic_tokenizer
from wsi_rt.runtime.atomic import is_vacant
from wsi_rt.runtime.errors import InputError
from wsi_rt.runtime.staging import require_room, staged_directory

SHARD_BYTES = 2_000_000_000  # a .bin shard is in memory while it is written
LLAVA, BASE = "llava", "llava_base"
_UNUSED = {  # a merged release holds these too; no component takes them (SPEC 6)
    "model.vision_tower.vision_tower.vision_model.embeddings.class_embedding": (8,),
    "model.vision_tower.vision_tower.vision_model.post_layernorm.weight": (8,),
    "model.layers.0.self_attn.rotary_emb.inv_freq": (4,),
}


@dataclass(frozen=True)
class LayoutPlan:
    """The files to write below `out`; nothing is generated yet."""

    out: Path
    dtype: str
    pieces: tuple[Piece, ...]
    texts: Mapping[str, Any]  # JSON files by path
    tokenizers: Mapping[str, int]  # folder -> vocabulary

    @property
    def stored_bytes(self) -> int:
        """Of the weights; the configuration and the tokenizer add about 2 MB."""
        return sum(piece.stored_bytes(DTYPES[self.dtype]) for piece in self.pieces)


def plan_layout(
    preset: str, seed: int, layout: str, out: Path, dtype: str = "fp32", shard_bytes: int | None = None
) -> LayoutPlan:
    """The weights of `synthetic:<preset>?seed=N` in a published layout: whichever it is, the model read back from it is
    the same to the last bit (of `dtype`).

    `shard_bytes` (default: two shards or more, of 2 GB at most) bounds a shard of the language model. Raises
    InputError: an unknown preset, layout or dtype, or an `out` that holds something.
    """
    for what, given, known in (("preset", preset, PRESETS), ("layout", layout, LAYOUTS), ("dtype", dtype, DTYPES)):
        if given not in known:
            raise InputError(f"--{what} is {given!r}, expected one of: {', '.join(known)}")
    if not 0 <= seed < 10**18:
        raise InputError(f"--seed is {seed}, expected a whole number from 0 to 10^18 - 1")
    _require_empty(out)
    return _Files(PRESETS[preset], preset, seed, dtype, shard_bytes).plan(layout, out)


def write_layout(plan: LayoutPlan, on_file: Callable[[str], None] = lambda _: None) -> None:
    """Write aside and rename: `plan.out` is there whole or not at all. One tensor is in memory at a time, or one
    `.bin` or `.pth` file. MachineError: no room."""
    require_room(plan.out, plan.stored_bytes, "the checkpoint needs")
    with staged_directory(plan.out, _require_empty) as work:
        for piece in plan.pieces:
            on_file(piece.path)
            piece.write(work, DTYPES[plan.dtype])
        for path, data in plan.texts.items():
            (work / path).parent.mkdir(parents=True, exist_ok=True)
            (work / path).write_text(json.dumps(data, indent=2) + "\n")
        for folder, vocab in plan.tokenizers.items():
            on_file(f"{folder}/tokenizer.json")
            synthetic_tokenizer(work / folder, vocab)


def _require_empty(out: Path) -> None:
    if not is_vacant(out):
        raise InputError(f"{out}: exists and is not empty, expected a new folder; choose another --out")


class _Unused(WeightSource):
    """Tensors of a merged release that no component takes."""

    label = "unused"

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return dict(_UNUSED)

    def get(self, name: str) -> F32:
        return np.ascontiguousarray(uniform(self._seed, name, _UNUSED[name][0], 0.5, 1.5))

    def digest(self) -> str:
        return str(self._seed)


class _Files:
    """The pieces that layouts are put together from."""

    def __init__(self, preset: Preset, name: str, seed: int, dtype: str, shard_bytes: int | None) -> None:
        self._preset, self._seed, self._dtype, self._most = preset, seed, dtype, shard_bytes
        configs = preset.components()
        self._sources = {n: SyntheticSource(c, name, seed) for n, c in configs.items()}
        self._pieces: list[Piece] = []
        self._texts: dict[str, Any] = {}
        self._tokenizers: dict[str, int] = {}

    def plan(self, layout: str, out: Path) -> LayoutPlan:
        LAYOUTS[layout](self)
        tile = "pytorch_model.bin" if layout == "merged-bin" else "model.safetensors"
        self._pieces.append(Piece(f"tile_encoder/{tile}", self._sources["tile_encoder"]))
        self._texts["tile_encoder/config.json"] = timm_json(self._preset.tile_encoder)
        self._pieces.append(Piece("slide_encoder/slide_encoder.pth", self._sources["slide_encoder"], wrapper="model"))
        settings = longnet_json(self._preset.slide_encoder)
        if settings:
            self._texts["slide_encoder/config.json"] = settings
        return LayoutPlan(out, self._dtype, tuple(self._pieces), self._texts, self._tokenizers)

    def merged(self) -> None:
        self._merged("model", ".safetensors")

    def merged_bin(self) -> None:
        self._merged("pytorch_model", ".bin")

    def _merged(self, stem: str, suffix: str) -> None:
        everything = Overlay(self._sources["llm"], self._sources["projector"], _Unused(self._seed))
        self._shards(LLAVA, stem, suffix, everything)
        self._texts[f"{LLAVA}/config.json"] = llava_json(self._preset.llm, self._preset.projector)
        self._tokenizers[LLAVA] = self._preset.llm.vocab

    def projector(self) -> None:
        """Stage 2's projector over its base."""
        self._base(self._sources["llm"])
        self._pieces.append(Piece(f"{LLAVA}/mm_projector.bin", self._sources["projector"]))

    def lora(self) -> None:
        """Stage 3's adapter and projector over their base."""
        llm = self._preset.llm
        base, adapter = split(self._sources["llm"], llm, DTYPES[self._dtype])
        self._base(base)
        self._pieces.append(Piece(f"{LLAVA}/adapter_model.safetensors", adapter))
        trained = Renamed(self._sources["projector"], lambda n: f"base_model.model.{n}")
        self._pieces.append(Piece(f"{LLAVA}/non_lora_trainables.bin", trained))
        self._texts[f"{LLAVA}/adapter_config.json"] = adapter_json(
            rank_for(llm), alpha_for(llm), list(TARGETS), f"../{BASE}"
        )
        self._texts[f"{LLAVA}/config.json"] = llava_json(llm, self._preset.projector)

    def _base(self, source: WeightSource) -> None:
        self._shards(BASE, "model", ".safetensors", source)
        self._texts[f"{BASE}/config.json"] = llama_json(self._preset.llm)
        self._tokenizers[BASE] = self._preset.llm.vocab

    def _shards(self, folder: str, stem: str, suffix: str, source: WeightSource) -> None:
        dtype = DTYPES[self._dtype]
        half = -(-Piece("", source).stored_bytes(dtype) // 2)
        pieces = shards(folder, stem, suffix, source, self._most or min(SHARD_BYTES, half), dtype)
        self._pieces += pieces
        self._texts[f"{folder}/{stem}{suffix}.index.json"] = index_of(pieces, dtype)


LAYOUTS: Mapping[str, Callable[[_Files], None]] = {
    "merged": _Files.merged,
    "merged-bin": _Files.merged_bin,
    "lora": _Files.lora,
    "projector": _Files.projector,
}
