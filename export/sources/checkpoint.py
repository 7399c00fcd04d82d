"""What `--checkpoint`, `--tile-encoder`, `--slide-encoder` and `--llava` name -> components with weights."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import parse_qsl

from wsi_rt.export.arch import LongNetConfig, ProjectorConfig
from wsi_rt.export.sources.llava import load_llava
from wsi_rt.export.sources.longnet import load_slide_encoder
from wsi_rt.export.sources.presets import PRESETS
from wsi_rt.export.sources.synthetic import SyntheticSource
from wsi_rt.export.sources.timm_vit import load_timm_directory
from wsi_rt.export.sources.weights import Part, check_tensors
from wsi_rt.runtime.errors import CheckpointError
from wsi_rt.runtime.hashing import sha256_json

TILE, SLIDE, PROJECTOR, LLM = "tile_encoder", "slide_encoder", "projector", "llm"


@dataclass(frozen=True)
class Checkpoint:
    """Components by name; `tokenizer` is a path, or None for the synthetic one. `sources` are the words it was asked
    for by, with the base that an adapter names itself: they ask for the same from any folder, once made absolute."""

    parts: Mapping[str, Part]
    tokenizer: Path | None
    synthetic: bool
    sources: Sources

    @property
    def digest(self) -> str:
        return sha256_json({name: part.source.digest() for name, part in self.parts.items()})

    @property
    def label(self) -> str:
        return ", ".join(dict.fromkeys(part.source.label for part in self.parts.values()))


@dataclass(frozen=True)
class Sources:
    """The command line's words. `checkpoint` is `synthetic:<preset>?seed=N` or a folder that holds
    `tile_encoder/`, `slide_encoder/` and `llava/` (and `llava_base/` where `llava/` is an adapter or a projector)."""

    checkpoint: str | None = None
    tile_encoder: str | None = None
    slide_encoder: str | None = None
    llava: str | None = None
    llava_base: str | None = None
    tokenizer: str | None = None

    def arguments(self) -> str:
        """The flags that name these sources, for the command that rebuilds a bundle."""
        given = {k.replace("_", "-"): v for k, v in vars(self).items() if v is not None}
        return " ".join(f"--{flag} {shlex.quote(value)}" for flag, value in given.items())


def resolve(sources: Sources) -> Checkpoint:
    """Open every source and check every tensor's name and shape; loads no weights.

    Raises CheckpointError naming what is missing, unexpected, misshapen or unsupported.
    """
    asked, sources = sources, _expand(sources)
    parts: dict[str, Part] = {}
    tokenizer = Path(sources.tokenizer) if sources.tokenizer else None
    synthetic = False
    for name, word in (("tile_encoder", sources.tile_encoder), ("slide_encoder", sources.slide_encoder)):
        if word:
            synthetic |= word.startswith("synthetic:")
            parts[name] = _synthetic(word, name) if word.startswith("synthetic:") else _encoder(name, Path(word))
    if sources.llava and sources.llava.startswith("synthetic:"):
        synthetic = True
        parts |= {name: _synthetic(sources.llava, name) for name in (PROJECTOR, LLM)}
        if sources.llava_base:
            raise CheckpointError(
                f"--llava-base {sources.llava_base} goes with a LoRA adapter or projector weights, not with "
                f"{sources.llava}; leave it out"
            )
    elif sources.llava:
        base = Path(sources.llava_base) if sources.llava_base else None
        llava = load_llava(Path(sources.llava), base)
        parts |= llava.parts
        tokenizer = tokenizer or llava.tokenizer
        if base is None and llava.base is not None:  # found where the adapter says, from where we stand
            asked = replace(asked, llava_base=str(llava.base))
    elif sources.llava_base:
        raise CheckpointError(f"--llava-base {sources.llava_base} needs --llava, the adapter or projector over it")
    if not parts:
        raise CheckpointError("no checkpoint given: --checkpoint SRC, or --tile-encoder, --slide-encoder, --llava")
    parts = _fit(parts)
    for name, part in parts.items():
        check_tensors(part.source, part.config.tensors(), name)
    return Checkpoint(parts, tokenizer, synthetic, asked)


def _expand(sources: Sources) -> Sources:
    """`--checkpoint` as the three flags it stands for; a flag given beside it wins."""
    word = sources.checkpoint
    if word is None:
        return sources
    if word.startswith("synthetic:"):
        found = {"tile_encoder": word, "slide_encoder": word, "llava": word}
    else:
        root = Path(word)
        found = {n: str(root / n) for n in ("tile_encoder", "slide_encoder", "llava") if (root / n).exists()}
        if "llava" in found and not sources.llava and (root / "llava_base").exists():
            found["llava_base"] = str(root / "llava_base")  # of that llava/, not of one given by a flag
        if not found:
            raise CheckpointError(
                f"{word}: expected synthetic:<preset>?seed=N, or a folder with tile_encoder/, slide_encoder/, llava/ "
                "(and llava_base/); "
                "name other layouts with --tile-encoder, --slide-encoder, --llava"
            )
    given = {k: v for k, v in vars(sources).items() if v is not None and k != "checkpoint"}
    return Sources(**{**found, **given})


def _synthetic(word: str, component: str) -> Part:
    """`synthetic:<preset>?seed=N`."""
    preset, _, query = word.removeprefix("synthetic:").partition("?")
    options = dict(parse_qsl(query, keep_blank_values=True))
    seed = options.pop("seed", "0")
    if preset not in PRESETS or options or not re.fullmatch(r"[0-9]{1,18}", seed):
        raise CheckpointError(
            f"{word!r}: expected synthetic:<preset>?seed=N with preset {' or '.join(PRESETS)} and N a whole number"
        )
    config = PRESETS[preset].components()[component]
    return Part(config, SyntheticSource(config, preset, int(seed)))


def _encoder(name: str, path: Path) -> Part:
    if not path.exists():
        raise CheckpointError(f"{path}: no such file or folder, expected the {name.replace('_', ' ')}'s checkpoint")
    return load_timm_directory(path) if name == TILE else load_slide_encoder(path)


def _fit(parts: dict[str, Part]) -> dict[str, Part]:
    """Check that neighbouring components fit each other; the projector decides how wide tokens are padded."""
    parts = dict(parts)
    tile, slide, projector, llm = (parts[n].config if n in parts else None for n in (TILE, SLIDE, PROJECTOR, LLM))
    if isinstance(slide, LongNetConfig):
        padded = projector.widths[0] if isinstance(projector, ProjectorConfig) else slide.padded
        if padded < slide.width or slide.norm_width not in {slide.width, padded}:
            raise CheckpointError(
                f"slide encoder of width {slide.width} with a norm of {slide.norm_width} does not fit a projector that "
                f"takes {padded}"
            )
        parts[SLIDE] = replace(parts[SLIDE], config=replace(slide, padded=padded))
    for a, b, left, right in (
        (TILE, SLIDE, getattr(tile, "width", None), getattr(slide, "in_width", None)),
        (
            PROJECTOR,
            LLM,
            projector.widths[-1] if isinstance(projector, ProjectorConfig) else None,
            getattr(llm, "hidden", None),
        ),
    ):
        if left is not None and right is not None and left != right:
            raise CheckpointError(
                f"{a} gives {left} numbers, {b} takes {right}: these checkpoints do not belong together"
            )
    return parts
