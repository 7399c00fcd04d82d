"""LLaVA directories -> projector and language model (SPEC 4, 5, 6)."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wsi_rt.export.arch import LlamaConfig, ProjectorConfig
from wsi_rt.export.sources.adapter import FILE_NAME as ADAPTER_CONFIG
from wsi_rt.export.sources.adapter import read_adapter_config
from wsi_rt.export.sources.fields import Fields
from wsi_rt.export.sources.files import FileSource, open_weights, read_json_object, refuse_pointer
from wsi_rt.export.sources.lora import LoraSource
from wsi_rt.export.sources.weights import Overlay, Part, Renamed, WeightSource
from wsi_rt.runtime.errors import CheckpointError


@dataclass(frozen=True)
class Llava:
    """Projector and language model, and the folder whose tokenizer is theirs."""

    parts: Mapping[str, Part]
    tokenizer: Path


def load_llava(path: Path, base: Path | None) -> Llava:
    """A merged LLaVA directory, a LoRA adapter over a base, or projector weights over a base (SPEC 6 a, b, c)."""
    if not path.exists():
        raise CheckpointError(f"{path}: no such file or folder, expected a LLaVA checkpoint")
    if path.is_dir() and (path / ADAPTER_CONFIG).is_file():
        source, base = _adapted(path, base)
        # The adapter's own config.json tells what was trained (LLaVA saves it); peft alone saves none.
        config_folder = path if (path / "config.json").is_file() else base
    else:
        source = open_weights(path)
        source = Overlay(source, _base_weights(base)) if base is not None else source
        config_folder = base or path
    data = read_json_object(config_folder / "config.json")
    config = llama_config(data, str(config_folder))
    projector, llm = Renamed(source, _projector_name), Renamed(source, _llm_name)
    identity = data.get("mm_projector_type") == "identity" and not projector.shapes()
    widths = ProjectorConfig((config.hidden,)) if identity else projector_config(projector)
    ignored = len(source.shapes()) - len(projector.shapes()) - len(llm.shapes())
    parts = {"projector": Part(widths, projector), "llm": Part(config, llm, ignored)}
    return Llava(parts, _tokenizer(path, base))


def _adapted(path: Path, base: Path | None) -> tuple[WeightSource, Path]:
    """The adapter's folder merged into its base, and that base."""
    config = read_adapter_config(path)
    base = base or config.local_base(path)
    if base is None:
        raise CheckpointError(
            f"{path}: a LoRA adapter over {config.base!r}, which is no folder here; name the base's folder with "
            "--llava-base"
        )
    beneath = _base_weights(base)
    extra = _one_of(path, "non_lora_trainables")
    if extra is not None:  # what was trained whole: the projector
        trained = FileSource([extra], str(extra))
        beneath = Overlay(Renamed(trained, _non_lora_names(trained)), beneath)
    adapter = _one_of(path, "adapter_model")
    if adapter is None:
        raise CheckpointError(f"{path}: no adapter_model.safetensors or adapter_model.bin beside {ADAPTER_CONFIG}")
    return LoraSource(FileSource([adapter], str(adapter)), beneath, config), base


def _base_weights(base: Path) -> WeightSource:
    if (base / ADAPTER_CONFIG).is_file():
        raise CheckpointError(f"{base}: is a LoRA adapter itself, expected a whole language model as --llava-base")
    return open_weights(base)


def _one_of(folder: Path, stem: str) -> Path | None:
    """safetensors before .bin, as peft and transformers choose."""
    return next((p for s in (".safetensors", ".bin") if (p := folder / f"{stem}{s}").is_file()), None)


def _non_lora_names(source: WeightSource) -> Callable[[str], str]:
    """LLaVA's own rule: strip `base_model.`, then, where any name has it doubled, one `model.`."""
    bare = [n.removeprefix("base_model.") for n in source.shapes()]
    prefix = "model." if any(n.startswith("model.model.") for n in bare) else ""
    return lambda name: name.removeprefix("base_model.").removeprefix(prefix)


def _tokenizer(path: Path, base: Path | None) -> Path:
    """The first of the two that has one; where none has, the one that should."""
    folders = [folder for folder in (path, base) if folder is not None and folder.is_dir()]
    files = [folder / name for folder in folders for name in ("tokenizer.model", "tokenizer.json")]
    found = next((file for file in files if file.is_file()), None)
    if found is None:
        return base or path
    refuse_pointer(found)
    return found.parent


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
    f = Fields({k: v for k, v in data.items() if v is not None}, f"{label}: config.json")  # null: transformers' default
    rope = _plain_rope(f, data)
    heads, hidden = f.whole("num_attention_heads"), f.whole("hidden_size")
    kv_heads = f.whole("num_key_value_heads", default=heads)
    if hidden % heads:  # whatever head_dim says
        f.refuse("num_attention_heads", heads, f"a divisor of hidden_size {hidden}, as transformers demands")
    if heads % kv_heads:
        f.refuse("num_key_value_heads", kv_heads, f"a divisor of the {heads} heads")
    head_width = f.whole("head_dim", default=hidden // heads)
    if head_width % 16:  # onnxruntime's GroupQueryAttention
        f.refuse("head_dim", head_width, "a multiple of 16")
    return LlamaConfig(
        hidden=hidden,
        layers=f.whole("num_hidden_layers"),
        heads=heads,
        kv_heads=kv_heads,
        head_width=head_width,
        ffn=f.whole("intermediate_size"),
        vocab=f.whole("vocab_size"),
        context=f.whole("max_position_embeddings"),
        rms_eps=f.positive("rms_norm_eps"),
        rope_theta=rope.positive("rope_theta", default=f.positive("rope_theta", default=10000.0)),
        tied_embeddings=f.flag("tie_word_embeddings", default=False),
    )


def _plain_rope(f: Fields, data: Mapping[str, Any]) -> Fields:
    """Refuse what is no plain Llama; the settings of its rotary positions."""
    kind = data.get("model_type")
    if kind not in ("llama", "llava", "llava_llama"):
        raise CheckpointError(f"{f.label}: language model {kind!r} is not supported, expected llama (or llava over it)")
    rope_name = "rope_parameters" if data.get("rope_parameters") else "rope_scaling"
    rope = data.get(rope_name) or {}
    if not isinstance(rope, dict):
        raise CheckpointError(f"{f.label}: {rope_name} = {rope!r} is not an object")
    refused = {
        rope_name: rope.get("rope_type", rope.get("type", "default")) != "default",
        "attention_bias": data.get("attention_bias", False),
        "mlp_bias": data.get("mlp_bias", False),
        "hidden_act": data.get("hidden_act", "silu") != "silu",
        "sliding_window": data.get("sliding_window") is not None,
    }
    if any(refused.values()):
        names = [f"{n} = {data.get(n)!r}" for n, bad in refused.items() if bad]
        raise CheckpointError(f"{f.label}: {', '.join(names)} is not supported, expected a plain Llama")
    return Fields({k: v for k, v in rope.items() if v is not None}, f"{f.label}: {rope_name}")
