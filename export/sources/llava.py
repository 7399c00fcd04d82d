"""LLaVA directories -> projector and language model (SPEC 4, 5, 6)."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from wsi_rt.export.arch import ProjectorConfig
from wsi_rt.export.sources.adapter import FILE_NAME as ADAPTER_CONFIG
from wsi_rt.export.sources.adapter import read_adapter_config
from wsi_rt.export.sources.files import FileSource, open_weights, refuse_pointer
from wsi_rt.export.sources.llama_json import llama_config, read_settings
from wsi_rt.export.sources.lora import LoraSource
from wsi_rt.export.sources.weights import Overlay, Part, Renamed, WeightSource, few
from wsi_rt.runtime.errors import CheckpointError


@dataclass(frozen=True)
class Llava:
    """Projector and language model, the folder whose tokenizer is theirs, and the base below them, if any: as given,
    or the folder that the adapter itself names."""

    parts: Mapping[str, Part]
    tokenizer: Path
    base: Path | None


def load_llava(path: Path, base: Path | None) -> Llava:
    """A merged LLaVA directory, a LoRA adapter over a base, or projector weights over a base (SPEC 6 a, b, c).

    Raises CheckpointError also for a base below a whole checkpoint: it would stand in for what the checkpoint lacks.
    """
    if not path.exists():
        raise CheckpointError(f"{path}: no such file or folder, expected a LLaVA checkpoint")
    source: WeightSource
    if path.is_dir() and (path / ADAPTER_CONFIG).is_file():
        source, base = _adapted(path, base)
    else:
        source = open_weights(path)
        source = _projector_over(path, source, base) if base is not None else source
    data, label = read_settings(path, base)
    config = llama_config(data, label)
    projector, llm = Renamed(source, _projector_name), Renamed(source, _llm_name)
    identity = data.get("mm_projector_type") == "identity" and not projector.shapes()
    widths = ProjectorConfig((config.hidden,)) if identity else projector_config(projector)
    ignored = len(source.shapes()) - len(projector.shapes()) - len(llm.shapes())
    parts = {"projector": Part(widths, projector), "llm": Part(config, llm, ignored)}
    return Llava(parts, _tokenizer(path, base), base)


def _projector_over(path: Path, source: WeightSource, base: Path) -> WeightSource:
    """Projector weights and nothing else, over a base of which the language model is taken."""
    whole = [name for name in source.shapes() if _llm_name(name)]
    if whole:
        raise CheckpointError(
            f"{path}: holds {len(whole)} tensors of a language model itself ({few(whole)}), expected projector "
            f"weights alone over the base {base}; give it without a base: --llava {path}"
        )
    if not any(map(_projector_name, source.shapes())):
        raise CheckpointError(
            f"{path}: no mm_projector tensors, expected projector weights over the base {base}; give the "
            "folder or file that holds them as --llava"
        )
    return _over(Renamed(source, _full_name), _base_weights(base))


def _adapted(path: Path, base: Path | None) -> tuple[WeightSource, Path]:
    """The adapter's folder merged into its base, and that base."""
    config = read_adapter_config(path)
    base = base or config.local_base(path)
    if base is None:
        raise CheckpointError(
            f"{path}: a LoRA adapter over {config.base!r}, which is no folder here; name the base's folder with "
            "--llava-base"
        )
    below = beneath = _base_weights(base)
    extra = _one_of(path, "non_lora_trainables")
    if extra is not None:  # what was trained whole: the projector
        trained = FileSource([extra], str(extra))
        own_name = _non_lora_names(trained)
        beneath = _over(Renamed(trained, lambda name: _full_name(own_name(name))), below)
    weights = _one_of(path, "adapter_model")
    if weights is None:
        raise CheckpointError(f"{path}: no adapter_model.safetensors or adapter_model.bin beside {ADAPTER_CONFIG}")
    adapter = FileSource([weights], str(weights))
    merged = LoraSource(adapter, beneath, config)
    own = extra is not None and any(map(_projector_name, Renamed(trained, own_name).shapes()))
    if not own and "mm_projector" not in config.saved and any(map(_projector_name, below.shapes())):
        merged.label += " (projector of the base)"
    return merged, base


def _over(source: WeightSource, base: WeightSource) -> WeightSource:
    """`source` over `base`; never half of one's projector and half of the other's."""
    if any(map(_projector_name, source.shapes())):
        base = Renamed(base, lambda name: None if _projector_name(name) else name)
    return Overlay(source, base)


def _base_weights(base: Path) -> WeightSource:
    if (base / ADAPTER_CONFIG).is_file():
        raise CheckpointError(f"{base}: is a LoRA adapter itself, expected a whole language model as --llava-base")
    return Renamed(open_weights(base), _full_name)


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


def _full_name(name: str) -> str:
    return _projector_name(name) or name


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
