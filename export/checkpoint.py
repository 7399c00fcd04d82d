"""What `--checkpoint`, `--tile-encoder`, `--slide-encoder` and `--llava` name -> components with weights."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from wsi_rt.export.arch import ComponentConfig, LlamaConfig, LongNetConfig, ProjectorConfig
from wsi_rt.export.presets import PRESETS
from wsi_rt.export.synthetic import SyntheticSource
from wsi_rt.export.timm_vit import load_timm_directory
from wsi_rt.export.weights import Overlay, Renamed, SafetensorsSource, WeightSource, check_tensors
from wsi_rt.kernels.dilated_attention import check_branches
from wsi_rt.kernels.errors import KernelInputError
from wsi_rt.runtime.errors import CheckpointError
from wsi_rt.runtime.hashing import sha256_json

TILE, SLIDE, PROJECTOR, LLM = "tile_encoder", "slide_encoder", "projector", "llm"


@dataclass(frozen=True)
class Part:
    """One component: what it is and where its weights come from. `ignored`: tensors of the source left out."""

    config: ComponentConfig
    source: WeightSource
    ignored: int = 0


@dataclass(frozen=True)
class Checkpoint:
    """Components by name; `tokenizer` is a path, or None for the synthetic one."""

    parts: Mapping[str, Part]
    tokenizer: Path | None
    synthetic: bool

    @property
    def digest(self) -> str:
        return sha256_json({name: part.source.digest() for name, part in self.parts.items()})

    @property
    def label(self) -> str:
        return ", ".join(dict.fromkeys(part.source.label for part in self.parts.values()))


@dataclass(frozen=True)
class Sources:
    """The command line's words. `checkpoint` is `synthetic:<preset>?seed=N` or a folder that holds
    `tile_encoder/`, `slide_encoder/` and `llava/`."""

    checkpoint: str | None = None
    tile_encoder: str | None = None
    slide_encoder: str | None = None
    llava: str | None = None
    llava_base: str | None = None
    tokenizer: str | None = None

    def arguments(self) -> str:
        """The flags that name these sources, for the command that rebuilds a bundle."""
        return " ".join(f"--{k.replace('_', '-')} {v}" for k, v in vars(self).items() if v is not None)


def resolve(sources: Sources) -> Checkpoint:
    """Open every source and check every tensor's name and shape; loads no weights.

    Raises CheckpointError naming what is missing, unexpected, misshapen or unsupported.
    """
    sources = _expand(sources)
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
    elif sources.llava:
        base = Path(sources.llava_base) if sources.llava_base else None
        parts |= _llava(Path(sources.llava), base)
        tokenizer = tokenizer or base or Path(sources.llava)
    if not parts:
        raise CheckpointError("no checkpoint given: --checkpoint SRC, or --tile-encoder, --slide-encoder, --llava")
    parts = _fit(parts)
    for name, part in parts.items():
        check_tensors(part.source, part.config.tensors(), name)
    return Checkpoint(parts, tokenizer, synthetic)


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
        if not found:
            raise CheckpointError(
                f"{word}: expected synthetic:<preset>?seed=N, or a folder with tile_encoder/, slide_encoder/, llava/; "
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
    if name == TILE:
        config, source = load_timm_directory(path)
        return Part(config, source)
    return _slide_encoder(path)


def _slide_encoder(path: Path) -> Part:
    """Sizes come from the weights; heads, segments and ratios from a `config.json` beside them, if any."""
    source = SafetensorsSource.open(path)
    shapes = source.shapes()
    data = _json(path / "config.json") if (path / "config.json").is_file() else {}
    try:
        width, in_width = shapes["patch_embed.proj.weight"]
        ffn = shapes["encoder.layers.0.ffn.fc1.weight"][0]
        norm_width = shapes["norm.weight"][0]
    except (KeyError, ValueError, IndexError) as e:
        raise CheckpointError(f"{path}: not a LongNet slide encoder ({e} is missing or misshapen)") from e
    depth = 1 + max(int(m[1]) for m in (re.match(r"encoder\.layers\.(\d+)\.", n) for n in shapes) if m)
    options: dict[str, Any] = {
        k: tuple(v) if isinstance(v, list) else v for k, v in data.items() if k in _SLIDE_OPTIONS
    }
    config = LongNetConfig(in_width, width, depth, ffn=ffn, norm_width=norm_width, **options)
    try:
        check_branches(config.segment_lengths, config.dilated_ratios)
        fits = width % config.heads == 0
    except (KernelInputError, TypeError, ZeroDivisionError):
        fits = False
    if not fits:
        raise CheckpointError(
            f"{path}: width {width} with {config.heads} heads, segments {config.segment_lengths} with ratios "
            f"{config.dilated_ratios}: do not fit; correct config.json"
        )
    return Part(config, source)


_SLIDE_OPTIONS = ("heads", "segment_lengths", "dilated_ratios", "eps", "pool_eps")


def _llava(path: Path, base: Path | None) -> dict[str, Part]:
    """A merged LLaVA directory, or projector weights over a base directory (SPEC 6 a, c)."""
    if not path.exists():
        raise CheckpointError(f"{path}: no such file or folder, expected a LLaVA checkpoint")
    if path.is_dir() and (path / "adapter_config.json").is_file():
        raise CheckpointError(
            f"{path}: a LoRA adapter, which this version does not merge; merge it into its base first"
        )
    source: WeightSource = _llava_weights(path)
    if base is not None:
        source = Overlay(source, _llava_weights(base))
    config = llama_config(_json((base or path) / "config.json"), str(base or path))
    projector, llm = Renamed(source, _projector_name), Renamed(source, _llm_name)
    ignored = len(source.shapes()) - len(projector.shapes()) - len(llm.shapes())
    return {PROJECTOR: Part(projector_config(projector), projector), LLM: Part(config, llm, ignored)}


def _llava_weights(path: Path) -> WeightSource:
    try:
        return SafetensorsSource.open(path)
    except CheckpointError as e:
        if path.is_dir() and any(path.glob("*.bin")):
            raise CheckpointError(f"{path}: holds .bin weights; this version reads .safetensors only") from e
        raise


def _projector_name(name: str) -> str | None:
    """mm_projector tensors, with or without the `model.` that projector-only files leave out."""
    if name.startswith("mm_projector."):
        return f"model.{name}"
    return name if name.startswith("model.mm_projector.") else None


def _llm_name(name: str) -> str | None:
    """Everything but the projector, the unused CLIP tower and tables older releases stored."""
    other = _projector_name(name) or name.startswith(("model.vision_tower.", "model.image_newline"))
    return None if other or name.endswith("rotary_emb.inv_freq") else name


def projector_config(source: WeightSource) -> ProjectorConfig:
    """From the weights' shapes; a config's mm_hidden_size is wrong in some releases (SPEC 4)."""
    shapes = source.shapes()
    layers = sorted({int(m[1]) for n in shapes if (m := re.search(r"\.(\d+)\.(?:weight|bias)$", n))})
    weights = [f"model.mm_projector.{i}.weight" for i in layers] or ["model.mm_projector.weight"]
    missing = [n for n in weights if len(shapes.get(n, ())) != 2]
    if missing:
        raise CheckpointError(f"{source.label}: no {missing[0]} of a linear or mlp projector (missing or misshapen)")
    return ProjectorConfig((shapes[weights[0]][1], *(shapes[n][0] for n in weights)))


def llama_config(data: Mapping[str, Any], label: str) -> LlamaConfig:
    """A Hugging Face `config.json` -> LlamaConfig; raises CheckpointError naming what is not supported."""
    kind = data.get("model_type")
    if kind not in {"llama", "llava", "llava_llama"}:
        raise CheckpointError(f"{label}: language model {kind!r} is not supported, expected llama (or llava over it)")
    rope_name = "rope_parameters" if data.get("rope_parameters") else "rope_scaling"
    rope = data.get(rope_name) or {}
    if not isinstance(rope, dict):
        raise CheckpointError(f"{label}: {rope_name} = {rope!r} in config.json is not an object")
    refused = {
        rope_name: rope.get("rope_type", rope.get("type", "default")) != "default",
        "attention_bias": data.get("attention_bias", False),
        "mlp_bias": data.get("mlp_bias", False),
        "hidden_act": data.get("hidden_act", "silu") != "silu",
        "sliding_window": data.get("sliding_window") is not None,
    }
    if any(refused.values()):
        names = [f"{n} = {data.get(n)!r}" for n, bad in refused.items() if bad]
        raise CheckpointError(f"{label}: {', '.join(names)} in config.json is not supported")
    try:
        heads = int(data["num_attention_heads"])
        kv_heads = int(data.get("num_key_value_heads") or heads)
        head_width = int(data.get("head_dim") or int(data["hidden_size"]) // heads)
        if heads % kv_heads:
            raise ValueError(f"num_key_value_heads: {kv_heads} for {heads} heads")
        if head_width < 1 or head_width % 16:  # onnxruntime's GroupQueryAttention
            raise ValueError(f"head_dim: {head_width}, expected a multiple of 16")
        return LlamaConfig(
            hidden=int(data["hidden_size"]),
            layers=int(data["num_hidden_layers"]),
            heads=heads,
            kv_heads=kv_heads,
            head_width=head_width,
            ffn=int(data["intermediate_size"]),
            vocab=int(data["vocab_size"]),
            context=int(data["max_position_embeddings"]),
            rms_eps=float(data["rms_norm_eps"]),
            rope_theta=float(rope.get("rope_theta", data.get("rope_theta", 10000.0))),
            tied_embeddings=bool(data.get("tie_word_embeddings", False)),
        )
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as e:
        raise CheckpointError(f"{label}: config.json lacks or garbles {e}") from e


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
        config = LongNetConfig(**{**vars(slide), "padded": padded})
        parts[SLIDE] = Part(config, parts[SLIDE].source)
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


def _json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text())
    except OSError as e:
        raise CheckpointError(f"{path}: not readable ({e.strerror}), expected the checkpoint's configuration") from e
    except ValueError as e:
        raise CheckpointError(f"{path}: not JSON ({e})") from e
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: a JSON {type(data).__name__}, expected an object")
    return data
