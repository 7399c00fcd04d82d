"""`adapter_config.json` of a LoRA adapter (peft's LoraConfig): what decides the merge, and what is refused."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wsi_rt.export.sources.fields import Fields
from wsi_rt.export.sources.files import read_json_object
from wsi_rt.runtime.errors import CheckpointError

FILE_NAME = "adapter_config.json"

# Settings without a say in the merged weights. fan_in_fan_out is among them because peft switches it off for
# nn.Linear, and every projection of a Llama is one; what it was trained as shows in the tensors' shapes.
_INERT = {
    "auto_mapping",
    "base_model_name_or_path",
    "eva_config",
    "fan_in_fan_out",
    "inference_mode",
    "loftq_config",
    "lora_dropout",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "task_type",
    "unsloth_fixed",
}
_READ = {
    "alpha_pattern",
    "bias",
    "exclude_modules",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "lora_alpha",
    "modules_to_save",
    "peft_type",
    "r",
    "rank_pattern",
    "target_modules",
    "use_rslora",
}
# Initialisations that leave the base as it was; the others (PiSSA, OLoRA, CorDA, LoftQ, ...) rewrite it.
_PLAIN_INIT = (True, False, "gaussian", "eva", "orthogonal")
_ALL_LINEAR = "all-linear"


@dataclass(frozen=True)
class Targets:
    """Which of the base's modules the adapter changes, by peft's rules.

    `names`: names or their ends; a regular expression of whole names; "all-linear"; None when nothing is said.
    `layers`: the chosen decoder layers, or None for all.
    """

    names: tuple[str, ...] | str | None
    layers: tuple[int, ...] | None = None
    layers_pattern: tuple[str, ...] = ()
    excluded: tuple[str, ...] | str = ()

    def take(self, module: str) -> bool:
        """Whether a Linear of a decoder layer, `model.layers.0.mlp.up_proj`, is one of them."""
        if self.names is None or _named(module, self.excluded):
            return False
        if isinstance(self.names, str):  # over which peft takes no choice of layers
            return self.names.lower() == _ALL_LINEAR or _named(module, self.names)
        return module in self.names or (_named(module, self.names) and self._chosen(module))

    def _chosen(self, module: str) -> bool:
        patterns = [rf"(?:^|.*?\.){p}" for p in self.layers_pattern] or [r".*?\.[^.]*"]
        index = next((int(m["i"]) for p in patterns if (m := re.match(rf"{p}\.(?P<i>\d+)\.", module))), None)
        return self.layers is None or index in self.layers


@dataclass(frozen=True)
class AdapterConfig:
    """`saved`: modules whose whole weights the adapter holds."""

    label: str
    rank: int
    alpha: float
    rslora: bool
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    targets: Targets
    saved: tuple[str, ...]
    base: str | None

    def rank_of(self, module: str) -> int:
        return _matching(self.rank_pattern, module, self.rank)

    def scale_of(self, module: str) -> float:
        """What B @ A is multiplied by: alpha / r, or alpha / sqrt(r) (rank-stabilised)."""
        rank, alpha = self.rank_of(module), _matching(self.alpha_pattern, module, self.alpha)
        return alpha / math.sqrt(rank) if self.rslora else alpha / rank

    def arithmetic(self) -> tuple[object, ...]:
        """What decides the merged numbers, for a digest."""
        patterns = (tuple(self.rank_pattern.items()), tuple(self.alpha_pattern.items()))
        return (self.rank, self.alpha, self.rslora, *patterns)

    def local_base(self, folder: Path) -> Path | None:
        """The base that the adapter names, when it is a folder here: beside the adapter, or where we stand."""
        places = (folder / self.base, Path(self.base)) if self.base else ()
        try:
            return next((p.resolve() for p in places if p.is_dir()), None)
        except OSError:  # a name too long for any folder
            return None


def read_adapter_config(folder: Path) -> AdapterConfig:
    """Raises CheckpointError naming every setting whose arithmetic is not this merge's."""
    path = folder / FILE_NAME
    data = read_json_object(path)
    f = Fields({k: v for k, v in data.items() if v is not None}, str(path))
    _refuse_other_arithmetic(f, data)
    rank_pattern = _pattern(f, data, "rank_pattern")
    if any(not isinstance(r, int) for r in rank_pattern.values()):
        f.refuse("rank_pattern", rank_pattern, "whole numbers")
    base = data.get("base_model_name_or_path")
    return AdapterConfig(
        label=str(path),
        rank=f.whole("r"),
        alpha=f.positive("lora_alpha"),
        rslora=f.flag("use_rslora", default=False),
        rank_pattern=rank_pattern,
        alpha_pattern=_pattern(f, data, "alpha_pattern"),
        targets=_targets(f, data),
        saved=tuple(_strings(f, data, "modules_to_save")),
        base=base if isinstance(base, str) and base else None,
    )


def _refuse_other_arithmetic(f: Fields, data: Mapping[str, Any]) -> None:
    kind, init = data.get("peft_type", "LORA"), data.get("init_lora_weights", True)
    if kind != "LORA":
        raise CheckpointError(f"{f.label}: peft_type = {kind!r}, expected LORA; merge it with peft first")
    if init not in _PLAIN_INIT:
        raise CheckpointError(
            f"{f.label}: init_lora_weights = {init!r}, which trains over a rewritten base, expected one of "
            f"{', '.join(map(str, _PLAIN_INIT))}; merge it with peft first"
        )
    if data.get("bias", "none") not in ("none", "all", "lora_only"):
        f.refuse("bias", data["bias"], "none, all or lora_only")
    other = sorted(k for k, v in data.items() if v and k not in _INERT | _READ)
    if other:
        told = ", ".join(f"{k} = {data[k]!r}"[:120] for k in other)
        raise CheckpointError(f"{f.label}: {told} is not supported, expected plain LoRA; merge it with peft first")


def _pattern(f: Fields, data: Mapping[str, Any], key: str) -> dict[str, Any]:
    """Regular expression of a module's name -> a number above 0."""
    given = data.get(key) or {}
    if not isinstance(given, dict):
        f.refuse(key, given, "an object")
    for pattern, value in given.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e9:
            f.refuse(key, given, "numbers above 0")
        _require_pattern(f, key, pattern)
    return dict(given)


def _require_pattern(f: Fields, key: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as e:
        raise CheckpointError(f"{f.label}: {key} has {pattern!r} ({e}), expected a regular expression") from e


def _matching(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """peft's rule: the first pattern that matches the whole name, or what follows one of its dots."""
    return next((v for p, v in patterns.items() if re.match(rf"(.*\.)?({p})$", module)), default)


def _strings(f: Fields, data: Mapping[str, Any], key: str) -> list[str]:
    given = data.get(key) or []
    if not isinstance(given, list) or not all(isinstance(x, str) for x in given):
        f.refuse(key, given, "a list of module names")
    return given


def _targets(f: Fields, data: Mapping[str, Any]) -> Targets:
    """What peft was told to change, every kind of telling."""
    layers = data.get("layers_to_transform")
    layers = [layers] if isinstance(layers, int) else layers or None
    if layers is not None and not (isinstance(layers, list) and all(isinstance(i, int) for i in layers)):
        f.refuse("layers_to_transform", layers, "a whole number or a list of them")
    patterns = data.get("layers_pattern") or ()
    patterns = (patterns,) if isinstance(patterns, str) else tuple(_strings(f, data, "layers_pattern"))
    for pattern in patterns:
        _require_pattern(f, "layers_pattern", pattern)
    return Targets(
        names=_names(f, data, "target_modules") or None,
        layers=None if layers is None else tuple(layers),
        layers_pattern=patterns,
        excluded=_names(f, data, "exclude_modules"),
    )


def _names(f: Fields, data: Mapping[str, Any], key: str) -> tuple[str, ...] | str:
    """A list of names, or one string: a regular expression (or "all-linear")."""
    given = data.get(key)
    if not isinstance(given, str):
        return tuple(_strings(f, data, key))
    _require_pattern(f, key, given)
    return given


def _named(module: str, names: tuple[str, ...] | str) -> bool:
    """peft's rule: a string matches the whole name; one of a list is the name, or follows one of its dots."""
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return any(module == n or module.endswith(f".{n}") for n in names)
